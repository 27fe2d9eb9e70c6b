"""The schedule explorer: what it says of a setting is right, and every control does its part."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from cmp import config, registry, schedules
from cmp.config import Schedule
from cmp.errors import CmpError
from lab import analyses, explorers, figures

pytestmark = pytest.mark.usefixtures("clean_drawing")
MORE = {
    "warmup": 0.2, "cooldown": 0.3, "shift": 7, "level": 0.25, "decay": 0.75,
    "peaks": (1.0, 0.5, 0.25),
}  # fmt: skip
PAIRS = [
    (name, meta)
    for name in registry.option_names("schedule")
    for meta in registry.option_names("meta_schedule")
    if registry.get_option("meta_schedule", meta).facts["curve"] in (None, name)
    and (name != "infinite" or meta == "none")
]
LABELS = {
    "name": "Schedule", "meta": "Meta schedule", "peak": "Peak", "tasks": "Tasks T",
    "steps": "Steps a task", "warmup": "Warmup, of a task", "cooldown": "Cooldown, of a task",
    "shift": "Shift, steps", "level": "Level, in peaks", "decay": "Decay, a task",
    "hold": "Hold this one",
}  # fmt: skip


class Explorer:
    """An explorer's controls by key, and what it shows."""

    def __init__(self, published=None):
        explorer = explorers.schedule_explorer(published)
        box, self.sentence, self.picture, self.below = explorer.children
        found = {control.description: control for control in box.children}
        self.controls = {key: found.pop(text) for key, text in LABELS.items()}
        assert not found

    def set(self, **values):
        for key, value in values.items():
            self.controls[key].value = value

    def enabled(self):
        return {key for key, control in self.controls.items() if not control.disabled}


@pytest.fixture
def drawn(monkeypatch):
    """The curves of every figure of learning rates that is drawn, in order."""
    found, original = [], figures.plot_learning_rates
    monkeypatch.setattr(
        figures, "plot_learning_rates", lambda curves: found.append(curves) or original(curves)
    )
    return found


def published(**changes):
    """Metrics of settings that change a schedule (or, with a dot, any key); two replicates. Scores
    after the stream are 30 and 40 for the first setting, one more for each that follows."""
    rows = []
    for place, (name, change) in enumerate(changes.items()):
        keys = [f"{key if '.' in key else f'schedule.{key}'}={v}" for key, v in change.items()]
        text = json.dumps(config.parse(config.override({}, keys)).to_dict())
        for replicate in range(2):
            for task, scope, base in ((0, "full", 10), (8, "full", 30), (8, "subset", 60)):
                about = {"setting": name, "replicate": replicate, "task": task, "scope": scope}
                for role, more in (("adapt", 0), ("eval", 10)):
                    score = base + more + place + replicate - 0.5
                    rows.append(about | {"role": role, "score": score, "config": text})
    return pd.DataFrame(rows)


def test_used_is_what_the_config_says():
    base = {"warmup", "warmup_steps"}
    assert analyses.schedule_keys("constant", "none") == set()
    assert analyses.schedule_keys("cosine", "geometric") == base | {"decay"}
    assert analyses.schedule_keys("linear", "free") == base | {"peaks"}
    cooled = base | {"cooldown", "cooldown_steps"}
    assert analyses.schedule_keys("rsqrt", "rsqrt") == cooled | {"shift"}
    assert analyses.schedule_keys("infinite", "none") == cooled | {"level"}


