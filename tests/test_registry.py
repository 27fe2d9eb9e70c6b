"""Options of one's own: what is refused at once, and what tells two definitions apart."""

import importlib
import linecache
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types
from importlib.metadata import EntryPoint

import forked
import pytest
import torch

import cmp
from cmp import config, data, mixtures, registry, streams
from cmp.embedded.packed import load_embedded
from cmp.errors import CmpError
from cmp.merging.apply import merge
from cmp.merging.policies import TaskEnd, apply_policy
from cmp.registry import KINDS, get_option, load_plugin, option_names, register
from cmp.runs import forecast, identity

pytestmark = pytest.mark.usefixtures("own_options")
IMPORTS = "import functools\nimport torch\nimport cmp\n"


@pytest.fixture
def notebook(monkeypatch):
    """Return a function that runs a cell as IPython does: in a module that has no file, from a text
    in linecache. It returns what the cells have defined so far."""

    def run_cell(text, name="notebook"):
        text = textwrap.dedent(text)
        cell = f"<cell {abs(hash(text))}>"
        linecache.cache[cell] = (len(text), None, text.splitlines(keepends=True), cell)
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        names = vars(sys.modules[name])
        exec(compile(text, cell, "exec"), names)
        return names

    run_cell(IMPORTS)
    return run_cell


@pytest.fixture
def digest_of(notebook):
    """Return a function that gives the digest of the option "mine" that a cell registers."""

    def digest(cell, kind="schedule"):
        notebook(cell)
        return get_option(kind, "mine").digest

    return digest


# --- names


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [
        ("schedule", "cosin", "cosine"),
        ("meta_schedule", "rsqrt-recoverd", "rsqrt-recovered"),
        ("merge_rule", "task-aritmetic", "task-arithmetic"),
        ("merge_policy", "emma", "ema"),
        ("method", "lorra", "lora"),
        ("order", "randm", "random"),
        ("buffer", "resevoir", "reservoir"),
    ],
)
def test_an_unknown_name_gets_a_near_one_and_the_list(kind, name, near):
    key, names = KINDS[kind].key, ", ".join(option_names(kind))
    begins = f"{key}: no {kind.replace('_', ' ')} is called"
    names += "; `cmpt --plugin FILE` loads others"
    with pytest.raises(CmpError) as error:
        get_option(kind, name)
    assert str(error.value) == f"{begins} {name!r}; did you mean {near!r}? There are {names}"
    with pytest.raises(CmpError) as error:  # where nothing is near, the list is enough
        get_option(kind, "xqzw")
    assert str(error.value) == f"{begins} 'xqzw'; there are {names}"
    section, _, key = key.partition(".")
    with pytest.raises(CmpError, match=rf"{section}\.{key}.*did you mean '{near}'"):
        config.parse({section: {key: name}})


def test_unknown_kinds_and_properties_are_refused():
    for call in (lambda: register("scedule", "x"), lambda: option_names("scedule")):
        with pytest.raises(CmpError, match="no kind of option is called 'scedule'; did you mean "):
            call()
    with pytest.raises(CmpError, match=r"no property of a schedule .*'continous'.*'continuous'"):
        register("schedule", "x", continous=True)
    with pytest.raises(CmpError, match="no property of a buffer is called 'linear'; there are"):
        register("buffer", "x", linear=True)
    with pytest.raises(CmpError, match=r"no property of a method .*'need_pool'.*'needs_pool'"):
        option_names("method", need_pool=True)


def test_a_setting_that_the_config_does_not_have_is_refused():
    with pytest.raises(CmpError, match=r"'warmpu': not a key .*'warmup'"):

        @register("schedule", "x", settings=("warmpu",))
        def x(task, step):
            return task.relative_peak

    assert "x" not in option_names("schedule")
    config.parse({"schedule": {"name": "cosine"}})


def test_only_a_method_may_have_defaults_of_its_own():
    """Those of other kinds would never be read."""
    words = "'warmup': only a method may have defaults"
    refuse("schedule", stairs, words, continuous=False, settings={"warmup": 0.3})


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_of_the_package_are_found_by_their_facts_and_settings(kind):
    options = {name: get_option(kind, name) for name in option_names(kind)}
    for name, option in options.items():
        assert (option.kind, option.name) == (kind, name)
        for fact, value in option.facts.items():
            alike = [other for other in options if options[other].facts[fact] == value]
            assert option_names(kind, **{fact: value}) == alike
        for setting in option.settings:
            readers = [other for other in options if setting in options[other].settings]
            assert option_names(kind, setting) == readers


