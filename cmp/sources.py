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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmp.errors import CmpError
from cmp.files import tensors_digest


def is_own(module: object) -> bool:
    """Return whether a module name belongs to this package."""
    return str(module).partition(".")[0] == "cmp"


Part = tuple[str, Any]
"""The name and value of something that an option consists of or refers to."""


def collect_sources(value: Any, module: str, settings: Any, facts: Any) -> dict[str, str]:
    """Return the sources of everything that an option consists of or refers to, by name.

    The user's functions and classes give their source, other functions and classes their name, and
    constants their value as text. Something that was collected before gives the name of its first
    occurrence.

    Args:
        value: The registered function or object.
        module: The module that registers it.
        settings: The config keys that the option reads.
        facts: The option's declared properties.
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
                seen[id(part)] = label, part  # keeps the part alive, so its id stays unique
                todo += _parts(name, part, root)
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


def _parts(name: str, value: Any, root: str) -> list[Part]:
    """Return the parts that a function or class refers to, or that an object consists of."""
    if inspect.ismodule(value) or isinstance(value, logging.Logger):  # does not affect results
        return []
    if inspect.isfunction(value):
        return _references(value, root)
    if inspect.isclass(value):
        return _class_members(value)
    if inspect.isroutine(value) and _is_named(value):  # written in another language
        raise _unreadable_error(name)
    if isinstance(value, Mapping):
        is_plain = all(isinstance(key, str | int) for key in value)
        members = value.items() if is_plain else enumerate(value.items())
    elif isinstance(value, list | tuple):
        members = enumerate(value)
    else:
        members = _state(name, value).items()
    return [(f"{name}.{key}", member) for key, member in members]


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


def _read_source(function: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function.__code__))
    except (OSError, TypeError) as error:
        raise _unreadable_error(function.__qualname__) from error


def _unreadable_error(name: str, what: str = "its source") -> CmpError:
    return CmpError(
        f"{name}: {what} cannot be read, so runs that use it cannot be distinguished; define it "
        "in a cell or a file, and create locks, open files and the like inside a function"
    )
