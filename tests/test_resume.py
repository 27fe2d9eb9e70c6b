"""A run that goes on from a checkpoint ends as if it had never stopped, to the bit."""

import dataclasses
import functools
import hashlib
import json
import os
import signal
import threading
from types import SimpleNamespace

import forked
import numpy as np
import open_clip
import options
import pandas as pd
import pytest
import torch
from options import small
from safetensors.torch import load_file

from cmp import config, models, training
from cmp.embedded import packed
from cmp.errors import CmpError, Interrupted
from cmp.evaluation import evaluate
from cmp.merging import policies
from cmp.mixtures import task_pools
from cmp.registry import register
from cmp.runs import checkpoints, identity, launch, store, verify
from cmp.runs.checkpoints import CheckpointManager, RunState
from cmp.runs.machine import machine_differences, machine_record
from cmp.runs.runner import Observer, RunResult, execute
from cmp.scale import processes
from cmp.training import UpdateMethod, make_train_state, train_task
from cmp.values import MAX_COUNT

FIRST, MIDDLE, BOUNDARY, END = (0, 1), (1, 2), (1, 0), (2, 0)


class MemoryManager:
    """A manager that keeps every state of a run, and goes on from the one that it is given."""

    run_id, in_background, last = "memory", False, None

    def __init__(self, start: RunState | None = None):
        self.start, self.states, self.models = start, {}, {}

    def load(self) -> RunState | None:
        return self.start

    def is_due(self, done: int, steps: int) -> bool:
        return done < steps

    def finish(self) -> None:
        pass

    def keep_model(self, done: int, weights: dict, preprocessing: str) -> None:
        self.models[done] = weights

    def save(self, state: RunState) -> None:
        places = [x.data_ptr() for x in state.tensors.values() if x.numel()]
        assert len(set(places)) == len(places), "two names of one tensor, which no file can hold"
        tensors = {name: x.detach().clone() for name, x in state.tensors.items()}
        place = (state.progress.task, state.progress.step)
        self.states[place] = dataclasses.replace(state, tensors=tensors)


def same(one: RunResult, other: RunResult) -> bool:
    pd.testing.assert_frame_equal(one.metrics, other.metrics, check_exact=True)
    return models.weights_digest(one.model) == models.weights_digest(other.model)


def equal(one: RunState, other: RunState) -> bool:
    """Whether two states are the same to the bit, seconds apart."""
    places = [dataclasses.replace(state.progress, seconds=0) for state in (one, other)]
    return (
        places[0] == places[1]
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())
    )


def assert_resumes(run_config, folder, places=(MIDDLE, BOUNDARY)):
    """From each place, or any, a run goes on through the disk over the same states to the same end,
    whatever was drawn from torch's generator before."""
    corpus, manager = forked.small_corpus(), MemoryManager()
    result = execute(run_config, corpus, manager=manager)
    for place in places or manager.states:
        torch.rand(7)
        path = checkpoints.write_checkpoint(manager.states[place], folder)
        resumed = MemoryManager(checkpoints.read_checkpoint(path))
        assert same(execute(run_config, corpus, manager=resumed), result), place
        assert all(equal(state, manager.states[at]) for at, state in resumed.states.items()), place


@pytest.fixture
def corpus(monkeypatch):
    """The small corpus, on which runs are, too."""
    small_corpus = forked.small_corpus()  # while the data are in sight
    monkeypatch.setattr(packed, "load_embedded", forked.small_corpus)
    return small_corpus