@pytest.mark.parametrize(("name", "meta"), PAIRS)
def test_a_setting_has_what_its_schedule_uses_and_nothing_else(name, meta):
    run = analyses.schedule_run(name, meta, 4e-4, 3, 10, **MORE)
    used = {key: MORE[key] for key in MORE if key in analyses.schedule_keys(name, meta)}
    assert run.schedule == Schedule(name, meta, 4e-4, **used)
    assert (run.stream.tasks, run.training.steps) == (3, 10)
    found = analyses.schedule_rates(run)
    assert found.shape == (3, 10)
    assert found[2, 4] == schedules.learning_rate(run.schedule, 10, 2, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"meta": "rsqrt-recovered"},
            "meta 'rsqrt-recovered' goes with 'rsqrt', not with 'cosine'",
        ),
        ({"name": "infinite", "meta": "cosine"}, "'infinite' is one curve over the stream"),
        (
            {"name": "wsd", "warmup": 0.7, "cooldown": 0.6},
            "warmup 28 + cooldown 24 steps in a task of 40",
        ),
        ({"meta": "free", "peaks": (1.0, 0.5)}, "schedule.peaks: 2 peaks for 8 tasks"),
        ({"meta": "free", "peaks": (1.0, 1.5)}, "peaks.1: Input should be less than or equal"),
    ],
)
def test_what_config_refuses_is_refused_in_its_words(values, words):
    usual = {"name": "cosine", "meta": "none", "peak": 1e-3, "tasks": 8, "steps": 40}
    with pytest.raises(CmpError) as error:
        analyses.schedule_run(**usual | values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_sentence_by_hand():
    run = analyses.schedule_run("constant", "geometric", 1e-3, 2, 4, decay=0.5)
    found = analyses.schedule_rates(run)
    assert explorers.schedule_sentence(run, found) == (
        "Mean rate 0.00075 = 0.75 of the peak 0.001, over 2 tasks x 4 steps; "
        "path length (the sum of all rates) 0.006."
    )


def test_distance_by_hand():
    one = np.array([1.0, 1.0])
    assert analyses.schedule_distance(one, one) == 0
    assert analyses.schedule_distance(one, 2 * one) == pytest.approx(np.log(2))
    assert analyses.schedule_distance(one, np.array([1.0, np.e])) == pytest.approx(np.sqrt(0.5))
    assert analyses.schedule_distance(one, np.ones(3)) == np.inf
    assert analyses.schedule_distance(np.zeros(2), np.zeros(2)) == 0
    assert np.isfinite(analyses.schedule_distance(one, np.zeros(2)))


SHARES = st.integers(0, 9).map(lambda twentieths: twentieths / 20)  # two fit into a task
VALUES = {
    "peak": st.builds("{}e{}".format, st.integers(100, 999), st.integers(-7, -4)).map(float),
    "tasks": st.integers(1, 20), "steps": st.integers(5, 200), "shift": st.integers(0, 400),
    "warmup": SHARES, "cooldown": SHARES, "level": SHARES, "decay": SHARES,
    "peaks": st.lists(SHARES, min_size=20, max_size=20).map(tuple),
}  # fmt: skip


@given(st.sampled_from(PAIRS), st.fixed_dictionaries(VALUES))
def test_copied_arguments_make_the_same_run(pair, values):
    try:
        run = analyses.schedule_run(*pair, **values)
    except CmpError as error:
        assert "the learning rate is zero at every step of task" in str(error)
        return
    arguments = shlex.split(" ".join(explorers.run_arguments(run)))
    assert config.parse(config.override(config.profile("cpu"), arguments)) == run
    own, usual = (each.changes() for each in (run, config.parse(config.profile("cpu"))))
    changed = {key for key in own | usual if own.get(key) != usual.get(key)}
    assert {argument.partition("=")[0] for argument in arguments} == changed


def test_copied_arguments_are_short():
    assert explorers.run_arguments(config.parse(config.profile("cpu"))) == []
    run = analyses.schedule_run(
        "rsqrt", "free", 4e-5, 2, 40, warmup=0.1, cooldown=0.5, peaks=(1, 0.5)
    )
    assert explorers.run_arguments(run) == [
        "stream.tasks=2",
        "schedule.name=rsqrt",
        "schedule.meta=free",
        "schedule.peak=4e-05",
        "schedule.cooldown=0.5",
        "'schedule.peaks=[1.0,0.5]'",
    ]


def test_nearest_runs():
    frame = published(
        **{"half": {"peak": 0.0005}, "carried": {"optimizer.carry": "true"}, "cosine": {}},
        **{"meta": {"meta": "cosine"}, "short": {"stream.tasks": 4}, "tenth": {"peak": 0.0001}},
    )
    run = analyses.schedule_run("cosine", "none", 1e-3, 8, 40)
    table = analyses.nearest_schedules(run, analyses.stored_schedules(frame), count=4)
    assert table["setting"].tolist() == ["cosine", "carried", "half", "meta"]
    assert table["distance"].tolist()[:3] == [0, 0, 0.693]
    assert table["differs also in"].tolist() == ["", "optimizer.carry=True", "", ""]
    assert table["A_KA (%)"].tolist() == [32, 31, 30, 33]
    assert table["A_ZS (%)"].tolist() == [42, 41, 40, 43]
    shorter = analyses.schedule_run("cosine", "none", 1e-3, 4, 40)
    assert analyses.nearest_schedules(shorter, analyses.stored_schedules(frame))[
        "setting"
    ].tolist() == ["short"]
    with pytest.raises(CmpError, match="published: no column config"):
        analyses.stored_schedules(frame.drop(columns="config"))


def test_runs_without_a_full_test_are_scored_on_the_subset():
    frame = published(cosine={}).query("scope == 'subset'")
    stored = analyses.stored_schedules(frame)
    assert stored.loc["cosine", ["A_KA", "A_ZS"]].tolist() == [60.0, 70.0]


def test_the_first_picture_is_that_of_the_defaults(drawn):
    explorer = Explorer()
    run = config.RunConfig()
    ((label, rates),) = drawn[0].items()
    assert label == "cosine, peak 0.001"
    assert rates.tolist() == schedules.learning_rates(run.schedule, 8, 40).tolist()
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")
    assert "over 8 tasks x 40 steps" in explorer.sentence.value
    words = explorer.below.value.partition("cmpt run cpu")[2].partition("</pre>")[0].split()
    assert {*words} - {"\\"} == {"stream.tasks=8", "schedule.name=cosine", "schedule.peak=0.001"}
    assert "stored run" not in explorer.below.value


MOVED = {
    "peak": (1e-4, "cosine", "none", "schedule.peak=0.0001"),
    "tasks": (3, "cosine", "none", "stream.tasks=3"),
    "steps": (100, "cosine", "none", "training.steps=100"),
    "warmup": (0.3, "cosine", "none", "schedule.warmup=0.3"),
    "cooldown": (0.5, "wsd", "none", "schedule.cooldown=0.5"),
    "shift": (100, "rsqrt", "none", "schedule.shift=100"),
    "level": (0.2, "infinite", "none", "schedule.level=0.2"),
    "decay": (0.9, "constant", "geometric", "schedule.decay=0.9"),
    "name": ("linear", "linear", "none", "schedule.name=linear"),
    "meta": ("cosine", "cosine", "cosine", "schedule.meta=cosine"),
}


@pytest.mark.parametrize("key", MOVED)
def test_every_control_draws_again(key, drawn):
    value, name, meta, argument = MOVED[key]
    explorer = Explorer()
    explorer.set(**{k: v for k, v in {"name": name, "meta": meta}.items() if k != key})
    count, before = len(drawn), bytes(explorer.picture.value)
    assert key in explorer.enabled()
    explorer.set(**{key: value})
    assert len(drawn) == count + 1
    assert bytes(explorer.picture.value) != before
    assert argument in explorer.below.value
    assert getattr(explorer.controls[key], "continuous_update", False) is False


def test_controls_are_on_where_the_schedule_uses_them(monkeypatch):
    monkeypatch.setattr(figures, "plot_learning_rates", lambda curves: Figure())
    explorer = Explorer()
    for name, meta in PAIRS:
        if meta == "free":
            continue
        explorer.set(name=name, meta=meta)
        used = analyses.schedule_keys(name, meta) & set(LABELS)
        assert explorer.enabled() == {"name", "meta", "peak", "tasks", "steps", "hold"} | used
        assert "Refused" not in explorer.sentence.value


def test_every_key_of_a_schedule_has_a_control():
    keys = {
        key
        for kind in ("schedule", "meta_schedule")
        for name in registry.option_names(kind)
        for key in registry.get_option(kind, name).settings
        if not key.endswith("_steps")
    }
    assert keys - {"peaks"} <= set(Explorer().controls)


def test_a_refusal_keeps_the_last_picture():
    explorer = Explorer()
    before, below = bytes(explorer.picture.value), explorer.below.value
    explorer.set(meta="rsqrt-recovered")
    assert "meta 'rsqrt-recovered' goes with 'rsqrt', not with 'cosine'" in explorer.sentence.value
    assert "<b>Refused:</b>" in explorer.sentence.value
    assert (bytes(explorer.picture.value), explorer.below.value) == (before, below)
    explorer.set(name="rsqrt", meta="rsqrt-recovered")
    assert "Refused" not in explorer.sentence.value
    assert bytes(explorer.picture.value) != before


def test_a_held_setting_is_compared_with_until_it_is_let_go(drawn):
    explorer = Explorer()
    explorer.set(peak=5e-4)
    explorer.set(hold=True)
    explorer.set(meta="cosine", tasks=4)
    assert list(drawn[-1]) == ["cosine, meta cosine, peak 0.0005", "held: cosine, peak 0.0005"]
    now, held = drawn[-1].values()
    assert (now.shape, held.shape) == ((4, 40), (8, 40))
    assert held.tolist() == schedules.learning_rates(Schedule(peak=5e-4), 8, 40).tolist()
    explorer.set(hold=False)
    assert len(drawn[-1]) == 1
    explorer.set(hold=True)
    assert list(drawn[-1])[1] == "held: cosine, meta cosine, peak 0.0005"


def test_stored_runs_are_listed_below():
    explorer = Explorer(published(cosine={}, lower={"peak": 0.0002}))
    assert "lower" in explorer.below.value
    assert explorer.below.value.index("cosine</td>") < explorer.below.value.index("lower</td>")
    explorer.set(peak=2e-4)
    assert explorer.below.value.index("lower</td>") < explorer.below.value.index("cosine</td>")
    explorer.set(tasks=5)
    assert "No stored run is of a stream of 5 tasks" in explorer.below.value


def test_the_still_shows_every_curve_and_every_meta_schedule():
    figure = figures.plot_schedules()
    assert isinstance(figure, Figure)
    titles = [axes.get_title() for axes in figure.axes if axes.lines]
    assert titles[: len(registry.option_names("schedule"))] == list(
        registry.option_names("schedule")
    )
    metas = [
        title.partition(", meta ")[2] for title in titles[len(registry.option_names("schedule")) :]
    ]
    assert metas == [meta for meta in registry.option_names("meta_schedule") if meta != "none"]
    assert len(figures.FREE_PEAKS) == 8
    for axes in figure.axes:
        assert all(len(line.get_ydata()) == 8 * 40 for line in axes.lines)
