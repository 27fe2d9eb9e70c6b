"""Strict reading of YAML, JSON, records and tables."""

import functools
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import yaml

from cmp.errors import CmpError, clean_text, did_you_mean, explain_limit

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow
    import pyarrow.parquet

T = TypeVar("T")

MAX_TEXT_BYTES, MAX_RECORD_BYTES, MAX_YAML_BYTES = 2**30, 2**24, 2**20
"""Size limits for text in general, such as a list of images, for records in JSON, and for YAML,
which is written by hand."""
SMALL_COLUMN, MAX_GROWTH, MAX_GROUP_BYTES = 2**26, 100, 2**31
"""A column of a Parquet file may have so many bytes in memory, or so many times those of the file,
whichever is more; and a row group never more than the last."""
INDEX_BYTES = 8
"""Bytes in memory of a number, or of the place of a text."""


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that rejects aliases, tags and repeated keys. As in YAML 1.2, whatever
    JSON could not read is text: 1e-3 is a number, but yes, 010, 1:30 and 2026-01-15 are texts."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        # an alias could expand to endless or huge values, and a tag change how a text is read
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                "aliases and tags are not allowed; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise yaml.MarkedYAMLError(f"{repeated[0]!r} is given twice", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):  # such as 5 and +5
            raise yaml.MarkedYAMLError("two keys are the same number", node.start_mark)
        return mapping

    def construct_scalar(self, node: Any) -> Any:
        # JSON writes a character beyond 16 bits as two escapes, and PyYAML reads each by itself
        return super().construct_scalar(node).encode(*_UTF_16).decode(*_UTF_16)