@pytest.fixture
def build(corpus, tmp_path, monkeypatch):
    """A build folder of the test's own."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    return tmp_path


@pytest.mark.numbers
@pytest.mark.parametrize(
    "settings", options.one_in(8, options.SETTINGS, options.key_of), ids=" ".join
)
def test_every_choice_resumes_to_the_bit(settings, tmp_path):
    """From the second task on, where all that a choice keeps is there; one choice in four from each
    kind of place. The fast suite has one choice in eight of each kind."""
    everywhere = options.SETTINGS.index(settings) % 4 == 3
    places = (FIRST, MIDDLE, BOUNDARY, END) if everywhere else (MIDDLE, BOUNDARY)
    assert_resumes(small(*settings), tmp_path, places)


RANDOM_TOWERS = {
    "dropout": {"timm_drop": 0.5},
    "drop-path": {
        "timm_model_name": "convnext_atto",
        "timm_model_pretrained": False,
        "timm_drop_path": 0.5,
    },
}


@pytest.fixture(scope="module", params=options.one_in(2, RANDOM_TOWERS))
def random_network(request, tmp_path_factory):
    """The name of a small network whose image tower has layers that are random in training."""
    tree = open_clip.get_model_config("tiny")
    tree["text_cfg"]["vocab_size"] = 49408  # what a name outside the package is read with
    tree["vision_cfg"] |= RANDOM_TOWERS[request.param]
    path = tmp_path_factory.mktemp("models") / f"{request.param}-32.json"
    path.write_text(json.dumps(tree))
    open_clip.add_model_config(path)
    return path.stem


@pytest.mark.numbers
@pytest.mark.defect
@pytest.mark.long
def test_random_layers_draw_what_the_seeds_say_and_resume_to_the_bit(random_network, tmp_path):
    """At every cut, also in EWC's measurement."""
    settings = [f"model.name={random_network}", "model.start=random", "training.batch=6"]
    settings += ["method.name=ewc", "method.batches=1"]
    assert models.has_random_layers(models.create_on_meta(random_network))
    assert_resumes(small(*settings), tmp_path, places=None)


@pytest.mark.numbers
@pytest.mark.defect
def test_the_noise_of_random_layers_follows_the_seed_of_augmentation(random_network, monkeypatch):
    """Not only the crops and flips, which stay the same here."""
    augment = training.augment
    monkeypatch.setattr(training, "augment", lambda x, noise: augment(x, torch.zeros_like(noise)))
    settings = (f"model.name={random_network}", "model.start=random", "training.batch=6")
    digests = []
    for seed in (0, 1, 0):
        state = make_train_state(small(*settings, f"seeds.augment={seed}"), forked.small_corpus())
        before = torch.get_rng_state()
        train_task(state, task_pools(state.config, state.corpus)[0], 0)
        assert torch.equal(torch.get_rng_state(), before)
        digests.append(models.weights_digest(state.model))
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.defect
def test_runs_of_networks_with_random_layers_have_ids_of_their_own(random_network):
    def is_marked(name):
        run_config = small(f"model.name={name}", "model.start=random")
        return "random_layers" in identity.run_identity(run_config, forked.small_corpus())

    assert is_marked(random_network)
    assert not any(map(is_marked, ("tiny", "small", "ViT-B-32", "RN50")))


@pytest.mark.numbers
def test_hits_of_whole_test_sets_are_kept_through_a_resume_and_add_up_to_the_scores(build):
    settings = ("evaluation.full=true", "evaluation.subset=4")
    run_config, corpus, manager = small(*settings), forked.small_corpus(), MemoryManager()
    result = execute(run_config, corpus, manager=manager)
    for place in (FIRST, BOUNDARY, END):
        resumed = execute(run_config, corpus, manager=MemoryManager(manager.states[place]))
        assert resumed.hits.keys() == result.hits.keys()
        assert all(np.array_equal(x, result.hits[name]) for name, x in resumed.hits.items())
    content = identity.run_identity(run_config, corpus)
    store.save_run(store.make_stored_run(run_config, result, content))
    stored = store.load_run(identity.json_digest(content))
    full = stored.metrics.query("scope == 'full'")
    assert set(full["task"]) == {0, 2}
    assert set(stored.metrics.query("scope == 'subset'")["task"]) == {0, 1, 2}
    assert stored.hits.keys() == {f"{row.task}/{row.dataset}" for row in full.itertuples()}
    questions = evaluate(result.model, "tiny", corpus, precision="fp32").hits
    for row in full.itertuples():
        mine, hits = (
            questions[questions["dataset"] == row.dataset],
            stored.hits[f"{row.task}/{row.dataset}"],
        )
        assert hits.dtype == bool
        assert 100 * (mine["weight"] * hits).sum() == pytest.approx(row.score, abs=1e-9)
    bits = (store.run_folder(stored.id) / store.HITS).stat().st_size
    assert bits < 1000 + len(questions) / 4


