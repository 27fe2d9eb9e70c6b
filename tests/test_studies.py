"""Studies: grids, plans, forecasts, and workers that are killed, stopped or left alone."""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pandas as pd
import pytest
import torch
from forked import Child, await_true, is_alive, small_config, small_corpus, study, workers_of
from hypothesis import given
from hypothesis import strategies as st
from kill_study import Campaign
from typer.testing import CliRunner

from cmp import cli, config, mixtures
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.files import SHORT_ID
from cmp.mixtures import empty_shares
from cmp.project import build_folder, project_folder
from cmp.runs import forecast, identity, launch, store
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.lookup import unfinished_runs
from cmp.runs.runner import execute
from lab import analyses
from lab.evidence import results, studies, workers

SIZES = {
    "stream.tasks": 3, "training.steps": 4, "training.batch": 4, "evaluation.subset": 1,
    "model.start": "random",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _server():
    """The fork server starts, and the corpus is read, while the data are in sight."""
    forked.server()
    small_corpus()


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build folder of the test's own, with the small corpus."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(packed, "load_embedded", lambda *roles: small_corpus())
    return tmp_path / "build"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a grid as chapter 77's, of small runs, and read it."""
    monkeypatch.setattr(studies, "STUDIES", tmp_path)

    def written(settings, replicates=1, live=()):
        tree = {"question": "Why?", "replicates": replicates, "live": list(live)}
        tree["settings"] = {name: SIZES | changes for name, changes in settings.items()}
        (tmp_path / "77.yaml").write_text(json.dumps(tree))
        return studies.load_study("77")

    return written


def configs_of(grid):
    return list(grid.configs("quick").values())


def stored(grid):
    """Which settings are stored."""
    pairs = grid.configs("quick").items()
    return {name for (name, _), each in pairs if studies.missing_runs([each]) == []}


# grids


def test_a_setting_without_lists_stands_for_itself():
    assert studies.expand_setting("a", {"x.y": 1}, "file") == {"a": {"x.y": 1}}


def test_what_is_common_is_shared_and_a_setting_may_say_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", tmp_path)
    grid = {"question": "Why?", "replicates": 1, "live": [], "common": {"mixture.replay": 0.5}}
    grid["settings"] = {"a": {}, "b": {"mixture.replay": 1.0}, "c": {"schedule.peak": 0.1}}
    (tmp_path / "77.yaml").write_text(json.dumps(grid))
    configs = studies.load_study("77").configs("quick")
    assert [each.mixture.replay for each in configs.values()] == [0.5, 1.0, 0.5]
    (tmp_path / "77.yaml").write_text(json.dumps(grid | {"common": [1]}))
    with pytest.raises(CmpError, match=r"77\.yaml: common: must have keys below it"):
        studies.load_study("77")
    (tmp_path / "77.yaml").write_text(json.dumps(grid | {"name": "78"}))
    with pytest.raises(CmpError, match=r"77\.yaml: name: the study is named by its file"):
        studies.load_study("77")


@pytest.mark.parametrize(
    ("key", "value"),
    [("joint", "no"), ("joint", 0), ("joint", None)]
    + [("draw", value) for value in ("x", -1, 1.0, True, None)],
)
def test_a_joint_or_a_draw_that_cannot_be_is_named(write, key, value):
    kind = {"joint": "true or false", "draw": "an integer of at least 0"}[key]
    words = rf"77\.yaml: settings: a: {key}: must be {kind}, not {value!r}$"
    with pytest.raises(CmpError, match=words):
        write({"a": {key: value}})
    words = words.replace("settings: a", f"settings: a, {key} {value}")
    with pytest.raises(CmpError, match=words):
        write({"a": {"product": {key: [value]}}})


@pytest.mark.parametrize(("key", "values"), [("joint", [True, False]), ("draw", [0, 20])])
def test_a_joint_or_a_draw_that_can_be_is_taken(write, key, values):
    grids = [write({"a": {key: value}}) for value in values]
    assert configs_of(grids[0]) != configs_of(grids[1])


def test_a_product_is_every_combination_named_after_its_values():
    lists = {"schedule.peak": [0.1, 0.2], "mixture.replay": [1, 0.5]}
    found = studies.expand_setting("a", {"joint": True, "product": lists}, "file")
    assert list(found) == [
        "a, peak 0.1, replay 1", "a, peak 0.1, replay 0.5",
        "a, peak 0.2, replay 1", "a, peak 0.2, replay 0.5",
    ]  # fmt: skip
    assert found["a, peak 0.2, replay 1"] == {
        "joint": True, "schedule.peak": 0.2, "mixture.replay": 1,
    }  # fmt: skip


def test_a_zip_goes_along_its_lists():
    found = studies.expand_setting("a", {"zip": {"x.p": [1, 2], "x.q": [3, 4]}}, "file")
    assert found == {"a, p 1, q 3": {"x.p": 1, "x.q": 3}, "a, p 2, q 4": {"x.p": 2, "x.q": 4}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zip": {"x": [1, 2], "y": [1]}}, "zip: all lists must have the same length"),
        ({"zip": {"x": [1]}, "product": {"y": [1]}}, "zip: give only one of product and zip"),
        ({"product": [1, 2]}, "product: give only one of product and zip, with lists"),
        ({"product": {}}, "product: give only one of product and zip, with lists"),
        ({"product": {"x": 1}}, "product: every key must have a list"),
        ({"zip": {"x": []}}, "zip: every key must have a list"),
        ({"x": 1, "product": {"x": [1, 2]}}, "product: x: also set outside it"),
        ({"product": {"x": [1, 1]}}, "product: the same values occur twice"),
        ({"product": {"schedule.peek": [1]}}, "schedule.peek"),
        ({"product": {"schedule.peak": [-1]}}, "schedule.peak"),
        ({"product": {"replicates": [2, "many"]}}, "replicates many: replicates: must be 1 to"),
        ({"product": {"replicates": [0]}}, "replicates 0: replicates: must be 1 to"),
    ],
)
def test_lists_that_cannot_be_combined_are_refused(write, changes, words):
    with pytest.raises(CmpError) as error:
        write({"a": changes})
    assert words in str(error.value)
    assert "77" in str(error.value)


