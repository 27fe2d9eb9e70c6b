"""The log of a run: every step once, whatever happened in between, and shown as a line of bars."""

import functools
import json
import os
import shutil
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import options
import pandas as pd
import pytest
import torch
from forked import small_config, small_corpus
from typer.testing import CliRunner

from cmp import budgets, cli
from cmp.cli import computing
from cmp.embedded import packed
from cmp.errors import CmpError, Interrupted
from cmp.registry import register
from cmp.runs import checkpoints, identity, launch, logs, store
from cmp.runs.runner import Observer
from cmp.scale import decoding
from cmp.training import StepResult, UpdateMethod
from lab import chapter_setup

RUN = ("model.start=random", "evaluation.full=false")
TASKS, STEPS = 3, 4


@pytest.fixture
def build(tmp_path, monkeypatch):
    corpus = small_corpus()  # from where the data are
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(packed, "load_embedded", lambda *roles: corpus)
    return tmp_path / "build"


def log_of(run_id: str) -> pd.DataFrame:
    return logs.read_log(logs.log_path(run_id))


def every_step(table: pd.DataFrame) -> bool:
    steps = table.dropna(subset="step")[["task", "step"]].astype(int)
    return [*map(tuple, steps.to_numpy())] == [(t, s) for t in range(TASKS) for s in range(STEPS)]


def test_a_run_leaves_a_line_for_each_step_and_evaluation(build):
    losses = []
    watch = Observer(lambda task, step, result, model: losses.append(result.loss.item()))
    run = launch.run_one(small_config(*RUN), watch)
    table = log_of(run.id)
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
    assert logs.log_path(run.id) == build / "runs" / run.id[:12] / "log.jsonl"
    assert store.stored_ids() == [run.id[:12]]


def test_a_ruined_run_is_called_so_where_it_is_printed(build, capsys):
    for peak, is_ruined in ((1e-4, False), (3, True)):
        run = launch.run_one(
            small_config(*RUN, f"schedule.peak={peak}", "training.task_steps=[1, 1, 12]")
        )
        computing.print_run(run)
        assert ("may be ruined" in capsys.readouterr().out) == is_ruined


def test_a_progress_bar_waits_for_no_step(monkeypatch):
    """Each loss that it shows is asked for twenty steps later, when a card has long had it."""
    waited, shown = [], []
    copy_later = lambda x: lambda: waited.append(x.item()) or x  # noqa: E731
    monkeypatch.setattr(computing, "copy_to_host", copy_later)
    bar = SimpleNamespace(update=lambda: None, set_postfix_str=shown.append, disable=False)
    bar.format_dict = {"rate": 2.0}
    observer = computing.progress_observer(bar)
    for step in range(41):
        result = StepResult(torch.tensor(float(step)), torch.tensor(1.0), 1e-3, samples=8)
        observer.step(0, step, result, torch.nn.Identity())
        assert waited == [0.0, 20.0][: step // 20]
    assert shown == ["16 images/s, loss 0.000", "16 images/s, loss 20.000"]


def test_a_cell_shows_the_losses_of_runs_in_progress(build):
    live = {("thirds", 0): small_config(*RUN)}
    assert chapter_setup.loss_curves(live) == ""
    log = logs.log_path(identity.run_id_of(live["thirds", 0]))
    log.parent.mkdir(parents=True)
    log.write_text(
        '{"task": 0, "step": 0, "loss": NaN}\n'
    )  # diverged, as seen a step later on a GPU
    assert chapter_setup.loss_curves(live) == ""
    lines = [{"task": 0, "step": n, "loss": 4.0 - n} for n in range(3)]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    line = f"thirds: step 3 of {TASKS * STEPS}, loss 4.00 █▅▁ 2.00"
    assert chapter_setup.loss_curves(live) == line
    launch.run_one(live["thirds", 0])
    assert chapter_setup.loss_curves(live) == ""  # it has ended


@pytest.mark.parametrize(
    ("stop", "interval"),
    options.one_in(
        2, [pytest.param(6, 0.0), pytest.param(1, 0.0), pytest.param(11, 1e6), pytest.param(4, 1e6)]
    ),
)
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
    table = log_of(run.id)
    assert every_step(table)
    assert list(table["done"].dropna()) == [0, 1, 2, 3]


def test_a_checkpoint_comes_after_the_lines_of_its_steps(build, monkeypatch):
    """A kill right behind a checkpoint loses no line, as the run goes on after these steps."""
    run_config, write, lines = small_config(*RUN), checkpoints.write_checkpoint, []

    def write_and_look(state, folder):
        kept = log_of(state.progress.run)
        lines.append((state.progress.task * STEPS + state.progress.step, kept.get("loss", [])))
        return write(state, folder)

    make = functools.partial(checkpoints.CheckpointManager, interval=0.0)
    monkeypatch.setattr(launch, "CheckpointManager", make)
    monkeypatch.setattr(checkpoints, "write_checkpoint", write_and_look)
    launch.run_one(run_config)
    assert [done for done, _ in lines] == [*range(TASKS * STEPS + 1)]
    assert all(pd.Series(losses, dtype=float).count() == done for done, losses in lines)


def test_a_log_can_be_read_while_it_is_written(build):
    assert log_of("a" * 64).empty
    path = logs.log_path("a" * 64)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"task": 0, "step": 0, "loss": 2.0}) + '\n{"task": 0, "st')
    assert list(log_of("a" * 64)["loss"]) == [2.0]


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
    losses = log_of(run.id)["loss"].dropna()
    assert lines["loss"][1] == f"{losses.iloc[0]:.4g}"
    assert lines["loss"][3] == f"{losses.iloc[-1]:.4g}"