_UTF_16 = "utf-16-le", "surrogatepass"
_WHOLE = r"(0|[1-9][0-9]*)"
for _tag, _form, _begin in (
    ("null", r"(~|null|Null|NULL|)", "~nN"),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", rf"[-+]?{_WHOLE}", "-+0123456789"),
    ("float", rf"[-+]?({_WHOLE}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), ["", *_begin]
    )


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: The text is not valid, or its value cannot be represented in JSON.
    """
    try:
        value = yaml.load(text, _StrictLoader)  # noqa: S506 - it is a safe loader
        json.dumps(value)  # rejects integers too long to print
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return value


def parse_record(text: str, kind: type[T]) -> T:
    """Return a JSON text as an instance of a pydantic dataclass.

    Raises:
        ValueError: The text does not fit the class; the message names the key.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        key, fault = first_fault(error)
        raise ValueError(f"{key or '(whole file)'}: {fault['msg']}") from error


def refuse_later(tree: Any, key: str, known: int, path: Path) -> None:
    """Raise `CmpError` if a later version of this package wrote a record, which may then have keys
    that are unknown here.

    Args:
        tree: The record, with the machine that wrote it as "provenance" or "machine".
        key: Its key with the version of its format.
        known: The latest such version that this package reads.
        path: Its file.
    """
    number = tree.get(key) if isinstance(tree, dict) else None
    if type(number) is not int or number <= known:
        return
    machine = tree.get("provenance", tree.get("machine"))
    version = machine.get("cmp") if isinstance(machine, dict) else None
    wanted = f"cmp {clean_text(version):.40}" if isinstance(version, str) else "the latest cmp"
    raise CmpError(
        f"{path}: {key}: {number}: a newer version of cmp wrote this file; yours reads {key} "
        f"{known} at most; install {wanted}"
    )


def first_fault(error: Any) -> tuple[str, dict[str, Any]]:
    """Return the dotted key ("" for the whole record) and the entry of a fault that pydantic found.
    A misspelt key comes first, since it can also cause a "missing" fault."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass
    fault = min(error.errors(), key=lambda fault: fault["type"] not in unknown)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in unknown:
        message = "unknown key"
    elif fault["type"] in ("dict_type", "model_type", "model_attributes_type", "dataclass_type"):
        message = "must have keys below it"
    fault = {**fault, "msg": message}
    return ".".join(map(str, fault["loc"])), fault


def explain_fault(source: str, key: str, fault: Mapping[str, Any], hint: str = "") -> CmpError:
    """Return pydantic's finding at a key as a sentence.

    Args:
        source: What was rejected.
        key: The dotted key, or "" for the whole config.
        fault: See `first_fault`.
        hint: A suggestion for an unknown key.
    """
    message = fault["msg"]
    if message == "unknown key":
        message += hint
    elif fault["type"] == "missing":
        message = "is missing"
    elif fault["type"] == "union_tag_not_found":
        message = f"{fault['ctx']['discriminator']} is missing"
    elif fault["type"] == "union_tag_invalid":
        message = "{discriminator} is {tag!r}; it can be {expected_tags}".format(**fault["ctx"])
    elif fault["type"] != "value_error":  # which names the keys and their values already
        message += f" (found {fault['input']!r:.80})"
    if fault["type"] == "dataclass_exact_type":
        message += f"; give cmp.{fault['ctx']['class_name']}(...)"
    return CmpError(": ".join(filter(None, (source, key, message))))


def raise_cmp_errors(kind: type[T]) -> type[T]:
    """Make a pydantic dataclass that is created in Python raise `CmpError` for bad values, as
    `cmp.config.parse` does."""
    from pydantic import ValidationError

    record: Any = kind
    init, names = record.__init__, [*record.__dataclass_fields__]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            key, fault = first_fault(error)
            if key.isdigit() and int(key) < len(names):  # a positional argument
                key = names[int(key)]
            raise explain_fault(kind.__name__, key, fault, did_you_mean(key, names)) from error

    record.__init__ = checked
    return kind


def check_record(tree: Any, kind: type[T], source: str, remedy: str = "") -> T:
    """Return a tree of keys as a pydantic dataclass, or as a tuple or dict of them.

    Args:
        tree: The tree.
        kind: The class that it must fit.
        source: The beginning of error messages, before the key.
        remedy: The end of error messages.

    Raises:
        CmpError: The tree does not fit.
    """
    try:
        return parse_record(json.dumps(tree), kind)
    except (TypeError, ValueError) as error:
        raise CmpError(f"{source}{error}{remedy}") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: A regular file, since a pipe or a device may never end.
        limit: The largest size allowed, in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a regular file, is too large, or is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise ValueError(f"not a regular file of at most {limit:,} bytes")
    return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the tree of keys in a YAML file.

    Raises:
        CmpError: The file cannot be read, or has no keys at the top level.
    """
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except FileNotFoundError as error:
        raise CmpError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read ({error})") from error
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise CmpError(f"{path}: {_explain_yaml(error)}") from error
    if not isinstance(tree, dict):
        raise CmpError(f"{path}: expected YAML with keys at the top level")
    return tree


def _explain_yaml(error: ValueError) -> str:
    """Return a line that says what in a YAML text is invalid, and where."""
    words, cause = " ".join(str(error).split()), error.__cause__
    if isinstance(cause, yaml.MarkedYAMLError):
        mark = cause.problem_mark or cause.context_mark
        words = cause.problem or cause.context
        words = f"line {mark.line + 1}: {words}" if mark else words
    return f"cannot be read as YAML ({words})"


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: The text is not JSON or is nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_json(path: Path, limit: int = MAX_RECORD_BYTES) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file, see `read_text`.
        limit: The largest size allowed, in bytes; a value takes several times as many in memory.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is too large, or not JSON, see `parse_json`.
    """
    return parse_json(read_text(path, limit))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; Python itself would silently keep the last value of a
    repeated key."""
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"{max(counts, key=counts.__getitem__)!r} is given twice")
    return dict(pairs)


