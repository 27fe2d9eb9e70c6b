"""A notebook that registers five options: it runs them by name, survives a kill and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from typer.testing import CliRunner

from cmp import cli, config, registry
from cmp.files import build_folder

NOTEBOOK = Path(__file__).with_name("own_options.md")
BOOK = Path(__file__).parents[1] / "book"
MAX_OPTION_LINES = 12
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def start(folder: Path, build: Path) -> subprocess.Popen:
    """Start executing the notebook in a process and a kernel of its own."""
    path = folder / "own_options.ipynb"
    nbformat.write(jupytext.read(NOTEBOOK), path)
    environment = os.environ | {
        "CMP_BUILD": str(build),
        "KERNEL_PID_FILE": str(folder / "pid"),
        "PYTHONPATH": os.pathsep.join([str(BOOK), str(BOOK.parent)]),
    }
    command = [sys.executable, "-c", EXECUTE, str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def outputs(folder: Path, process: subprocess.Popen) -> list[str]:
    """Return what the notebook printed, once it has ended."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    cells = nbformat.read(folder / "own_options.ipynb", as_version=4).cells
    return [o["text"].strip() for cell in cells for o in cell.get("outputs", []) if "text" in o]


@pytest.fixture
def make_build(tmp_path):
    """Return a function that makes an empty build folder with the data of the real one."""

    def make(name: str) -> Path:
        build = tmp_path / name
        build.mkdir()
        (build / "data").symlink_to(build_folder().resolve() / "data")
        return build

    return make


def test_five_options_run_by_name_survive_a_kill_and_resume(tmp_path, make_build):
    killed, whole = make_build("killed"), make_build("whole")
    process = start(tmp_path, killed)
    deadline = time.monotonic() + 200
    while not list(killed.glob("checkpoints/*/task-1-step-0-*")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    process.kill()
    process.communicate()
    assert not list(killed.glob("runs/*/run.json")), "the run had finished before it was killed"
    resumed, known_names = outputs(tmp_path, start(tmp_path, killed))
    expected, _ = outputs(tmp_path, start(tmp_path, whole))
    assert resumed == expected  # run id and hash of the final weights
    assert known_names == "['by-name-length', 'low-spread', 'median']"  # explorers offer them
    [record] = whole.glob("runs/*/run.json")
    options = json.loads(record.read_text())["provenance"]["options"]
    assert "TEETH" in options["schedule:sawtooth"]["sources"]
    assert len(options) == 5


def test_options_are_short():
    cells = [cell.source for cell in jupytext.read(NOTEBOOK).cells if "register(" in cell.source]
    assert len(cells) == 5
    for cell in cells:
        assert len([line for line in cell.splitlines() if line.strip()]) <= MAX_OPTION_LINES


def test_another_process_names_the_option_that_it_lacks():
    assert "sawtooth" not in registry.option_names("schedule")
    with pytest.raises(Exception, match="no schedule is called 'sawtooth'"):
        config.parse({"schedule": {"name": "sawtooth"}})


PLUGIN = """
import cmp

@cmp.register("schedule", "halved", continuous=False)
def halved(task, step):
    return task.peak / {divisor}
"""


def test_a_plugin_is_named_where_it_lacks_or_differs(tmp_path, make_build, monkeypatch):
    build = make_build("build")

    def cmpt(*words: str) -> tuple[int, str]:
        environment = os.environ | {"CMP_BUILD": str(build)}
        command = [sys.executable, "-m", "cmp", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    same, other = tmp_path / "same.py", tmp_path / "other.py"
    same.write_text(PLUGIN.format(divisor=2))
    other.write_text(PLUGIN.format(divisor=4))
    command = [sys.executable, "-m", "cmp", "--plugin", str(same), "run", "quick"]
    command += ["schedule.name=halved", "stream.tasks=2", "training.steps=60", "training.batch=8"]
    environment = os.environ | {"CMP_BUILD": str(build)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (begun := list(build.glob("checkpoints/*/task-1-step-0-*"))):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    process.kill()
    process.wait()
    run_id = begun[0].parent.name

    monkeypatch.setenv("CMP_BUILD", str(build))
    result = CliRunner().invoke(cli.app, ["resume", run_id])  # this process lacks the plugin
    text = str(result.exception)
    assert "'halved'" in text and "--plugin FILE" in text
    status, text = cmpt("--plugin", str(other), "resume", run_id)
    assert status == 2 and "another source" in text
    status, text = cmpt("--plugin", str(same), "resume", run_id)
    assert status == 0, text
    for words in ("ls", f"show {run_id}", f"verify {run_id}"):
        result = CliRunner().invoke(cli.app, ["results", *words.split()])
        text = f"{result.output} {result.exception}"
        assert "'halved'" in text and "--plugin FILE" in text
    status, text = cmpt("--plugin", str(other), "results", "verify", run_id)
    assert status == 2 and "another source" in text
