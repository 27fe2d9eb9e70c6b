"""Collect the sources of a user's option. Their hash is part of the id of runs that use it.

A file of the user counts as a whole, together with the files of the user that it imports, also
inside functions; even an edited comment is a change. Of a notebook, the statement that defines the
function or class counts, and what it names: those of other cells, constants, and files. What an
object holds, such as the 2 in `functools.partial(power, 2)`, counts wherever it was made.

Installed packages and compiled code count by their names. What is read while the option runs, such
as an environment variable or a table of numbers, does not count, nor does a module whose name is
computed.
"""

import ast
import contextlib
import copyreg
import dis
import functools
import hashlib
import inspect
import itertools
import linecache
import re
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.util import decode_source, resolve_name
from pathlib import Path
from types import CodeType
from typing import Any

from cmp.errors import CmpError
from cmp.files import tensors_digest

Memory = dict[int, tuple[Any, list[Any]]]
"""By id, an object, which keeps its id unique, and what it consisted of when it was first read."""
_STARTED = time.time()
"""When this module was imported, in seconds since 1970."""
_loaded_texts: dict[Path, tuple[Any, str]] = {}
"""By file, an object that changes if its module is loaded again, and the text that was loaded."""


def is_own(module: object) -> bool:
    """Return whether a module name belongs to this package."""
    return str(module).partition(".")[0] == "cmp"


