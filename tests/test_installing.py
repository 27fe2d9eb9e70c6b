"""What an installation has: `cmp`, and in a checkout also the book's packages and commands."""

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
from tests import lock

ROOT = Path(cmp.__file__).parents[1]
PACKED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ATTRIBUTION.md")
BUILD = """
from setuptools import build_meta

build_meta.build_wheel("../wheel")
build_meta.build_editable("../editable")
"""
IN_A_WHEEL = """
import sys

for name in ("jupyterlab", "ipywidgets", "anywidget", "matplotlib", "papermill", "IPython"):
    sys.modules[name] = None
import torch
import cmp

older, newer = ({"weight": torch.full((2, 2), float(value))} for value in (0, 1))
merged = cmp.merge("interpolation", [newer, older], weights=[0.25, 0.75])
assert merged["weight"].unique().tolist() == [0.25]
try:
    cmp.load_data("embedded")
except cmp.CmpError as error:
    print(error)
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
    assert not list(tree.glob("*.egg-info"))  # it would hide the commands of an editable install
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
    [entries] = (built / "editable").glob("*.dist-info/entry_points.txt")
    assert "study = lab.commands:study" in entries.read_text()


@pytest.mark.defect
def test_a_wheel_has_cmp_alone_and_is_small(built):
    folders = {path.name for path in (built / "wheel").glob("*/") if path.suffix != ".dist-info"}
    assert folders == {"cmp"}
    [wheel] = (built / "wheel").glob("*.whl")
    assert wheel.stat().st_size < 2.5e6


@pytest.mark.defect
def test_versions_are_locked_for_the_oldest_python_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    assert f"{oldest}.0" == lock.OLDEST


@pytest.mark.defect
def test_a_wheel_merges_and_says_in_an_empty_folder_where_the_benchmark_is_built(built, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(built / "wheel")}
    environment.pop("CMP_BUILD", None)
    done = python("-c", IN_A_WHEEL, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("in a clone of the study book") == 1


@pytest.mark.defect
@pytest.mark.parametrize(
    ("module", "extra"),
    [("scipy.stats", "[experiments]"), ("papermill", "[book]"), ("ray", "[ray]"), ("pandas", "")],
)
def test_a_missing_package_names_its_extra_alone(module, extra, monkeypatch, capfd):
    def stop():
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(cli, "app", stop)
    with pytest.raises(SystemExit):
        cli.main()
    assert f"-pretraining{extra}'" in capfd.readouterr().err