def test_a_run_without_whole_test_sets_keeps_no_hits(build):
    run = launch.run_one(small(), wait=False)
    assert run.hits == {}
    assert not (store.run_folder(run.id) / store.HITS).exists()


@pytest.mark.parametrize("carry", [True, False])
def test_moments_are_carried_where_asked_for(corpus, carry):
    manager = MemoryManager()
    execute(small(f"optimizer.carry={json.dumps(carry)}"), corpus, manager=manager)
    steps = {
        place: x.item()
        for place, state in manager.states.items()
        for name, x in state.tensors.items()
        if name == "optimizer/logit_scale/step"
    }
    counted = {(task, step): 3 * task * carry + step for task, step in manager.states}
    assert steps == {place: count for place, count in counted.items() if count}


@pytest.mark.numbers
def test_infinite_deploys_a_branch_and_goes_on_from_the_trunk(corpus):
    manager, scored = MemoryManager(), {}
    settings = ["schedule.name=infinite", "schedule.cooldown_steps=1", "optimizer.carry=true"]
    watch = Observer(step=lambda t, n, result, model: scored.update({(t, n): digest_of(model)}))
    result = execute(small(*settings), corpus, watch, manager=manager)
    states = {place: weights_of(state.tensors) for place, state in manager.states.items()}
    assert states[0, 2] == scored[0, 1] == weights_of(manager.states[0, 2].tensors, "trunk/")
    assert states[1, 0] == scored[0, 1] != scored[0, 2]  # the next task goes on from the trunk
    last = digest_of(result.model)
    deployed = checkpoints.strip_prefix(manager.states[2, 0].tensors, "deployed/")
    deployed = {f"weights/{name}": x for name, x in deployed.items()}
    assert weights_of(deployed) == scored[1, 2] == last
    assert states[2, 0] == scored[1, 1]  # where a third task would start
    kept = {f"weights/{name}": x for name, x in manager.models[1].items()}
    assert weights_of(kept) == scored[0, 2]  # what was deployed after the first task, too
    assert not any(name.startswith("trunk/") for name in manager.states[1, 0].tensors)


def digest_of(model):
    return weights_of(checkpoints.state_tensors(model))


def weights_of(tensors, prefix=""):
    weights = checkpoints.strip_prefix(tensors, f"{prefix}weights/")
    content = b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(content).hexdigest()


def test_a_checkpoint_of_another_run_is_refused(build):
    with CheckpointManager(ID) as manager:
        manager.save(some_state())
    other = ID[:12] + "b" * 52  # the same short id
    with (
        CheckpointManager(other) as manager,
        pytest.raises(CmpError, match=f"contains checkpoints of run {ID}"),
    ):
        manager.load()


def with_machine(state, **facts):
    """A state of a run that began on another machine."""
    machine = state.progress.machine | facts
    return dataclasses.replace(state, progress=dataclasses.replace(state.progress, machine=machine))


def test_going_on_elsewhere_is_said_and_kept(corpus):
    """Also by a run that comes back to its first machine."""
    manager = MemoryManager()
    assert "began" not in execute(small(), corpus, manager=manager).provenance
    state = manager.states[MIDDLE]
    elsewhere = MemoryManager(with_machine(state, torch="1.0"))
    with pytest.warns(UserWarning, match=r"under other conditions, .*: torch 1\.0 and"):
        again = execute(small(), corpus, manager=elsewhere)
    assert again.provenance["began"]["torch"] == "1.0"
    assert again.seconds > state.progress.seconds
    back = with_machine(elsewhere.states[END], torch=torch.__version__)
    assert "began" in execute(small(), corpus, manager=MemoryManager(back)).provenance