def test_a_name_that_two_settings_come_to_is_refused(write):
    sweep = {"product": {"schedule.peak": [0.1]}}
    with pytest.raises(CmpError, match=r"77\.yaml: settings: a: 'a, peak 0\.1' is defined twice"):
        write({"a, peak 0.1": {}, "a": sweep})


def test_swept_settings_can_be_live_and_are_paired(write):
    grid = write({"a": {"product": {"schedule.peak": [0.1, 0.2]}}}, 2, ["a, peak 0.2"])
    [(key, live)] = grid.configs("quick", 1, live_only=True).items()
    assert key == ("a, peak 0.2", 0)
    assert live.schedule.peak == 0.2
    seeds = {each.seeds for each in configs_of(grid)}
    assert seeds == {config.Seeds(r, 0, r, r) for r in (0, 1)}  # one base has to do in quick


@given(count=st.integers(0, 60), parts=st.integers(1, 70))
def test_shards_are_disjoint_and_make_up_the_study(count, parts):
    runs = list(range(count))
    found = [studies.shard_runs(runs, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted(itertools.chain(*found)) == runs
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "0/0", "x", "", "1", "1/", "-1/3", "1/3/5", "1.0/3", "a/b"]
)
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(CmpError, match="expected i/n"):
        studies.shard_runs([], text)


# plans


def save_as(run_config, run):
    """Store a run under the id of a config."""
    content = identity.run_identity(run_config, small_corpus())
    run_id = identity.json_digest(content)
    store.save_run(dataclasses.replace(run, id=run_id, identity=content))


def test_a_plan_counts_what_is_stored_and_forecasts_the_rest(build, write):
    grid = write({"a": {}, "b": {"schedule.peak": 0.5}, "same as a": {}}, 2)
    launch.run_one(configs_of(grid)[0])
    plan = studies.plan_study(configs_of(grid))
    assert (plan.runs, len(plan.todo)) == (4, 3)  # two settings come to the same
    assert re.match(r"4 runs, 1 stored, 3 to compute: 0\.\d\d core-hours", str(plan))
    taken = store.load_run(store.stored_ids()[0]).provenance["seconds"]
    assert plan.seconds == pytest.approx(3 * taken)


