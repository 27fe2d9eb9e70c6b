"""Data that stay in files: the same batches from any process, and runs that resume exactly."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pictures import classes, fileset, picture, tar, tree, write_manifest
from PIL import Image
from typer.testing import CliRunner

from cmp import cli, config, mixtures, models, streams
from cmp.config import Model, RunConfig
from cmp.data import Preprocessing, load_data, stored_images
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests
from cmp.errors import CmpError, Interrupted
from cmp.evaluation import evaluate
from cmp.faults import explain_failure
from cmp.project import project_folder
from cmp.readers import collection
from cmp.runs import identity, store
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer, execute
from cmp.scale import decoding
from cmp.scale.decoding import worker_count
from cmp.training import make_train_state, train_task

CPU = torch.device("cpu")
SMALL = ("stream.tasks=2", "training.steps=3", "training.batch=9", "evaluation.subset=4",
         "evaluation.full=false", "training.precision=fp32", "mixture.replay=1",
         "mixture.select=random")  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A collection of files alone: a set that arrives, a pool, and one that must be retained."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    root = tmp_path / "data"
    for place, (name, role) in enumerate((("mine", "adapt"), ("web", "pool"), ("known", "eval"))):
        classes(root / name, [f"{word} {place}" for word in ("fox", "owl", "oak", "elm")], 10)
        write_manifest(root / f"{name}.yaml", name=name, role=role, reader={"path": name})
    return root


def small(folder, *settings):
    tree = config.override(config.profile("quick"), [*SMALL, f"data={folder}", *settings])
    return config.parse(tree)


def test_a_collection_of_files(folder):
    corpus = load_data(small(folder).data)
    assert corpus.in_files and len(corpus.table) == 120
    assert corpus.by_role("adapt") == ["mine"] and len(corpus.rows("train", dataset="web")) == 40
    held = [len(corpus.rows(split, dataset="known")) for split in ("validation", "test")]
    assert sum(held) == 40 and 20 < held[1] < 40
    shown = corpus.images[torch.arange(3)]
    assert shown.shape == (3, 3, 224, 224) and shown.dtype == torch.uint8
    assert corpus.images.at(Preprocessing(48))[np.arange(2)].shape == (2, 3, 48, 48)
    assert load_data(small(folder).data) is corpus


def test_a_folder_counts_by_what_is_in_it_wherever_it_lies(folder, tmp_path):
    first = small(folder)
    run_id = identity.run_id_of(first, load_data(first.data))
    moved = small(folder.rename(tmp_path / "elsewhere"))
    assert identity.run_id_of(moved, load_data(moved.data)) == run_id
    (tmp_path / "elsewhere/mine/fox 0/0.png").unlink()
    collection._load_folder.cache_clear()
    assert identity.run_id_of(moved, load_data(moved.data)) != run_id


def test_an_id_counts_the_order_of_datasets(tmp_path):
    """Manifests are read by the names of their files, and a batch is drawn by position."""
    for name in ("new", "new-more"):
        classes(tmp_path / name, ("oak",), prefix=name)
    run_config = RunConfig(data=str(tmp_path))

    def identify(*manifests):
        for path in tmp_path.glob("*.yaml"):
            path.unlink()
        for file, name in zip(manifests, ("new", "new-more"), strict=True):
            write_manifest(tmp_path / file, name=name, reader={"path": name})
        corpus = load_data(run_config.data)
        return identity.run_id_of(run_config, corpus), [*corpus.datasets]

    by_name, same, other = (
        identify("new.yaml", "new-more.yaml"), identify("b.yaml", "a.yaml"),
        identify("a.yaml", "b.yaml"),
    )  # fmt: skip
    assert by_name == same
    assert other[0] != same[0] and other[1] == same[1][::-1]


def test_an_id_counts_unused_images_that_shift_the_draws_of_a_full_buffer(tmp_path):
    classes(tmp_path / "new", [f"oak {number}" for number in range(8)], 9)
    classes(tmp_path / "spare", ("elm",), 7)
    write_manifest(tmp_path / "b.yaml", name="new", reader={"path": "new"})
    full = ("mixture.policy=reservoir", "mixture.capacity=8")

    def identify(*settings, spare=""):
        if spare:
            write_manifest(tmp_path / spare, name="spare", role="substitute",
                           reader={"path": "spare"})  # fmt: skip
        run_config = small(tmp_path, "mixture.pretraining=0", "mixture.update=0.5",
                           "mixture.buffer=0.5", "training.batch=8", *settings)  # fmt: skip
        corpus = load_data(run_config.data)
        first = streams.adaptation_rows(corpus)[0]
        pools = mixtures.task_pools(run_config, corpus)
        if spare:
            (tmp_path / spare).unlink()
        return identity.run_id_of(run_config, corpus), (pools[1].buffer - first).tolist()

    alone = identify(*full)
    assert identify(*full, spare="c.yaml") == alone
    shifted = identify(*full, spare="a.yaml")
    assert shifted[0] != alone[0] and shifted[1] != alone[1]
    assert identify(spare="a.yaml") == identify()


def overwrite(path, content):
    """Write a file in place, at the same size and with its old time."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("kind", ["folder", "pairs", "csv", "tars"])