# --- what is registered twice


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_the_package_is_taken(kind):
    name = option_names(kind)[0]
    value = get_option(kind, name).value
    with pytest.raises(CmpError, match=f"'{name}': the package already uses this name"):
        register(kind, name)(lambda *arguments: None)
    assert get_option(kind, name).value is value


SAWTOOTH = """
    TEETH = 4

    @cmp.register("schedule", "sawtooth", continuous=False)
    def sawtooth(task, step):
        length = task.N / TEETH
        return task.relative_peak * (1 - step % length / length)
"""


def test_a_name_of_another_function_is_taken_and_the_same_cell_replaces(notebook):
    notebook(SAWTOOTH)
    first = get_option("schedule", "sawtooth")
    notebook(SAWTOOTH.replace("return task", "return 0.5 * task"))
    second = get_option("schedule", "sawtooth")
    assert second.value is not first.value and second.digest != first.digest
    other = SAWTOOTH.replace("def sawtooth", "def another")
    with pytest.raises(CmpError, match="'sawtooth': another definition already uses this name"):
        notebook(other)
    notebook("import cmp", name="elsewhere")
    with pytest.raises(CmpError, match="'sawtooth': another definition already uses this name"):
        notebook(SAWTOOTH, name="elsewhere")
    assert get_option("schedule", "sawtooth") is second
    notebook(SAWTOOTH)
    assert get_option("schedule", "sawtooth").digest == first.digest
    assert option_names("schedule").count("sawtooth") == 1


def test_an_object_is_replaced_by_the_same_cell(notebook):
    cell = """
        def losses(state, output):
            return {"spread": output.image.var(dim=0).sum()}

        cmp.register("method", "low-spread", {"strength": 0.01})(cmp.UpdateMethod(losses=losses))
    """
    notebook(cell)
    digest = get_option("method", "low-spread").digest
    notebook(cell)
    assert get_option("method", "low-spread").digest == digest
    notebook(cell.replace("0.01", "0.02"))
    assert get_option("method", "low-spread").digest != digest
    assert get_option("method", "low-spread").settings == {"strength": 0.02}


def test_a_cell_that_registers_an_object_of_its_own_class_may_be_run_again(notebook):
    cell = """
        class Slope:
            def __call__(self, task, step):
                return task.relative_peak * (1 - 0.5 * step / task.N)

        cmp.register("schedule", "mine")(Slope())
    """
    notebook(cell)
    first = get_option("schedule", "mine")
    notebook(cell)
    assert get_option("schedule", "mine").digest == first.digest
    notebook(cell.replace("0.5", "0.25"))
    assert get_option("schedule", "mine").digest != first.digest
    with pytest.raises(CmpError, match="'mine': another definition already uses this name"):
        notebook(cell.replace("Slope", "Other"))


def test_a_method_with_an_optimizer_of_its_own_is_counted(notebook):
    notebook("""
        import torch
        own = cmp.UpdateMethod(optimizer=lambda section: torch.optim.Adamax)
        cmp.register("method", "own")(own)
    """)
    full, own = (cmp.step_cost("tiny", batch=4, method=name) for name in ("full", "own"))
    assert own.step == full.step
    assert own.memory == pytest.approx(full.memory, rel=1e-3)  # two moments as well


def test_a_replaced_option_is_at_once_in_use(notebook):
    notebook(SAWTOOTH)
    schedule = cmp.Schedule("sawtooth", peak=1.0)
    assert cmp.learning_rate(schedule, 40, 0, 5) == 0.5
    notebook(SAWTOOTH.replace("TEETH = 4", "TEETH = 2"))
    assert cmp.learning_rate(schedule, 40, 0, 5) == 0.75
    notebook(SAWTOOTH.replace("False", "False, settings=('warmup',)"))
    assert cmp.learning_rate(schedule, 40, 0, 0) == 0.25  # the first of four steps of warmup
    late = SAWTOOTH.replace("return task.relative_peak", "return (task.t > 4) * task.relative_peak")
    notebook(late)  # which the checks at registration cannot see
    with pytest.raises(CmpError, match="zero at every step of task 0"):
        config.parse({"schedule": {"name": "sawtooth"}})
    notebook(SAWTOOTH)
    config.parse({"schedule": {"name": "sawtooth"}})
    notebook(late)
    with pytest.raises(CmpError, match="zero at every step of task 0"):
        config.parse({"schedule": {"name": "sawtooth"}})


