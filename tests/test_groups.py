"""A signal to all processes of a job, over pictures that other processes decode: a terminal's, a
batch system's, torchrun's."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import forked
import months
import numpy as np
import pytest
import torch
from forked import TIMEOUT, Child, await_true
from pictures import picture, tree

from cmp import config
from cmp.cli import computing
from cmp.project import project_folder
from cmp.releases import release
from cmp.runs import checkpoints, store
from cmp.runs.checkpoints import StopRequest
from cmp.runs.launch import run_one
from cmp.runs.lookup import unfinished_runs
from cmp.runs.runner import Observer
from cmp.scale.decoding import prefetch

SETTINGS = ("model.name=tiny", "model.start=random", "stream.tasks=2", "training.batch=8",
            "evaluation.subset=4", "evaluation.full=false", "mixture.replay=1.0")  # fmt: skip
MANY = "training.steps=5000"


@pytest.fixture(scope="module", autouse=True)
def server():
    forked.server()
    forked.small_corpus()  # while the data are in sight


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A collection of JPEG files: a set that arrives, a pool, and one that must be retained."""
    root = tmp_path_factory.mktemp("jpegs")
    for place, (name, role) in enumerate((("mine", "adapt"), ("web", "pool"), ("known", "eval"))):
        names = [f"{word} {place}/{n}.jpg" for word in ("fox", "owl", "oak") for n in range(8)]
        tree(root / name, {path: picture(crc32(path.encode()), kind="JPEG") for path in names})
        about = {"name": name, "title": name, "role": role, "licence": "own",
                 "reader": {"kind": "folder", "path": name}}  # fmt: skip
        (root / f"{name}.yaml").write_text(json.dumps(about))
    return root


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build folder of the test's own; two processes decode pictures for a run."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CMP_WORKERS", "2")
    return tmp_path / "build"


def descendants(pid):
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def number_of(key):
    time.sleep(0.02)
    return torch.tensor(key)


def signal_decoders(tell, number):
    """Send a signal to processes that decode, from a process that is not their parent."""
    items = prefetch(number_of, range(30), 2, torch.device("cpu"))
    assert next(items) == 0
    started = multiprocessing.active_children()
    subprocess.run(["kill", f"-{number}", *(str(child.pid) for child in started)], check=True)
    assert list(items) == [*range(1, 30)]
    assert len(started) == 2 and not multiprocessing.active_children()


def leave_decoders(tell):
    """End while a process decodes, which Python asks to end by SIGTERM, and waits for."""
    global items
    items = prefetch(number_of, range(1000), 1, torch.device("cpu"))
    assert next(items) == 0


@pytest.mark.defect
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_processes_that_decode_outlive_a_signal_that_is_not_their_parent_s(build, number):
    child = Child(build, signal_decoders, int(number))
    assert child.outcome().status == 0, child.said()


def test_processes_that_decode_end_when_their_parent_does(build):
    child = Child(build, leave_decoders)
    assert child.outcome().status == 0, child.said()


def test_processes_that_decode_do_not_hold_a_run(build):
    """As they outlive their parent by some seconds if it is killed."""
    with checkpoints.CheckpointManager("a" * 64):
        items = prefetch(number_of, range(30), 1, torch.device("cpu"))
        assert next(items) == 0
    with checkpoints.CheckpointManager("a" * 64):
        assert next(items) == 1
    items.close()