def test_a_board_that_is_not_installed_is_said(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(CmpError, match="pip install tensorboard"):
        launch.run_one(small_config(*RUN), boards={"tensorboard": str(build / "board")})


def test_a_board_gets_every_number(build, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder):
            told.append(folder)

        def close(self):
            told.append("closed")

        def add_scalar(self, name, value, place):
            told.append((name, place))

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", type("M", (), {"SummaryWriter": Writer})
    )
    launch.run_one(small_config(*RUN), boards={"tensorboard": str(build / "board")})
    assert told[0] == str(build / "board")
    assert told[-1] == "closed"
    assert [place for name, place in told[1:-1] if name == "loss"] == list(range(TASKS * STEPS))
    assert [place for name, place in told[1:-1] if name == "A_ZS"] == [0, 4, 8, 12]


class FakeWandb:
    """The module `wandb`, as far as a board uses it, offline: it notes what it receives."""

    def __init__(self):
        self.options, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.options.append(options)
        return self

    def log(self, numbers, step):
        self.rows.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_get_every_number_and_a_resumed_run_its_entry(build, wandb):
    boards = {"wandb": "clip"}
    count = {"seen": 0}

    def stop(*_):
        count["seen"] += 1
        if count["seen"] == 6:
            raise Interrupted("here", 15)

    with pytest.raises(Interrupted):
        launch.run_one(small_config(*RUN), Observer(stop), boards=boards)
    run = launch.run_one(small_config(*RUN), boards=boards)
    assert wandb.finished == 2
    assert {options["project"] for options in wandb.options} == {"clip"}
    assert {options["id"] for options in wandb.options} == {run.id[:12]}
    assert {options["resume"] for options in wandb.options} == {"allow"}
    assert wandb.options[0]["config"] == run.config.to_dict()
    table = log_of(run.id)
    steps = [(step, row["loss"]) for step, row in wandb.rows if "loss" in row]
    assert steps[-1] == (TASKS * STEPS - 1, table["loss"].dropna().iloc[-1])
    assert {step for step, row in wandb.rows if "A_ZS" in row} == {0, 4, 8, 12}


def test_a_run_from_a_shell_passes_its_project_on(build, wandb):
    command = ["run", "quick", *RUN, "stream.tasks=2", "training.steps=2", "training.batch=4",
               "evaluation.subset=1", "--wandb", "clip"]  # fmt: skip
    stopped = CliRunner().invoke(cli.app, [*command, "--stop-after", "1"])
    assert stopped.exit_code == 0, stopped.output
    assert [options["project"] for options in wandb.options] == ["clip"]


def test_without_wandb_the_option_says_what_to_install(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CmpError, match="--wandb: not installed; run `pip install wandb`"):
        launch.run_one(small_config(*RUN), boards={"wandb": "clip"})


