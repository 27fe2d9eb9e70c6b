"""A run may be killed at any moment, and goes on to the same bits."""

import builtins
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import forked
import numpy as np
import options
import pandas as pd
import pytest
import safetensors.torch
import torch
from forked import Child, Family, small_config, small_corpus, small_id
from kill import Campaign, uninterrupted
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from benchmark import pretraining
from cmp import NUMERICS, config, files, mixtures, models, training
from cmp.cli import exporting, streams
from cmp.embedded import models as embedded_models
from cmp.embedded import packed, sheets
from cmp.embedded.manifest import embedded_manifests
from cmp.errors import CmpError, Diverged
from cmp.files import delete_leftovers
from cmp.losses import model_loss
from cmp.merging.files import merge_files
from cmp.runs import checkpoints, identity, lookup, store
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer, RunResult, execute
from lab.evidence import results, studies

TOTAL = forked.TASKS * forked.STEPS


@pytest.fixture(scope="module", autouse=True)
def uncut(tmp_path_factory):
    """The run that nobody kills, and its seconds; the server starts while the data are in sight."""
    forked.server()
    small_corpus()
    return uninterrupted(tmp_path_factory.mktemp("uncut"), None, None)[None]


@pytest.fixture
def reference(uncut):
    return uncut[0]


def folder():
    return checkpoints.run_folder(small_id())


def finite(state):
    return all(x.isfinite().all() for x in state.tensors.values())


def steps_kept():
    """Steps done in the run's last checkpoint, none without; damage there would be an error."""
    checkpoint = checkpoints.latest_checkpoint(folder())
    if checkpoint is None:
        return None
    assert finite(checkpoint[1])
    return checkpoint[1].progress.task * forked.STEPS + checkpoint[1].progress.step


def assert_same(end, reference):
    assert end.status == 0, end.error
    assert end.weights == reference.weights
    assert end.metrics.equals(reference.metrics)


def test_the_reference_is_what_the_library_computes(reference):
    result = execute(small_config(), small_corpus())
    assert models.weights_digest(result.model) == reference.weights
    assert result.metrics.equals(reference.metrics)
    assert reference.resumed == 0


SAVE = 7
"""The initial state is save 1, so this one is of six steps: task 1 is half done."""
IN_A_SAVE = [
    ("half written", 1, None), ("before the write", 2, 0), ("half written", SAVE, 5),
    ("before the rename", SAVE, 5), ("before the old one is pruned", SAVE, 6),
]  # fmt: skip
"""A moment of death, the number of a save, and the steps of the last whole one."""
ALSO_IN_A_SAVE = [
    ("before the write", 1, None),
    *(("before the write", steps + 2, steps) for steps in range(1, TOTAL)),
    ("before the hash", SAVE, 5), ("before the folder is flushed", SAVE, 6),
    ("after the old one is pruned", SAVE, 6), ("half written", TOTAL + 1, TOTAL - 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "save", "kept"),
    [*IN_A_SAVE, *(pytest.param(*row, marks=pytest.mark.long) for row in ALSO_IN_A_SAVE)],
)
def test_killed_in_a_save_it_goes_on_from_the_last_whole_one(build, reference, moment, save, kept):
    assert Child(build, forked.compute, moment, save).outcome().status == -signal.SIGKILL
    assert steps_kept() == kept
    end = Child(build).outcome()
    assert_same(end, reference)
    assert end.resumed == (kept or 0)
    assert forked.leftovers(build) == []


@pytest.mark.parametrize(
    ("moment", "resumed"),
    [
        pytest.param("before the result is written", TOTAL, marks=pytest.mark.long),
        ("before the result is renamed", TOTAL),
        ("before the record is renamed", TOTAL),
        pytest.param("after the record is renamed", None, marks=pytest.mark.long),
        pytest.param("before the checkpoints are removed", None, marks=pytest.mark.long),
        ("while the checkpoints are removed", None),
    ],
)
def test_killed_while_the_result_is_stored_it_is_stored_once(build, reference, moment, resumed):
    assert Child(build, forked.compute, moment, TOTAL + 1).outcome().status == -signal.SIGKILL
    end = Child(build).outcome()
    assert_same(end, reference)
    assert end.resumed == resumed
    assert forked.leftovers(build) == []


