"""Options by name: those of the package, and those that a notebook or a file adds.

A schedule, meta schedule, merge rule, merge policy, method, order or buffer is one decorated
function (or object). From then on its name is valid in a config, on the command line, in the
explorers and when a run is resumed.
"""

import contextlib
import dis
import functools
import hashlib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cmp.errors import CmpError, name_choices

T = TypeVar("T")


class Kind(NamedTuple):
    """A kind of option.

    Attributes:
        home: The module that registers the package's own options and has `check_option`, which
            refuses an option whose declared properties do not hold.
        key: The config key that names an option of this kind.
        facts: The properties that an option may declare, each with its default.
    """

    home: str
    key: str
    facts: dict[str, Any]


KINDS = {
    "schedule": Kind(
        "cmp.schedules",
        "schedule.name",
        {"continuous": True, "over_stream": False, "warmup_target": None},
    ),
    "meta_schedule": Kind("cmp.schedules", "schedule.meta", {"curve": None}),
    "merge_rule": Kind(
        "cmp.merging.rules",
        "merging.rule",
        {"linear": False, "base": False, "count": None, "trims": False, "draws": False,
         "running": None, "idempotent": True},
    ),
    "merge_policy": Kind("cmp.merging.policies", "merging.policy", {"merges": ("two",)}),
    "method": Kind("cmp.methods", "method.name", {"adapters": False, "needs_pool": False}),
    "order": Kind(
        "cmp.streams",
        "stream.order",
        {"statistics": False, "partial": False, "seeded": True, "updates": False},
    ),
    "buffer": Kind("cmp.mixtures", "mixture.policy", {"capacity": "none"}),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Option:
    """A registered option.

    Attributes:
        kind: One of `KINDS`.
        name: The name in configs.
        value: The function or object.
        settings: The config keys of its section that it reads, each with the value that holds
            where the config leaves the key open (None for the config's own default).
        facts: Its declared properties, see `Kind.facts`.
        module: The module that registered it.
        sources: Source text of the functions and constants that it consists of and refers to, by
            name, for an option that is not the package's own; empty otherwise.
    """

    kind: str
    name: str
    value: Any
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    module: str
    sources: Mapping[str, str]

    @property
    def digest(self) -> str:
        """sha256 of the sources, which enters the id of runs that use the option."""
        text = "\n".join(f"# {name}\n{self.sources[name]}" for name in sorted(self.sources))
        return hashlib.sha256(text.encode()).hexdigest()


_entry_points = functools.cache(lambda group: {x.name: x for x in entry_points(group=group)})
_options: dict[str, dict[str, Option]] = {kind: {} for kind in KINDS}


def register(
    kind: str, name: str, settings: Iterable[str] | Mapping[str, Any] = (), **facts: Any
) -> Callable[[T], T]:
    """Return a decorator that registers a function or object under a name.

    A cell of a notebook may be run again: an option that is defined anew under the same function
    name replaces the one before.

    Args:
        kind: "schedule", "meta_schedule", "merge_rule", "merge_policy", "method", "order" or
            "buffer".
        name: The name in configs, such as "sawtooth".
        settings: Config keys of the same section that the option reads, such as "warmup".
        **facts: Declared properties, see `KINDS`.

    Raises:
        CmpError: The kind or a property is unknown, the name is taken, or a declared property
            does not hold.

    Example:
        >>> @cmp.register("schedule", "sawtooth", continuous=False)
        ... def sawtooth(task, step):
        ...     return task.peak * (1 - step % 10 / 10)
        >>> cmp.learning_rate(cmp.Schedule("sawtooth", peak=1.0), 40, 0, 5)
        0.5
    """
    _check_near(kind, KINDS, "kind of option")
    for fact in facts:
        _check_near(fact, KINDS[kind].facts, f"property of a {kind}")
    declared = dict(settings) if isinstance(settings, Mapping) else dict.fromkeys(settings)
    module = sys._getframe(1).f_globals.get("__name__", "__main__")

    def decorate(value: T) -> T:
        own = _is_own(module)
        sources = {} if own else _collect_sources(value, module, declared, facts)
        option = Option(kind, name, value, declared, KINDS[kind].facts | facts, module, sources)
        if own:
            _options[kind][name] = option
        else:
            _add_foreign(option)
        return value

    return decorate


def _add_foreign(option: Option) -> None:
    """Add an option that is not the package's own, or raise `CmpError` and leave all as it was."""
    options = _loaded(option.kind)
    before = options.get(option.name)
    if before and not _is_redefined(before, option):
        owner = "the package" if _is_own(before.module) else "another definition"
        raise CmpError(
            f"{option.kind} {option.name!r}: {owner} has this name already; choose another"
        )
    sections = importlib.import_module("cmp.config").RunConfig.__dataclass_fields__
    section = KINDS[option.kind].key.partition(".")[0]
    for key in option.settings:
        _check_near(key, sections[section].type.__dataclass_fields__, f"key of section {section}")
    _options[option.kind] = options | {option.name: option}
    try:
        importlib.import_module(KINDS[option.kind].home).check_option(option)
    except BaseException:
        _options[option.kind] = options
        raise


def get_option(kind: str, name: str) -> Option:
    """Return a registered option; raise `CmpError` as `check_name` does for an unknown name."""
    try:
        return _loaded(kind)[check_name(kind, name)]
    except ValueError as error:
        raise CmpError(f"{KINDS[kind].key}: {error}") from error


def option_names(kind: str, setting: str | None = None, **facts: Any) -> list[str]:
    """Return the registered names of a kind.

    Args:
        kind: One of `KINDS`.
        setting: Only options that read this config key.
        **facts: Only options that declare these properties.

    Example:
        >>> cmp.option_names("merge_rule", base=False)
        ['interpolation', 'slerp']
    """
    options = _loaded(kind)
    for fact in facts:
        _check_near(fact, KINDS[kind].facts, f"property of a {kind}")
    return [
        name
        for name, option in options.items()
        if setting in (None, *option.settings) and facts.items() <= option.facts.items()
    ]


def check_name(kind: str, name: str) -> str:
    """Return a name if it is registered; raise `ValueError` that lists the names otherwise."""
    _check_near(name, _loaded(kind), kind.replace("_", " "), ValueError)
    return name


def check_settings(kind: str, name: str, section: Any) -> None:
    """Check that a config section sets only what its option reads.

    Args:
        kind: One of `KINDS`.
        name: The option that the section names.
        section: A dataclass of `cmp.config`.

    Raises:
        ValueError: A key that belongs to other options of this kind is not at its default.
    """
    read = _loaded(kind)[name].settings
    for key in dict.fromkeys(key for each in _loaded(kind).values() for key in each.settings):
        default = type(section).__dataclass_fields__[key].default
        if key not in read and getattr(section, key) != default:
            users = ", ".join(option_names(kind, key))
            raise ValueError(f"{key}: {name!r} has none, only {users}")


def load_plugin(path: Path) -> None:
    """Run a Python file that registers options.

    Raises:
        CmpError: The file cannot be run.

    Example:
        >>> text = "@cmp.register('order', 'as-listed', seeded=False)\\n"
        >>> text += "def order(table, seed): return range(len(table))"
        >>> path = folder / "mine.py"
        >>> _ = path.write_text(f"import cmp\\n{text}")
        >>> cmp.load_plugin(path)
    """
    place = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    name = f"cmp_plugin_{path.stem}_{place[:12]}"  # files of one name are not the same plugin
    try:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise CmpError("the name of a plugin must end in .py")
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        sys.modules.pop(name, None)
        kind = "" if isinstance(error, CmpError) else f"{type(error).__name__}: "
        raise CmpError(f"--plugin {path}: {kind}{error}") from error


def entry_names(group: str) -> list[str]:
    """Return the names of a group's installed entry points, none of which is loaded."""
    return list(_entry_points(group))


def load_entry(group: str, name: str) -> Any:
    """Return what an installed entry point names.

    Args:
        group: "cmp.data" (functions that return a `Corpus`), "cmp.models" (modules of a model
            family, see `cmp.models.family_of`) or "cmp.statistics" (the module that has tables of
            class statistics).
        name: The entry point.

    Raises:
        CmpError: It is not installed, or cannot be loaded.
    """
    try:
        return _entry_points(group)[name].load()
    except Exception as error:  # it is not installed, or whatever the code of others raises
        why = f"cannot be loaded ({type(error).__name__}: {error}); install its package anew"
        raise CmpError(f"entry point {name!r} of {group!r}: {why}, or uninstall it") from error


def _loaded(kind: str) -> dict[str, Option]:
    """Return the options of a kind, the package's own among them."""
    _check_near(kind, KINDS, "kind of option")
    importlib.import_module(KINDS[kind].home)
    return _options[kind]


def _check_near(
    name: str, names: Collection[str], what: str, error: type[Exception] = CmpError
) -> None:
    if name not in names:
        raise error(f"no {what} is called {name!r:.60}{name_choices(name, names)}")


def _is_redefined(old: Option, new: Option) -> bool:
    """Whether a definition takes the place of an earlier one: a notebook's cell was run again."""
    names = [getattr(option.value, "__qualname__", "") for option in (old, new)]
    kinds = [type(option.value) for option in (old, new)]
    return old.module == new.module and names[0] == names[1] and kinds[0] is kinds[1]


def _is_own(module: object) -> bool:
    return str(module).partition(".")[0] == "cmp"


Part = tuple[str, Any]
"""Something that an option consists of or refers to, with its name."""


def _collect_sources(value: Any, module: str, settings: Any, facts: Any) -> dict[str, str]:
    """Return the sources of what an option consists of and refers to, by name.

    Of functions and classes of the user's the sources, of all others the names; of constants the
    values, as text; of what was there already the name.
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
        is_users = _is_users(part, root) or (name == "value" and not _is_own(_home(part)))
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
    return first == root or not (is_installed or _is_own(home) or first in sys.stdlib_module_names)


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
