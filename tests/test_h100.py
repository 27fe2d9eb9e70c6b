"""The validation on a card, made small: all of it runs on a CPU, so that it will run there."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmp.project import build_folder

SCRIPT = Path(__file__).parent / "bench" / "h100.sh"
SECTIONS = {
    1: [
        "machine", "ceilings", "gradients", "loader", "decoding", "short captions",
        "short captions, compiled", "long captions", "long captions, compiled",
        "500 x 375, compiled", "flash attention", "waits",
    ],
    2: [
        "open_clip", "open_clip, compiled", "large model", "checkpoint", "merging", "evaluation",
        "methods",
    ],
    3: ["killed and resumed", "export", "update and compare", "cmpt bench gpu", "small runs"],
}  # fmt: skip


def cpu_seconds():
    """The time that all processes which this one started and waited for have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.long
def test_all_stages_run_whole_on_a_cpu(tmp_path):
    build = tmp_path / "build"
    build.mkdir()
    (build / "data").symlink_to(build_folder().absolute() / "data")
    folders = {"CMP_BUILD": build, "H100_WORK": tmp_path / "work", "OUT": tmp_path / "out"}
    variables = os.environ | {name: str(path) for name, path in folders.items()}
    used = cpu_seconds()
    result = subprocess.run(
        ["bash", str(SCRIPT), "--small"], env=variables | {"PYTHON": sys.executable},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    # about 100 s on two free cores; a busy machine makes each second longer
    assert cpu_seconds() - used < 400
    for stage, names in SECTIONS.items():
        results = json.loads((tmp_path / "out" / f"stage-{stage}.json").read_text())
        assert list(results) == names
        assert not [name for name in names if "error" in results[name]]
        assert all(results[name]["values"] for name in names)
    assert results["export"]["values"]["the same weights"] is True
    assert "predicted 168" in result.stdout


def test_without_data_it_is_refused_before_anything_is_measured(tmp_path):
    script = tmp_path / "checkout" / "tests" / "bench" / "h100.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    folders = {"CMP_BUILD": "build", "H100_WORK": "work", "OUT": "out", "BUNDLE": "bundle"}
    variables = os.environ | {name: str(tmp_path / path) for name, path in folders.items()}
    result = subprocess.run(
        ["bash", str(script), "1"], env=variables | {"PYTHON": sys.executable},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert "cmpt data build" in result.stderr and "BUNDLE" in result.stderr
    assert not list((tmp_path / "out").iterdir())
