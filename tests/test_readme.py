"""Commands of README and the manual: `python -m tests.readme` runs them all, and the tests here
those that a reader tries first."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import cmp
from cmp.project import build_folder
from tests import readme

PRINTED = readme.printed_commands()
PAPERMILL = "papermill book/03_merging.ipynb out.ipynb -p profile cpu -p weight 0.5"


def test_it_is_settled_how_each_command_is_run():
    assert list(readme.WAYS) == PRINTED


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A function that runs a command in the environment, without `PYTHONPATH` and with its own
    build folder; the environment's package must be that of this checkout."""
    build = tmp_path_factory.mktemp("build")
    (build / "data").symlink_to((build_folder() / "data").resolve())
    environment = os.environ | {"CMP_BUILD": str(build)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("PYTHONPATH", None)

    def run(*command, folder=readme.ROOT):
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    found = run("python", "-c", "import cmp; print(cmp.__file__)", folder=build)
    if found.stdout.strip() != cmp.__file__:
        pytest.skip("this environment has the package of another checkout")
    return run


def run_line(shell, tmp_path, *arguments, folder=readme.ROOT):
    """The manual's papermill line with other arguments -> its process, and the notebook's path."""
    out, book = tmp_path / "out.ipynb", readme.ROOT / "book" / "03_merging.ipynb"
    return shell("papermill", os.path.relpath(book, folder), out, *arguments, folder=folder), out


@pytest.mark.long
@pytest.mark.defect
@pytest.mark.parametrize("folder", [".", "book"])
def test_papermill_runs_a_chapter(shell, tmp_path, folder):
    assert PAPERMILL in PRINTED
    arguments = PAPERMILL.split()[3:]
    done, out = run_line(shell, tmp_path, *arguments, folder=readme.ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert "Profile cpu" in str(nbformat.read(out, 4))


@pytest.mark.long
@pytest.mark.defect
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", "heavy", "weight: 'heavy' is not of type float"),
        ("wieght", "0.5", "did you mean 'weight'"),
    ],
)
def test_papermill_ends_a_chapter_whose_parameters_are_wrong(shell, tmp_path, name, value, words):
    done, _ = run_line(shell, tmp_path, "-p", name, value)
    assert done.returncode and words in done.stderr.strip().splitlines()[-1]


@pytest.mark.long
def test_a_quick_run_and_what_is_stored_of_it(shell):
    done = shell("cmpt", "run", "quick")
    assert done.returncode == 0, done.stderr
    assert "A_KA" in done.stdout + shell("cmpt", "results", "ls").stdout