@pytest.mark.numbers
def test_evaluation_does_not_move_training(corpus):
    losses = {}
    for subset in (1, 3):
        values = losses[subset] = []
        keep = lambda task, step, result, model, v=values: v.append(result.loss)  # noqa: E731
        hook = Observer(step=keep)
        execute(small(f"evaluation.subset={subset}"), corpus, hook)
    assert torch.equal(torch.stack(losses[1]), torch.stack(losses[3]))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    forked.small_corpus()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "load_embedded", forked.small_corpus)
        patch.setenv("CMP_BUILD", str(tmp_path_factory.mktemp("stored")))
        return launch.run_one(small("evaluation.subset=8"))


def with_provenance(run, **facts):
    return dataclasses.replace(run, provenance=run.provenance | facts)


def test_scores_of_a_card_may_differ_a_little(stored):
    changed = stored.metrics.copy()
    for points, answer in ((0.01, "within tolerance"), (90, "different")):
        changed.loc[changed["role"] == "adapt", "score"] += points
        before = dataclasses.replace(stored, metrics=changed)
        assert verify.compare_runs(before, stored).answer == "different"
        on_a_card = [with_provenance(run, device="H100") for run in (before, stored)]
        assert verify.compare_runs(*on_a_card).answer == answer


@pytest.mark.parametrize("facts", [{}, {"torch": "0"}])
def test_missing_scores_and_other_weights_are_different(stored, facts):
    part = dataclasses.replace(stored, metrics=stored.metrics.iloc[:-1])
    assert verify.compare_runs(stored, with_provenance(part, **facts)).answer == "different"
    assert verify.compare_runs(part, with_provenance(stored, **facts)).answer == "different"
    only_weights = verify.compare_runs(stored, dataclasses.replace(stored, weights="0"))
    assert only_weights.answer == "different"
    assert "weights" in only_weights.sentence


def test_where_two_processes_differ():
    machine = machine_record()
    assert machine_differences(machine, machine) == ""
    differences = machine_differences(machine | {"threads": 7}, machine)
    assert differences == f"threads 7 and {machine['threads']}"


def test_tf32_is_recorded_whichever_setting_of_torch_allows_it(monkeypatch):
    monkeypatch.setattr("cmp.runs.machine.device_name", lambda device: "NVIDIA H100")
    assert machine_record("cuda")["tf32"] == "convolutions"
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        assert machine_record("cuda")["tf32"] == "products, convolutions"
    finally:
        products.fp32_precision = before


class Slow(CheckpointManager):
    """A manager whose clock goes on by a second a step, and by a while for each save."""

    def __init__(self, takes, **more):
        super().__init__("f" * 64, **more)
        self.takes, self.saves = takes, 0

    def _write(self, state):
        CLOCK["now"] += self.takes
        self.saves += 1


CLOCK = {"now": 0.0}


@pytest.mark.parametrize("takes", [0.001, 1.0, 10.0, 100.0])
def test_checkpoints_take_a_fiftieth_of_the_time_at_most(build, monkeypatch, takes):
    CLOCK["now"] = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: CLOCK["now"])
    manager, waits, last = Slow(takes), [], 0.0
    for step in range(1, 50_001):
        CLOCK["now"] += 1.0
        if manager.is_due(step, 100_000):
            waits.append(CLOCK["now"] - last)
            manager.save(None)
            last = CLOCK["now"]
    assert manager.saves >= 5
    assert manager.saves * takes <= 0.021 * CLOCK["now"]
    assert max(waits) <= max(checkpoints.INTERVAL, 50 * takes) + 2
    assert not manager.is_due(100_000, 100_000)  # the task's end is saved anyway


