"""Collect the source code of a user's option: everything that it consists of or refers to.

The hash of the sources is part of the id of runs that use the option. The sources are stored with
such runs as a record.
"""

import contextlib
import dis
import functools
import hashlib
import inspect
import json
import logging
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from cmp.errors import CmpError
from cmp.files import tensors_digest

T = TypeVar("T")
_STARTED = time.time()
"""When this module was imported, in seconds since 1970."""


def is_own(module: object) -> bool:
    """Return whether a module name belongs to this package."""
    return str(module).partition(".")[0] == "cmp"


Part = tuple[str, Any]
"""The name and value of something that an option consists of or refers to."""


Memory = dict[tuple[Any, int], tuple[Any, Any]]
"""By reader and id of an object, the object, which keeps its id unique, and what was read of it."""


def collect_sources(
    value: Any, module: str, settings: Any, facts: Any, memory: Memory
) -> dict[str, str]:
    """Return the sources of everything that an option consists of or refers to, by name.

    The user's functions and classes give their source, other functions and classes their name, and
    constants their value as text. Something that was collected before gives the name of its first
    occurrence.

    Args:
        value: The registered function or object.
        module: The module that registers it.
        settings: The config keys that the option reads.
        facts: The option's declared properties.
        memory: What earlier calls for this option have read. An object is read only once, so
            neither a file that is edited but not loaded again nor a cache or a counter that the
            option fills counts as a change.
    """
    root = module.partition(".")[0]
    todo: list[Part] = [("facts", facts), ("settings", settings), ("value", value)]
    seen: dict[int, Part] = {}
    sources: dict[str, str] = {}

    def read_once(read: Callable[..., T], part: Any, *arguments: Any) -> T:
        key = read, id(part)
        if key not in memory:
            memory[key] = part, read(part, *arguments)
        return memory[key][1]

    def add(name: str, text: str) -> str:
        if sources.setdefault(name, text) != text:
            name = f"{name} {len(sources)}"
            sources[name] = text
        return name

    while todo:
        name, part = todo.pop()
        part = inspect.unwrap(part, stop=lambda x: inspect.isfunction(x) and _is_users(x, root))
        text = read_once(_constant_text, part)
        is_users = _is_users(part, root) or (name == "value" and not is_own(_home(part)))
        if text is None and not is_users and _is_named(part):
            text = f"{_home(part).partition('.')[0]}: {part.__name__}"
        if text is None:
            if id(part) not in seen:
                label = getattr(part, "__qualname__", name) if is_users else name
                if is_users and inspect.isfunction(part):
                    label = add(label, read_once(_read_source, part.__code__, part.__qualname__))
                seen[id(part)] = label, part  # keeps the part alive, so its id stays unique
                if inspect.isfunction(part):
                    todo += _references(part, root)
                elif inspect.isclass(part):
                    todo += _class_members(part)
                else:
                    members = read_once(_members, part, name)
                    todo += [(f"{name}.{key}", member) for key, member in members]
            text = f"as {seen[id(part)][0]}"
        if text not in ("{}", f"as {name}"):
            add(name, text)
    return sources


def _home(part: Any) -> str:
    """Return the name of a module, or of the module that defines a function, a class or an object's
    class."""
    if inspect.ismodule(part):
        return part.__name__
    if inspect.isfunction(part):  # a decorator may have changed its `__module__`
        return part.__globals__.get("__name__", "")
    return str(getattr(part, "__module__", None) or type(part).__module__)


def _is_users(part: Any, root: str) -> bool:
    """Whether something is the user's: from `root`, the package that registers the option, or from
    neither this package, nor Python, nor an installed package."""
    home = _home(part)
    first = home.partition(".")[0]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (home, first)]
    folders = {part for file in filter(None, files) for part in Path(file).parts}
    is_installed = not folders.isdisjoint(("site-packages", "dist-packages"))
    return first == root or not (is_installed or is_own(home) or first in sys.stdlib_module_names)


def _is_named(part: Any) -> bool:
    """Whether its name identifies something completely, as with a function or class without
    state."""
    bound = getattr(part, "__self__", None)
    has_state = getattr(part, "__closure__", None) or not (bound is None or inspect.ismodule(bound))
    return hasattr(part, "__name__") and not has_state


def _members(value: Any, name: str) -> list[tuple[Any, Any]]:
    """Return the keys and values of what an object, other than a function or class, consists of."""
    if inspect.ismodule(value) or isinstance(value, logging.Logger):  # does not affect results
        return []
    if inspect.isroutine(value) and _is_named(value):  # written in another language
        raise _unreadable_error(name)
    if isinstance(value, Mapping):
        is_plain = all(isinstance(key, str | int) for key in value)
        return [*(value.items() if is_plain else enumerate(value.items()))]
    if isinstance(value, list | tuple):
        return [*enumerate(value)]
    return [*_state(name, value).items()]


