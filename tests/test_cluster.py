"""Studies on many machines: a lost node loses no run."""

import collections
import contextlib
import importlib.util
import os
import pickle
import re
import signal
import sys
import time
from types import SimpleNamespace

import forked
import pandas as pd
import psutil
import pytest
import torch

from cmp import config, models
from cmp.bench import networks  # noqa: F401, open_clip gets its models
from cmp.embedded import packed
from cmp.errors import CmpError, Interrupted
from cmp.faults import explain_failure
from cmp.project import build_folder
from cmp.runs import checkpoints, identity, launch, lookup, store
from cmp.runs.checkpoints import StopRequest
from cmp.runs.lookup import unfinished_runs
from cmp.scale import decoding
from lab import analyses
from lab.evidence import cluster, studies, workers

SMALL = ["stream.tasks=3", "training.batch=12", "evaluation.subset=2", "model.start=random"]
SEEDS = range(5)
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # else a token is written to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps it to 127.0.0.1
}


def run_on_ray(configs, jobs, device, finished):
    """As a study computes runs, which notes signals."""
    with StopRequest() as stop:
        return cluster.run_on_ray(configs, jobs, device, finished, stop)


def small(*settings, steps=4):
    tree = config.override(
        {"evaluation": {"full": False}}, [*SMALL, f"training.steps={steps}", *settings]
    )
    return config.parse(tree)


def fresh(folder, monkeypatch):
    """Make `folder` the build folder, with the data in it."""
    data = build_folder().absolute() / "data"
    folder.mkdir()
    (folder / "data").symlink_to(data)
    monkeypatch.setenv("CMP_BUILD", str(folder))
    return folder


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build folder of the test's own, with the data in it."""
    return fresh(tmp_path / "build", monkeypatch)


def patiently(start, limit=300.0):
    """Try it until a time in seconds is over: Ray 2.60 gives up a node that needs more than 30
    seconds to start, as one may on a busy machine."""
    end = time.monotonic() + limit
    while True:
        try:
            return start()
        except Exception as error:
            if time.monotonic() > end:
                pytest.fail(f"Ray's node did not start within {limit:g} s; last: {error!r}")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def nodes():
    """A cluster on this machine, as Ray's own tests have them: a node of one core, where the driver
    is, to which tests add others."""
    if not importlib.util.find_spec("ray"):
        pytest.skip('Ray is not installed: pip install "ray>=2.40,<3"')
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in SETTINGS.items():
            patch.setenv(key, value)
        from ray.cluster_utils import Cluster

        noticed = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        head = {"include_dashboard": False, "_system_config": noticed}
        found = patiently(lambda: Cluster(True, head_node_args=head))
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.shutdown()
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def noted(build, monkeypatch):
    """The lines that tasks wrote: whether on the doomed node, run, task where it began or went on,
    and at the end why it failed. On the doomed node they hang once a task is saved."""
    work, save, place = (
        cluster._compute_on_node,
        checkpoints.CheckpointManager.save,
        build / "noted",
    )

    def hang(manager, state):
        save(manager, state)
        if state.progress.task == 1:
            (build / "hangs").touch()
            time.sleep(600)

    def note(run_id, run_config, device, jobs):
        doomed = "DOOMED" in os.environ
        if doomed:
            checkpoints.CheckpointManager.save = hang
        found = checkpoints.latest_checkpoint(checkpoints.run_folder(run_id))
        with open(place, "a", buffering=1) as file:
            print(doomed, run_id, found[1].progress.task if found else 0, file=file)
            result = work(run_id, run_config, device, jobs)
            if isinstance(result, str):
                print(result, file=file)
        return result

    monkeypatch.setattr(cluster, "_compute_on_node", note)
    return lambda: place.read_text().splitlines()


def kill(nodes, node):
    """End a node and all that runs on it at once, as when its power fails."""
    [raylet] = node.all_processes["raylet"]
    everything = psutil.Process(raylet.process.pid).children(recursive=True)
    raylet.process.kill()
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    nodes.remove_node(node, allow_graceful=False)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("[0-9a-f]*/run.json")}