def test_an_entry_that_fails_costs_no_run_and_no_other_board(build, wandb, monkeypatch):
    def fail(numbers, step):
        raise OSError("no network")

    monkeypatch.setattr(wandb, "log", fail)
    with pytest.warns(UserWarning, match="--wandb: .*no network"):
        run = launch.run_one(small_config(*RUN), boards={"wandb": "clip"})
    assert every_step(log_of(run.id))


@pytest.mark.skipif(
    find_spec("wandb") is None and os.environ.get("REQUIRE_EXTRAS") != "1",
    reason="needs the extra `wandb`",
)
def test_the_real_wandb_takes_a_run_offline(build, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    launch.run_one(small_config(*RUN), boards={"wandb": "clip"})
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_the_time_spent_waiting_for_images_is_logged(build, monkeypatch):
    """A quarter of the time of the steps, and all of that of the evaluations between them, by the
    clocks of a test."""
    now = {"seconds": 0.0, "waited": 0.0}
    monkeypatch.setattr(logs.time, "monotonic", lambda: now["seconds"])
    monkeypatch.setattr(logs.decoding, "seconds_waited", lambda: now["waited"])

    def step(*_):
        now["seconds"] += 2.0
        now["waited"] += 0.5

    def task(*_):
        now["seconds"] += 10.0
        now["waited"] += 10.0

    run = launch.run_one(small_config(*RUN), Observer(step, task))
    assert set(log_of(run.id)["waiting"].dropna()) == {0.25}
    shown = CliRunner().invoke(cli.app, ["results", "show", run.id[:8]]).output
    assert "waiting            0.25" in shown


def test_waiting_is_what_the_loader_takes(monkeypatch):
    """Without processes, items are made while they are waited for."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now["seconds"])
    before = decoding.seconds_waited()

    def make(key):
        now["seconds"] += 2.0
        return torch.tensor(key)

    for _ in decoding.prefetch(make, range(3), 0, torch.device("cpu")):
        now["seconds"] += 5.0
    assert decoding.seconds_waited() - before == 6.0


@pytest.mark.parametrize(("card", "known"), [("NVIDIA A100-SXM4-80GB", True), ("FPU 1", False)])
def test_on_a_card_the_share_of_its_peak_is_logged(build, monkeypatch, card, known):
    """Of a card whose peak is known: steps of two seconds each, by the clock of a test."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(logs.time, "monotonic", lambda: now["seconds"])
    monkeypatch.setattr("cmp.scale.devices.device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    reset = []  # a run's memory is not that of an earlier one
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    run_config = small_config(*RUN)
    samples = run_config.training.batch
    log = logs.RunLog(logs.log_path("a" * 64), "a" * 64, run_config, "cuda")
    with log:
        assert reset == ["cuda"]
        observer = log.observe(Observer())
        for number in range(4):
            now["seconds"] += 2.0
            result = StepResult(torch.tensor(1.0), torch.tensor(1.0), 1e-3, samples)
            observer.step(0, number, result, torch.nn.Identity())
        table = log_of("a" * 64)
    expected = budgets.full_cost(run_config).step / 2 / 312e12
    assert ("peak_share" in table) == known
    if known:
        assert table["peak_share"].to_list() == pytest.approx([expected] * STEPS, rel=0.01)


def test_rates_count_the_samples_of_steps_and_no_evaluation(build, monkeypatch):
    """Batches of two samples, as `training.passes` may give a small update, a second each."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(logs.time, "monotonic", lambda: now["seconds"])
    scores = SimpleNamespace(summary=lambda: {"A_KA": 1.0})
    with logs.RunLog(logs.log_path("a" * 64), "a" * 64, small_config(*RUN), "cpu") as log:
        observer = log.observe(Observer())
        for task in range(TASKS):
            for step in range(STEPS):
                now["seconds"] += 1.0
                result = StepResult(torch.tensor(1.0), torch.tensor(1.0), 1e-3, samples=2)
                observer.step(task, step, result, torch.nn.Identity())
            now["seconds"] += 100.0
            observer.task(task + 1, scores)
    assert set(log_of("a" * 64)["samples_per_second"].dropna()) == {2.0}


@pytest.mark.parametrize("hook", ["prepare", "losses", "optimizer", "end_task"])
def test_a_method_that_reads_data_or_values_is_logged_without_its_share(
    build, monkeypatch, own_options, hook
):
    reads = {
        "prepare": lambda state: len(state.corpus.classes),
        "losses": lambda state, output: {"new": output.image[output.image > 0].mean()},
        "optimizer": lambda section: lambda groups, **_: groups[0]["params"][0].max().item(),
        "end_task": lambda state, encode_further: state.model.logit_scale.item(),
    }
    register("method", "reads")(UpdateMethod(**{hook: reads[hook]}))
    run_config = small_config(*RUN, "method.name=reads")
    monkeypatch.setattr("cmp.scale.devices.device_name", lambda device: "NVIDIA H100")
    assert logs.RunLog(build / "log", "a" * 64, run_config, "cuda").share == 0.0
    with pytest.raises(CmpError, match="'reads': its cost cannot be counted without data"):
        budgets.method_cost(run_config)


@pytest.fixture(scope="module")
def stopped_folder(tmp_path_factory):
    """The build folder of a run that was stopped after all steps but one, a checkpoint a step."""
    corpus, folder, count = small_corpus(), tmp_path_factory.mktemp("stopped"), {"seen": 0}

    def step(*_):
        count["seen"] += 1
        if count["seen"] == TASKS * STEPS - 1:
            raise Interrupted("here", 15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(folder))
        patch.setattr(packed, "load_embedded", lambda *roles: corpus)
        make = functools.partial(checkpoints.CheckpointManager, interval=0.0)
        patch.setattr(launch, "CheckpointManager", make)
        with pytest.raises(Interrupted):
            launch.run_one(small_config(*RUN), Observer(step))
    return folder


@pytest.fixture
def stopped(build, stopped_folder):
    """The log of that run, in a copy of its build folder."""
    shutil.copytree(stopped_folder, build)
    return logs.log_path(identity.run_id_of(small_config(*RUN)))


@pytest.mark.parametrize("half", [b'{"task": 0, "st', b'{"done": 2, "A_KA": 1\xc3'])
def test_half_a_line_is_left_out_and_gone_once_the_run_goes_on(stopped, half):
    """A kill left it behind all lines, also those of steps that were not saved."""
    run_id = identity.run_id_of(small_config(*RUN))
    whole = log_of(run_id)
    stopped.write_bytes(stopped.read_bytes() + half)
    assert log_of(run_id).equals(whole)
    launch.run_one(small_config(*RUN))
    assert every_step(log_of(run_id))
    assert list(log_of(run_id)["done"].dropna()) == [0, 1, 2, 3]
    for line in stopped.read_text().splitlines():
        json.loads(line)


@pytest.mark.defect
@pytest.mark.parametrize(
    "trouble",
    ["full", "gone", pytest.param("a folder", marks=pytest.mark.long)],
)
def test_a_log_that_cannot_be_written_costs_no_run(build, monkeypatch, trouble):
    run_config = small_config(*RUN)
    path = logs.log_path(identity.run_id_of(run_config))

    def step(task, step, *_):
        if trouble == "gone" and (task, step) == (1, 1):
            path.unlink()

    if trouble == "a folder":
        path.mkdir(parents=True)
    elif trouble == "full":
        path.parent.mkdir(parents=True)
        path.symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=path.name):
        run = launch.run_one(run_config, Observer(step))
    assert store.is_stored(run.id)
    assert CliRunner().invoke(cli.app, ["results", "show", run.id[:8]]).exit_code == 0


def test_a_log_whose_lines_have_checksums_as_those_of_0_3_is_read(stopped):
    run_id, lines = identity.run_id_of(small_config(*RUN)), stopped.read_text().splitlines()
    old = [json.dumps(json.loads(line) | {"check": "0123abcd"}) for line in lines]
    stopped.write_text("\n".join(old) + "\n")
    launch.run_one(small_config(*RUN))
    assert every_step(log_of(run_id))


@pytest.mark.defect
def test_a_board_that_fails_costs_no_run(build, monkeypatch):
    class Writer:
        def __init__(self, folder):
            pass

        def close(self):
            raise OSError("no space")

        def add_scalar(self, name, value, place):
            raise OSError("no space")

    module = type("M", (), {"SummaryWriter": Writer})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.warns(UserWarning, match="--tensorboard: .*no space"):
        run = launch.run_one(small_config(*RUN), boards={"tensorboard": str(build / "board")})
    assert every_step(log_of(run.id))