def test_a_folder_is_read_again_in_one_process_when_a_file_changes(tmp_path, kind):
    """An image, a text beside it, a table or a tar."""
    root, pictures = tmp_path / "data", {f"{n}.bmp": picture(n, kind="BMP") for n in range(4)}
    texts = {f"{n}.txt": b"an oak" for n in range(4)}
    tree(root / "oak", pictures | (texts if kind == "pairs" else {}))
    lines = "".join(f"oak/{n}.bmp,an oak\n" for n in range(4))
    (root / "t.csv").write_text(f"filepath,title\n{lines}")
    tar(root / "1.tar", sorted([*pictures.items(), *texts.items()]))
    path = {"csv": "t.csv", "tars": "*.tar"}.get(kind, ".")
    write_manifest(root / "mine.yaml", kind, reader={"path": path})
    before = load_data(str(root))
    assert load_data(str(root)) is before
    if kind == "folder":
        overwrite(root / "oak/0.bmp", picture(9, kind="BMP"))
    elif kind == "pairs":
        overwrite(root / "oak/0.txt", b"an elm")
    elif kind == "csv":
        overwrite(root / "t.csv", (root / "t.csv").read_bytes().replace(b"an oak", b"an elm"))
    else:
        tar(root / "1.tar", [("0.bmp", picture(9, kind="BMP")), ("0.txt", b"an elm")])
    after = load_data(str(root))
    assert after.hashes != before.hashes
    assert load_data(str(root)) is after


@pytest.mark.defect
def test_an_export_says_which_pictures_open_clip_sees_otherwise(folder, monkeypatch, tmp_path):
    Image.new("RGBA", (40, 40)).save(folder / "mine/fox 0/0.png")
    monkeypatch.chdir(tmp_path)
    given = [*SMALL, f"data={folder}", "training.steps=1", "stream.tasks=1", "--keep-weights"]
    invoke = CliRunner().invoke
    done = invoke(cli.app, ["run", "quick", *given])
    assert done.exit_code == 0, done.output
    [run_id] = store.stored_ids()
    for out in ("new.safetensors", "new"):
        to = ["--to", "hf"] * (out == "new")
        done = invoke(cli.app, ["export", run_id, "-o", out, *to])
        assert "note: mine: transparent images: 1; " in done.output, done.output
    assert "* mine: transparent images: 1; " in Path("new/README.md").read_text()


@pytest.mark.numbers
def test_parts_are_drawn_by_step_and_seed_alone(folder):
    run_config = small(folder)
    corpus = load_data(run_config.data)
    pools = mixtures.task_pools(run_config, corpus)

    def images(task, step, *settings):
        where = small(folder, *settings), corpus, pools[task], task, step
        return mixtures.make_batch(*where, 32).images

    assert torch.equal(images(1, 2), images(1, 2))
    assert not torch.equal(images(1, 2), images(1, 1))
    assert not torch.equal(images(1, 2), images(1, 2, "seeds.augment=1"))
    assert images(0, 0).shape == (9, 3, 32, 32)


