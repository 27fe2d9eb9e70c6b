"""Runs: what they draw from, what they store, and that the same config is the same run."""

import dataclasses
import itertools
import json
import shutil

import forked
import numpy as np
import open_clip
import options
import pandas as pd
import pytest
import torch
from pictures import tree
from safetensors.torch import save_file
from typer.testing import CliRunner

import cmp
from cmp import cli, config, mixtures, models, registry
from cmp.cli import shared
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.files import SHORT_ID, file_digest, tensors_digest
from cmp.methods import adapters
from cmp.runs import identity, launch, lookup, runner, store
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import execute
from lab.evidence import studies
from lab.evidence.studies import joint_training

SMALL = ["stream.tasks=2", "training.steps=3", "training.batch=12", "evaluation.subset=8"]


def small(*settings):
    tree = config.override({"evaluation": {"full": False}}, [*SMALL, *settings])
    return config.parse(tree)


@pytest.fixture
def small_corpus(monkeypatch):
    """The small corpus, on which runs are, too."""
    found = forked.small_corpus()  # while the data are in sight
    monkeypatch.setattr(packed, "load_embedded", forked.small_corpus)
    return found


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The build folder of a stored run."""
    folder = tmp_path_factory.mktemp("computed")
    forked.small_corpus()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "load_embedded", forked.small_corpus)
        patch.setenv("CMP_BUILD", str(folder))
        launch.run_one(small())
    return folder


@pytest.fixture
def run(computed, small_corpus, build):
    """That run, in a copy of the folder, which a test may change."""
    shutil.copytree(computed, build, dirs_exist_ok=True)
    return launch.run_one(small())


def test_a_run_is_stored_once_and_then_looked_up(small_corpus, build, monkeypatch):
    first = launch.run_one(small())
    assert first.metrics["task"].tolist() == sorted(first.metrics["task"])
    assert set(first.metrics["task"]) == {0, 1, 2}
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("computed again"))
    again = launch.run_one(small())
    assert again.id == first.id
    assert again.config == small()
    pd.testing.assert_frame_equal(again.metrics, first.metrics)
    assert again.provenance["seconds"] > 0


def test_a_look_up_leaves_the_checkpoints_of_another_process(run):
    """Such as of one that computes the run again, for its weights."""
    with CheckpointManager(run.id) as manager:
        assert launch.run_one(small()).id == run.id
        assert (manager.folder / "lock").exists()
    assert launch.run_one(small()).id == run.id  # what a killed process left
    assert not (manager.folder / "lock").exists()


@pytest.mark.numbers
@pytest.mark.defect
@pytest.mark.parametrize("name", ["small", "tiny-vit"])
def test_plain_open_clip_loads_the_network_that_a_run_ends_in(name, tmp_path):
    result = execute(
        small(f"model.name={name}", "method.name=lora", "training.precision=fp32"),
        forked.small_corpus(),
    )
    path = tmp_path / "model.safetensors"
    models.export_weights(result.model, path)
    plain = open_clip.create_model(name, pretrained=str(path), output_dict=True).eval()
    pixels, tokens = torch.randn(2, 3, 32, 32), models.tokenizer(name)(["a red cat", "x"])
    with torch.no_grad():
        ours, theirs = (each.eval()(pixels, tokens) for each in (result.model, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.defect),
        pytest.param({"method": {"name": "lora", "fold": False}}, marks=pytest.mark.defect),
        pytest.param(
            {"method": {"name": "galore", "gap": 2}}, marks=[pytest.mark.defect, pytest.mark.long]
        ),
        pytest.param({"passes": 0.02}, marks=pytest.mark.long),
        pytest.param({"optimizer": {"carry": False}}, marks=pytest.mark.long),
        pytest.param({"method": "lora"}, marks=pytest.mark.long),
    ],
)
def test_a_loop_of_one_s_own_over_the_tasks_is_a_run_to_the_bit(small_corpus, build, settings):
    """The loop is that of the example of `cmp.train_task`."""
    settings = settings | {
        "stream": {"tasks": 3},
        "steps": 3,
        "batch": 9,
        "full": False,
        "subset": 1,
    }
    finished = cmp.run("quick", progress=False, **settings)
    state = cmp.make_train_state(finished.config, small_corpus)
    for task, pools in enumerate(cmp.task_pools(finished.config, state.corpus)):
        cmp.train_task(state, pools, task)
    weights = adapters.merged_state_dict(state.model)
    assert tensors_digest(weights) == finished.weights


def test_a_stored_run_is_loaded_where_its_device_is_missing(small_corpus, build, monkeypatch):
    short = {"stream": {"tasks": 1}, "steps": 1, "batch": 9, "full": False, "subset": 1}
    made = cmp.run("quick", progress=False, **short)

    def check_device(device):
        raise CmpError(f"device {device!r}: cannot be used here")

    monkeypatch.setattr(launch, "check_device", check_device)
    assert cmp.run("quick", "cuda", progress=False, **short).id == made.id
    with pytest.raises(CmpError, match="cannot be used here"):
        cmp.run("quick", "cuda", progress=False, **short | {"steps": 2})


def test_the_shell_stores_the_same_run_as_the_library(small_corpus, build):
    result = CliRunner().invoke(cli.app, ["run", "quick", *SMALL])
    assert result.exit_code == 0, result.output
    run_config = config.parse(config.override(config.profile("quick"), SMALL))
    run_id = identity.run_id_of(run_config, small_corpus)
    by_shell = store.load_run(run_id)
    assert run_id[:SHORT_ID] in result.output
    fresh = execute(run_config, small_corpus).metrics
    pd.testing.assert_frame_equal(by_shell.metrics, fresh)


def test_every_key_of_the_config_moves_the_id(corpus):
    other = {
        "data": ["fomo"],
        "model.name": ["tiny-vit"], "mixture.update": None, "mixture.buffer": None,
        "mixture.pretraining": [0.5, "mixture.update=0.25", "mixture.buffer=0.25"],
        "schedule.warmup": [0.3], "schedule.warmup_steps": [2],
        "schedule.cooldown": [0.3, "schedule.name=wsd"],
        "schedule.cooldown_steps": [2, "schedule.name=wsd"],
        "schedule.shift": [3, "schedule.name=rsqrt"],
        "schedule.level": [0.3, "schedule.name=infinite"],
        "schedule.decay": [0.3, "schedule.meta=geometric"],
        "schedule.peaks": [[1.0] * 4, "schedule.meta=free"],
        "training.budget": [2.0], "training.passes": [2.5],
        "training.task_steps": [[5] * small().stream.tasks], "mixture.policy": ["task-balanced"],
        "mixture.capacity": [40, "mixture.policy=reservoir"],
        "stream.traits": ["by-hand", "stream.order=listed"],
        "merging.rule": ["slerp", "merging.policy=ema"],
        "merging.weight": [0.3, "merging.policy=ema"],
        "merging.shares": ["log", "merging.policy=zero-all"],
        "merging.power": [2.0, "merging.policy=zero-all", "merging.shares=power"],
        "merging.reverse": [True, "merging.policy=zero-all", "merging.shares=log"],
        "merging.zero": [True, "merging.policy=zero-all"],
        "merging.scale": [0.3, "merging.policy=ema", "merging.rule=ties"],
        "merging.density": [0.5, "merging.policy=ema", "merging.rule=ties"],
        "merging.outliers": [0.1, "merging.policy=ema", "merging.rule=breadcrumbs"],
        "merging.alpha": [0.1, "merging.policy=ema", "merging.rule=lines"],
        "merging.beta": [0.1, "merging.policy=ema", "merging.rule=lines"],
        "merging.protect": [0.1, "merging.policy=ema", "merging.rule=opcm"],
        "merging.decay": [0.9, "merging.policy=step-ema"],
        "merging.window": [0.6, "merging.policy=wsm"],
    }  # fmt: skip
    special = {"targets": ["q_proj"], "fold": False, "fisher": "batch"}
    special |= {"layer_decay": 0.5, "unlock": 1, "image_rate": 0.3, "views": 2, "lock_from": 1}
    for method in registry.option_names("method"):
        for key, value in registry.get_option("method", method).settings.items():
            changed = special[key] if key in special else value / 2 if value < 2 else value + 1
            other[f"method.{key}"] = [changed, f"method.name={method}"]
    other["method.lock_from"].append("method.views=1")
    base, ids, changes = small(), set(), 0
    for key, value in config.flat_keys(base.to_dict()):
        names = [name for name in options.choices().get(key, [None, None]) if name != value]
        if not names or other.get(key, names) is None:  # one choice, or a share that follows others
            continue
        plain = value + 1 if type(value) is int else value
        plain = plain / 2 if isinstance(plain, float) else plain
        changed, *companions = other.get(key, [names[0] if key in options.choices() else plain])
        ids.add(identity.run_id_of(small(f"{key}={json.dumps(changed)}", *companions), corpus))
        changes += 1
    assert identity.run_id_of(base, corpus) not in ids
    assert len(ids) == changes > 30


def test_joint_training_is_one_task_of_all_classes_and_as_many_steps(corpus):
    joint = joint_training(small())
    [pools] = mixtures.task_pools(joint, corpus)
    assert joint.training.steps == 6
    assert len(pools.update) == sum(
        corpus.datasets[name].counts.train for name in corpus.by_role("adapt")
    )


def test_the_control_sees_no_new_data(corpus):
    control = small("mixture.pretraining=1", "mixture.update=0", "mixture.buffer=0")
    for pools in mixtures.task_pools(control, corpus):
        assert len(pools.update) == len(pools.buffer) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["stream.tasks=5000"], ["stream.tasks", "5000"]),
        (["mixture.update=0.9"], ["mixture", "must be 1"]),
        (["training.batchsize=3"], ["training.batchsize", "training.batch"]),
        (["seed=99"], ["99", "cmpt pretrain"]),
        (["training.batch=5000"], ["training.batch", "5000", "training.batch="]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(corpus, build, settings, words):
    result = CliRunner().invoke(cli.app, ["run", "quick", *settings])
    assert isinstance(result.exception, CmpError)
    for word in words:
        assert word in str(result.exception)
    assert not [*build.glob("runs/*")]


def test_results_are_listed_and_shown(run, monkeypatch):
    short = run.id[:SHORT_ID]
    invoke = CliRunner().invoke
    rows = []
    monkeypatch.setattr(shared, "print_table", lambda columns, table: rows.extend(table))
    assert invoke(cli.app, ["results", "ls"]).exit_code == 0
    [(name, *_, changes)] = rows
    assert name == short
    usual = dict(config.flat_keys(config.parse(config.profile("cpu")).to_dict()))
    keys = {key for key, value in config.flat_keys(small().to_dict()) if value != usual[key]}
    assert {change.partition("=")[0] for change in changes.split(" ")} == keys
    shown = invoke(cli.app, ["results", "show", short[:6]]).output
    assert "training.steps: 3" in shown
    assert "results ls" in str(invoke(cli.app, ["results", "show", "fff"]).exception)


@pytest.mark.parametrize("damage", ["{", '{"id": 3}', ""])
def test_a_damaged_run_is_named(run, damage):
    (store.run_folder(run.id) / "run.json").write_text(damage)
    with pytest.raises(CmpError, match=run.id[:SHORT_ID]):
        store.load_run(run.id)


def test_one_unreadable_run_does_not_take_the_list_down(run):
    one, two = run, launch.run_one(small("seeds.data=1"))
    (store.run_folder(one.id) / store.METRICS).write_bytes(b"")
    result = CliRunner().invoke(cli.app, ["results", "ls"])
    assert result.exit_code == 0
    assert two.id[:SHORT_ID] in result.stdout
    assert one.id[:SHORT_ID] not in result.stdout
    assert f"left out: {store.run_folder(one.id)}" in result.stderr
    assert "metrics.parquet is damaged" in result.stderr


def test_a_run_of_an_older_format_is_said_to_be_one(run):
    path = store.run_folder(run.id) / "run.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format": store.RUN_FORMAT - 1}))
    words = f"{path.parent}: .*another version wrote it.*delete the folder and rerun"
    with pytest.raises(CmpError, match=words):
        store.load_run(run.id)


def test_a_run_of_a_later_format_says_what_to_install(run):
    path = store.run_folder(run.id) / "run.json"
    tree = json.loads(path.read_text()) | {"format": store.RUN_FORMAT + 1, "new": 1}
    tree["provenance"]["cmp"] = "9.1.0"
    path.write_text(json.dumps(tree))
    with pytest.raises(CmpError, match=r"a newer version of cmp .*install cmp 9\.1\.0") as error:
        store.load_run(run.id)
    assert "delete" not in str(error.value)


def changed_steps(tree):
    tree["config"]["training"]["steps"] += 1


def changed_steps_and_hash(tree):
    changed_steps(tree)
    del tree["sha256"]
    tree["sha256"] = identity.json_digest(tree)


def changed_identity_too(tree):
    tree["identity"]["config"]["training.steps"] += 1
    changed_steps_and_hash(tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_steps, "run.json is damaged: it does not match its hash"),
        (changed_steps_and_hash, "config: does not match the id"),
        (changed_identity_too, "identity: does not match the id"),
    ],
)
def test_a_record_that_was_changed_is_refused(run, change, words):
    path = store.run_folder(run.id) / "run.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(CmpError, match=words):
        store.load_run(run.id)


def test_a_run_on_data_that_were_made_anew_is_not_damaged(run, small_corpus, monkeypatch):
    hashes = small_corpus.hashes | {"shapes": "0" * 64}
    other = dataclasses.replace(small_corpus, hashes=hashes)
    monkeypatch.setattr(identity, "load_data", lambda name: other)
    assert identity.run_id_of(small()) != run.id
    assert store.load_run(run.id).id == run.id


GRID = """
question: Does it work?
replicates: 2
live: [a]
settings:
  a: {}
  b: {schedule.peak: 0.0005}
  joint: {joint: true}
