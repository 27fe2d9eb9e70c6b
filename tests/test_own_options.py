"""A notebook that registers five options: it runs them by name, survives a kill and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import options
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from typer.testing import CliRunner

from cmp import cli, config, registry
from cmp.project import build_folder
from cmp.runs.checkpoints import StopRequest
from lab.evidence import workers

NOTEBOOK = Path(__file__).with_name("own_options.md")
BOOK = Path(__file__).parents[1] / "book"
MAX_OPTION_LINES = 12
SHOWS = "kernel_explorers.stream_explorer"


def execute(build: Path, without: str = "\0") -> list[str]:
    """Execute the notebook in a kernel of its own and return what it printed; `without` leaves the
    cells out that hold it."""
    notebook = jupytext.read(NOTEBOOK)
    notebook.cells = [cell for cell in notebook.cells if without not in cell.source]
    environment = os.environ | {
        "CMP_BUILD": str(build),
        "KERNEL_PID_FILE": str(build / "pid"),
        "PYTHONPATH": os.pathsep.join([str(BOOK), str(BOOK.parent)]),
    }
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["text"].strip() for output in outputs if "text" in output]


def first_checkpoint(build: Path, has_ended) -> Path:
    """Wait for the first checkpoint of a run's second task."""
    deadline = time.monotonic() + 200
    while not (found := list(build.glob("runs/*/task-1-step-0-*"))):
        assert not has_ended() and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    return found[0]


@pytest.fixture
def make_build(tmp_path):
    """Return a function that makes an empty build folder with the data of the real one."""

    def make(name: str) -> Path:
        build = tmp_path / name
        build.mkdir()
        (build / "data").symlink_to(build_folder().resolve() / "data")
        return build

    return make


@pytest.mark.long
def test_five_options_run_by_name_survive_a_kill_and_resume(make_build):
    killed, whole = make_build("killed"), make_build("whole")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(execute, killed)
        first_checkpoint(killed, first.done)
        os.kill(int((killed / "pid").read_text()), signal.SIGKILL)
        with pytest.raises(DeadKernelError):
            first.result()
    assert not list(killed.glob("runs/*/run.json")), "the run had finished before it was killed"
    resumed, known_names = execute(killed)
    [expected] = execute(whole, without=SHOWS)
    assert resumed == expected  # run id and hash of the final weights
    assert known_names == "['by-name-length', 'low-spread', 'median']"  # explorers offer them
    [record] = whole.glob("runs/*/run.json")
    options = json.loads(record.read_text())["provenance"]["options"]
    assert "TEETH = 4" in "".join(options["schedule:sawtooth"]["sources"].values())
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
    return task.relative_peak / {divisor}
"""


@pytest.fixture
def cmpt(own_options, monkeypatch):
    """Return a function that does a command as a new process would, which knows no plugin but those
    that the command names; it returns the status, and what was said."""
    monkeypatch.setenv("CMP_PLUGINS", "")  # so that it is as before after the test

    def invoke(*words: str) -> tuple[int, str]:
        registry.options_of("schedule").pop("halved", None)
        result = CliRunner().invoke(cli.app, words)
        return result.exit_code, f"{result.output} {result.exception}"

    return invoke


@pytest.mark.long
def test_a_plugin_is_named_where_it_lacks_or_differs(tmp_path, make_build, monkeypatch, cmpt):
    build = make_build("build")
    same, other = tmp_path / "same.py", tmp_path / "other.py"
    same.write_text(PLUGIN.format(divisor=2))
    other.write_text(PLUGIN.format(divisor=4))
    wanted = ["run", "quick", "schedule.name=halved", "stream.tasks=2", "training.steps=60"]
    wanted += ["training.batch=8"]
    command = [sys.executable, "-m", "cmp", "--plugin", str(same), *wanted]
    environment = os.environ | {"CMP_BUILD": str(build)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    run_id = first_checkpoint(build, process.poll).parent.name
    process.kill()
    process.wait()

    monkeypatch.setenv("CMP_BUILD", str(build))
    for words in (wanted, ["results", "show", run_id]):
        status, text = cmpt(*words)
        assert status and "'halved'" in text
    status, text = cmpt("--plugin", str(other), *wanted, "--dry-run")
    assert status == 0 and run_id not in text  # another source is another run
    status, text = cmpt("--plugin", str(same), *wanted, "--dry-run")
    assert f"run {run_id}: continues from its last checkpoint" in text
    status, text = cmpt("--plugin", str(same), *wanted)
    assert status == 0, text
    for words in ("ls", f"show {run_id}", f"verify {run_id}"):
        _, text = cmpt("results", *words.split())
        assert "'halved'" in text and "--plugin FILE" in text
    status, text = cmpt("--plugin", str(other), "results", "verify", run_id)
    assert status and "different source" in text


@pytest.mark.defect
@pytest.mark.long
def test_a_worker_says_what_is_wrong_with_a_plugin_that_was_edited(tmp_path, monkeypatch):
    plugin = tmp_path / "edited.py"
    plugin.write_text("import cmp\nunfinished(\n")
    monkeypatch.setenv("CMP_PLUGINS", str(plugin))
    with StopRequest() as stop:
        [reason] = workers.run_locally([options.small()], 1, "cpu", print, stop).values()
    assert "edited.py: SyntaxError" in reason