def wait_for(condition):
    """Wait until it holds, for as long as a busy machine may take."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def tables(configs):
    frame = analyses.collect_metrics({("small", each.seeds.init): each for each in configs})
    digests = frame["run"].map(lambda run: lookup.find_run(run).weights)
    return frame.assign(weights=digests)


@pytest.mark.long
def test_a_lost_node_loses_no_run_and_no_bit(nodes, noted, build, corpus, tmp_path, monkeypatch):
    """Its run goes on from its checkpoint elsewhere; nothing that was finished is done again."""
    configs = [small(f"seed={seed}") for seed in SEEDS]
    node, before = patiently(lambda: nodes.add_node(env_vars={"DOOMED": "1"})), {}

    def finished(run_config):
        if len(stamps(build)) >= 3 and not before:
            wait_for((build / "hangs").exists)
            before.update(stamps(build))
            kill(nodes, node)

    assert run_on_ray(configs, 3, "cpu", finished) == {}
    assert before.items() <= stamps(build).items()
    assert len(before) < len(stamps(build)) == len(configs)
    begun = [line.split() for line in noted()]
    [lost] = [run for doomed, run, _ in begun if doomed == "True"]
    assert [task for _, run, task in begun if run == lost] == ["0", "1"]
    assert len(begun) == len(configs) + 1

    on_ray = tables(configs)
    fresh(tmp_path / "local", monkeypatch)
    for run_config in configs:
        launch.run_one(run_config)
    pd.testing.assert_frame_equal(on_ray, tables(configs), check_exact=True)


@pytest.mark.long
def test_a_failed_run_is_named_and_the_others_finish(nodes, build, corpus):
    configs = [small("seed=0", steps=2), small("seed=99", "model.start=annealed")]
    with pytest.raises(CmpError, match=r"1 of 2 runs failed:\n  a run without .*99.*cmpt pretrain"):
        studies.compute_runs(configs, 2, backend="ray")
    assert studies.missing_runs(configs) == [configs[1]]


@pytest.mark.long
def test_a_run_that_ends_every_worker_is_given_up(nodes, build, corpus, monkeypatch):
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    monkeypatch.setattr(
        cluster, "_compute_on_node", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    [why] = run_on_ray([small()], 1, "cpu", lambda run_config: None).values()
    assert why.startswith("lost 2 times")
    assert "\n" not in why


def test_a_node_with_other_data_refuses(build, monkeypatch):
    monkeypatch.setattr(packed, "load_embedded", forked.small_corpus)
    run_config = small("stream.tasks=1", steps=1)
    assert "its data, bases or version" in cluster._compute_on_node("0" * 64, run_config, "cpu", 1)
    assert not stamps(build)
    run, _ = cluster._compute_on_node("", run_config, "cpu", 1)  # no weights where the study began
    assert store.is_stored(run.id)


def test_final_weights_come_back_from_another_disk(build, tmp_path, monkeypatch):
    """Those that are kept: of a model that is not embedded."""
    monkeypatch.setattr(packed, "load_embedded", forked.small_corpus)
    run_config = small("model.name=bench-nano", "stream.tasks=1", steps=1)
    run_id = identity.run_id_of(run_config)
    fresh(tmp_path / "node", monkeypatch)
    result = pickle.dumps(cluster._compute_on_node(run_id, run_config, "cpu", 1))
    monkeypatch.setenv("CMP_BUILD", str(build))
    assert not store.is_stored(run_id)
    ray = SimpleNamespace(
        get=pickle.loads, exceptions=SimpleNamespace(RayTaskError=(), RayError=())
    )
    assert cluster._outcome(ray, result) is None
    run = store.load_run(run_id)
    assert models.weights_digest(store.final_model(run)) == run.weights


class Finished:
    """A run that is stored."""

    id = "a" * 64


class FakeRay:
    """As much of Ray as a study uses: nodes with cores and GPUs, on which tasks run at once."""

    def __init__(self, nodes, gpus):
        self.gpus, self.node = gpus, None
        self.exceptions = SimpleNamespace(RayTaskError=(), RayError=())
        self.free = {f"node {number}": gpus for number in range(nodes)}

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"GPU": self.gpus * len(self.free)}

    def nodes(self):
        return [{"NodeID": name, "Resources": {"CPU": 64.0, "GPU": float(self.gpus)}}
                for name in self.free]  # fmt: skip

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: self.node)

    def remote(self, **options):
        def decorate(function):
            def start(*arguments):
                self.node = max(self.free, key=self.free.get)  # as Ray spreads them
                self.free[self.node] -= 1
                assert self.free[self.node] >= 0, "a GPU for each run"
                return self.node, function(*arguments)

            return SimpleNamespace(remote=start)

        return decorate

    def wait(self, references, **options):
        return references, []

    def get(self, reference):
        return reference[1]

    def cancel(self, reference):
        pass


@pytest.mark.parametrize(("gpus", "jobs", "each"), [(4, 8, 15), (8, 8, 7), (4, 2, 31)])
def test_runs_on_the_cards_of_a_node_share_its_cores(corpus, monkeypatch, gpus, jobs, each):
    """Two nodes of 64 cores: all cores are used, and none twice."""
    ray, processes_of = FakeRay(2, gpus), collections.Counter()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv(decoding.JOBS, "1")
    monkeypatch.delenv("CMP_WORKERS", raising=False)
    monkeypatch.setattr(decoding, "usable_cores", lambda: 64)
    monkeypatch.setattr(identity, "run_id_of", lambda run_config: "a" * 64)
    monkeypatch.setattr(identity, "known_id", lambda run_config: "a" * 64)
    monkeypatch.setattr(store, "is_stored", lambda run_id: True)
    monkeypatch.setattr(store, "final_model", lambda run: None)
    monkeypatch.setattr(launch, "is_kept", lambda *_, **__: False)

    def run_one(run_config, device, wait):
        decoders = decoding.worker_count(torch.device("cuda"))
        assert decoders == each
        processes_of[ray.node] += decoders + 1
        return Finished()

    monkeypatch.setattr(launch, "run_one", run_one)
    runs = [small(f"seed={number}") for number in range(jobs)]
    done = []
    assert run_on_ray(runs, jobs, "cuda", done.append) == {}
    assert len(done) == jobs
    assert all(count <= 64 for count in processes_of.values())
    if jobs >= 2 * gpus:
        assert set(processes_of.values()) == {64}


def test_decoders_that_are_asked_for_are_those_of_every_worker(monkeypatch):
    monkeypatch.setenv("CMP_WORKERS", "3")
    assert workers.worker_environment()["CMP_WORKERS"] == "3"


@pytest.mark.long
def test_sigterm_saves_the_runs_and_ends_with_a_sentence(nodes, noted, corpus):
    configs = [small("seed=0", steps=1), small("seed=1", steps=10_000), small("seed=2")]
    handler = signal.getsignal(signal.SIGTERM)

    def finished(run_config):
        wait_for(unfinished_runs)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Interrupted, match="stopped with 2 runs to go; repeat the command to continue"
    ):
        run_on_ray(configs, 2, "cpu", finished)
    assert signal.getsignal(signal.SIGTERM) is handler
    [steps] = re.findall(
        r"stopped after 0 tasks and (\d+) steps; everything is saved", "\n".join(noted())
    )
    assert [progress.step for progress in unfinished_runs()] == [int(steps)]


@pytest.mark.long
def test_no_gpu_is_a_sentence(nodes, build, corpus):
    with pytest.raises(CmpError, match="no node of the Ray cluster has a GPU"):
        run_on_ray([small()], 1, "cuda", lambda run_config: None)


@pytest.mark.long
def test_an_address_where_nothing_is_is_a_sentence(nodes, build, corpus, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(CmpError, match=r"backend ray: 127.0.0.1:9: .*refused"):
        run_on_ray([small()], 1, "cpu", lambda run_config: None)


def test_without_ray_its_installation_is_named(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        run_on_ray([small()], 1, "cpu", lambda run_config: None)
    assert "needs the package 'ray': pip install" in explain_failure(caught.value)
    no_windows = ModuleNotFoundError("No module named 'fcntl'", name="fcntl")
    assert explain_failure(no_windows) == "cmpt runs on Linux and macOS; on Windows, use WSL"