@pytest.mark.defect
def test_memory_is_counted_anew_if_what_a_method_uses_was_edited(notebook):
    """The method is the same object then."""
    notebook("""
        import torch

        COUNT = 1

        def keep(state):
            state.method_state["kept"] = torch.zeros(COUNT, 1000, device="meta")

        cmp.register("method", "mine")(cmp.UpdateMethod(prepare=keep))
    """)
    run = cmp.RunConfig(method=config.Method("mine"))
    held = forecast.memory_account(run)["method"]
    notebook("COUNT = 5")
    assert forecast.memory_account(run)["method"] == 5 * held > 0


# --- declared properties


def refuse(kind, function, match, **options):
    with pytest.raises(CmpError, match=match):
        register(kind, "mine", **options)(function)
    assert "mine" not in option_names(kind)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("merge_policy", "weight"), ("schedule", "peak"), ("order", "tasks"), ("buffer", "capacity")],
)
def test_an_option_may_not_list_a_key_that_every_option_reads(kind, key):
    """Listed, it would be refused for all other options, in new configs and in stored runs."""
    refuse(kind, lambda *given: None, f"'{key}': not a key .*; leave it out", settings=[key])
    config = cmp.RunConfig(
        merging=cmp.Merging("ema", weight=0.25), schedule=cmp.Schedule("constant", peak=2e-4)
    )
    assert config.merging.weight == 0.25


def stairs(task, step):
    return task.relative_peak * (1 if step < 50 else 0.5)


def test_a_fact_that_is_a_function_is_one():
    words = "warmup_target=0.5: give a function"
    refuse("schedule", stairs, words, continuous=False, warmup_target=0.5)


def end_task():
    memory = {"zero": {"x": torch.zeros(3)}}
    apply_policy(TaskEnd(cmp.Merging("mine"), memory, {"x": torch.ones(3)}, 1, 0))


USES = {
    "schedule": lambda: cmp.learning_rate(cmp.Schedule("mine", peak=1.0), 40, 0, 5),
    "meta_schedule": lambda: cmp.learning_rate(cmp.Schedule(meta="mine", peak=1.0), 40, 0, 5),
    "order": lambda: streams.class_order(forked.small_corpus(), config.Stream("mine"), 0),
    "buffer": lambda: mixtures.task_pools(
        forked.small_config("mixture.policy=mine"), forked.small_corpus()
    ),
    "merge_rule": lambda: merge("mine", [{"x": torch.ones(2, 3)}] * 3),
    "merge_policy": end_task,
}


@pytest.mark.parametrize(
    ("kind", "function", "facts", "words"),
    [
        ("schedule", lambda task, step: 1.5, {}, "schedule 'mine': 1.5 in task 0: return a mult"),
        ("schedule", lambda task, step: -0.1, {}, "-0.1 in task 0: return a multiple"),
        ("schedule", lambda task, step: float("nan"), {}, "nan in task 0: return a multiple"),
        ("schedule", lambda task, step: None, {}, "None in task 0: return a multiple"),
        ("meta_schedule", lambda task: "1", {}, "meta_schedule 'mine': '1' in task 0: return"),
        ("order", lambda table, seed: list(table.index), {}, "must return each position once"),
        ("order", lambda table, seed: range(3), {}, "must return each position once"),
        ("buffer", lambda history, *given: history.task >= 0, {}, "must return a pair: positions"),
        ("buffer", lambda *given: ([3, 3], None), {}, r"keeps \[3 3\]: expected different"),
        ("buffer", lambda history, *given: (history.rows + 999, None), {}, "keeps .*: expected"),
        ("buffer", lambda history, *given: ([], [0]), {}, "1 groups for 0 images"),
        ("merge_rule", lambda x, _: x.mean(), {}, r"returned shape \[\], but must .* shape \[6\]"),
        (
            "merge_rule", lambda x, _: x.mean(0).reshape(-1), {"matrix": True},
            r"returned shape \[6\], but must return shape \[2, 3\]",
        ),
        (
            "merge_rule", lambda models, *given: [1.0], {"linear": True},
            "returned 1 factors, but must return 3 factors",
        ),
        ("merge_policy", lambda end: end.trained, {}, "must return MergedWeights"),
    ],
)  # fmt: skip
def test_what_does_not_return_what_it_should_is_refused_where_it_is_used(
    kind, function, facts, words
):
    register(kind, "mine", **facts)(function)
    with pytest.raises(CmpError, match=words):
        USES[kind]()