"""


@pytest.fixture
def write_grid(tmp_path, monkeypatch):
    """Write a grid as chapter 77's and read it."""
    monkeypatch.setattr(studies, "STUDIES", tmp_path)

    def write(text=GRID):
        (tmp_path / "77.yaml").write_text(text)
        return studies.load_study("77")

    return write


def test_a_study_pairs_bases_and_streams(write_grid):
    study = write_grid()
    configs = study.configs("quick")
    assert list(configs) == [(s, r) for r in (0, 1) for s in ("a", "b", "joint")]
    assert all(c.seeds == config.Seeds(r, 0, r, r) for (_, r), c in configs.items())
    full = study.configs("cpu")
    assert all(c.seeds == config.Seeds(r, 2 + r, r, r) for (_, r), c in full.items())
    assert configs["b", 1].schedule.peak == 0.0005
    assert configs["joint", 0].stream.tasks == 1
    assert list(study.configs("quick", 1, live_only=True)) == [("a", 0)]


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("question: Does it work?\n", "", "question"),
        ("replicates: 2", "replicates: two", "replicates"),
        ("live: [a]", "live: [z]", "live"),
        ("live: [a]", "live: [a]\ncolour: red", "colour"),
        ("schedule.peak", "schedule.peek", "schedule.peek"),
        ("question", "- question", "YAML"),
    ],
)
def test_a_bad_grid_is_refused_with_file_and_key(write_grid, old, new, word):
    with pytest.raises(CmpError) as error:
        write_grid(GRID.replace(old, new))
    assert "77" in str(error.value)
    assert word in str(error.value)


