"""Register options by name, from this package, a notebook or a file.

A schedule, meta schedule, merge rule, merge policy, method, order or buffer is one decorated
function (or object). Once it is registered, its name works in configs, on the command line, in
explorers that compute in the kernel, and when a run is resumed.
"""

import functools
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, TypeVar

from cmp.errors import CmpError, did_you_mean, name_choices
from cmp.sources import collect_sources, is_own, sources_digest

T = TypeVar("T")


class Kind(NamedTuple):
    """A kind of option.

    Attributes:
        home: The module that registers the package's own options.
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
        "cmp.merging.apply",
        "merging.rule",
        {"linear": False, "matrix": False, "base": False, "count": None, "trims": False,
         "draws": False, "keeps_norm": False, "idempotent": True, "check": None},
    ),
    "merge_policy": Kind(
        "cmp.merging.policies", "merging.policy", {"merges": ("two",), "step_share": None}
    ),
    "method": Kind("cmp.methods", "method.name", {"adapters": False, "needs_pool": False}),
    "order": Kind(
        "cmp.streams",
        "stream.order",
        {"statistics": False, "partial": False, "seeded": True, "updates": False},
    ),
    "buffer": Kind("cmp.buffers", "mixture.policy", {"capacity": "none"}),
}  # fmt: skip
FUNCTIONS = ("warmup_target", "step_share", "check")
"""The facts that are functions."""


@dataclass(frozen=True, eq=False)
class Option:
    """A registered option.

    Attributes:
        kind: One of `KINDS`.
        name: The name in configs.
        value: The function or object.
        settings: The config keys of its section that it reads, each with the value to use if the
            config does not set the key (None for the config's own default).
        facts: The declared properties, see `Kind.facts`.
        module: The module that registered it.
        collect: Returns `sources`.
    """

    kind: str
    name: str
    value: Any
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    module: str
    collect: Callable[[], dict[str, str]] = field(repr=False)

    @property
    def sources(self) -> dict[str, str]:
        """For an option from outside the package, the source text of the functions and constants
        that it uses, by name; otherwise empty.

        They are collected anew each time: in a notebook, the next cell may define a constant or
        function again without registering the option again.
        """
        return self.collect()

    @property
    def digest(self) -> str:
        """The sha256 of the sources, which is part of the id of runs that use the option."""
        return sources_digest(self.sources)


_entry_points = functools.cache(lambda group: {x.name: x for x in entry_points(group=group)})
_options: dict[str, dict[str, Option]] = {kind: {} for kind in KINDS}


def register(
    kind: str, name: str, settings: Iterable[str] | Mapping[str, Any] = (), **facts: Any
) -> Callable[[T], T]:
    """Return a decorator that registers a function or object under a name.

    A notebook cell may be run again: a new definition with the same function name replaces the
    previous one.

    Args:
        kind: "schedule", "meta_schedule", "merge_rule", "merge_policy", "method", "order" or
            "buffer".
        name: The name in configs, such as "sawtooth".
        settings: Config keys of the same section that only some options of the kind read, this
            one among them, such as "warmup". A key that every option may read is not listed.
            Methods may give a mapping from keys to defaults of their own.
        **facts: Declared properties, see the table in `CONTRIBUTING.md`.

    Raises:
        CmpError: The kind, a property or a setting is unknown, the name is taken, or a declared
            property does not hold. A setting is one that every option of the kind may read, or has
            a default and the kind is not "method".

    Example:
        >>> @cmp.register("schedule", "sawtooth", continuous=False)
        ... def sawtooth(task, step):
        ...     return task.relative_peak * (1 - step % 10 / 10)
        >>> cmp.learning_rate(cmp.Schedule("sawtooth", peak=1.0), 40, 0, 5)
        0.5
    """
    if kind not in KINDS:
        raise CmpError(_unknown("kind of option", kind, KINDS))
    _check_facts(kind, facts)
    for fact in FUNCTIONS:
        if facts.get(fact) is not None and not callable(facts[fact]):
            raise CmpError(f"{kind} {name!r}: {fact}={facts[fact]!r:.80}: give a function")
    declared = dict(settings) if isinstance(settings, Mapping) else dict.fromkeys(settings)
    given = [key for key, default in declared.items() if default is not None]
    if given and kind != "method":
        raise CmpError(
            f"{kind} {name!r}: settings: {given[0]!r}: only a method may have defaults of its own; "
            "list the keys alone"
        )
    caller = sys._getframe(1).f_globals
    module, file = caller.get("__name__", "__main__"), caller.get("__file__")

    def decorate(value: T) -> T:
        own = is_own(module)
        collect = partial(collect_sources, (value, declared, facts), module, file, {})
        facts_of = KINDS[kind].facts | facts
        option = Option(kind, name, value, declared, facts_of, module, dict if own else collect)
        if own:
            _options[kind][name] = option
        else:
            _add_foreign(option)
        return value

    return decorate


def _add_foreign(option: Option) -> None:
    """Add an option from outside the package, or raise `CmpError` without changing anything."""
    option.collect()  # raises what cannot be read, and reads files before they are edited
    options = options_of(option.kind)
    before = options.get(option.name)
    if before and not _is_redefined(before, option):
        owner = "the package" if is_own(before.module) else "another definition"
        raise CmpError(
            f"{option.kind} {option.name!r}: {owner} already uses this name; choose another"
        )
    # listing a key refuses it for every option of the kind that does not list it
    listed = {key for each in options.values() if is_own(each.module) for key in each.settings}
    if common := sorted(option.settings.keys() - listed):
        kind = option.kind.replace("_", " ")
        raise CmpError(
            f"{option.kind} {option.name!r}: settings: {common[0]!r}: not a key that only some "
            f"{kind}s read; leave it out of `settings`{did_you_mean(common[0], listed)}"
        )
    _options[option.kind] = options | {option.name: option}


def options_of(kind: str) -> dict[str, Option]:
    """Return all registered options of a kind by name, including the package's own."""
    if kind not in KINDS:
        raise CmpError(_unknown("kind of option", kind, KINDS))
    importlib.import_module(KINDS[kind].home)  # registers them
    return _options[kind]


def get_option(kind: str, name: str) -> Option:
    """Return a registered option; raise `CmpError` if the name is unknown."""
    options = options_of(kind)
    if name not in options:
        raise CmpError(f"{KINDS[kind].key}: {_unknown_option(kind, name)}")
    return options[name]


def option_names(kind: str, setting: str | None = None, **facts: Any) -> list[str]:
    """Return the registered names of a kind.

    Args:
        kind: See `register`.
        setting: Return only options that read this config key.
        **facts: Return only options that declare these properties.

    Example:
        >>> cmp.option_names("merge_rule", count=2)
        ['slerp']
    """
    options = options_of(kind)
    _check_facts(kind, facts)
    return [
        name
        for name, option in options.items()
        if setting in (None, *option.settings) and facts.items() <= option.facts.items()
    ]


def check_name(kind: str, name: str) -> str:
    """Return a name if it is registered; otherwise raise `ValueError` with the valid names."""
    if name not in options_of(kind):
        raise ValueError(_unknown_option(kind, name))
    return name


def check_settings(kind: str, name: str, section: Any) -> None:
    """Check that a config section sets only keys that its option reads.

    Args:
        kind: One of `KINDS`.
        name: The option that the section names.
        section: A dataclass of `cmp.config`.

    Raises:
        ValueError: A key that belongs to other options of this kind is not at its default.
    """
    options, fields = options_of(kind), section.__dataclass_fields__
    read = options[name].settings
    for option in options.values():
        for key in option.settings:
            if key not in read and getattr(section, key) != fields[key].default:
                users = ", ".join(option_names(kind, key))
                raise ValueError(f"{key}: not used by {name!r}, only by {users}")


def load_plugin(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers options.

    If it was loaded before, its options are replaced.

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
    # files with the same name are different plugins
    name = f"cmp_plugin_{Path(path).stem}_{place[:12]}"
    _forget(name)  # an edited file may give an option another function
    try:
        if Path(path).suffix != ".py":
            raise CmpError("the name of a plugin must end in .py")
        spec = spec_from_file_location(name, path, loader=_PluginLoader(name, os.fspath(path)))
        assert spec and spec.loader
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # anything that the user's code raises
        _forget(name)
        kind = "" if isinstance(error, CmpError) else f"{type(error).__name__}: "
        raise CmpError(f"--plugin {path}: {kind}{error}") from error


class _PluginLoader(SourceFileLoader):
    """A loader that always compiles the source. Python finds the byte code that it keeps by a
    file's size and its time in whole seconds, so it would miss a second edit within one second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _forget(module: str) -> None:
    """Remove a module and the options that it registered."""
    sys.modules.pop(module, None)
    for kind, known in _options.items():
        _options[kind] = {key: x for key, x in known.items() if x.module != module}


def entry_names(group: str) -> list[str]:
    """Return the names of a group's installed entry points without loading them."""
    return list(_entry_points(group))


def load_entry(group: str, name: str) -> Any:
    """Load an installed entry point and return its object.

    Args:
        group: "cmp.data" (functions that return a `Corpus`), "cmp.models" (modules of a model
            family, see `cmp.starts.family_of`) or "cmp.statistics" (the module with tables of class
            statistics).
        name: The name of the entry point.

    Raises:
        CmpError: The entry point is not installed or cannot be loaded.
    """
    try:
        return _entry_points(group)[name].load()
    except Exception as error:  # not installed, or anything that third-party code raises
        why = f"cannot be loaded ({type(error).__name__}: {error}); reinstall its package"
        raise CmpError(f"entry point {name!r} of {group!r}: {why}, or uninstall it") from error


def _check_facts(kind: str, facts: Mapping[str, Any]) -> None:
    """Raise `CmpError` if options of a kind have no such property."""
    if unknown := sorted(facts.keys() - KINDS[kind].facts.keys()):
        raise CmpError(_unknown(f"property of a {kind}", unknown[0], KINDS[kind].facts))


def _unknown_option(kind: str, name: str) -> str:
    known = _unknown(kind.replace("_", " "), name, options_of(kind))
    return f"{known}; `cmpt --plugin FILE` loads others"


def _unknown(what: str, name: str, names: Collection[str]) -> str:
    return f"no {what} is called {name!r:.60}{name_choices(name, names)}"


def _is_redefined(old: Option, new: Option) -> bool:
    """Whether a definition replaces an earlier one because a notebook cell was run again."""
    values = old.value, new.value  # objects have the name of their class, which is defined anew too
    names = [getattr(value, "__qualname__", type(value).__qualname__) for value in values]
    return old.module == new.module and names[0] == names[1]