@pytest.mark.numbers
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
def test_batches_made_ahead_are_the_same(folder, monkeypatch, count):
    run_config = small(folder, "training.steps=5")
    corpus = load_data(run_config.data)
    pools, state = mixtures.task_pools(run_config, corpus), make_train_state(run_config, corpus)
    monkeypatch.setenv("CMP_WORKERS", str(count))
    # in order, from the middle, beyond the last step
    for task, steps in [(0, range(3)), (0, range(1, 3)), (1, range(3, 6)), (1, [0])]:
        ahead = list(state.batches(pools[task], task, steps))
        assert len(ahead) == len(steps)
        for step, other in zip(steps, ahead, strict=True):
            one = mixtures.make_batch(run_config, corpus, pools[task], task, step)
            np.testing.assert_array_equal(one.rows, other.rows)
            assert torch.equal(one.images, other.images) and torch.equal(one.texts, other.texts)
    rows = np.arange(11)
    blocks = list(stored_images(corpus, rows, 4, Preprocessing(20), CPU))
    assert [len(block) for block in blocks] == [4, 4, 3]
    assert torch.equal(torch.cat(blocks), corpus.images.at(Preprocessing(20))[rows])


@pytest.mark.numbers
@pytest.mark.parametrize("count", [0, 2])
def test_some_of_a_batch_are_decoded_as_they_are_in_the_whole(folder, monkeypatch, count):
    run_config = small(folder)
    corpus = load_data(run_config.data)
    [pools, _] = mixtures.task_pools(run_config, corpus)
    monkeypatch.setenv("CMP_WORKERS", str(count))
    state = make_train_state(run_config, corpus)
    [batch] = state.batches(pools, 0, [1])
    read = []
    monkeypatch.setattr(type(corpus.images), "read", watched(type(corpus.images).read, read))
    [some] = state.batches(pools, 0, [1], slice(3, 6))
    assert torch.equal(some.images, batch.images[3:6]) and torch.equal(some.texts, batch.texts)
    np.testing.assert_array_equal(some.rows, batch.rows)
    if not count:
        assert sorted(read) == sorted(some.rows[3:6])  # and no others


def without_shared_memory(key):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return torch.zeros(9)


def killed(key):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("make", [without_shared_memory, killed])
def test_decoding_processes_that_lack_memory_are_explained(make):
    with pytest.raises((CmpError, RuntimeError)) as caught:
        list(decoding.prefetch(make, range(3), 2, CPU))
    assert "CMP_WORKERS to a smaller number" in explain_failure(caught.value)


def watched(read, rows):
    """A reader of files that notes the rows which it is asked for."""

    def reading(files, row):
        rows.append(row)
        return read(files, row)

    return reading