def test_a_forecast_from_stored_runs_is_their_median(build, monkeypatch):
    run = launch.run_one(small_config("model.start=random"))
    for index, (seconds, threads) in enumerate([(12.0, 1), (24.0, 1), (600.0, 1), (1e6, 4)]):
        about = run.provenance | {"seconds": seconds, "threads": threads}
        other = small_config("model.start=random", f"seeds.augment={index + 1}")
        save_as(other, dataclasses.replace(run, config=other, provenance=about))
    monkeypatch.setattr(forecast, "_measure_step", lambda *_: pytest.fail("measured"))
    (store.run_folder(run.id) / "run.json").write_text("{")  # damage elsewhere is in nobody's way
    assert forecast.forecast_seconds([run.config]) == [24.0]
    monkeypatch.setattr(forecast, "device_name", lambda device: "NVIDIA H100")
    with pytest.raises(pytest.fail.Exception):  # a GPU takes another time
        forecast.forecast_seconds([run.config], "cuda")


def test_what_moves_no_time_is_measured_once(build, monkeypatch):
    measured = []
    monkeypatch.setattr(forecast, "_measure_step", lambda run, _: measured.append(run) or 0.5)
    ewc = [small_config("method.name=ewc", f"method.strength={x}") for x in (1.0, 100.0)]
    seconds = forecast.forecast_seconds([small_config(), *ewc])
    assert measured == [small_config(), ewc[0]]
    assert seconds[1] == seconds[2]


def test_without_such_runs_a_few_steps_are_measured(build):
    """Random weights will do, as a base that is not there fails its run, not the plan."""
    few, more = (small_config(f"training.steps={n}", "seeds.init=99") for n in (4, 400))
    few, again, more = forecast.forecast_seconds([few, few, more])
    assert 0 < few == again < 60
    assert 10 * few < more < float("inf")


def test_small_updates_whose_passes_shrink_the_batch_are_measured(build):
    settings = ["model.start=random", "stream.tasks=24", "training.batch=64"]
    with pytest.raises(CmpError, match="takes more samples from a pool than it holds"):
        forecast.forecast_seconds([small_config(*settings)])
    fitted = mixtures.fit_steps(small_config(*settings, "training.passes=1"), small_corpus())
    assert 0 < forecast.forecast_seconds([fitted])[0] < 600


def test_several_studies_are_one_programme_and_published_one_by_one(build, write, monkeypatch):
    monkeypatch.setattr(forecast, "_measure_step", lambda *_: 0.5)
    write({"a": {}}, replicates=3)
    text = (build.parent / "77.yaml").read_text()
    (build.parent / "88.yaml").write_text(text.replace('"a": {', '"a": {"schedule.peak": 0.5, '))
    began, told = [], []

    def compute(todo, jobs, device, finished, stop):
        began.append(todo)
        for run_config in todo:
            finished(run_config)
        return {}

    monkeypatch.setitem(studies.BACKENDS, "local", compute)
    monkeypatch.setattr(results, "publish_study", lambda grid: told.append(len(began)))
    result = CliRunner().invoke(cli.app, ["study", "77", "88", "--publish"])
    assert result.exit_code == 0, result.exception
    assert "study 77, cpu: 3 runs, 0 stored" in result.output
    assert [len(todo) for todo in began] == [3, 3]
    assert told == [1, 2]
    nothing = CliRunner().invoke(cli.app, ["study"])
    assert "the name of one or more" in str(nothing.exception)


def test_a_study_that_fails_stops_no_later_one(build, write, monkeypatch):
    monkeypatch.setattr(forecast, "_measure_step", lambda *_: 0.5)
    write({"a": {}})
    text = (build.parent / "77.yaml").read_text()
    for name, peak in (("88", 0.5), ("99", 0.25)):
        changes = f'"a": {{"schedule.peak": {peak}, '
        (build.parent / f"{name}.yaml").write_text(text.replace('"a": {', changes))
    began, told = [], []

    def compute(todo, *_):
        began.append(todo)
        return {todo[0]: "no memory"} if len(began) == 2 else {}

    monkeypatch.setitem(studies.BACKENDS, "local", compute)
    monkeypatch.setattr(results, "publish_study", lambda grid: told.append(grid.name))
    result = CliRunner().invoke(cli.app, ["study", "77", "88", "99", "--publish"])
    assert isinstance(result.exception, CmpError)
    assert str(result.exception).startswith("study 88: 1 of 1 runs failed:")
    assert (len(began), told) == (3, ["77", "99"])


