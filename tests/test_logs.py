"""The log of a run: every step once, whatever happened in between, and shown as a line of bars."""

import functools
import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from forked import small_config, small_corpus
from typer.testing import CliRunner

from cmp import cli
from cmp.cli import runs
from cmp.embedded import packed
from cmp.errors import CmpError, Interrupted
from cmp.runs import checkpoints, identity, launch, logs, store
from cmp.runs.runner import Observer
from cmp.training import StepResult
from lab import chapter_setup

RUN = ("model.start=random", "evaluation.full=false")
TASKS, STEPS = 3, 4


@pytest.fixture
def build(tmp_path, monkeypatch):
    corpus = small_corpus()  # from where the data are
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(packed, "load_embedded", lambda *roles: corpus)
    return tmp_path / "build"


def every_step(table: pd.DataFrame) -> bool:
    steps = table.dropna(subset="step")[["task", "step"]].astype(int)
    return [*map(tuple, steps.to_numpy())] == [(t, s) for t in range(TASKS) for s in range(STEPS)]


def test_a_run_leaves_a_line_for_each_step_and_evaluation(build):
    losses = []
    watch = Observer(lambda task, step, result, model: losses.append(result.loss.item()))
    run = launch.run_one(small_config(*RUN), watch)
    table = logs.read_log(run.id)
    assert every_step(table)
    steps, scores = table.dropna(subset="step"), table.dropna(subset="done")
    assert list(steps["loss"]) == losses
    assert (steps["gradient_norm"] > 0).all()
    assert (steps["samples_per_second"] > 0).all()
    assert steps["time"].is_monotonic_increasing
    assert steps["rate"].max() == pytest.approx(run.config.schedule.peak)
    assert list(scores["done"]) == [0, 1, 2, 3]
    last = store.trajectory(run.metrics).iloc[-1]
    assert scores["A_KA"].iloc[-1] == pytest.approx(last["A_KA"])
    assert logs.log_path(run.id) == build / "logs" / f"{run.id[:12]}.jsonl"
    assert store.stored_ids() == [run.id[:12]]


def test_a_progress_bar_waits_for_no_step(monkeypatch):
    """Each loss that it shows is asked for twenty steps later, when a card has long had it."""
    waited, shown = [], []
    copy_later = lambda x: lambda: waited.append(x.item()) or x  # noqa: E731
    monkeypatch.setattr(runs, "copy_to_host", copy_later)
    bar = SimpleNamespace(update=lambda: None, set_postfix_str=shown.append, disable=False)
    bar.format_dict = {"rate": 2.0}
    observer = runs.progress_observer(bar, 8)
    for step in range(41):
        result = StepResult(torch.tensor(float(step)), torch.tensor(1.0), 1e-3)
        observer.step(0, step, result, torch.nn.Identity())
        assert waited == [0.0, 20.0][: step // 20]
    assert shown == ["16 images/s, loss 0.000", "16 images/s, loss 20.000"]


def test_a_cell_shows_the_losses_of_runs_in_progress(build):
    live = {("thirds", 0): small_config(*RUN)}
    assert chapter_setup.loss_curves(live) == ""
    log = logs.log_path(identity.run_id_of(live["thirds", 0]))
    log.parent.mkdir(parents=True)
    lines = [{"task": 0, "step": n, "loss": 4.0 - n} for n in range(3)]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    line = f"thirds: step 3 of {TASKS * STEPS}, loss 4.00 █▅▁ 2.00"
    assert chapter_setup.loss_curves(live) == line
    launch.run_one(live["thirds", 0])
    assert chapter_setup.loss_curves(live) == ""  # it has ended


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
@pytest.mark.parametrize("interval", [0.0, 1e6])
def test_a_run_that_goes_on_logs_no_step_twice(build, monkeypatch, stop, interval):
    """Stopped after some steps; what it saved is either each of them, or the last task's end."""
    run_config, count = small_config(*RUN), {"seen": 0}

    def step(*_):
        count["seen"] += 1
        if count["seen"] == stop:
            raise Interrupted("here", 15)

    make = functools.partial(checkpoints.CheckpointManager, interval=interval)
    monkeypatch.setattr(launch, "CheckpointManager", make)
    with pytest.raises(Interrupted):
        launch.run_one(run_config, Observer(step))
    run = launch.run_one(run_config)
    table = logs.read_log(run.id)
    assert every_step(table)
    assert list(table["done"].dropna()) == [0, 1, 2, 3]


def test_a_log_can_be_read_while_it_is_written(build):
    assert logs.read_log("a" * 64).empty
    path = logs.log_path("a" * 64)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"task": 0, "step": 0, "loss": 2.0}) + '\n{"task": 0, "st')
    assert list(logs.read_log("a" * 64)["loss"]) == [2.0]


def test_a_run_that_is_refused_leaves_no_log(build):
    with pytest.raises(CmpError, match="no annealed base 99"):
        launch.run_one(small_config("seeds.init=99"))
    assert not list(build.rglob("*.jsonl"))


def test_steps_are_written_every_few_seconds(build, monkeypatch):
    now, seen = {"seconds": 0.0}, []
    monkeypatch.setattr(logs.time, "monotonic", lambda: now["seconds"])
    run_config = small_config(*RUN)
    path = logs.log_path(identity.run_id_of(run_config))

    def step(*_):
        now["seconds"] += 2.0
        seen.append(path.read_text().count('"step"'))

    launch.run_one(run_config, Observer(step))
    assert seen[:4] == [0, 0, 0, 3]  # three steps make more than five seconds