def sources_digest(sources: Mapping[str, str]) -> str:
    """Return the sha256 of the result of `collect_sources`."""
    text = "\n".join(f"# {name}\n{sources[name]}" for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()


def collect_sources(value: Any, home: str, file: str | None, memory: Memory) -> dict[str, str]:
    """Return the sources of everything that an option consists of or refers to, by name.

    Args:
        value: The registered function or object, and what is declared of it.
        home: The module that registers it.
        file: The file of that module, if it has one.
        memory: The objects that earlier calls for this option have read; empty while it is being
            registered. An object is read only once, so a cache or a counter that the option fills
            is no change.

    Raises:
        CmpError: Something cannot be read, or a file was edited after it was imported.
    """
    is_new = not memory
    sources: dict[str, str] = {}
    labels: dict[Any, str] = {}

    def add_file(module: str, path: Path) -> None:
        name = path.name if module == home else module
        if name not in sources:
            sources[name] = text = _loaded_text(module, path, is_new)
            package = module if path.stem == "__init__" else module.rpartition(".")[0]
            add_modules(_imported_names(text, package), path.parent)

    def add_modules(names: Iterable[str], *folders: Path) -> None:
        """Add the user's files among modules, or the modules that contain functions so named."""
        for name in names:
            for module in itertools.accumulate(name.split("."), "{}.{}".format):
                if path := _users_file(module, *folders):
                    add_file(module, path)

    def add_statement(file: str, line: int, names: Mapping[str, Any]) -> str:
        """Add a statement of a cell and what it names, and return the label of its source."""
        text = _read_statement(file, line)
        if text not in labels:
            labels[text] = label = f"statement {len(labels)}"
            add_modules(_imported_names(text, ""))
            held = {name: names[name] for name in _global_names(text) if name in names}
            for name, rest in re.findall(r"(\w+)\.([\w.]+)", text):
                if inspect.ismodule(held.get(name)):
                    add_modules([f"{held[name].__name__}.{rest}"])
            lines = [f"{name} = {describe(part)}" for name, part in held.items()]
            sources[label] = "\n".join([text, *lines])
        return labels[text]

    def describe(part: Any) -> str:
        """Return what something holds as text, or the label under which its source is added."""
        part = inspect.unwrap(part, stop=inspect.isfunction)
        if type(part) in (str, int, float, bool, type(None)):
            return repr(part)
        if id(part) in labels:
            return labels[id(part)]
        labels[id(part)] = f"part {len(labels)}"  # as it may hold itself
        if inspect.isfunction(part) or inspect.isclass(part) or inspect.ismodule(part):
            return describe_named(part)
        if id(part) not in memory:
            memory[id(part)] = part, _members(part)
        texts = [describe(member) for member in memory[id(part)][1]]
        return f"{type(part).__name__}({', '.join(texts)})"

    def describe_named(part: Any) -> str:
        """Return the name of a function, class or module, and what it holds if it is a cell's."""
        module = part.__name__ if inspect.ismodule(part) else part.__module__
        held = {}
        if inspect.isfunction(part):
            module = part.__globals__.get("__name__", "")  # a decorator may change `__module__`
            held = inspect.getclosurevars(part).nonlocals
        texts = [getattr(part, "__qualname__", part.__name__)]
        if not _is_notebook(module):
            add_modules([module])
            texts.append("" if module == home else module.partition(".")[0])
        elif inspect.isclass(part):
            held = {base.__name__: base for base in part.__bases__} | _class_members(part)
        elif inspect.isfunction(part):
            code = part.__code__
            texts.append(add_statement(code.co_filename, code.co_firstlineno, part.__globals__))
        return ", ".join([*texts, *(f"{key} = {describe(each)}" for key, each in held.items())])

    try:
        if file:
            add_file(home, Path(file))
        sources["option"] = describe(value)
    except (OSError, TypeError) as error:  # no source, or no copy, as of a lock or an open file
        raise CmpError(
            f"what it consists of cannot be read ({error}), so runs that use it cannot be "
            "distinguished; define it in a cell or a file, and create locks, open files and the "
            "like inside a function"
        ) from error
    return sources


def _loaded_text(module: str, path: Path, is_new: bool) -> str:
    """Return the text of a file, or the text that it had when its module was loaded.

    Raises:
        CmpError: An option is new, but Python keeps an old version of a module that it uses.
    """
    loaded = sys.modules.get(module)
    version = getattr(loaded, "__spec__", None) or loaded  # loading it again replaces the spec
    known, text = _loaded_texts.get(path, (None, ""))
    if version is None or known is not version:
        text = decode_source(path.read_bytes())
        is_outdated = loaded is not None and _is_outdated(loaded, path)
    else:
        is_outdated = is_new and text != decode_source(path.read_bytes())
    if is_outdated:
        raise CmpError(
            f"{path} was edited after it was imported, so its old code would run; restart Python, "
            "or reload it with importlib.reload first"
        )
    _loaded_texts[path] = version, text
    return text


def _is_outdated(module: Any, path: Path) -> bool:
    """Return whether a file that was edited while this process runs lacks functions that Python
    loaded from it before."""
    if path.stat().st_mtime < _STARTED:
        return False
    codes = _all_codes(compile(path.read_bytes(), path, "exec", dont_inherit=True))
    functions = [value for value in vars(module).values() if inspect.isfunction(value)]
    loaded = [each.__code__ for each in functions if each.__globals__ is vars(module)]
    return any(code not in codes for code in loaded if code.co_filename == str(path))


def _all_codes(code: CodeType) -> list[CodeType]:
    """Return compiled code and the code of all functions in it."""
    codes = [code]
    for each in codes:  # grows during the loop
        codes += [constant for constant in each.co_consts if inspect.iscode(constant)]
    return codes


def _users_file(module: str, *folders: Path) -> Path | None:
    """Return the file of a module, or None if it is part of this package, of Python or of an
    installed package. It is not imported; `folders` are searched after `sys.path`."""
    if is_own(module) or module.partition(".")[0] in sys.stdlib_module_names:
        return None
    places = [Path(folder, *module.split(".")) for folder in (*sys.path, *folders)]
    files = [file for place in places for file in (place / "__init__.py", Path(f"{place}.py"))]
    if loaded := getattr(sys.modules.get(module), "__file__", None):
        files = [Path(loaded)]
    file = next((file for file in files if file.suffix == ".py" and file.is_file()), None)
    return None if file and {"site-packages", "dist-packages"} & {*file.parts} else file


@functools.cache
def _imported_names(text: str, package: str) -> list[str]:
    """Return the dotted names that a file of a package may import, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # from outside of all packages
                home = resolve_name("." * node.level + (node.module or ""), package)
                names += [f"{home}.{alias.name}" for alias in node.names]
    return names


def _is_notebook(module: str) -> bool:
    """Return whether a module has no file and is not compiled either, as the cells of a notebook
    or what is typed into Python."""
    first = module.partition(".")[0]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (module, first)]
    return first not in sys.stdlib_module_names and not any(files)


def _read_statement(file: str, line: int) -> str:
    """Return the statement of a cell that a line belongs to."""
    lines = linecache.getlines(file)
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree: ast.Module = compile("".join(lines), file, "exec", flags)
    for statement in tree.body:
        decorators = getattr(statement, "decorator_list", [])
        first, last = min(x.lineno for x in (statement, *decorators)), statement.end_lineno or 0
        if first <= line <= last:
            return "".join(lines[first - 1 : last])
    raise OSError(f"{file} has no source")


def _global_names(text: str) -> list[str]:
    """Return the names that a statement, or a function in it, looks up outside of functions."""
    codes = _all_codes(compile(text, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
    steps = [step for code in codes for step in dis.get_instructions(code)]
    return sorted({x.argval for x in steps if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")})


def _class_members(part: type) -> dict[str, Any]:
    """Return the functions and constants in the definition of a cell's class."""
    members = {}
    for name, member in vars(part).items():
        for inner in ("__func__", "fget", "func"):  # of a class method, a property, a cached one
            member = getattr(member, inner, member)
        code = getattr(inspect.unwrap(member), "__code__", None)
        # decorators such as `dataclass` write functions of their own
        if code.co_filename != "<string>" if code else not name.startswith(("__", "_abc_")):
            members[name] = member
    return members


def _members(part: Any) -> list[Any]:
    """Return what an object consists of: its items, or what a copy of it is made from."""
    import torch  # imported by now

    kind = type(part)
    if isinstance(part, torch.Tensor):
        return [tensors_digest({"": part})]
    if kind is bytes:
        return [hashlib.sha256(part).hexdigest()]
    if kind in (list, tuple):
        return [*part]
    if kind in (set, frozenset):
        return sorted(part, key=repr)
    if kind is dict:
        return [member for item in part.items() for member in item]
    made: Any = copyreg.dispatch_table.get(kind, lambda part: part.__reduce_ex__(4))(part)
    if isinstance(made, str):  # the name of a function in another language
        home = getattr(part, "__module__", None) or kind.__module__
        return [home.partition(".")[0], made]
    return [*made[:3], *(list(items) for items in made[3:5] if items)]
