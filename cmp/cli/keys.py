"""Explain the keys of a run's config, from the docstrings of `cmp.config`."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from cmp import config, values
from cmp.cli import shared
from cmp.registry import KINDS, option_names

OPTIONS = {kind.key: name for name, kind in KINDS.items()}
"""Config key -> the kind of option that it names."""
TYPES = {"integer": "whole number", "boolean": "true or false", "string": "text"}
"""Plain names for types of a JSON schema."""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
          "exclusiveMaximum": "below"}  # fmt: skip


def describe_sections() -> dict[str, str]:
    """Return the description of each section of a config, with its keys, and of each key, by
    name."""
    explained, known = shared.describe_names(inspect.getdoc(config.RunConfig), "Attributes"), {}
    for name, field in config.RunConfig.__dataclass_fields__.items():
        if not dataclasses.is_dataclass(field.type):  # a key outside all sections
            known[name] = describe_key(name, field.type, explained[name])
            continue
        about = inspect.getdoc(field.type)
        texts = shared.describe_names(about, "Attributes")
        keys = {
            f"{name}.{key}": describe_key(f"{name}.{key}", each.type, texts[key])
            for key, each in field.type.__dataclass_fields__.items()
        }
        text = f"{name}: {about.partition('Attributes:')[0]}".strip()
        lines = [line for part in text.split("\n\n") for line in _wrap(part)]
        known |= {name: "\n".join([*lines, *keys.values()]), **keys}
    return known


def describe_key(key: str, annotation: Any, text: str) -> str:
    """Return the description of a key: its type, unit and default, and below it the meaning.

    Args:
        key: The dotted key.
        annotation: The type in its dataclass.
        text: The key's docstring, which may end in a unit, as in "Steps per task. [steps]".
    """
    meaning, unit = re.fullmatch(r"(.*?)(?: \[(.+)\])?", text).groups()
    if key in OPTIONS:
        words = f"one of {', '.join(option_names(OPTIONS[key]))}"
    else:
        words = describe_type(TypeAdapter(annotation).json_schema())
    words += f", in {unit}" if unit else ""
    default = config.defaults()[key]
    default = f"{default:.6g}" if isinstance(default, float) else json.dumps(default).strip('"')
    lines = [line for part in (words, meaning) for line in _wrap(part, 76)]
    return "\n".join([f"{key} = {default}", *(f"    {line}" for line in lines)])


def describe_type(schema: Mapping[str, Any]) -> str:
    """Return a text on the values that a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(map(describe_type, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        parts = schema.get("prefixItems") or [schema["items"]]
        count = len(schema.get("prefixItems", ()))
        return f"list of {count or 'any number'}, each a {describe_type(parts[0])}"
    texts = {key: f"{x:,}" if isinstance(x, int) else f"{x:,.10g}" for key, x in schema.items()
             if key in BOUNDS and x not in (values.MAX_COUNT, 2**31)}  # fmt: skip
    bounds = " and ".join(f"{BOUNDS[key]} {texts[key]}" for key in BOUNDS if key in texts)
    bounds = bounds.replace("at least 0 and at most 1", "from 0 to 1")
    return f"{TYPES.get(schema['type'], schema['type'])} {bounds}".strip()


def _wrap(text: str, width: int = 80) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