def test_a_plan_of_what_is_stored_reads_no_other_run(build, monkeypatch):
    run = launch.run_one(small_config("model.start=random"))
    monkeypatch.setattr(store, "stored_ids", lambda: pytest.fail("the whole store was read"))
    assert studies.plan_study([run.config]).todo == {}


def test_a_paused_study_begins_no_run_until_it_is_resumed(build, monkeypatch):
    assert "are paused" in CliRunner().invoke(cli.app, ["study", "--pause"]).output
    begun, waited = [], []

    def sleep(_):
        waited.append(len(begun))
        if len(waited) == 3:
            assert "go on" in CliRunner().invoke(cli.app, ["study", "--resume"]).output

    monkeypatch.setattr(workers.time, "sleep", sleep)

    def start(run_config):
        begun.append(run_config)
        return len(begun)

    def wait(handles):
        return [(handle, None) for handle in list(handles)]

    runs = [small_config(f"seeds.data={n}") for n in range(3)]
    stop = SimpleNamespace(signal=None)
    assert workers.compute_all(runs, 2, start, wait, lambda run: None, stop) == {}
    assert waited == [0, 0, 0]
    assert begun == runs


def test_replicates_that_confirm_share_no_base_and_no_stream_with_those_that_explore():
    def seeds(**more):
        tree = {"question": "Why?", "replicates": 20, "live": ["a"], "settings": {"a": {}}}
        grid = studies.check_record(tree | more | {"name": "topic"}, studies.Study, "grid: ")
        return grid, [each.seeds for each in grid.configs("cpu").values()]

    grid, confirming = seeds()
    _, exploring = seeds(explores=True)
    assert [each.init for each in confirming] == [2 + r % 10 for r in range(20)]
    assert {each.init for each in exploring} == {0, 1}
    for kind in ("stream", "data", "augment"):
        first, second = ({getattr(x, kind) for x in each} for each in (confirming, exploring))
        assert len(first) == len(second) == 20
        assert not first & second
    assert {each.seeds.init for each in grid.configs("quick", 3, live_only=True).values()} == {0}
    _, other = seeds(settings={"a": {"draw": 2}})
    assert not {each.stream for each in other} & {each.stream for each in confirming + exploring}
    assert [dataclasses.replace(x, stream=0) for x in other] == [
        dataclasses.replace(x, stream=0) for x in confirming
    ]


def test_a_dry_run_prints_the_plan_and_computes_nothing(build, write, monkeypatch):
    monkeypatch.setattr(forecast, "_measure_step", lambda *_: 0.5)
    write({"a": {}, "b": {"schedule.peak": 0.5}}, 2)
    monkeypatch.setattr(studies, "compute_runs", lambda *_: pytest.fail("computed"))
    result = CliRunner().invoke(cli.app, ["study", "77", "--profile", "quick", "--dry-run"])
    assert result.exit_code == 0
    assert "4 runs, 0 stored, 4 to compute: 0.01 core-hours" in result.output
    assert not build.exists()


def test_a_band_holds_the_runs_that_readers_compute_in_quick(write, monkeypatch):
    tree = {"question": "Why?", "replicates": 20, "live": ["a"], "explores": True}
    tree["settings"] = {"a": {"schedule.peak": 0.5, "replicates": 3}, "b": {}}
    write({})
    (studies.STUDIES / "topic.yaml").write_text(json.dumps(tree | {"explores": False}))
    own = studies.load_study("topic").configs("quick", 2, live_only=True)
    band = studies.load_study("quick-topic")
    runs = band.configs("cpu")
    assert list(runs) == [("a", replicate) for replicate in range(10)]
    for key, run_config in own.items():
        band_run = runs[key]
        assert dataclasses.replace(
            run_config, model=band_run.model, optimizer=band_run.optimizer
        ) == (band_run)
    with pytest.raises(CmpError, match="no such study"):
        studies.load_study("quick-nothing")