@pytest.mark.long
def test_ten_kills_at_random_moments_change_nothing(uncut, tmp_path):
    family = Family(("merging.policy=step-ema", "evaluation.full=true"), 3)
    references = {None: uncut} | uninterrupted(tmp_path, family)
    campaign = Campaign(references, 10, tmp_path, random.Random(0))
    campaign.go()
    assert campaign.killed == 10
    assert campaign.differences == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weights": "0" * 64}, "weights 000"),
        ({"hits": "0" * 64}, "weights"),
        ({"weights": None}, "status 0"),
        ({"status": 1}, "status 1"),
        ({"metrics": pd.DataFrame()}, "metrics"),
    ],
)
def test_a_campaign_notices_a_run_that_ends_otherwise(reference, tmp_path, change, word):
    campaign = Campaign({None: (reference, 1.0)}, 20, tmp_path, random.Random(0))
    (tmp_path / "one").mkdir()
    campaign.compare(tmp_path / "one", reference, "")
    assert campaign.differences == []
    (tmp_path / "two").mkdir()
    campaign.compare(tmp_path / "two", dataclasses.replace(reference, **change), "")
    assert word in campaign.differences[0]
    (tmp_path / "three/runs/rest").mkdir(parents=True)
    campaign.compare(tmp_path / "three", reference, "")
    assert "leftovers ['runs/rest']" in campaign.differences[1]


def test_two_processes_do_not_compute_the_same_run(build, reference):
    first = Child(build)
    first.await_run()
    assert first.hear(forked.TIMEOUT), first.said()  # it trains, so it holds the run
    first.signal(signal.SIGSTOP)
    try:
        second = Child(build).outcome()
        assert first.alive()
    finally:
        first.signal(signal.SIGKILL)
    assert "another process is computing this run" in second.error
    assert first.outcome().weights is None
    assert_same(Child(build).outcome(), reference)


@pytest.mark.parametrize(
    ("number", "step"),
    [pytest.param(signal.SIGINT, 6, marks=pytest.mark.long), (signal.SIGTERM, 8)],
)
def test_asked_to_stop_the_shell_finishes_the_step_and_goes_on(build, reference, number, step):
    arguments = ("run", "quick", *forked.SETTINGS)
    stopped = Child(build, forked.command, arguments, number, step)
    assert stopped.outcome().status == 128 + number
    assert f"cmpt: stopped after 1 tasks and {step - 4} steps" in stopped.said()
    assert "everything is saved; the same command continues" in stopped.said()
    assert steps_kept() == step
    resumed = Child(build, forked.command, arguments)
    assert resumed.outcome().status == 0, resumed.said()
    run = store.load_run(small_id())
    assert run.weights == reference.weights
    assert run.metrics.equals(reference.metrics)
    assert forked.leftovers(build) == []


def test_a_run_that_is_stored_is_not_left_unfinished_by_the_shell(build):
    Child(build, forked.compute, "before the checkpoints are removed", TOTAL + 1).outcome()
    assert forked.leftovers(build)
    again = Child(build, forked.command, ("run", "quick", *forked.SETTINGS))
    assert again.outcome().status == 0, again.said()
    assert "nothing to compute" in again.said()
    assert forked.leftovers(build) == []


class Stop(BaseException):
    """Not an `Exception`, as a kill is none."""


def run_until(count, *settings, model=None):
    """Compute the small run here, a checkpoint a step, and break it off in step `count`."""

    def step(task, step, result, model):
        if task * forked.STEPS + step + 1 == count:
            raise Stop

    config = small_config(*settings)
    with CheckpointManager(identity.run_id_of(config, small_corpus()), interval=0.0) as manager:
        return execute(config, small_corpus(), Observer(step), model, manager=manager)


@pytest.fixture(scope="module")
def two(tmp_path_factory, uncut):
    """A build folder with two checkpoints, of 1 and of 2 steps."""
    place = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(place))
        with pytest.raises(Stop):
            run_until(3)
    return place


@pytest.fixture
def pair(two, build):
    """A copy of these two: the paths of the newest and of the one before it."""
    shutil.copytree(two, build)
    newest, before = checkpoints.checkpoint_files(folder())
    return newest, before


def assert_refused(newest, before):
    """The newest is refused by name and warned of; the one before it is used, and is whole."""
    with pytest.raises(CmpError, match=newest.name):
        checkpoints.read_checkpoint(newest)
    with pytest.warns(UserWarning, match=newest.name):
        path, state = checkpoints.latest_checkpoint(folder())
    assert path == before
    assert (state.progress.task, state.progress.step) == (0, 1)
    assert finite(state)