def read_groups(
    path: Path, column: str, groups: Collection[int] | None = None
) -> "Iterator[pyarrow.ChunkedArray]":
    """Yield a column of a Parquet file by row group, in which a text or an image is in memory once,
    however many rows have it.

    Args:
        path: The file.
        column: The column.
        groups: The row groups; all by default.

    Raises:
        ValueError: The column is too large in memory: a row group, which is then not read, by the
            sizes that the file gives; or all values together.
    """
    import pyarrow.parquet as pq

    about, total = pq.read_metadata(path), 0
    leaves = [about.schema.column(place) for place in range(about.num_columns)]
    own = [n for n, leaf in enumerate(leaves) if f"{leaf.path}.".startswith(f"{column}.")]
    limit = max(SMALL_COLUMN, MAX_GROWTH * path.stat().st_size)
    with pq.ParquetFile(path, read_dictionary=[leaves[n].path for n in own]) as file:
        for group in range(about.num_row_groups) if groups is None else groups:
            declared = 0
            for n in own:  # a struct has one for each field
                part, width = about.row_group(group).column(n), max(leaves[n].length, INDEX_BYTES)
                declared += part.total_uncompressed_size + width * part.num_values
            _check_size(column, declared, min(limit, MAX_GROUP_BYTES))
            found = file.read_row_group(group, columns=[column])[column]
            total += sum(map(_written_out, found.chunks))
            _check_size(column, total, limit)
            yield found


def _check_size(column: str, size: int, limit: int) -> None:
    """Raise `ValueError` if a column of a Parquet file is too large in memory."""
    if size > limit:
        raise ValueError(
            f"{column}: {size:,} bytes in memory, but at most {limit:,} are allowed for a file of "
            "this size; split the file, or leave out the largest values"
        )


def _written_out(array: Any) -> int:
    """Return the bytes of an array from `read_groups` if each row had its own value."""
    from pyarrow.compute import call_function

    if hasattr(array, "dictionary"):
        return call_function("sum", [value_lengths(array)]).as_py() or 0
    if hasattr(array, "flatten"):  # a list, or a struct with a part for each field
        parts = array.flatten()
        return sum(map(_written_out, parts if isinstance(parts, list) else [parts]))
    return array.nbytes


def value_lengths(array: Any) -> "pyarrow.Array":
    """Return the length in bytes of each text or image in an array from `read_groups`."""
    from pyarrow.compute import call_function

    if not hasattr(array, "dictionary"):  # bytes of fixed length
        return call_function("binary_length", [array])
    return call_function("binary_length", [array.dictionary]).take(array.indices)


def check_memory(path: Path, columns: Collection[str]) -> None:
    """Raise `ValueError` if a column of a Parquet file is too large, see `read_groups`."""
    for column in columns:
        for _ in read_groups(path, column):
            pass


def read_table(
    path: Path, columns: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> "pd.DataFrame":
    """Return the table of a parquet file.

    Args:
        path: The file.
        columns: The type of each required column: str, int, float, list for anything, or
            `pd.Categorical` for long texts that repeat, to store each only once.
        optional: The same for columns that may be missing.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a table, or lacks a column.
    """
    import pandas as pd  # takes half a second to import, and most commands read no table
    import pyarrow
    import pyarrow.parquet as pq
    from pandas.api import types

    checks: dict[Any, Callable[[Any], bool]] = {
        str: types.is_string_dtype,
        int: types.is_integer_dtype,
        float: types.is_numeric_dtype,
        pd.Categorical: pd.CategoricalDtype.is_dtype,
    }
    repeated = [name for name, kind in columns.items() if kind is pd.Categorical]
    try:
        check_memory(path, {*pq.read_schema(path).names} - {*repeated})
        table = pd.read_parquet(path, read_dictionary=repeated)
    except (pyarrow.ArrowException, LookupError, TypeError) as error:
        if explain_limit(error):
            raise
        raise ValueError(f"{path.name}: cannot be read as a table ({error!r:.200})") from error
    held = {name: kind for name, kind in (optional or {}).items() if name in table}
    for name, kind in {**columns, **held}.items():
        if [*table].count(name) != 1 or (kind in checks and not checks[kind](table[name])):
            raise ValueError(f"{path.name}: {name}: must be one column of {kind.__name__}")
    return table