# workers


def start(build, *more):
    """`cmpt study` of chapter 77 in a process of its own."""
    return Child(build, study, build.parent, "77", "--profile", "quick", "--jobs", "2", *more)


def begun(build):
    """The workers that have begun with a run."""
    return [*Path(f"{build}-workers").glob("begun-*")]


def slow(build):
    """From now on every step takes a while; returns how to end that."""
    place = Path(f"{build}-workers")
    place.mkdir(exist_ok=True)
    (place / "slow").touch()
    return (place / "slow").unlink


def training(build):
    """How many workers have computed a step."""
    return len([*Path(f"{build}-workers").glob("step-*")])


def steps_kept():
    """Where each unfinished run was left, as steps within its task."""
    return sorted(each.step for each in unfinished_runs())


@pytest.mark.long
def test_a_run_that_fails_is_named_and_stops_no_other(build, write):
    lost = {"model.start": "annealed", "seeds.init": 99}
    grid = write({"lost": lost, "b": {}, "c": {"schedule.peak": 0.5}})
    child = start(build)
    assert child.outcome().status == 2
    assert stored(grid) == {"b", "c"}
    assert "cmpt: study 77: 1 of 3 runs failed:\n" in child.said()
    assert "  a run without weights: seeds.init: no annealed base 99 of 'small'" in child.said()
    assert "Traceback" not in child.said()


class Odd(Exception):
    """Cannot be shown, nor sent to another process."""

    def __init__(self):
        self.lock = lambda: None

    def __str__(self):
        raise RuntimeError("no text")


