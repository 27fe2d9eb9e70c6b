"""The reference page of the public API, `book/api.md`, written from the docstrings.

The page says what stands where: below the heading of each name, all is written anew by
`python -m tests.api_reference`.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import griffe

import cmp
from cmp.files import write_atomic
from cmp.project import project_folder

PAGE = project_folder() / "book" / "api.md"
HEADING = re.compile(r"^### `cmp\.(\w+)`\n", re.M)
WIDTH = 88
NEEDS_DATA = re.compile(r'= cmp\.run\(|load_data\("embedded"\)')
"""What an example calls that needs the embedded benchmark."""
LISTS = {"parameters": "Arguments", "attributes": "Attributes", "returns": "Returns",
         "raises": "Raises", "yields": "Yields"}  # fmt: skip


def reference_page() -> str:
    """Return the page as MyST Markdown, with what stands below each name written anew."""
    package = griffe.load("cmp", search_paths=[str(project_folder())])
    below = re.compile(rf"{HEADING.pattern}.*?(?=^#{{2,3}} |\Z)", re.M | re.S)
    text = PAGE.read_text(encoding="utf-8")
    text = below.sub(lambda found: "\n".join([*_entry(package, found[1]), ""]), text)
    return text.rstrip() + "\n"


def _entry(package: griffe.Module, name: str) -> Iterator[str]:
    """Yield the lines of one name: its signature, what the docstring says, its public methods."""
    value = getattr(cmp, name)
    entry: Any = package[value.__module__.removeprefix("cmp.")][value.__name__]
    yield f"### `cmp.{name}`\n"
    if not (isinstance(value, type) and issubclass(value, Exception)):
        # a dataclass and a named tuple have these, and an `__init__` that is not written
        yield f"```python\n{_signature(entry, hasattr(value, '__match_args__'))}\n```\n"
    yield from _description(entry)
    for member in entry.members.values() if entry.is_class else ():
        is_public = member.is_function or "property" in member.labels
        if is_public and not member.name.startswith("_") and member.docstring:
            yield f"#### `{name}.{member.name}`\n\n```python\n{_signature(member)}\n```\n"
            yield from _description(member)


def _signature(entry: Any, has_fields: bool = False) -> str:
    """Return a call with types and defaults, on several lines where one would be too long."""
    if "property" in entry.labels:
        return f"{entry.name}: {entry.annotation}"
    result = f" -> {entry.returns}" if entry.is_function and entry.returns else ""
    parameters = _fields(entry) if has_fields else _parameters(entry)
    parameters = [text.replace("'", '"') for text in parameters]  # as the package writes literals
    line = f"{entry.name}({', '.join(parameters)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{entry.name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){result}"


def _fields(entry: Any) -> Iterator[str]:
    """Yield the fields of a class that has them; a default that a function makes is left open."""
    for field in entry.attributes.values():
        if "property" not in field.labels:
            made = field.value and str(field.value).startswith("_section(")
            default = f" = {'...' if made else field.value}" if field.value else ""
            yield f"{field.name}: {field.annotation}{default}"


def _parameters(entry: Any) -> Iterator[str]:
    """Yield the parameters of a function, or of a class's `__init__`."""
    for kind, parameters in itertools.groupby(entry.parameters, lambda each: each.kind.value):
        if kind == "keyword-only":
            yield "*"
        for parameter in parameters:
            stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
            annotation = f": {parameter.annotation}" if parameter.annotation else ""
            default = f" = {parameter.default}" if parameter.default and not stars else ""
            if parameter.name != "self":
                yield f"{stars}{parameter.name}{annotation}{default}"


def _description(entry: Any) -> Iterator[str]:
    """Yield a docstring's sections: text, lists of arguments and the like, the example."""
    for section in entry.docstring.parse("google", warnings=False):
        kind = section.kind.value
        if kind == "text":
            yield f"{section.value}\n"
        elif kind == "admonition":
            if NEEDS_DATA.search(section.value.contents):
                yield "This example needs `cmpt data build`.\n"
            yield f"```pycon\n{section.value.contents}\n```\n"
        elif kind in LISTS:
            yield LISTS[kind]
            yield from (f": {_item(item)}" for item in section.value)
            yield ""


def _item(item: Any) -> str:
    """Return what is said of one item, such as "`steps`: Steps per task."."""
    name = item.annotation if isinstance(item, griffe.DocstringRaise) else getattr(item, "name", "")
    text = " ".join(item.description.split())
    return f"`{name}`: {text}" if name else text


if __name__ == "__main__":
    write_atomic(PAGE, reference_page())