def test_a_state_that_a_thread_writes_is_the_one_that_was_saved(corpus, build):
    states = MemoryManager()
    execute(small(), corpus, manager=states)
    weights = {name: x.clone() for name, x in states.states[MIDDLE].tensors.items()}
    given = dataclasses.replace(states.states[MIDDLE], tensors=weights)
    with CheckpointManager(given.progress.run) as manager:
        manager.in_background = True
        manager.save(given)
        for x in weights.values():
            x.zero_()  # training goes on
        manager.finish()
        assert equal(checkpoints.read_checkpoint(manager.last), states.states[MIDDLE])
        manager.folder = build / "a file"
        manager.folder.write_text("")
        manager.save(given)
        with pytest.raises(CmpError, match="a file"):
            manager.finish()


ID = "e" * 64


def some_state(task=0):
    progress = checkpoints.Progress(checkpoints.SCHEMA, ID, {}, task, 0, [], 0.0, {})
    return RunState(progress, {"weights/a": torch.zeros(1)})


def keep(manager, done, value=0.0):
    """Keep a model after so many tasks."""
    manager.keep_model(done, {"a": torch.full((1,), value)}, "{}")


def models_of(manager):
    return checkpoints.files_beside(manager.folder, "model")


@pytest.fixture
def manager(build):
    """A manager whose thread writes."""
    with CheckpointManager(ID) as manager:
        manager.in_background = True
        yield manager


def refuse(*_):
    raise CmpError("the disk refuses")


def test_a_thread_writes_the_model_after_a_task_too(manager, monkeypatch):
    gate, write = threading.Event(), checkpoints.write_tensors
    monkeypatch.setattr(
        checkpoints, "write_tensors", lambda *x: gate.wait(forked.TIMEOUT) and write(*x)
    )
    manager.save(some_state())
    keep(manager, 1)
    assert not gate.is_set() and models_of(manager) == []
    gate.set()
    manager.finish()
    [model] = models_of(manager)
    [state] = checkpoints.checkpoint_files(manager.folder)
    assert model.stat().st_mtime_ns >= state.stat().st_mtime_ns  # a kill leaves no model too early
    manager.folder = manager.folder / "lock"
    keep(manager, 2)
    with pytest.raises(CmpError, match="lock"):
        manager.finish()


def test_a_report_outlives_the_checkpoint_that_is_being_written(manager, monkeypatch):
    """The write goes on when the report waits for it, or at the latest when the report is there."""
    gate, write, wait = threading.Event(), checkpoints.write_checkpoint, checkpoints.futures.wait
    monkeypatch.setattr(
        checkpoints, "write_checkpoint", lambda *x: gate.wait(forked.TIMEOUT) and write(*x)
    )
    monkeypatch.setattr(checkpoints.futures, "wait", lambda pending: gate.set() or wait(pending))
    manager.save(some_state())
    path = manager.report({"task": 0})
    gate.set()
    manager.finish()
    assert path.exists() and checkpoints.checkpoint_files(manager.folder)


def test_a_checkpoint_that_failed_hides_no_divergence_and_no_stored_run(manager, monkeypatch):
    monkeypatch.setattr(checkpoints, "write_checkpoint", refuse)
    manager.save(some_state())
    assert manager.report({"task": 0}).exists()
    manager.remove()
    assert not manager.folder.exists()


def test_the_first_process_reads_its_checkpoint_once_and_tells_the_others_of_it(
    manager, monkeypatch
):
    manager.save(some_state())
    manager.finish()
    read, reads = checkpoints.read_checkpoint, []
    monkeypatch.setattr(checkpoints, "read_checkpoint", lambda x: reads.append(x) or read(x))
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "broadcast", lambda text: text or str(manager.last))
    assert equal(checkpoints.latest(manager), some_state())
    assert reads == [manager.last]
    assert equal(checkpoints.latest(None), some_state())