def test_a_buffer_may_not_keep_more_than_its_capacity():
    register("buffer", "mine", capacity="required")(
        lambda history, capacity, seed: (range(len(history.rows)), None)
    )
    run = forked.small_config("mixture.policy=mine", "mixture.capacity=1")
    with pytest.raises(CmpError, match=r"keeps \d+ images, more than 1"):
        mixtures.task_pools(run, forked.small_corpus())


def test_a_merge_rule_may_ask_for_whole_matrices():
    shapes = []

    def turned(entries, block):
        shapes.append(entries.shape[1:])
        return entries.mean(0)

    register("merge_rule", "mine", matrix=True)(turned)
    models = [{"x": torch.full((2, 5), value), "s": torch.tensor(value)} for value in (1.0, 3.0)]
    merged = merge("mine", models)
    assert merged["x"].tolist() == [[2.0] * 5] * 2 and merged["s"].item() == 2
    assert shapes[-2:] == [(2, 5), ()]


# --- sources


def test_options_of_the_package_have_no_sources_and_leave_run_ids_alone():
    for kind in KINDS:
        for name in option_names(kind):
            assert get_option(kind, name).sources == {}, (kind, name)
    run_config, corpus = forked.small_config(), forked.small_corpus()
    before = identity.run_id_of(run_config, corpus)
    assert run_config.option_record() == {}
    register("schedule", "mine")(lambda task, step: task.relative_peak)
    assert identity.run_id_of(run_config, corpus) == before


CELL = """
    TEETH, UNUSED = 4, 5
    TABLE = {"b": [1, 2], "a": None}

    def helper(x, power=1):
        return x ** power

    class Wave:
        depth = 0.5

        def at(self, x):
            return self.depth * x

    @cmp.register("schedule", "mine", continuous=False)
    def mine(task, step, floor=0.25):
        wave = [Wave().at(step % TEETH / TEETH) for _ in range(1)][0]
        return task.relative_peak * max(floor, helper(wave, len(TABLE)))
"""


HOLDS = """
    import logging
    import random
    import re
    from math import sqrt

    import numpy as np

    LOG = logging.getLogger("mine")
    KEEP = {0, 8}
    PAIRS = {("a", 1): 2.0, ("b", 2): [frozenset("cd")]}
    ARRAY = np.array([1.5, 2.5])
    TENSOR = torch.tensor([1.5, 3.5], dtype=torch.bfloat16)
    NUMBER = re.compile("[0-9]+")
    NOISE = random.Random(3)
    GIVEN = frozenset({1})
    LAYER = torch.nn.CrossEntropyLoss(label_smoothing=0.4)

    def power(exponent):
        return lambda x: x**exponent

    def halved(function):
        @functools.wraps(function)
        def wrapper(x):
            return function(x) / 2

        return wrapper

    @halved
    def quarter(x):
        return x / 4

    POWERS = {"first": power(2), "second": quarter, "third": torch.abs}

    class Wave:
        kinds = {"sine"}

        @functools.cached_property
        def depth(self):
            return 0.5

    @cmp.register("schedule", "mine")
    def mine(task, step, given=GIVEN):
        LOG.debug("%s", [sqrt, KEEP, PAIRS, ARRAY, TENSOR, NUMBER, NOISE, LAYER, POWERS, Wave])
        return task.relative_peak
"""


