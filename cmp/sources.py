"""The sources of an option of the user's: all that it consists of and refers to.

Their hash is part of the id of runs that use the option, and they are stored with it, as a record.
"""

import contextlib
import dis
import functools
import hashlib
import importlib
import inspect
import json
import logging
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmp.errors import CmpError


def is_own(module: object) -> bool:
    """Return whether a module, by its name, is of this package."""
    return str(module).partition(".")[0] == "cmp"


Part = tuple[str, Any]
"""Something that an option consists of or refers to, with its name."""


def collect_sources(value: Any, module: str, settings: Any, facts: Any) -> dict[str, str]:
    """Return the sources of what an option consists of and refers to, by name.

    Of functions and classes of the user's the sources, of all others the names; of constants the
    values, as text; of what was there already the name.

    Args:
        value: The function or object that is registered.
        module: The module that registers it.
        settings: The config keys that it reads.
        facts: Its declared properties.
    """
    root = module.partition(".")[0]
    todo: list[Part] = [("facts", facts), ("settings", settings), ("value", value)]
    seen: dict[int, Part] = {}
    sources: dict[str, str] = {}

    def add(name: str, text: str) -> str:
        if sources.setdefault(name, text) != text:
            name = f"{name} {len(sources)}"
            sources[name] = text
        return name

    while todo:
        name, part = todo.pop()
        part = inspect.unwrap(part, stop=lambda x: inspect.isfunction(x) and _is_users(x, root))
        text = _constant_text(part)
        is_users = _is_users(part, root) or (name == "value" and not is_own(_home(part)))
        if text is None and not is_users and _is_named(part):
            text = f"{_home(part).partition('.')[0]}: {part.__name__}"
        if text is None:
            if id(part) not in seen:
                label = getattr(part, "__qualname__", name) if is_users else name
                if is_users and inspect.isfunction(part):
                    label = add(label, _read_source(part))
                seen[id(part)] = label, part  # which keeps the part, and so its id
                todo += _parts(name, part, root)
            text = f"as {seen[id(part)][0]}"
        if text not in ("{}", f"as {name}"):
            add(name, text)
    return sources


def _home(part: Any) -> str:
    """Return the name of a module, or of that which a function, class or object's class is from."""
    if inspect.ismodule(part):
        return part.__name__
    if inspect.isfunction(part):  # to which a decorator may have given the name of another
        return part.__globals__.get("__name__", "")
    return str(getattr(part, "__module__", None) or type(part).__module__)


def _is_users(part: Any, root: str) -> bool:
    """Whether something is from the package `root`, which registers an option, or else neither
    from this package, nor from Python, nor from an installed package."""
    home = _home(part)
    first = home.partition(".")[0]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (home, first)]
    folders = {part for file in filter(None, files) for part in Path(file).parts}
    is_installed = not folders.isdisjoint(("site-packages", "dist-packages"))
    return first == root or not (is_installed or is_own(home) or first in sys.stdlib_module_names)


def _is_named(part: Any) -> bool:
    """Whether the name of something says all of it: a function or class that has no state."""
    bound = getattr(part, "__self__", None)
    has_state = getattr(part, "__closure__", None) or not (bound is None or inspect.ismodule(bound))
    return hasattr(part, "__name__") and not has_state


def _parts(name: str, value: Any, root: str) -> list[Part]:
    """Return what a function or class refers to, or what an object consists of."""
    if inspect.ismodule(value) or isinstance(value, logging.Logger):  # which decides no result
        return []
    if inspect.isfunction(value):
        return _references(value, root)
    if inspect.isclass(value):
        return _class_members(value)
    if inspect.isroutine(value) and _is_named(value):  # written in another language
        raise _unreadable(name)
    if isinstance(value, Mapping):
        is_plain = all(isinstance(key, str | int) for key in value)
        members = value.items() if is_plain else enumerate(value.items())
    elif isinstance(value, list | tuple):
        members = enumerate(value)
    else:
        members = _state(name, value).items()
    return [(f"{name}.{key}", member) for key, member in members]


def _state(name: str, value: Any) -> dict[str, Any]:
    """Return an object's class and what a copy of it would keep, which is all that it holds."""
    try:
        made = value.__reduce_ex__(4)
    except Exception as error:  # such as of a lock, or of an open file
        raise _unreadable(name, f"what this {type(value).__name__} holds") from error
    _, args, state, *items = (None, made, None) if isinstance(made, str) else (*made, None)
    state = state if isinstance(state, dict) else {"state": state}
    held = {"class": type(value), "args": args} | state
    return held | {f"items {n}": list(x) for n, x in enumerate(items) if x is not None}


def _class_members(part: type) -> list[Part]:
    """Return a class's own functions and constants, and the classes it is made from."""
    members: dict[str, Any] = {base.__name__: base for base in part.__bases__}
    for key, member in vars(part).items():
        if isinstance(member, functools.cached_property):
            member = member.func
        member = getattr(member, "__func__", getattr(member, "fget", member))
        code = getattr(inspect.unwrap(member), "__code__", None)
        is_hidden = key.startswith(("__", "_abc_")) or hasattr(type(member), "__get__")
        if code.co_filename != "<string>" if code else inspect.isclass(member) or not is_hidden:
            members[key] = member
    return [(f"{part.__qualname__}.{key}", member) for key, member in members.items()]


def _references(function: Any, root: str) -> list[Part]:
    """Return what a function refers to: its defaults and closure; and if it is the user's, its
    globals, and what it may take from the user's modules among these."""
    codes, loaded, names = [function.__code__], [], []
    for code in codes:  # which grows
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        steps = dis.get_instructions(code)
        loaded += [step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
        names += code.co_names
    outer = function.__globals__ if _is_users(function, root) else {}
    referred = [(name, outer[name]) for name in loaded if name in outer]
    modules = []
    for _, part in referred:  # which grows
        if inspect.ismodule(part) and part not in modules and _is_users(part, root):
            modules.append(part)
            referred += [(name, vars(part)[name]) for name in names if name in vars(part)]
    nonlocals = inspect.getclosurevars(function).nonlocals
    given = {"defaults": function.__defaults__, **(function.__kwdefaults__ or {}), **nonlocals}
    qualname = function.__qualname__
    referred += [(f"{qualname}.{name}", part) for name, part in given.items() if part is not None]
    return referred


def _constant_text(value: Any) -> str | None:
    """Return a constant as text that is another one for another constant, such as JSON; None for
    anything that is none, or is made of other things than constants."""
    with contextlib.suppress(TypeError, ValueError):
        return json.dumps(value, sort_keys=True)
    import numpy as np  # which, as torch, is there by now
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
        return importlib.import_module("cmp.models").tensors_digest({"": value})
    return None


def _read_source(function: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function.__code__))
    except (OSError, TypeError) as error:
        raise _unreadable(function.__qualname__) from error


def _unreadable(name: str, what: str = "its source") -> CmpError:
    return CmpError(
        f"{name}: {what} cannot be read, so runs that use it could not be told apart; define it in "
        "a cell or in a file, and a lock, an open file or the like inside a function"
    )