def test_processes_on_a_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("CMP_WORKERS", raising=False)
    monkeypatch.setattr(decoding, "usable_cores", lambda: 16)
    assert worker_count(torch.device("cuda")) == 15
    monkeypatch.setenv(decoding.JOBS, "2")  # a study of two runs at a time
    assert worker_count(torch.device("cuda")) == 7
    monkeypatch.setattr("cmp.scale.processes.world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(torch.device("cuda")) == 3 and worker_count(CPU) == 0
    monkeypatch.setattr(decoding, "usable_cores", lambda: 1.5)
    assert worker_count(torch.device("cuda")) == 1


def test_processes_that_srun_has_given_cores_of_their_own_share_none(monkeypatch):
    monkeypatch.delenv("CMP_WORKERS", raising=False)
    monkeypatch.setattr("cmp.scale.processes.world_size", lambda: 8)
    for name, value in (("STEP_TASKS_PER_NODE", "4(x2)"), ("NODEID", "1"), ("CPUS_ON_NODE", "32")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for usable in (8, 32):  # its own; those of all, where srun binds no process
        monkeypatch.setattr(decoding, "usable_cores", lambda usable=usable: usable)
        assert worker_count(torch.device("cuda")) == 7
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")  # which is torchrun, with all of them
    assert worker_count(torch.device("cuda")) == 7


def test_cores_are_those_of_the_job_and_not_of_the_machine(monkeypatch):
    """A job of four cores on a machine of 128 starts three processes, not 127."""
    monkeypatch.setattr(decoding.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(decoding.os, "cpu_count", lambda: 128)
    for content, cores in (("max 100000", 4), ("250000 100000", 2.5), ("900000 100000", 4)):
        monkeypatch.setattr(Path, "read_text", lambda path, x=content: x)
        assert decoding.usable_cores() == cores
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(OSError))
    assert decoding.usable_cores() == 4


@pytest.mark.numbers
@pytest.mark.long
@pytest.mark.parametrize("count", [0, 2])
def test_runs_resume_exactly_at_every_step(folder, monkeypatch, count):
    monkeypatch.setenv("CMP_WORKERS", "0")
    run_config = small(folder)
    corpus = load_data(run_config.data)
    result = execute(run_config, corpus)
    monkeypatch.setenv("CMP_WORKERS", str(count))
    for stop in range(1, 6):
        run_id = f"{stop}" * 64
        counts = {"seen": 0}

        def step(task, number, result, model, counts=counts, stop=stop):
            counts["seen"] += 1
            if counts["seen"] == stop:
                raise Interrupted("here", 15)

        with CheckpointManager(run_id, interval=0.0) as manager:
            with pytest.raises(Interrupted):
                execute(run_config, corpus, Observer(step), manager=manager)
            again = execute(run_config, corpus, manager=manager)
        assert models.weights_digest(again.model) == models.weights_digest(result.model)
        pd.testing.assert_frame_equal(again.metrics, result.metrics)


@pytest.mark.parametrize("value", ["-1", "many", "1.5", ""])
def test_a_number_of_processes_that_is_none(monkeypatch, value):
    monkeypatch.setenv("CMP_WORKERS", value)
    with pytest.raises(CmpError, match="CMP_WORKERS"):
        worker_count(CPU)


def test_a_few_pictures_beside_the_embedded_sets(corpus, tmp_path):
    root = classes(tmp_path, [f"thing {n}" for n in range(4)], 12)
    write_manifest(root / "m.yaml", beside="embedded")
    mine = load_data(str(root))
    assert not mine.in_files and mine.images.shape[1:] == (4, 32, 32)
    assert mine.by_role("adapt") == ["mine"] and mine.by_role("pool") == corpus.by_role("pool")
    assert mine.hashes["shapes"] == corpus.hashes["shapes"]
    run_config = config.parse(config.override(config.profile("quick"), [*SMALL, f"data={root}"]))
    metrics = execute(run_config, mine).metrics
    assert set(metrics["dataset"]) >= {"mine", "shapes"} and set(metrics["task"]) == {0, 1, 2}
    default = config.parse(config.override(config.profile("quick"), SMALL))
    assert identity.run_id_of(run_config, mine) != identity.run_id_of(default, corpus)
    assert "data" not in default.changes()
    write_manifest(root / "m.yaml", name="shapes", beside="embedded")
    with pytest.raises(CmpError, match="shapes: name: an embedded dataset"):
        load_data(str(root))


@pytest.mark.usefixtures("build")
def test_a_table_of_captions_is_scored_by_recall(tmp_path):
    held = {"filepath": [picture(n) for n in range(20)], "title": [f"thing {n}" for n in range(20)]}
    pd.DataFrame(held).to_parquet(tmp_path / "t.parquet")
    table = fileset("parquet", role="eval", reader={"path": "t.parquet"})
    index = collection.check_images(collection.read_index(table, tmp_path))
    model, corpus = models.load_model(Model("tiny"), 0), collection.corpus_from_indexes([index])
    scored = evaluate(model, "tiny", corpus).datasets.loc["mine"]
    assert scored["metric"] == "R@5"
    assert scored["images"] == (index.table["split"] == "test").sum()


def test_packed_images_are_of_one_size(corpus):
    with pytest.raises(CmpError, match="takes images of 224 pixels, but the data have 32"):
        corpus.check_side(224, "ViT-B-16")
    oblong = SimpleNamespace(visual=SimpleNamespace(image_size=(224, 160)))
    with pytest.raises(CmpError, match="only square images"):
        models.preprocessing(oblong)


NOWHERE = ["/nowhere/at/all", "fomoo", "traits", "embedded/..", "a" * 300, "a/" * 3000, "\ud800"]


@pytest.mark.parametrize("source", NOWHERE, ids=range(len(NOWHERE)))
def test_no_such_data(source):
    with pytest.raises(CmpError, match="data: "):
        load_data(source)


def test_a_pool_is_wanted_or_left_out(folder):
    (folder / "web.yaml").unlink()
    alone = small(folder)
    with pytest.warns(UserWarning, match="no dataset has the role pool"):
        mixtures.task_pools(alone, load_data(alone.data))
    without = small(folder, "mixture.pretraining=0", "mixture.update=0.5", "mixture.buffer=0.5")
    pools = mixtures.task_pools(without, load_data(without.data))
    state = make_train_state(without, load_data(without.data))
    train_task(state, pools[0], 0)
    tree(folder, {"empty/.keep": b""})
    with pytest.raises(CmpError, match="no manifests"):
        load_data(str(folder / "empty"))


def test_packed_pictures_as_files_are_the_same_pictures(tmp_path):
    icons = packed.read_packed(embedded_manifests()["new-icons"])
    rows = np.flatnonzero(icons.table["split"] == "train")
    for row in rows:
        place = tmp_path / icons.table["label"].iloc[row].replace(" ", "_")
        place.mkdir(exist_ok=True)
        Image.fromarray(icons.images[row].transpose(1, 2, 0)).save(place / f"{row}.png")
    mine = load_data(str(write_manifest(tmp_path / "m.yaml", beside="embedded")))
    held = np.flatnonzero((mine.table["dataset"] == "mine").to_numpy())
    assert len(held) == len(rows)
    assert mine.classes["mine"] == icons.header.classes
    first = mine.table["group"].iloc[held[0]]
    row = int(first.rpartition("/")[2].removesuffix(".png"))
    assert (mine.images[held[0]].numpy() == icons.images[row]).all()


SHARDED = """import hashlib
from cmp import config, data, mixtures

def digests(settings, steps):
    run_config = config.parse(config.override({}, settings))
    corpus = data.load_data(run_config.data)
    assert len(corpus.table) == 100_040
    pools, found = mixtures.task_pools(run_config, corpus), []
    for step in steps:
        batch = mixtures.make_batch(run_config, corpus, pools[1], 1, step, side=32)
        parts = (batch.rows, batch.images.numpy(), batch.texts.numpy())
        found.append(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
    return found
"""
PRINTED = """
import sys
print(*digests(sys.argv[1:], (0, 1, 3999)))
# ru_maxrss would begin with the memory of the process that started this one
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1])
"""


@pytest.mark.long
def test_shards_of_a_hundred_thousand_samples_go_on_at_any_step(tmp_path, monkeypatch):
    """Tars of webdataset's layout: a process, and then another one from the index that is kept,
    reads what its steps ask for, and no more."""
    files = [picture(n, (40, 30), "JPEG") for n in range(16)]
    for shard in range(10):
        numbers = range(shard * 10_000, (shard + 1) * 10_000)
        members = [
            (f"{n}{suffix}", content)
            for n in numbers
            for suffix, content in ((".jpg", files[n % 16] + bytes(str(n), "ascii")),
                                    (".txt", bytes(f"picture {n}", "ascii")))
        ]  # fmt: skip
        tar(tmp_path / "web" / f"{shard:04}.tar", members)
    reader = {"path": "web/*.tar"}
    write_manifest(tmp_path / "web.yaml", "tars", name="web", role="pool", reader=reader)
    classes(tmp_path / "mine", ("fox", "owl"), 20)
    write_manifest(tmp_path / "mine.yaml", reader={"path": "mine"})
    settings = [f"data={tmp_path}", "stream.tasks=2", "training.steps=4000", "training.batch=12",
                "mixture.replay=1.0"]  # fmt: skip
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    environment = os.environ | {"PYTHONPATH": str(project_folder()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARDED + PRINTED, *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *first, memory = done.stdout.split()
    assert int(memory) < 1_200_000  # in kB: a kilobyte per sample beside what torch takes
    names: dict = {}
    exec(SHARDED, names)
    *again, other = names["digests"](settings, (0, 1, 3999, 3998))
    assert again == first and other not in first
