"""What an installation has: `cmp` and the tables of `cmpt plan`, and in a checkout also `lab`."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cmp
from cmp import cli
from cmp.cli import shared
from cmp.errors import CmpError
from cmp.experiments import preflight
from cmp.experiments.claims import FAMILIES
from tests import lock

ROOT = Path(cmp.__file__).parents[1]
PACKED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ATTRIBUTION.md")
BUILD = """
from setuptools import build_meta

build_meta.build_wheel("../wheel")
build_meta.build_editable("../editable")
"""
WITHOUT_BOOK = """
import sys
from cmp.cli import main

for name in ("jupyterlab", "ipywidgets", "anywidget", "matplotlib", "papermill", "IPython"):
    sys.modules[name] = None
main()
"""


def python(*arguments, **options):
    """Run Python with some arguments, the last of which may be paths."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel, and one with an editable install, of a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    (tree := folder / "tree").mkdir()
    for name in (name for name in PACKED if (ROOT / name).exists()):
        shutil.copy(ROOT / name, tree)
    for name in ("cmp", "data_manifests", "book"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-c", BUILD, cwd=tree)
    assert done.returncode == 0, done.stderr
    for wheel in folder.glob("*/*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(wheel.parent)
    return folder


@pytest.mark.defect
def test_an_editable_install_has_the_book_s_package_and_a_wheel_has_not(built, tmp_path):
    where = "import importlib.util as found, site, sys; site.addsitedir(sys.argv[1]); "
    where += "print(found.find_spec('lab').origin)"
    done = python("-S", "-c", where, built / "editable", cwd=tmp_path, env={})
    assert Path(done.stdout.strip()).is_relative_to(built / "tree" / "book"), done.stderr
    assert not (built / "wheel" / "lab").exists() and (built / "wheel" / "cmp").is_dir()


@pytest.mark.defect
def test_a_wheel_has_the_claims_of_all_families(built):
    assert all((built / "wheel" / "cmp" / "book" / path.name).exists() for path in FAMILIES)


@pytest.mark.defect
def test_versions_are_locked_for_the_oldest_python_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    assert f"{oldest}.0" == lock.OLDEST


@pytest.mark.defect
def test_an_installed_command_in_another_checkout_says_whose_command_to_run(tmp_path, monkeypatch):
    (tmp_path / "book" / "lab").mkdir(parents=True)
    shutil.copytree(ROOT / "cmp" / "cli", tmp_path / "cmp")
    monkeypatch.setattr("cmp.project.project_folder", lambda: tmp_path)
    with pytest.raises(CmpError, match=r"its own package.*\.venv/bin/cmpt"):
        shared.import_lab("run")


@pytest.mark.long
@pytest.mark.defect
def test_a_wheel_plans_from_published_runs_without_the_book_s_packages(built, tmp_path):
    command = ["plan", "--gpu-hours", "0.0116", "--device", "core"]
    environment = {**os.environ, "PYTHONPATH": str(built / "wheel")}
    environment.pop("CMP_BUILD", None)
    done = python("-c", WITHOUT_BOOK, *command, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "The nearest stored runs" in done.stdout and "Effect of EMA-Merge" in done.stdout


@pytest.mark.defect
@pytest.mark.parametrize(
    ("module", "extra"),
    [("scipy.stats", "[experiments]"), ("papermill", "[book]"), ("ray", "[ray]"), ("pandas", "")],
)
def test_a_missing_package_names_its_extra_alone(module, extra, monkeypatch, capsys):
    def stop():
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(cli, "app", stop)
    with pytest.raises(SystemExit):
        cli.main()
    assert f"-pretraining{extra}'" in capsys.readouterr().err


@pytest.fixture
def foreign(tmp_path):
    """A folder where pip put another distribution of the name `cmp`, whose `__init__.py` is empty,
    over this package."""
    (tmp_path / "cmp").mkdir()
    (tmp_path / "cmp" / "__init__.py").touch()
    for path in Path(cmp.__file__).parent.glob("[!_]*"):
        (tmp_path / "cmp" / path.name).symlink_to(path)
    about = tmp_path / "cmp-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cmp\nVersion: 0.0.1\n")
    (about / "top_level.txt").write_text("cmp\n")
    return tmp_path


@pytest.mark.defect
def test_doctor_names_another_package_that_has_overwritten_a_file(foreign):
    environment = {**os.environ, "PYTHONPATH": str(foreign)}
    command = ("-c", "from cmp.cli import main; main()", "doctor")
    done = python(*command, cwd=foreign, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cmp 0.0.1" in done.stderr


@pytest.mark.defect
def test_doctor_names_another_package_that_would_take_a_file_along(foreign, monkeypatch):
    monkeypatch.syspath_prepend(foreign)
    [packages] = [check for check in preflight.check_setup() if check.what == "packages"]
    assert packages.state == preflight.DAMAGED and "cmp 0.0.1" in packages.sentence