def test_a_trajectory_has_the_mean_of_each_role_and_their_geometric_mean():
    runs = itertools.product("ab", (0, 1), (0, 1), ("subset", "full"), ("adapt", "eval"), "xyz")
    columns = ["setting", "replicate", "task", "scope", "role", "dataset"]
    frame = pd.DataFrame(runs, columns=columns)
    frame["score"] = np.random.default_rng(0).uniform(1, 100, len(frame))
    trajectory = store.trajectory(frame)
    assert len(trajectory) == 2 * 2 * 2 * 2
    for _, row in trajectory.iterrows():
        mine = frame[(frame[columns[:4]] == row[columns[:4]]).all(axis=1)]
        for name, role in (("A_KA", "adapt"), ("A_ZS", "eval")):
            assert row[name] == pytest.approx(mine[mine["role"] == role]["score"].mean())
        assert row["GM"] == pytest.approx(np.sqrt(row["A_KA"] * row["A_ZS"]))


def run_with_hits():
    """A run that is stored, of six datasets whose questions were scored."""
    row = {"task": 0, "scope": "full", "dataset": "shapes", "role": "eval", "score": 50.0}
    hits = {f"{task}/{name}": np.arange(9) % 2 == task for task in (0, 1) for name in "abc"}
    about = {"threads": 1, "seconds": 1.0}
    content = {"config": config.RunConfig().changes()}
    run_id, run_config = identity.json_digest(content), config.RunConfig()
    run = store.StoredRun(run_id, run_config, about, pd.DataFrame([row]), "", content, hits)
    store.save_run(run)
    return run