def test_numbers_are_shown_as_bars():
    assert logs.sparkline(pd.Series([0.0, 1.0, 2.0, 3.0])) == "▁▃▆█"
    assert logs.sparkline(pd.Series([5.0, 5.0])) == "▁▁"
    assert logs.sparkline(pd.Series([None, 1.0, None, 2.0])) == "▁█"
    assert len(logs.sparkline(pd.Series(range(1000)))) == 40


def test_results_show_the_course_of_a_run(build):
    run = launch.run_one(small_config(*RUN))
    shown = CliRunner().invoke(cli.app, ["results", "show", run.id[:8]]).output
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if "▁" in line}
    assert {"loss", "gradient_norm", "rate"} <= lines.keys()
    losses = logs.read_log(run.id)["loss"].dropna()
    assert lines["loss"][1] == f"{losses.iloc[0]:.4g}"
    assert lines["loss"][3] == f"{losses.iloc[-1]:.4g}"


def test_a_board_that_is_not_installed_is_said(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(CmpError, match="pip install tensorboard"):
        launch.run_one(small_config(*RUN), board=build / "board")


def test_a_board_gets_every_number(build, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder):
            told.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            told.append("closed")

        def add_scalar(self, name, value, place):
            told.append((name, place))

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", type("M", (), {"SummaryWriter": Writer})
    )
    launch.run_one(small_config(*RUN), board=build / "board")
    assert told[0] == str(build / "board")
    assert told[-1] == "closed"
    assert [place for name, place in told[1:-1] if name == "loss"] == list(range(TASKS * STEPS))
    assert [place for name, place in told[1:-1] if name == "A_ZS"] == [0, 4, 8, 12]


def stopped_run():
    """The id of a run that was stopped after six steps of twelve, a checkpoint a step."""
    count = {"seen": 0}

    def step(*_):
        count["seen"] += 1
        if count["seen"] == 6:
            raise Interrupted("here", 15)

    with pytest.MonkeyPatch.context() as patch:
        make = functools.partial(checkpoints.CheckpointManager, interval=0.0)
        patch.setattr(launch, "CheckpointManager", make)
        with pytest.raises(Interrupted):
            launch.run_one(small_config(*RUN), Observer(step))
    return identity.run_id_of(small_config(*RUN))


def change_line(path, number, change):
    lines = path.read_bytes().split(b"\n")
    lines[number] = change(lines[number])
    path.write_bytes(b"\n".join(lines))


DAMAGES = {
    "no UTF-8": lambda line: line[:10] + bytes([line[10] ^ 0x80]) + line[11:],
    "no JSON": lambda line: line[:-1],
    "another digit": lambda line: line.replace(b'"loss": ', b'"loss": 1'),
    "a text": lambda line: b'{"task": 0, "step": 0, "loss": "low"}',
    "a list": lambda line: b"[1, 2]",
    "an unknown key": lambda line: line.replace(b"gradient_norm", b"gradient_nOrm"),
    "no step": lambda line: b'{"loss": 1.0}',
    "a huge number": lambda line: b'{"task": 0, "step": 0, "loss": 1%s}' % (b"0" * 400),
    "nothing but a half": lambda line: line[: len(line) // 2],
    "deeply nested": lambda line: b"[" * 100_000,
}


@pytest.mark.defect
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_line_of_a_log_stops_nothing_and_is_said(build, damage):
    run_id = stopped_run()
    path = logs.log_path(run_id)
    change_line(path, 2, damage)
    before = CliRunner().invoke(cli.app, ["results", "show", run_id[:8]])
    assert before.exit_code == 0 and "1 lines are damaged" in before.output
    run = launch.run_one(small_config(*RUN))
    table = logs.read_log(run.id)
    steps = table.dropna(subset="step")
    assert len(steps) == TASKS * STEPS - 1
    assert list(table["done"].dropna()) == [0, 1, 2, 3]
    shown = CliRunner().invoke(cli.app, ["results", "show", run.id[:8]])
    assert shown.exit_code == 0 and "1 lines are damaged" in shown.output
    change_line(path, 2, lambda line: b"")
    assert "damaged" not in CliRunner().invoke(cli.app, ["results", "show", run.id[:8]]).output


@pytest.mark.defect
@pytest.mark.parametrize("trouble", ["a folder", "a file above it", "full", "gone"])
def test_a_log_that_cannot_be_written_costs_no_run(build, monkeypatch, trouble):
    run_config = small_config(*RUN)
    path = logs.log_path(identity.run_id_of(run_config))

    def step(task, step, *_):
        if trouble == "gone" and (task, step) == (1, 1):
            path.unlink()

    if trouble == "a folder":
        path.mkdir(parents=True)
    elif trouble == "a file above it":
        build.mkdir()
        path.parent.write_text("")
    elif trouble == "full":
        path.parent.mkdir(parents=True)
        path.symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=path.name):
        run = launch.run_one(run_config, Observer(step))
    assert store.is_stored(run.id)
    assert CliRunner().invoke(cli.app, ["results", "show", run.id[:8]]).exit_code == 0


def test_a_log_of_0_2_0_without_checksums_is_read(build):
    path = logs.log_path("a" * 64)
    path.parent.mkdir(parents=True)
    rows = [{"done": 0, "A_KA": 11.5}, {"task": 0, "step": 0, "loss": float("nan"), "memory": 3}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    table, damaged = logs.check_log("a" * 64)
    assert damaged == 0 and list(table["memory"].dropna()) == [3]


@pytest.mark.defect
def test_a_board_that_fails_costs_no_run(build, monkeypatch):
    class Writer:
        def __init__(self, folder):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise OSError("no space")

        def add_scalar(self, name, value, place):
            raise OSError("no space")

    module = type("M", (), {"SummaryWriter": Writer})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.warns(UserWarning, match="--tensorboard: .*no space"):
        run = launch.run_one(small_config(*RUN), board=build / "board")
    assert every_step(logs.read_log(run.id))