@pytest.mark.parametrize(
    ("kind", "cell", "edits"),
    [
        (
            "schedule",
            CELL,
            [
                ("task.relative_peak * max", "0.9 * task.relative_peak * max"),  # the function
                ("floor=0.25", "floor=0.3"),  # a default
                ("x ** power", "abs(x) ** power"),  # a function that it calls
                ("TEETH, UNUSED = 4, 5", "TEETH, UNUSED = 8, 5"),  # a number
                ("[1, 2]", "[1, 3]"),  # a table
                ("depth = 0.5", "depth = 0.4"),  # an attribute of a class
                ("self.depth * x", "self.depth * x * x"),  # a method
                ("continuous=False", "continuous=False, warmup_target=None"),  # what is declared
            ],
        ),
        (
            "schedule",
            HOLDS,
            [
                ("{0, 8}", "{0, 9}"),
                ('("b", 2)', '("b", 3)'),  # a key
                ('"cd"', '"ce"'),
                ("[1.5, 2.5]", "[1.5, 2.0]"),
                ("[1.5, 2.5]", "[[1.5, 2.5]]"),  # a shape
                ("[1.5, 3.5]", "[1.5, 3.0]"),
                ("bfloat16", "float32"),
                ("[0-9]+", "[0-9]*"),
                ("Random(3)", "Random(4)"),
                ("smoothing=0.4", "smoothing=0.3"),
                ("power(2)", "power(3)"),
                ('"first": power(2), "second": quarter', '"first": quarter, "second": power(2)'),
                ("function(x) / 2", "function(x) / 3"),  # a decorator
                ("x / 4", "x / 5"),  # what is decorated
                ("torch.abs", "torch.neg"),
                ("from math", "from numpy"),
                ('{"sine"}', '{"saw"}'),
                ("return 0.5", "return 0.4"),
                ("{1}", "{2}"),  # of a default
            ],
        ),
        (
            "merge_policy",
            """
            from cmp.merging.policies import MergePolicy

            cmp.register("merge_policy", "mine")(MergePolicy("zero", "all"))
            """,
            [('"zero", "all"', '"last", "all"')],
        ),
        (
            "schedule",
            """
            def power(exponent, task, step):
                return task.relative_peak * (1 - step / task.N) ** exponent

            cmp.register("schedule", "mine")(functools.partial(power, 2))
            """,
            [("power, 2", "power, 3"), ("1 - step", "1 - 0.5 * step")],
        ),
        (
            "schedule",
            """
            def make(exponent):
                def mine(task, step):
                    return task.relative_peak * (1 - step / task.N) ** exponent

                return mine

            cmp.register("schedule", "mine")(make(2))
            """,
            [("make(2)", "make(3)")],
        ),
        (
            "schedule",
            """
            class Power:
                def __init__(self, exponent):
                    self.exponent = exponent

                def __call__(self, task, step):
                    return task.relative_peak * (1 - step / task.N) ** self.exponent

            cmp.register("schedule", "mine")(Power(2))
            """,
            [("Power(2)", "Power(3)"), ("1 - step", "1 - 0.5 * step")],
        ),
        (
            "schedule",
            """
            def target(task):
                return 0.5 * task.relative_peak

            cmp.register("schedule", "mine", warmup_target=target)(
                lambda task, step: task.relative_peak
            )
            """,
            [
                ("return 0.5", "return 0.4"),
                ("step: task.relative_peak", "step: task.relative_peak / 2"),
            ],
        ),
        (
            "method",
            """
            cmp.register("method", "mine")(cmp.UpdateMethod(
                losses=lambda state, output: {"a": output.image.mean()},
                begin_task=lambda state, task: None,
            ))
            """,
            [("image.mean()", "image.sum()"), ("state, task: None", "state, task: print(task)")],
        ),
        (
            "method",
            """
            from cmp.methods.adapters import SETTINGS, adapter_method
            from cmp.methods.lora import LoraAdapter

            class Mine(LoraAdapter):
                def reset(self, weight):
                    self.up.zero_()

            cmp.register("method", "mine", SETTINGS)(adapter_method(Mine))
            """,
            [("zero_()", "fill_(0)")],
        ),
    ],
)
def test_every_edit_that_matters_changes_the_digest(kind, cell, edits, digest_of):
    digest = digest_of(cell, kind)
    assert digest_of(cell, kind) == digest
    assert get_option(kind, "mine").sources
    for old, new in edits:
        assert old in cell
        assert digest_of(cell.replace(old, new), kind) != digest, new


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [
        (CELL, "UNUSED = 4, 5", "UNUSED = 4, 6"),
        (CELL, "helper(wave, len(TABLE)))\n", "helper(wave, len(TABLE)))\n\n    later = 1\n"),
        (HOLDS, "{0, 8}", "{8, 0}"),  # which are listed in another order
    ],
)
def test_other_edits_leave_the_digest_as_it_is(cell, old, new, digest_of):
    assert old in cell
    assert digest_of(cell.replace(old, new)) == digest_of(cell)