def _state(name: str, value: Any) -> dict[str, Any]:
    """Return an object's class and the state that a copy of it would have."""
    try:
        made = value.__reduce_ex__(4)
    except Exception as error:  # as for a lock or an open file
        raise _unreadable_error(name, f"the state of this {type(value).__name__}") from error
    _, args, state, *items = (None, made, None) if isinstance(made, str) else (*made, None)
    state = state if isinstance(state, dict) else {"state": state}
    held = {"class": type(value), "args": args} | state
    return held | {f"items {n}": list(x) for n, x in enumerate(items) if x is not None}


def _class_members(part: type) -> list[Part]:
    """Return a class's own functions and constants, and its base classes and metaclass."""
    members: dict[str, Any] = {base.__name__: base for base in part.__bases__}
    for key, member in vars(part).items():
        if key in ("__replace__", "__annotate_func__"):  # which newer versions of Python add
            continue
        if isinstance(member, functools.cached_property):
            member = member.func
        member = getattr(member, "__func__", getattr(member, "fget", member))
        code = getattr(inspect.unwrap(member), "__code__", None)
        is_hidden = key.startswith(("__", "_abc_")) or hasattr(type(member), "__get__")
        if code.co_filename != "<string>" if code else inspect.isclass(member) or not is_hidden:
            members[key] = member
    return [(f"{part.__qualname__}.{key}", member) for key, member in members.items()]


def _references(function: Any, root: str) -> list[Part]:
    """Return what a function refers to: its defaults and closure and, for a user's function, its
    globals and what it may use from the user's modules among them."""
    codes, loaded, names = [function.__code__], [], []
    for code in codes:  # grows during the loop
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        steps = dis.get_instructions(code)
        loaded += [step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
        names += code.co_names
    outer = function.__globals__ if _is_users(function, root) else {}
    referred = [(name, outer[name]) for name in loaded if name in outer]
    modules = []
    for _, part in referred:  # grows during the loop
        if inspect.ismodule(part) and part not in modules and _is_users(part, root):
            modules.append(part)
            referred += [(name, vars(part)[name]) for name in names if name in vars(part)]
    nonlocals = inspect.getclosurevars(function).nonlocals
    given = {"defaults": function.__defaults__, **(function.__kwdefaults__ or {}), **nonlocals}
    qualname = function.__qualname__
    referred += [(f"{qualname}.{name}", part) for name, part in given.items() if part is not None]
    return referred


def _constant_text(value: Any) -> str | None:
    """Return a constant as text, such as JSON, that differs for different constants. Return None
    for anything that is not a constant or does not consist of constants."""
    with contextlib.suppress(TypeError, ValueError):
        return json.dumps(value, sort_keys=True)
    import numpy as np  # imported by now, as is torch
    import torch

    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return f"{value.dtype.str} {value.shape} {_constant_text(value.tobytes())}"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, set | frozenset):
        members = [_constant_text(member) for member in value]
        return None if None in members else f"{{{', '.join(sorted(map(str, members)))}}}"
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r} {value.flags}"
    if isinstance(value, torch.Tensor):
        return tensors_digest({"": value})
    return None


def _read_source(code: CodeType, name: str) -> str:
    if _is_outdated(code):
        raise CmpError(
            f"{name}: {code.co_filename} was edited after it was imported, so its old code would "
            "run under its new source; restart Python, or reload it with importlib.reload first"
        )
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError) as error:
        raise _unreadable_error(name) from error


def _is_outdated(code: CodeType) -> bool:
    """Return whether a function's file was edited after it was imported.

    Only a file that was edited while this process runs is compared with the code, since an import
    hook may compile a file into other code than Python.
    """
    path = Path(code.co_filename)
    try:
        if path.stat().st_mtime < _STARTED:
            return False
        codes = [compile(path.read_bytes(), path, "exec", dont_inherit=True)]
    except OSError:  # a cell of a notebook
        return False
    except (SyntaxError, ValueError):
        return True
    for each in codes:  # grows during the loop
        codes += [constant for constant in each.co_consts if inspect.iscode(constant)]
    return code not in codes


def sources_digest(sources: Mapping[str, str]) -> str:
    """Return the sha256 of the result of `collect_sources`."""
    text = "\n".join(f"# {name}\n{sources[name]}" for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()


def _unreadable_error(name: str, what: str = "its source") -> CmpError:
    return CmpError(
        f"{name}: {what} cannot be read, so runs that use it cannot be distinguished; define it "
        "in a cell or a file, and create locks, open files and the like inside a function"
    )