@pytest.mark.defect
def test_a_second_sigterm_is_the_same_request_and_a_second_ctrl_c_is_not():
    told, numbers = [], (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in numbers}
    try:
        with StopRequest() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert (stop.signal, told) == (signal.SIGTERM, [])
            signal.raise_signal(signal.SIGINT)
            assert (stop.signal, told) == (signal.SIGTERM, [signal.SIGINT])
        signal.raise_signal(signal.SIGTERM)
        assert told == [signal.SIGINT, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("is_ignored", [True, pytest.param(False, marks=pytest.mark.defect)])
def test_a_closed_terminal_is_a_request_to_stop_unless_it_is_ignored(is_ignored):
    told = []
    before = signal.signal(
        signal.SIGHUP, signal.SIG_IGN if is_ignored else lambda n, _: told.append(n)
    )
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal == (None if is_ignored else signal.SIGHUP) and told == []
    finally:
        signal.signal(signal.SIGHUP, before)


def command_of_a_group(tell, sent, *arguments):
    """`cmp ARGUMENTS` in a group of its own, telling of each step. The third ends once the file
    `sent` says that the group got its signal."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored under nohup
    os.environ["CMP_WORKERS"] = "2"  # the server has the environment that it began in

    def step(task, step, result, model):
        tell("a step")
        if step == 2:
            await_true(sent.exists, "asked to stop")

    computing.progress_observer = lambda *_: Observer(step)
    forked.command(tell, arguments)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.defect),
        # a terminal is closed
        pytest.param(signal.SIGHUP, marks=[pytest.mark.defect, pytest.mark.long]),
    ],
)
def test_a_group_that_is_asked_to_stop_keeps_its_last_step(build, jpegs, monkeypatch, number):
    settings = ["quick", *SETTINGS, "training.steps=8", f"data={jpegs}"]
    sent = build.with_name("sent")
    child = Child(build, command_of_a_group, sent, "run", *settings)
    for _ in range(3):
        assert child.hear(TIMEOUT), child.said()
    assert len(descendants(child.pid)) == 3
    os.killpg(child.pid, number)
    sent.touch()
    assert child.outcome().status == 128 + number, child.said()
    assert "Traceback" not in child.said()
    [progress] = unfinished_runs()
    assert progress.task == 0 and 3 <= progress.step < 8
    assert f"stopped after 0 tasks and {progress.step} steps" in child.said()
    again = Child(build, command_of_a_group, sent, "run", *settings)
    assert again.outcome().status == 0, again.said()
    monkeypatch.setenv("CMP_BUILD", str(build.parent / "whole"))
    monkeypatch.setenv("CMP_WORKERS", "0")
    whole = run_one(config.parse(progress.config))
    monkeypatch.setenv("CMP_BUILD", str(build))
    assert store.load_run(progress.run).weights == whole.weights


def launch(build, *command):
    """Start a command of Python in a group of its own; all that it says goes into a file."""
    build.parent.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(project_folder()), "OMP_NUM_THREADS": "1"}
    with open(build.with_suffix(".txt"), "ab") as file:
        return subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def await_steps(build, process, runs, processes):
    """Wait until runs train, with so many processes in all."""

    def trains():
        assert process.poll() is None, build.with_suffix(".txt").read_text()
        logs = [*build.glob("runs/*/log.jsonl")]
        started = sum('"step"' in path.read_text() for path in logs) == runs
        return started and len(descendants(process.pid)) >= processes

    await_true(trains, "training")


def steps_kept(build):
    """Steps done in the last checkpoint of each run."""
    folders = build.glob("runs/*/")
    return [checkpoints.latest_checkpoint(folder)[1].progress.step for folder in folders]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.long
@pytest.mark.defect
@pytest.mark.parametrize("everyone", [False, True], ids=["torchrun's group", "all processes"])
def test_torchrun_that_is_asked_to_stop_keeps_the_last_step(build, jpegs, everyone):
    """torchrun, which forwards the signal to its processes, ends with status 1 after any end but
    a good one; SLURM sends it to all processes of a step besides."""
    settings = ("-m", "cmp", "run", "quick", *SETTINGS, MANY, f"data={jpegs}")
    process = launch(build, *TORCHRUN, *settings)
    await_steps(build, process, 1, 7)
    for pid in descendants(process.pid) if everyone else ():
        os.kill(pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(TIMEOUT) == 1
    said = build.with_suffix(".txt").read_text()
    [step] = steps_kept(build)
    assert step > 0 and f"stopped after 0 tasks and {step} steps; everything is saved" in said
    assert "DataLoader" not in said


@pytest.mark.long
def test_torchrun_tunes_and_updates(build, tmp_path):
    """Month by month, with `--start`, which torchrun takes for its own where no `--` is."""
    months.write_pictures(tmp_path / "data", 2)
    first, second, pool = (tmp_path / "data" / name for name in ("z-month", "y-month", "pool"))
    made, settings = tmp_path / "releases", ("--settings", tmp_path / "peak.yaml")
    begin = ("--start", months.START, "--data", first, "--pool", pool, *months.COMMON)
    for command in (
        ("tune", *begin, "--peaks", "0.001,0.003", "-o", settings[1]),
        ("update", *begin, *settings, "-o", made / "1"),
        ("update", made / "1", "--data", second, "-o", made / "2"),
    ):
        process = launch(build, *TORCHRUN, "-m", "cmp", "--", *map(str, command))
        assert process.wait(TIMEOUT) == 0, build.with_suffix(".txt").read_text()
    assert len(release.read_release(made / "2").record.updates) == 2


REQUEUE = """
torchrun --nproc-per-node 2 --standalone -m cmp run quick {settings} & run=$!
trap 'kill -TERM $run; wait $run; scontrol requeue $SLURM_JOB_ID' TERM
wait $run
"""


@pytest.mark.long
def test_a_batch_script_that_is_told_to_end_stops_torchrun_and_queues_again(
    build, jpegs, monkeypatch
):
    """`sbatch --requeue --signal=B:TERM@120` signals the script alone."""
    build.mkdir()
    names = {"torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}
    names["scontrol"] = f'echo "$@" >> {build}/queued'
    for name, line in names.items():
        (build / name).write_text(f"#!/bin/bash\n{line}\n")
        (build / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(build), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    settings = " ".join((*SETTINGS, MANY, f"data={jpegs}"))
    (build / "job.sh").write_text(REQUEUE.format(settings=settings))
    start = "import os; os.execvp('bash', ['bash', os.environ['CMP_BUILD'] + '/job.sh'])"
    process = launch(build, "-c", start)
    await_steps(build, process, 1, 8)
    process.terminate()
    process.wait(TIMEOUT)
    assert (build / "queued").read_text() == "requeue 77\n"
    [step] = steps_kept(build)
    assert step > 0


STUDY = """
import os, sys
from pathlib import Path
from cmp import cli
from lab.evidence import studies
studies.STUDIES = Path(os.environ["CMP_BUILD"])
sys.argv = ["cmp", "study", "77", "--profile", "quick", "--jobs", "2"]
if __name__ == "__main__":
    cli.main()
"""


@pytest.mark.long
@pytest.mark.defect
def test_a_study_whose_group_is_asked_to_stop_waits_until_its_runs_are_saved(build, jpegs):
    """The signal also ends the server that began the workers."""
    build.mkdir()
    settings = dict(config.flat_keys(config.override({}, [*SETTINGS, MANY, f"data={jpegs}"])))
    grid = {"question": "?", "replicates": 3, "live": [], "settings": {"a": settings}}
    (build / "77.yaml").write_text(json.dumps(grid))
    (build / "study.py").write_text(STUDY)
    process = launch(build, str(build / "study.py"))
    await_steps(build, process, 2, 9)
    started = [pid for pid in descendants(process.pid) if pid != process.pid]
    os.killpg(process.pid, signal.SIGTERM)
    said = build.with_suffix(".txt")
    assert process.wait(TIMEOUT) == 128 + signal.SIGTERM, said.read_text()
    assert np.greater(steps_kept(build), 0).tolist() == [True, True]
    assert re.search("stopped with 3 runs to go", said.read_text())
    await_true(lambda: not any(map(forked.is_alive, started)), "without its processes")