def test_what_cannot_be_told_apart_is_refused_by_its_name(digest_of):
    cell = """
        import threading

        shape = {}

        @cmp.register("schedule", "mine")
        def mine(task, step):
            return task.relative_peak * len(torch.ones(1).shape)
    """
    digest_of(cell.format("threading.Lock()"))  # only an attribute is called like the lock
    with pytest.raises(CmpError, match=r"lock.*so runs that use it cannot be distinguished"):
        digest_of(cell.format("threading.Lock()").replace("torch.ones(1).shape", "[shape]"))


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("from lent import slope", "slope(x)"),
        ("import lent", "lent.slope(x)"),
        ("import lent.steep", "lent.steep.slope(x)"),
    ],
)
def test_functions_of_other_files_of_the_user_count(line, call, tmp_path, monkeypatch, digest_of):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lent").mkdir()
    text = "FACTOR = 0.5\ndef slope(x):\n    return 1 - FACTOR * x\n"
    cell = f"""
        {line}

        FACTOR = 1.0

        @cmp.register("schedule", "mine")
        def mine(task, step):
            x = FACTOR * step / task.N
            return task.relative_peak * {call}
    """

    def digest(text):
        for name in ("lent", "lent.steep"):
            sys.modules.pop(name, None)
        (tmp_path / "lent/steep.py").write_text(text)
        (tmp_path / "lent/__init__.py").write_text("from lent.steep import slope\n")
        shutil.rmtree(tmp_path / "lent/__pycache__", ignore_errors=True)
        linecache.clearcache()
        return digest_of(cell)

    assert digest(text) == digest(text)
    edits = ("FACTOR = 0.5", "FACTOR = 0.4"), ("1 - FACTOR", "1 - 0.5 * FACTOR")
    assert len({digest(text), *(digest(text.replace(*edit)) for edit in edits)}) == 3
    for name in ("lent", "lent.steep"):
        del sys.modules[name]


def test_what_has_no_source_is_refused():
    names = {"cmp": cmp, "__name__": "typed"}
    text = "@cmp.register('schedule', 'mine')\ndef mine(task, step): return task.relative_peak"
    with pytest.raises(CmpError, match=r"\(<string> has no source\).* in a cell or a file"):
        exec(text, names)
    assert "mine" not in option_names("schedule")


def test_sources_are_recorded(notebook):
    notebook(CELL)
    [(key, record)] = forked.small_config("schedule.name=mine").option_record().items()
    assert key == "schedule:mine"
    assert record["sha256"] == get_option("schedule", "mine").digest
    text = "\n".join(record["sources"].values())
    for part in ("def mine(task, step", "def helper(x, power=1):", "def at(", "depth = 0.5"):
        assert part in text
    assert "TEETH = 4" in text and "UNUSED = " not in text


AGAIN = {
    "a constant": "TEETH = 2",
    "a helper": "def helper(x, power=1):\n    return x ** power / 2",
    "a class": "class Wave(Wave):\n    depth = 0.25",
}


@pytest.mark.parametrize("cell", AGAIN.values(), ids=AGAIN)
def test_what_an_option_uses_may_be_defined_again_in_a_cell_of_its_own(notebook, cell):
    notebook(CELL)
    run_config, corpus = forked.small_config("schedule.name=mine"), forked.small_corpus()
    names = notebook("")
    before = {**names}

    def known():
        return run_config.option_record(), identity.run_id_of(run_config, corpus)

    first = known()
    assert known() == first
    notebook(cell)
    assert all(old != new for old, new in zip(first, known(), strict=True))
    names.update(before)
    assert known() == first


def test_an_order_that_was_computed_is_not_kept_for_another_constant(notebook):
    notebook("""
        BACK = False

        @cmp.register("order", "mine", seeded=False)
        def mine(table, seed):
            return range(len(table))[::-1 if BACK else 1]
    """)
    corpus, stream = forked.small_corpus(), config.Stream("mine")
    order = streams.class_order(corpus, stream, 0)
    notebook("BACK = True")
    assert streams.class_order(corpus, stream, 0) == order[::-1] != order


def test_what_an_option_fills_while_it_is_used_is_no_change(notebook):
    notebook("""
        SEEN, COUNTS = {}, [0]
        DRAWS = torch.Generator().manual_seed(0)

        class Slope:
            calls = 0

            def __call__(self, task, step):
                self.calls += 1
                COUNTS[0] += 1
                noise = torch.rand(1, generator=DRAWS).item()
                return SEEN.setdefault(step, task.relative_peak * (1 - noise / 100))

        cmp.register("schedule", "mine")(Slope())
    """)
    digest = get_option("schedule", "mine").digest
    cmp.learning_rate(cmp.Schedule("mine"), 40, 0, 5)
    assert get_option("schedule", "mine").digest == digest