def damaged(content):
    """A file cut at any sixteenth, and with one bit changed in each of its parts."""
    for sixteenths in range(16):
        yield content[: len(content) * sixteenths // 16]
    header = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    for start, stop in ((0, 8), (8, header), (header, len(content))):
        for place in generator.choice(np.arange(start, stop), 3, replace=False):
            changed = bytearray(content)
            changed[place] ^= 1 << generator.integers(8)
            yield changed


def test_a_checkpoint_that_is_cut_or_has_another_bit_is_refused(pair):
    newest, before = pair
    content = newest.read_bytes()
    for changed in damaged(content):
        newest.write_bytes(changed)
        assert_refused(newest, before)
    newest.write_bytes(content)
    assert steps_kept() == 2


@pytest.mark.defect
@pytest.mark.parametrize(
    ("before", "after"),
    [('\\"threads\\": 1', '\\"threads\\": 3'), ('\\"step\\": 2', '\\"step\\": 3'),
     ('\\"score\\": ', '\\"score\\": 1')],
)  # fmt: skip
def test_a_header_is_checked_before_anything_in_it_is_believed(pair, before, after):
    newest, one_before = pair
    content = newest.read_bytes()
    place = content.index(before.encode())
    assert content.count(before.encode()) >= 1
    changed = content[:place] + after.encode() + content[place + len(after) :]
    newest.write_bytes(changed)
    with pytest.raises(CmpError, match=f"{newest.name}: damaged"):
        checkpoints.read_progress(newest)
    with pytest.warns(UserWarning, match=newest.name):
        assert checkpoints.latest_progress(folder()) == checkpoints.read_progress(one_before)


def test_a_checkpoint_of_0_2_0_whose_header_has_no_hash_is_checked_as_a_whole(pair):
    newest, _ = pair
    state = checkpoints.read_checkpoint(newest)
    header = {"progress": json.dumps(dataclasses.asdict(state.progress))}
    old = checkpoints.write_tensors(state.tensors, header, folder(), "task-0-step-3")
    assert checkpoints.read_progress(old) == state.progress
    assert checkpoints.read_checkpoint(old).progress == state.progress
    old.write_bytes(old.read_bytes().replace(b'\\"threads\\": 1', b'\\"threads\\": 3'))
    with pytest.raises(CmpError, match=f"{old.name}: damaged"):
        checkpoints.read_progress(old)


def test_checkpoints_under_each_others_names_are_refused(pair):
    newest, before = pair
    aside = newest.with_suffix(".aside")
    newest.rename(aside)
    before.rename(newest)
    aside.rename(before)
    for path in pair:
        with pytest.raises(CmpError, match=path.name):
            checkpoints.read_checkpoint(path)
    with pytest.warns(UserWarning) as warned:
        assert checkpoints.latest_checkpoint(folder()) is None
    assert len(warned) == 2


def of_schema(path, schema):
    """The checkpoint of this path rewritten with another schema, in its place."""
    state = checkpoints.read_checkpoint(path)
    path.unlink()
    progress = dataclasses.replace(state.progress, schema=schema)
    return checkpoints.write_checkpoint(dataclasses.replace(state, progress=progress), folder())


@pytest.mark.defect
@pytest.mark.parametrize("schema", [checkpoints.SCHEMA - 1, checkpoints.SCHEMA + 1])
@pytest.mark.parametrize("others", [0, 1])
def test_a_run_with_a_checkpoint_of_another_schema_stops_and_keeps_it(pair, schema, others):
    """Also beside an older one that can be read: the next save would delete this one."""
    newest, before = pair
    if not others:
        before.unlink()
    path = of_schema(newest, schema)
    content = path.read_bytes()
    with pytest.raises(CmpError, match=rf"{path.name}.*schema.*(install|delete)"):
        run_until(0)
    assert path.read_bytes() == content
    assert len(checkpoints.checkpoint_files(folder())) == 1 + others


@pytest.mark.defect
@pytest.mark.parametrize("number", options.one_in(3, [errno.EACCES, errno.EIO, errno.ESTALE]))
def test_a_run_stops_at_a_checkpoint_that_cannot_be_opened_and_keeps_it(
    pair, reference, monkeypatch, number
):
    newest, before = pair

    def refusing(reader):
        def read(path, *arguments, **options):
            if path == newest:
                raise OSError(number, os.strerror(number), str(path))
            return reader(path, *arguments, **options)

        return read

    with monkeypatch.context() as patch:
        patch.setattr(files, "file_digest", refusing(files.file_digest))
        patch.setattr(Path, "open", refusing(Path.open))
        for read in (lambda: run_until(0), lambda: checkpoints.latest_progress(folder())):
            with pytest.raises(CmpError, match=rf"{newest.name}.*{os.strerror(number)}"):
                read()
    assert checkpoints.checkpoint_files(folder()) == [newest, before]
    assert models.weights_digest(run_until(0).model) == reference.weights


@pytest.mark.defect
def test_a_run_that_cannot_be_read_is_left_out_of_the_list_by_name(pair):
    path = of_schema(pair[0], checkpoints.SCHEMA + 1)
    other = folder().with_name("0123456789abcdef"[: files.SHORT_ID])
    other.mkdir()
    shutil.copy(pair[1], other)
    with pytest.warns(UserWarning, match=f"left out: .*{path.name}"):
        assert [progress.step for progress in lookup.unfinished_runs()] == [1]


def test_a_checkpoint_of_a_later_version_says_what_to_install(tmp_path):
    """It may have keys that this version does not know."""
    tree = {"schema": checkpoints.SCHEMA + 1, "machine": {"cmp": "9.1.0"}, "new": 1}
    text = json.dumps(tree)
    metadata = {"progress": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
    save_file({"weights/x": torch.zeros(1)}, tmp_path / "later.safetensors", metadata)
    with pytest.raises(CmpError, match=r"schema: .*a newer version of cmp .*install cmp 9\.1\.0"):
        checkpoints.read_progress(tmp_path / "later.safetensors")


def test_with_every_checkpoint_damaged_a_run_starts_anew(pair, reference):
    for path in pair:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning) as warned:
        result = run_until(0)
    assert sum("damaged" in str(warning.message) for warning in warned) == 2
    assert models.weights_digest(result.model) == reference.weights
    assert result.metrics.equals(reference.metrics)
    assert len(checkpoints.checkpoint_files(folder())) == 2
    assert steps_kept() == TOTAL


@pytest.fixture
def open_build(monkeypatch):
    """A build folder that every user of the machine can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("CMP_BUILD", name)
        yield Path(name) / "build"


@pytest.mark.parametrize(
    "trouble", options.one_in(2, ["the disk is full", "the folder is read-only"])
)
def test_where_the_disk_refuses_the_run_says_so_and_keeps_the_last(
    build, open_build, reference, monkeypatch, trouble
):
    monkeypatch.setenv("CMP_BUILD", str(open_build))
    end = Child(open_build, forked.compute, trouble, SAVE).outcome()
    assert end.weights is None
    assert f"{folder()}: the checkpoint of task 1, step 2 cannot be written" in end.error
    assert "the previous one is kept" in end.error
    assert not list(folder().glob(".partial*"))
    assert steps_kept() == 5
    folder().chmod(0o755)
    end = Child(open_build).outcome()
    assert_same(end, reference)
    assert end.resumed == 5


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(build):
    build.mkdir()
    (build / "runs").write_text("a file where a folder should be")
    end = Child(build).outcome()
    assert f"{folder()}: cannot be created as a folder" in end.error


def test_a_run_that_diverges_says_where_and_keeps_finite_weights(build):
    config = small_config("schedule.peak=1e6")
    place = checkpoints.run_folder(identity.run_id_of(config, small_corpus()))
    with pytest.raises(Diverged, match=r"task 0, step 1: loss nan.*diverged.json") as error:
        run_until(0, "schedule.peak=1e6")
    report = json.loads((place / "diverged.json").read_text())
    assert report == error.value.report
    assert (report["task"], report["step"]) == (0, 1)
    assert np.isnan(float(report["loss"]["contrastive"]))
    assert np.isnan(float(report["gradient_norm"]))
    assert report["learning_rate"] == pytest.approx(1e6, rel=0.5)
    pools = mixtures.task_pools(config, small_corpus())
    batch = mixtures.make_batch(config, small_corpus(), pools[0], 0, 1)
    assert report["samples"] == batch.rows.tolist()
    _, state = checkpoints.latest_checkpoint(place)
    assert state.progress.step == 1
    assert finite(state)


@pytest.mark.parametrize(
    "settings",
    [["schedule.peak=1e30"], ["schedule.peak=1e300"],
     ["schedule.peak=1e30", "stream.tasks=1", "training.steps=1"]],
)  # fmt: skip
def test_weights_that_are_not_finite_are_never_kept(build, settings):
    """Not even of a run's very last step."""
    run_id = identity.run_id_of(small_config(*settings), small_corpus())
    place = checkpoints.run_folder(run_id)
    with pytest.raises(Diverged, match="weights are not finite after 1 steps of task 0"):
        run_until(0, *settings)
    report = json.loads((place / "diverged.json").read_text())
    assert report == {"task": 0, "step": 0, "weights": "not finite"}
    _, state = checkpoints.latest_checkpoint(place)
    assert state.progress.step == 0
    assert finite(state)


def test_a_run_goes_on_from_the_last_good_state_once_the_cause_is_mended(
    build, reference, monkeypatch
):
    sound, calls = model_loss, iter(range(TOTAL))

    def poisoned(*arguments):
        return sound(*arguments) * (np.nan if next(calls) == 6 else 1.0)

    monkeypatch.setattr(training, "model_loss", poisoned)
    model = models.load_model(small_config().model, 0)
    with pytest.raises(Diverged, match="task 1, step 2: loss nan"):
        run_until(0, model=model)
    assert steps_kept() == 6
    _, state = checkpoints.latest_checkpoint(folder())
    # the network is as it was before that step, too
    assert all(torch.equal(x, state.tensors[f"weights/{n}"]) for n, x in model.state_dict().items())
    monkeypatch.undo()
    monkeypatch.setenv("CMP_BUILD", str(build))
    result = run_until(0)
    assert models.weights_digest(result.model) == reference.weights
    assert not (folder() / "diverged.json").exists()


def test_the_shell_ends_with_an_error_where_a_run_diverges(build):
    settings = (*forked.SETTINGS, "schedule.peak=1e6")
    child = Child(build, forked.command, ("run", "quick", *settings))
    assert child.outcome().status == 2
    assert "cmpt: training diverged at task 0, step 1: loss nan" in child.said()
    assert "diverged.json for details" in child.said()
    [path] = build.glob("runs/*/diverged.json")
    assert path.read_text().startswith("{")
    assert not (path.parent / "run.json").exists()


class Disk:
    """A disk that refuses its operation number `fails_at` and all later ones but renames, by which
    what was moved is put back.

    Attributes:
        count: Operations so far.
        refused: Names of those that it refused.
    """

    def __init__(self, patch, error, fails_at):
        self.error, self.fails_at, self.count = error, fails_at, 0
        self.refused = set()
        for place, name in (
            *((os, name) for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink")),
            (safetensors.torch, "save_file"),
            (builtins, "open"), (io, "open"), (pd.DataFrame, "to_parquet"), (Image.Image, "save"),
        ):  # fmt: skip
            patch.setattr(place, name, self.watch(name, getattr(place, name)))

    def watch(self, name, real):
        """`real`, if it still works; a library's function leaves half a file behind."""

        def operation(*arguments, **options):
            if name == "open" and not writes(*arguments, **options):
                return real(*arguments, **options)
            self.count += 1
            if self.count < self.fails_at or (name == "rename" and self.count > self.fails_at):
                return real(*arguments, **options)
            self.refused.add(name)
            if name in ("save_file", "to_parquet", "save"):
                Path(arguments[1]).parent.joinpath("half").touch()
            message = os.strerror(self.error)
            if name == "save_file":
                raise SafetensorError(f"I/O error: {message} (os error {self.error})")
            raise OSError(self.error, message, str(arguments[-1]))

        return operation


def writes(path, mode="r", *arguments, **options):
    """Whether a file is opened to be written, by `os.open` or by `open`."""
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return bool(mode & flags) if isinstance(mode, int) else bool(set(mode) & set("wax+"))


TINY = ("model.name=tiny-half", "model.start=random")
"""Settings of what `WRITERS` write."""


def tiny_id():
    return identity.run_id_of(small_config(*TINY), small_corpus())


def save_a_checkpoint(folder):
    run_config = small_config(*TINY)
    weights = checkpoints.state_tensors(models.load_model(run_config.model, 0))
    with CheckpointManager(tiny_id()) as manager:
        manager.load()
        step = len(checkpoints.checkpoint_files(manager.folder))
        about = tiny_id(), run_config.to_dict(), 0, step, [], 0.0, {}
        progress = checkpoints.Progress(checkpoints.SCHEMA, *about)
        manager.save(checkpoints.RunState(progress, weights))


def finish_a_run(folder):
    run_config, row = small_config(*TINY), {"task": 0, "scope": "full", "dataset": "shapes"}
    metrics = pd.DataFrame([row | {"role": "eval", "score": time.time()}])
    model, about = models.create_model("tiny-half"), {"threads": 1, "numerics": NUMERICS}
    result = RunResult(metrics, model, 1.0, about, {"0/shapes": np.ones(9, bool)})
    content = identity.run_identity(run_config, small_corpus())
    store.save_run(store.make_stored_run(run_config, result, content), model)


def export(folder):
    exporting.export(tiny_id(), folder / "exported.safetensors")


def merge(folder):
    paths = [folder / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        if not path.exists():
            save_file(models.create_model("tiny-half", seed).state_dict(), path)
    merge_files("interpolation", paths, folder / "merged.safetensors")


def draw_a_sheet(folder):
    sheets.contact_sheet(packed_shapes(), folder / "sheet.png")


@functools.cache
def packed_shapes():
    return packed.read_packed(embedded_manifests()["shapes"])


def import_a_stream(folder):
    streams.import_(folder / "order.json", "mine")


def write_a_base(folder):
    weights = models.create_model("tiny-half").state_dict()
    pretraining.save_base(weights, folder / "base.safetensors")


def publish(folder):
    results.publish_study(studies.load_study("77"), "quick")


WRITERS = [save_a_checkpoint, finish_a_run, export, merge, draw_a_sheet, import_a_stream,
           write_a_base, publish]  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder in which each of `WRITERS` has written once."""
    packed_shapes()
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(packed, "load_embedded", lambda *roles: small_corpus())
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(studies, "STUDIES", tmp_path)
    changes = [*forked.SETTINGS, *TINY, "mixture.select=random"]
    tree = config.override(config.profile("quick"), changes)
    monkeypatch.setitem(config.PROFILES, "quick", tree)
    grid = {"question": "?", "replicates": 1, "live": [], "settings": {"a": {}}}
    (tmp_path / "77.yaml").write_text(json.dumps(grid))
    (tmp_path / "order.json").write_text('["new-flags+++a", "new-flags+++b"]')
    save_a_checkpoint(tmp_path)
    finish_a_run(tmp_path)
    return tmp_path


def names(folder):
    """All files of a folder; checkpoints come and go."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if "/task-" not in path}


def read_back(folder):
    """Read all that `WRITERS` have written so far; whatever is not whole is an error."""
    assert checkpoints.latest_checkpoint(checkpoints.run_folder(tiny_id()))
    assert store.load_run(tiny_id()).hits["0/shapes"].sum() == 9
    store.final_model(store.load_run(tiny_id()))
    for path in folder.glob("*.safetensors"):
        load_file(path)
    for path in folder.glob("*.png"):
        Image.open(path).load()
    for path in folder.glob("build/traits/*.parquet"):
        pd.read_parquet(path)
    if (folder / "base.safetensors").exists():
        embedded_models.check_base(folder / "base.safetensors")
    if results.is_published("77"):
        results.published_metrics("77")


@pytest.mark.parametrize(
    "error", options.one_in(2, [errno.ENOSPC, errno.EROFS]), ids=errno.errorcode.get
)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_wherever_the_disk_refuses_that_is_said_and_nothing_is_half_written(written, write, error):
    """Each operation of each writer in turn: what was there before can still be read."""
    write(written)
    before, fails_at = names(written), 0
    while True:
        fails_at += 1
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, error, fails_at)
            try:
                write(written)
            except CmpError as told:
                assert os.strerror(error) in str(told)
            else:  # at most leftovers could not be deleted
                assert disk.refused <= {"unlink"}
            if disk.count < fails_at:
                break
        if write is finish_a_run and not store.is_stored(tiny_id()):
            finish_a_run(written)  # from its last checkpoint
        read_back(written)
        delete_leftovers(written)  # which a disk that refuses all does not let go
        for folder in (path for path in written.rglob("*") if path.is_dir()):
            delete_leftovers(folder)
        assert names(written) == before
    assert fails_at > 3
