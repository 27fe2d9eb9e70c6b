"""What one writes in a shell: key=value."""

import json
from collections.abc import Iterable
from typing import Any

from cmp.config.profiles import laid_over, recipe
from cmp.errors import CmpError
from cmp.files import parse_yaml


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of a tree with "key=value" assignments applied; values are read as YAML. A recipe goes
    over the tree, and the other assignments over the recipe."""
    result = json.loads(json.dumps(tree))
    for assignment in sorted(assignments, key=lambda each: not each.startswith("recipe=")):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise CmpError(f"{assignment!r}: expected key=value, such as schedule.peak=0.0004")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise CmpError(f"{key}: {text!r} cannot be read: {error}") from error
        if key == "recipe":
            result = laid_over(result, recipe(value))
            continue
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CmpError(f"{key}: {parent!r} holds a value, not further keys")
        node[leaf] = value
    return result