def test_a_file_that_is_edited_and_not_loaded_again_is_no_change(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(IMPORTS + textwrap.dedent(CELL))
    load_plugin(path)
    digest = get_option("schedule", "mine").digest
    path.write_text(IMPORTS + textwrap.dedent(CELL).replace("x ** power", "x"))
    assert get_option("schedule", "mine").digest == digest
    load_plugin(path)
    assert get_option("schedule", "mine").digest != digest


def test_a_helper_that_was_edited_before_its_first_use_is_refused(tmp_path, monkeypatch, notebook):
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "early_helper.py"
    helper.write_text("def slope(task):\n    return 0.25\n")
    notebook("import early_helper")
    helper.write_text("def slope(task):\n    return 0.75\n")
    with pytest.raises(CmpError, match=r"early_helper\.py was edited after it was imported"):
        notebook("""
            @cmp.register("schedule", "mine")
            def mine(task, step):
                return early_helper.slope(task)
        """)
    del sys.modules["early_helper"]


def test_a_helper_that_was_edited_after_its_import_is_refused(tmp_path, monkeypatch):
    """Python keeps the module, so the old code would run under the digest of the new one."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    helper, plugin = tmp_path / "slope_helper.py", tmp_path / "mine.py"
    helper.write_text("def slope(task):\n    return 0.25\n")
    plugin.write_text(
        "import cmp, slope_helper\n@cmp.register('schedule', 'mine')\n"
        "def mine(task, step): return slope_helper.slope(task)\n"
    )

    def load():
        load_plugin(plugin)
        rate = cmp.learning_rate(cmp.Schedule("mine", peak=1.0), 40, 0, 5)
        return rate, get_option("schedule", "mine").digest

    first = load()
    for text in ("def slope(task):\n    return 0.75\n", "def slope(", "# below\n" * 9):
        helper.write_text(text)
        with pytest.raises(CmpError, match=r"--plugin .*slope_helper\.py was edited after"):
            load_plugin(plugin)
    helper.write_text("def slope(task):\n    return 0.75\n")
    importlib.reload(sys.modules["slope_helper"])
    again = load()
    assert (first[0], again[0]) == (0.25, 0.75) and again[1] != first[1]
    del sys.modules["slope_helper"]


# --- plugins


def test_what_a_function_of_a_plugin_imports_counts(tmp_path):
    """It is not imported yet when the plugin registers the function."""
    (tmp_path / "mine.py").write_text(
        "import cmp\n@cmp.register('schedule', 'mine')\ndef mine(task, step):\n"
        "    if step < 0:\n        from lent_helper import slope\n        return slope(task)\n"
        "    return task.relative_peak\n"
    )

    def digest(helper, factor):
        (tmp_path / "lent_helper.py").write_text(helper)
        (tmp_path / "lent_factor.py").write_text(factor)
        load_plugin(tmp_path / "mine.py")
        return get_option("schedule", "mine").digest

    helper = "import lent_factor\ndef slope(task): return lent_factor.FACTOR\n"
    first = digest(helper, "FACTOR = 1.0")
    assert digest(helper, "FACTOR = 1.0") == first
    edits = (helper, "FACTOR = 0.001"), (helper.replace("return", "return 2 *"), "FACTOR = 1.0")
    assert len({first, *(digest(*edit) for edit in edits)}) == 3


def test_an_edited_plugin_replaces_its_options(tmp_path):
    path = tmp_path / "mine.py"
    text = "import cmp\n@cmp.register('buffer', '{}')\n"
    text += "def {}(history, capacity, seed): return range(len(history.rows)), None\n"
    for name, function in (("mine", "first"), ("mine", "second"), ("other", "second")):
        path.write_text(text.format(name, function))
        load_plugin(path)
        assert get_option("buffer", name).value.__name__ == function
    assert "mine" not in option_names("buffer")
    path.write_text(text.format("mine", "first") + "1 / 0")
    with pytest.raises(CmpError, match="ZeroDivisionError"):
        load_plugin(path)
    assert not {"mine", "other"} & {*option_names("buffer")}


def test_plugins_of_one_name_do_not_replace_each_other(tmp_path):
    plugin = IMPORTS + textwrap.dedent(SAWTOOTH)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(plugin.replace("step %", f"{ord(folder)} %"))
    load_plugin(tmp_path / "a/mine.py")
    first = get_option("schedule", "sawtooth")
    with pytest.raises(CmpError, match=r"b/mine\.py: .*another definition already uses this name"):
        load_plugin(tmp_path / "b/mine.py")
    assert get_option("schedule", "sawtooth") is first
    (tmp_path / "link").symlink_to(tmp_path / "a")
    load_plugin(tmp_path / "link/mine.py")  # the same file
    (tmp_path / "b/mine.py").write_text((tmp_path / "a/mine.py").read_text())
    registry.options_of("schedule").pop("sawtooth")
    load_plugin(tmp_path / "b/mine.py")
    assert get_option("schedule", "sawtooth").digest == first.digest  # wherever it lies
    assert get_option("schedule", "sawtooth").module != first.module


@pytest.mark.defect
def test_two_edits_of_a_plugin_within_a_second_both_count(tmp_path, monkeypatch, own_options):
    """Also where Python keeps byte code, which it finds by the file's size and time."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    plugin = IMPORTS + textwrap.dedent(SAWTOOTH)
    second, digests = int(time.time()) + 1, set()
    for length, time_of_edit in (("4", second + 0.25), ("8", second + 0.5)):
        path.write_text(plugin.replace("step %", f"{length} %"))
        os.utime(path, (time_of_edit, time_of_edit))
        load_plugin(path)
        digests.add(get_option("schedule", "sawtooth").digest)
    assert len(digests) == 2
    assert not (tmp_path / "__pycache__").exists()


def test_a_plugin_may_have_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent(
            """
            from __future__ import annotations
            from dataclasses import dataclass
            import cmp

            @dataclass
            class Slope:
                factor: float = 0.5

                def __call__(self, task, step):
                    return task.relative_peak * (1 - self.factor * step / task.N)

            cmp.register("schedule", "mine")(Slope(0.25))
            """
        )
    )
    load_plugin(path)
    sources = get_option("schedule", "mine").sources
    assert "class Slope:" in sources["mine.py"]
    assert "0.25" in "\n".join(sources[name] for name in sources if name != "mine.py")
    assert cmp.learning_rate(cmp.Schedule("mine", peak=1.0), 100, 0, 40) == 0.9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def broken(:", ["SyntaxError"]),
        ("import nothing_like_it", ["ModuleNotFoundError", "nothing_like_it"]),
        ("1 / 0", ["ZeroDivisionError"]),
        (
            "import cmp\n@cmp.register('schedule', 'cosine')\ndef mine(task, step): return 1",
            ["'cosine'", "the package already uses this name"],
        ),
    ],
)
def test_an_error_in_a_plugin_is_told_with_its_file(text, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    modules = set(sys.modules)
    with pytest.raises(CmpError) as error:
        load_plugin(path)
    assert not [name for name in set(sys.modules) - modules if "plugin" in name]
    for word in (f"--plugin {path}: ", *words):
        assert word in str(error.value)


def test_an_entry_point_that_is_missing_or_broken_is_told_and_breaks_no_other(monkeypatch):
    broken = EntryPoint("broken", "nothing_like_it:load", "cmp.data")
    entries = (broken, EntryPoint("embedded", "cmp.embedded.packed:load_embedded", "cmp.data"))
    named = {entry.name: entry for entry in entries}
    monkeypatch.setattr(registry, "_entry_points", lambda group: named)
    assert data.named_sources() == ["broken", "embedded"]
    assert registry.load_entry("cmp.data", "embedded") is load_embedded
    with pytest.raises(CmpError, match=r"'broken' of 'cmp\.data': .*\(ModuleNotFound"):
        data.load_data("broken")
    with pytest.raises(CmpError, match=r"'folder' of .*\(KeyError.*install its package"):
        data.load_data("pictures/")


def test_a_file_that_is_no_plugin_is_refused(tmp_path):
    with pytest.raises(CmpError, match=r"--plugin .*none\.py: FileNotFoundError"):
        load_plugin(tmp_path / "none.py")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(CmpError, match=r"--plugin .*mine\.txt: .*must end in \.py"):
        load_plugin(tmp_path / "mine.txt")


FIRST = """
import cmp
import cmp.registry

def option(*arguments):
    return 0.5

for kind in cmp.registry.KINDS:
    try:
        cmp.register(kind, "mine", settings=["nothing"])(option)
    except cmp.CmpError as error:
        print(error)
try:
    cmp.register("schedule", "wsd")(option)
except cmp.CmpError as error:
    print(error)
"""


@pytest.mark.long
def test_a_process_may_begin_with_an_option_of_its_own(tmp_path):
    """The package's own options, and the keys of all sections, are known by then."""
    (tmp_path / "first.py").write_text(FIRST)
    command = [sys.executable, str(tmp_path / "first.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 8 and all("not a key" in line for line in said[:7])
    assert "the package already uses this name" in said[7]