def failing(monkeypatch, error):
    """Make every run fail."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(launch, "run_one", fail)


@pytest.mark.defect
@pytest.mark.parametrize("error", [Odd(), ValueError("two\n  lines"), KeyError("x")])
def test_a_bug_in_a_worker_is_told_with_its_traceback(build, monkeypatch, error):
    failing(monkeypatch, error)
    said = workers._attempt_run(small_config(), "cpu")
    assert said.startswith("a bug in this program") and "Traceback" in said
    assert type(error).__name__ in said.splitlines()[-1] or "two\n  lines" in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CmpError("A sentence."), "A sentence."),
        (OSError(28, "No space left on device"), "cannot read or write: [Errno 28] No space"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "smaller training.batch"),
    ],
)
def test_what_is_no_bug_is_a_line_alone(build, monkeypatch, error, line):
    failing(monkeypatch, error)
    said = workers._attempt_run(small_config(), "cpu")
    assert line in said and len(said.splitlines()) == 1


def test_killed_workers_cost_their_own_run_only(build, write):
    """One is killed once, and its run goes on; one always, and that run is given up."""
    peaks = {"once": forked.LETHAL, "always": forked.DEADLY, "never": 0.5}
    grid = write({name: {"schedule.peak": peak} for name, peak in peaks.items()})
    child = start(build)
    assert child.outcome().status == 2
    assert stored(grid) == {"once", "never"}
    died = f"its worker died {workers.ATTEMPTS} times (finally by SIGKILL); check that memory"
    assert f"1 of 3 runs failed:\n  {failed_id(grid, 'always')}: {died}" in child.said()
    resumed = Path(f"{build}-workers/resumed").read_text().split()
    assert resumed == [str(forked.STEPS)] * workers.ATTEMPTS  # 1 of the one, the rest of the other
    assert steps_kept() == [0]


def failed_id(grid, name):
    return identity.run_id_of(grid.configs("quick")[name, 0], small_corpus())[:SHORT_ID]


@pytest.mark.parametrize(
    ("number", "everyone"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
    ],
)
@pytest.mark.long
def test_stopped_it_saves_and_the_same_command_goes_on(build, write, number, everyone):
    """A terminal or a batch system sends the signal to the workers as well."""
    grid = write({"a": {}}, replicates=4)
    fast = slow(build)
    child = start(build)
    await_true(lambda: training(build) == 2, "at work on two runs")
    for pid in workers_of(build) if everyone else []:
        os.kill(pid, number)
    child.signal(number)
    assert child.outcome().status == 128 + number
    assert "cmpt: stopped with 4 runs to go; repeat the command to continue" in child.said()
    assert workers_of(build) == []
    kept = steps_kept()
    assert len(kept) == 2
    assert min(kept) > 0  # in the middle of a task, where only a stop saves
    fast()
    assert start(build).outcome().status == 0
    assert stored(grid) == {"a"}
    assert len(Path(f"{build}-workers/resumed").read_text().split()) == 2


@pytest.mark.long
def test_a_worker_that_alone_is_asked_to_end_is_replaced(build, write):
    grid = write({"a": {}})
    fast = slow(build)
    child = start(build)
    await_true(lambda: training(build), "at work")
    [pid] = workers_of(build)
    os.kill(pid, signal.SIGTERM)
    await_true(lambda: not is_alive(pid), "at its end")
    fast()
    assert child.outcome().status == 0, child.said()
    assert stored(grid) == {"a"}
    [steps] = Path(f"{build}-workers/resumed").read_text().split()
    assert int(steps) > 0


@pytest.mark.long
def test_workers_save_and_end_once_their_study_is_killed(build, write):
    grid = write({"a": {}}, replicates=3)
    fast = slow(build)
    child = start(build)
    await_true(lambda: training(build) == 2, "at work on two runs")
    child.signal(signal.SIGKILL)
    child.outcome()
    await_true(lambda: not workers_of(build), "without orphans", 15)
    assert len(steps_kept()) == 2
    assert min(steps_kept()) > 0
    for progress in unfinished_runs():
        with CheckpointManager(progress.run):  # nobody holds it
            pass
    fast()
    again = start(build)
    assert again.outcome().status == 0, again.said()
    assert stored(grid) == {"a"}


@pytest.mark.long
def test_a_study_waits_for_a_run_that_another_computes_and_can_be_stopped(build, write):
    grid = write({"a": {}})
    [run_config] = configs_of(grid)
    content = identity.run_identity(run_config, small_corpus())
    run_id = identity.json_digest(content)
    with CheckpointManager(run_id) as manager:
        child = start(build)
        await_true(lambda: begun(build), "with a worker that waits")
        child.signal(signal.SIGTERM)
        assert child.outcome().status == 128 + signal.SIGTERM
        assert workers_of(build) == []
        child = start(build)
        await_true(lambda: workers_of(build), "with a worker")
        result = execute(run_config, small_corpus(), manager=manager)
        store.save_run(store.make_stored_run(run_config, result, content))
        before = (store.run_folder(run_id) / "run.json").stat()
    assert child.outcome().status == 0, child.said()
    assert (store.run_folder(run_id) / "run.json").stat().st_ino == before.st_ino


REAL = """
import sys
from pathlib import Path
from cmp import cli
from lab.evidence import studies
if __name__ == "__main__":
    studies.STUDIES = Path(sys.argv.pop())
    cli.main()