@pytest.mark.parametrize("is_begun_again", [False, True])
def test_a_lock_is_of_a_file_that_is_still_there(build, monkeypatch, is_begun_again):
    """The process that had the run deletes it just before the next one has the lock."""
    first, flock = CheckpointManager(ID).__enter__(), checkpoints.fcntl.flock

    def delete_first(*arguments):
        if first.folder.exists() and not deleted:
            deleted.append(first.remove())
            first.__exit__()
            if is_begun_again:
                first.folder.mkdir()
                (first.folder / "lock").touch()
        return flock(*arguments)

    deleted = []
    monkeypatch.setattr(checkpoints.fcntl, "flock", delete_first)
    with CheckpointManager(ID, wait=True) as second:
        second.in_background = False
        second.save(some_state())
        with pytest.raises(CmpError, match="another process"), CheckpointManager(ID):
            pass


def test_a_run_that_saved_nothing_leaves_no_lock(build):
    with pytest.raises(CmpError, match="refuses"), CheckpointManager(ID) as manager:
        refuse()
    assert not manager.folder.exists()
    with CheckpointManager(ID) as manager:
        manager.save(some_state())
    assert checkpoints.checkpoint_files(manager.folder)


def test_the_lock_of_a_process_that_began_the_run_again_is_kept(build):
    with CheckpointManager(ID) as first:
        first.remove()
        first.folder.mkdir()
        (first.folder / "lock").touch()
    assert (first.folder / "lock").exists()


@pytest.mark.defect
@pytest.mark.parametrize("wait", [False, True])
def test_a_request_to_stop_counts_also_while_the_lock_is_taken(build, monkeypatch, wait):
    flock = checkpoints.fcntl.flock

    def stop_meanwhile(*arguments):
        flock(*arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.fcntl, "flock", stop_meanwhile)
        with pytest.raises(Interrupted, match="stopped before run") as stop:
            CheckpointManager(ID, wait=wait).__enter__()
    assert stop.value.signal == signal.SIGTERM
    with CheckpointManager(ID):  # the lock is free
        pass


@pytest.mark.defect
def test_a_file_that_a_user_put_among_the_checkpoints_stays(manager):
    manager.save(some_state())
    manager.finish()
    (manager.folder / "notes.txt").write_text("mine")
    keep(manager, 1)
    manager.save(some_state())
    manager.finish()
    manager.remove()
    assert [path.name for path in manager.folder.iterdir()] == ["notes.txt"]


@pytest.mark.defect
def test_the_newest_model_is_that_of_the_last_task_whatever_the_clock_says(manager):
    keep(manager, 2)
    keep(manager, 10)
    manager.finish()
    [newest] = manager.folder.glob("model-10-*")
    os.utime(newest, (0, 0))  # as if the clock had been set back
    assert models_of(manager)[-1] == newest
    manager.save(some_state(task=10))
    manager.finish()
    assert models_of(manager) == [newest]


def test_a_task_that_is_computed_again_keeps_one_model_and_its_checkpoint_none(manager):
    """An earlier checkpoint was damaged, so that the run had to go back."""
    keep(manager, 2)
    keep(manager, 2, 1.0)
    manager.finish()
    [path] = models_of(manager)
    assert load_file(path)["a"].item() == 1.0
    manager.save(some_state(task=1))
    manager.finish()
    assert models_of(manager) == []


@pytest.mark.numbers
def test_a_policy_may_name_its_memory_with_a_slash(own_options, tmp_path):
    """What it remembered comes back under the same name, so a resumed run ends the same."""

    @register("merge_policy", "two-speeds", merges=("two",))
    def two_speeds(end):
        before = end.memory.get("mean/fast", end.memory["zero"])
        mean = end.merge_pair(end.trained, before, "fast")
        return policies.MergedWeights(end.memory | {"mean/fast": mean}, end.trained, mean)

    assert_resumes(small("merging.policy=two-speeds"), tmp_path)