@pytest.mark.defect
def test_a_run_is_stored_in_the_same_bytes_each_time(build):
    contents = set()
    for _ in range(6):
        run = run_with_hits()
        contents.add((store.run_folder(run.id) / store.HITS).read_bytes())
    assert len(contents) == 1
    loaded = store.load_run(run.id).hits
    assert all(np.array_equal(x, loaded[name]) for name, x in run.hits.items())


def test_a_run_that_0_2_0_stored_is_read(build):
    run = run_with_hits()
    folder = store.run_folder(run.id)
    bits = {name: torch.from_numpy(np.packbits(hits)) for name, hits in run.hits.items()}
    save_file(bits, folder / store.HITS, {name: str(len(x)) for name, x in run.hits.items()})
    record = json.loads((folder / "run.json").read_text())
    record.pop("sha256")
    record["files"][store.HITS] = file_digest(folder / store.HITS)
    record["sha256"] = identity.json_digest(record)
    (folder / "run.json").write_text(json.dumps(record))
    loaded = store.load_run(run.id).hits
    assert loaded.keys() == run.hits.keys()
    assert all(np.array_equal(x, loaded[name]) for name, x in run.hits.items())


@pytest.mark.defect
def test_a_file_that_a_user_put_beside_a_run_stays_when_it_is_stored_again(build, monkeypatch):
    run = run_with_hits()
    folder = store.run_folder(run.id)
    tree(folder, {"notes.txt": b"mine", "figures/a.png": b"mine, too"})
    (folder / "link").symlink_to("nowhere")
    store.save_run(run, models.create_model(run.config.model.name))
    assert (folder / store.WEIGHTS).exists()
    assert (folder / "notes.txt").read_bytes() == b"mine"
    assert (folder / "figures/a.png").read_bytes() == b"mine, too"
    assert (folder / "link").is_symlink()
    assert store.load_run(run.id).id == run.id


@pytest.mark.defect
def test_a_file_that_a_user_put_beside_a_run_is_not_deleted_with_it(build, monkeypatch):
    run = run_with_hits()
    folder = store.run_folder(run.id)
    (folder / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"notes\.txt"):
        lookup.delete_run(run.id)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert store.stored_ids() == []