"""


@pytest.mark.long
def test_nothing_is_left_of_a_study_that_is_killed(tmp_path, write):
    """With a fork server of its own, as the shell has it, and the whole corpus."""
    data = build_folder() / "data"
    build = tmp_path / "build"
    build.mkdir()
    (build / "data").symlink_to(data.absolute())
    write({"a": {"training.steps": 10_000}}, replicates=2)
    (tmp_path / "real.py").write_text(REAL)
    command = [sys.executable, "real.py", "study", "77", "--profile", "quick", str(tmp_path)]
    environment = os.environ | {"CMP_BUILD": str(build), "PYTHONPATH": str(project_folder())}
    with open(tmp_path / "said", "w") as said:
        parent = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=said, start_new_session=True
        )
    try:
        ready = lambda: len(list(build.glob("runs/*/task-0*"))) == 2  # noqa: E731
        await_true(lambda: ready() or parent.poll() is not None, "at work on two runs")
        assert parent.poll() is None, (tmp_path / "said").read_text()
        session = members(parent.pid)
        assert len(session) >= 4  # the study, its fork server, two workers
        parent.kill()
        parent.wait()
        await_true(lambda: not members(parent.pid), "without orphans", 30)
    finally:
        for pid in members(parent.pid):
            os.kill(pid, signal.SIGKILL)


def members(session):
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        if int(fields[3]) == session and is_alive(pid):
            found.append(pid)
    return found


def test_workers_of_a_gpu_are_spawned():
    assert workers._context("cuda").get_start_method() == "spawn"
    if sys.platform == "linux":
        assert workers._context("cpu").get_start_method() == "forkserver"


# kills


@pytest.mark.long
def test_a_study_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path):
    campaign = Campaign(tmp_path, random.Random(0), 6, 1, 2)
    campaign.go()
    assert str(campaign) == (
        "6 runs, 1 kills of the parent, 2 of workers: 0 computed twice, tables equal"
    )


def test_a_campaign_notices_what_is_not_as_it_should_be(tmp_path, monkeypatch):
    campaign, whole = Campaign(tmp_path, random.Random(0), 6), tmp_path / "whole"
    monkeypatch.setattr(studies, "STUDIES", tmp_path)
    metrics = pd.DataFrame({"task": [0], "scope": "s", "dataset": "d", "role": "r", "score": 1.0})

    def put(place, score, weights):
        monkeypatch.setenv("CMP_BUILD", str(place))
        for each in configs_of(studies.load_study("77")):
            about = {"seconds": 1.0, "threads": 1}
            save_as(each, store.StoredRun("", each, about, metrics.assign(score=score), weights))

    put(whole, 1.0, "w")
    put(campaign.build, 1.0, "w")
    assert campaign.look() == 6
    campaign.compare(whole)
    assert (campaign.twice, campaign.problems) == (set(), [])
    put(campaign.build, 1.0 + 1e-12, "other")
    campaign.look()
    campaign.compare(whole)
    assert len(campaign.twice) == 6
    assert campaign.problems == ["the tables differ", "final weights differ"]


@pytest.mark.parametrize(
    ("lower", "schedule"),
    [("constant twin", "meta-rsqrt")],
)
def test_lower_peaks_have_the_mean_rate_of_what_they_stand_beside(lower, schedule):
    grid = studies.load_study("rates").configs("cpu", 1)
    means = [
        analyses.learning_rates(one.schedule, one.stream.tasks, one.training.steps).mean()
        for one in (grid[lower, 0], grid[schedule, 0])
    ]
    assert means[0] == pytest.approx(means[1], rel=2e-3)


def test_a_sweep_may_have_fewer_replicates():
    study = studies.load_study("scaling-more")
    grid = study.configs("cpu")
    count = {name: sum(each == name for each, _ in grid) for name, _ in grid}
    assert count["joint"] == 5
    assert count["tiny-vit, EMA"] == 3
    assert len({name for name, _ in study.configs("quick", 1)}) == len(count)


def vanishing_shares(run_config):
    """Shares of a run of which a task's batches have no sample."""
    tasks, batch = run_config.stream.tasks, run_config.training.batch
    each = {run_config.mixture.at(task, tasks): task == 0 for task in range(tasks)}
    return [name for mixture, first in each.items() for name in empty_shares(mixture, batch, first)]


@pytest.mark.parametrize("profile", config.PROFILES)
def test_no_setting_of_a_study_has_a_share_without_samples(profile):
    grids = [studies.load_study(path.stem) for path in studies.STUDIES.glob("*.yaml")]
    runs = [each for grid in grids for each in grid.configs(profile, 1).values()]
    assert len(runs) > 100
    assert not [name for each in runs for name in vanishing_shares(each)]


@pytest.mark.long
def test_no_published_run_has_a_share_without_samples():
    tables = [
        pd.read_parquet(path, columns=["config"]) for path in results.RESULTS.glob("*.parquet")
    ]
    trees = [json.loads(text) for text in pd.concat(tables)["config"].drop_duplicates()]
    assert len(trees) > 1000
    parts = {json.dumps([tree[key] for key in ("mixture", "stream", "training")]) for tree in trees}
    for mixture, stream, training in map(json.loads, parts):
        tree = {"mixture": mixture, "stream": {"tasks": stream["tasks"]}}
        run_config = config.parse(tree | {"training": {"batch": training["batch"]}})
        assert not vanishing_shares(run_config)