@pytest.mark.numbers
def test_only_a_run_that_deploys_other_weights_than_it_would_go_on_from_keeps_both(corpus):
    def ends(*settings, start=None, tasks=2):
        manager = MemoryManager()
        result = execute(
            small(*settings, f"stream.tasks={tasks}"), corpus, manager=manager, start=start
        )
        state = manager.states[tasks, 0]
        return result, state, checkpoints.strip_prefix(state.tensors, "deployed/")

    assert not ends()[2]
    infinite = ["schedule.name=infinite", "schedule.cooldown_steps=1"]
    _, state, deployed = ends(*infinite)
    assert deployed
    # a longer run goes on from the trunk, and what its parent deployed is not its own
    longer, last, deployed = ends(start=state, tasks=3)
    assert not deployed
    weights = checkpoints.state_tensors(longer.model)
    assert weights_of(weights) == weights_of(last.tensors)


@pytest.mark.numbers
def test_a_run_that_is_asked_to_stop_in_its_last_evaluation_finishes(corpus):
    manager = MemoryManager()
    watch = Observer(task=lambda done, scores: done == 2 and signal.raise_signal(signal.SIGINT))
    assert same(execute(small(), corpus, watch, manager=manager), execute(small(), corpus))


class Counting(torch.optim.SGD):
    """An optimiser whose steps get smaller, and which counts them in different places."""

    def __init__(self, groups, where, lr, **others):
        super().__init__(groups, lr=lr)
        self.where = where

    def step(self, closure=None):
        for group in self.param_groups:
            places = [self.state[p] for p in group["params"]] if self.where == "state" else [group]
            for place in places:
                place["count"] = place.get("count", 0) + 1
            group["lr"] /= places[0]["count"]
        super().step()


@pytest.mark.numbers
@pytest.mark.parametrize("where", ["state", "group"])
def test_an_optimiser_may_count_in_numbers(own_options, tmp_path, where):
    def make(section):
        return functools.partial(Counting, where=where)

    register("method", "counting")(UpdateMethod(optimizer=make))
    assert_resumes(small("method.name=counting", "schedule.peak=1.0"), tmp_path)


def test_an_optimiser_that_keeps_what_no_file_can_hold_is_named():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["history"] = [1.0]
    with pytest.raises(CmpError, match="SGD: history: a list cannot be saved; keep only tensors"):
        checkpoints.state_tensors(model, optimizer)


def test_a_file_may_hold_one_model_under_two_names(tmp_path):
    x = torch.arange(3.0)
    path = checkpoints.write_tensors({"best": x, "last": x}, {}, tmp_path, "two")
    assert {name: y.tolist() for name, y in load_file(path).items()} == {
        "best": [0, 1, 2], "last": [0, 1, 2]
    }  # fmt: skip


@pytest.mark.defect
def test_a_model_that_is_deleted_while_models_are_listed_is_in_nobody_s_way(tmp_path):
    (tmp_path / f"model-1-{'a' * 64}.safetensors").symlink_to(tmp_path / "deleted")
    assert len(checkpoints.files_beside(tmp_path, "model")) == 1


def test_checkpoints_of_the_longest_stream_and_task_are_found(tmp_path):
    name = f"task-{config.MAX_TASKS}-step-{MAX_COUNT}-{'a' * 64}.safetensors"
    (tmp_path / name).touch()
    assert checkpoints.checkpoint_files(tmp_path) == [tmp_path / name]


def test_a_run_is_verified_with_its_own_threads(monkeypatch):
    run, set_to = SimpleNamespace(config=None, provenance={"threads": 3}), []

    def execute(*_, **__):
        raise Interrupted("stopped", signal.SIGINT)

    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(verify, "execute", execute)
    with pytest.raises(Interrupted):
        verify.verify_run(run, None)
    assert set_to == [3, torch.get_num_threads()]
