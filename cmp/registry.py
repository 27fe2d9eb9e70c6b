"""Options by name: those of the package, and those that a notebook or a file adds.

A schedule, meta schedule, merge rule, merge policy, method, order or buffer is one decorated
function (or object). From then on its name is valid in a config, on the command line, in the
explorers and when a run is resumed.
"""

import builtins
import difflib
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cmp.errors import CmpError

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
    "method": Kind("cmp.methods", "method.name", {"needs_pool": False}),
    "order": Kind(
        "cmp.streams",
        "stream.order",
        {"statistics": False, "partial": False, "seeded": True},
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
        sources: Source text of the functions and classes that it consists of, by name, for an
            option that is not the package's own; empty otherwise.
    """

    kind: str
    name: str
    value: Any
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    sources: Mapping[str, str]

    @property
    def digest(self) -> str:
        """sha256 of the sources, which enters the id of runs that use the option."""
        text = "\n".join(f"# {name}\n{self.sources[name]}" for name in sorted(self.sources))
        return hashlib.sha256(text.encode()).hexdigest()


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

    def decorate(value: T) -> T:
        sources = _collect_sources(value)
        declared = dict(settings) if isinstance(settings, Mapping) else dict.fromkeys(settings)
        option = Option(kind, name, value, declared, KINDS[kind].facts | facts, sources)
        if sources:
            importlib.import_module(KINDS[kind].home)
        if (taken := _options[kind].get(name)) and not _is_redefined(taken.value, value):
            owner = "the package" if not taken.sources else "another definition"
            raise CmpError(f"{kind} {name!r}: {owner} has this name already; choose another")
        if sources:
            _home(kind).check_option(option)
        _options[kind][name] = option
        return value

    return decorate


def get_option(kind: str, name: str) -> Option:
    """Return a registered option; raise `CmpError` as `check_name` does for an unknown name."""
    options = _loaded(kind)
    if name not in options:
        raise CmpError(f"{KINDS[kind].key}: {unknown_name(kind, name)}")
    return options[name]


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
    return [
        name
        for name, option in _loaded(kind).items()
        if (setting is None or setting in option.settings)
        and all(option.facts[key] == value for key, value in facts.items())
    ]


def check_name(kind: str, name: str) -> str:
    """Return a name if it is registered; raise `ValueError` that lists the names otherwise."""
    if name not in _loaded(kind):
        raise ValueError(unknown_name(kind, name))
    return name


def unknown_name(kind: str, name: str) -> str:
    """Return the message for a name that is not registered: a near one, if any, and all."""
    return _unknown(name, _loaded(kind), kind.replace("_", " "))


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
    try:
        spec = spec_from_file_location(f"cmp_plugin_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise CmpError("the name of a plugin must end in .py")
        spec.loader.exec_module(module_from_spec(spec))
    except CmpError as error:
        raise CmpError(f"--plugin {path}: {error}") from error
    except Exception as error:  # whatever the user's code raises
        raise CmpError(f"--plugin {path}: {type(error).__name__}: {error}") from error


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """Return the installed entry points of a group, loaded.

    Args:
        group: "cmp.data" (functions that return a `Corpus`), "cmp.models" (modules of a model
            family, see `cmp.models.family_of`) or "cmp.statistics" (folders of tables).

    Returns:
        The loaded objects by name.
    """
    return {entry.name: entry.load() for entry in entry_points(group=group)}


def _home(kind: str) -> Any:
    return importlib.import_module(KINDS[kind].home)


def _loaded(kind: str) -> dict[str, Option]:
    """Return the options of a kind, the package's own among them."""
    _home(kind)
    return _options[kind]


def _check_near(name: str, names: Iterable[str], what: str) -> None:
    if name not in names:
        raise CmpError(_unknown(name, names, what))


def _unknown(name: str, names: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {what} is called {name!r:.60}{hint} There are {', '.join(names)}".replace(
        "' There", "'; there"
    )


def _is_redefined(old: Any, new: Any) -> bool:
    """Whether a definition takes the place of an earlier one: a notebook's cell was run again."""
    names = [getattr(value, "__qualname__", type(value).__qualname__) for value in (old, new)]
    modules = [_module_of(value) for value in (old, new)]
    return names[0] == names[1] and modules[0] == modules[1] and not _is_own(modules[0])


def _module_of(value: Any) -> str:
    return getattr(value, "__module__", None) or type(value).__module__


def _is_own(module: str) -> bool:
    return module == "cmp" or module.startswith("cmp.")


def _collect_sources(value: Any) -> dict[str, str]:
    """Return the source of an option that is not the package's own, with what it refers to in its
    module: functions, classes, and constants that are numbers or text."""
    todo, sources = list(_parts(value)), {}
    while todo:
        part = todo.pop()
        if _is_own(_module_of(part)) or part.__qualname__ in sources:
            continue
        try:
            sources[part.__qualname__] = textwrap.dedent(inspect.getsource(part))
        except (OSError, TypeError) as error:
            raise CmpError(
                f"{part.__qualname__}: its source cannot be read, so runs that use it could not be "
                "told apart; define it in a cell or in a file"
            ) from error
        for name, referred in _referred_globals(part).items():
            if isinstance(referred, int | float | str | bool | tuple):
                sources[name] = repr(referred)
            elif (inspect.isfunction(referred) or inspect.isclass(referred)) and (
                _module_of(referred) == part.__module__
            ):
                todo.append(referred)
    return sources


def _parts(value: Any) -> list[Any]:
    """Return the functions and classes that an option consists of."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return [value]
    fields = getattr(value, "__dataclass_fields__", {})
    return [part for name in fields if inspect.isfunction(part := getattr(value, name))]


def _referred_globals(part: Any) -> dict[str, Any]:
    functions = [part] if inspect.isfunction(part) else vars(part).values()
    referred: dict[str, Any] = {}
    for function in functions:
        function = getattr(function, "__func__", function)
        if not inspect.isfunction(function):
            continue
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [const for const in code.co_consts if inspect.iscode(const)]
            names = [name for name in code.co_names if name in function.__globals__]
            referred |= {name: function.__globals__[name] for name in names}
        if closure := inspect.getclosurevars(function).nonlocals:
            referred |= closure
    return {name: value for name, value in referred.items() if not hasattr(builtins, name)}
