"""`cmpt merge`: files in, one file out with its parents in its metadata, or nothing changed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import options
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_merging import (
    DRAWING_RULES,
    RULES,
    TASK_VECTOR_RULES,
    base_for,
    close,
    identical,
    several,
)
from typer.testing import CliRunner

import cmp
from cmp import cli
from cmp.cli import merging
from cmp.errors import CmpError
from cmp.merging import files as merging_files
from cmp.merging.apply import merge
from cmp.merging.rules import tensor_settings
from cmp.registry import get_option


@pytest.fixture
def files(tmp_path):
    """Paths of two models, newest first, and of their base."""
    tuned, base = several(2, 0)
    paths = [tmp_path / name for name in ("new.safetensors", "old.safetensors", "base.safetensors")]
    for path, weights in zip(paths, [*tuned, base], strict=True):
        save_file(weights, path)
    return paths


def save_old_merge(path):
    """Save what a merge may replace, and return its bytes."""
    save_file({"w": torch.ones(2)}, path, {"merge": "{}"})
    return path.read_bytes()


def shell(*arguments):
    return CliRunner().invoke(cli.app, ["merge", *map(str, arguments)])


def merged(tmp_path, *arguments):
    out = tmp_path / "out.safetensors"
    result = shell(*arguments, "-o", out)
    assert result.exit_code == 0, result.exception
    return out


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.numbers
@pytest.mark.parametrize("rule", RULES)
def test_files_are_merged_as_state_dicts_are(rule, files, tmp_path):
    new, old, base = files
    out = merged(tmp_path, rule, new, old, *(["--base", base] if rule in TASK_VECTOR_RULES else []))
    pair, start = [load_file(new), load_file(old)], load_file(base)
    expected = merge(rule, pair, base_for(rule, start))
    if rule in DRAWING_RULES:
        again = merged(tmp_path, rule, new, old, "--base", base, "--seed", "0")
        assert identical(load_file(again), expected)
        other = merged(tmp_path, rule, new, old, "--base", base, "--seed", "1")
        assert not identical(load_file(other), expected)
    else:
        assert identical(load_file(out), expected)


def test_metadata_name_the_parents(files, tmp_path):
    new, old, base = files
    out = merged(tmp_path, "ties", new, old, "--base", base, "--density", "0.4")
    header = metadata(out)
    assert header["format"] == "pt"
    parents = [
        {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    ]
    assert json.loads(header["merge"]) == {
        "rule": "ties", "models": parents[:2], "base": parents[2],
        "settings": {"scale": None, "density": 0.4},
    }  # fmt: skip


def test_settings_reach_the_rule(files, tmp_path):
    new, old, base = (load_file(path) for path in files)
    out = merged(tmp_path, "interpolation", *files[:2], "--weights", "0.9,0.1")
    assert identical(load_file(out), merge("interpolation", [new, old], weights=(0.9, 0.1)))
    assert json.loads(metadata(out)["merge"])["settings"] == {"weights": [0.9, 0.1]}
    out = merged(tmp_path, "breadcrumbs", *files[:2], "--base", files[2], "--density", "0.5",
                 "--outliers", "0.2", "--scale", "0.7")  # fmt: skip
    settings = {"density": 0.5, "outliers": 0.2, "scale": 0.7}
    assert identical(load_file(out), merge("breadcrumbs", [new, old], base, **settings))
    out = merged(tmp_path, "lines", *files[:2], "--base", files[2], "--alpha", "1", "--beta", "0")
    close(load_file(out), merge("task-arithmetic", [new, old], base))


@pytest.mark.parametrize("rule", RULES)
def test_every_setting_of_a_rule_is_an_option_of_the_shell(rule, files, tmp_path):
    keys = tensor_settings(get_option("merge_rule", rule))
    given = [text for key in keys for text in (f"--{key.replace('_', '-')}", "0.4")]
    base = ["--base", files[2]] if rule in TASK_VECTOR_RULES else []
    recorded = json.loads(metadata(merged(tmp_path, rule, *files[:2], *base, *given))["merge"])
    assert dict.fromkeys(keys, 0.4).items() <= recorded["settings"].items()


@pytest.mark.parametrize("dtype", merging_files.DTYPE_NAMES)
def test_every_type_survives(dtype, tmp_path):
    weights = {"a": torch.tensor([[1, 0, 1]]).to(dtype), "b": torch.ones(2), "empty": torch.ones(0)}
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        save_file(weights, path)
    result = load_file(merged(tmp_path, "interpolation", *paths))
    assert {name: x.dtype for name, x in result.items()} == {n: x.dtype for n, x in weights.items()}
    assert identical(result, weights)


@pytest.mark.defect
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_type_that_no_rule_merges_is_refused_in_any_file_before_the_work(which, files, tmp_path):
    weights = load_file(files[which])
    name = next(name for name, x in weights.items() if x.is_floating_point())
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, files[which])
    out = tmp_path / "out.safetensors"
    error = shell("ties", *files[:2], "--base", files[2], "-o", out).exception
    assert isinstance(error, CmpError), error
    assert str(error).startswith(f"{files[which]}: {name}: F8_E4M3 ") and "float32" in str(error)
    counts = []
    with pytest.raises(CmpError):
        cmp.merge_files("ties", files[:2], tmp_path / "out", files[2], counts.append)
    assert not counts and not (tmp_path / "out").exists()


@pytest.mark.defect
@pytest.mark.parametrize(
    ("rule", "passes"), [("ties", {3}), ("breadcrumbs", {3, 4}), ("dare", {1})]
)
def test_values_are_read_as_few_times_as_there_are_passes(
    rule, passes, files, tmp_path, monkeypatch
):
    """TIES: a sample, the rank within it, the merge. Breadcrumbs first looks at whether a tensor
    changed, which a model or two can tell. Hashing reads the files once more."""
    third, reads = tmp_path / "third.safetensors", Counter()
    save_file(load_file(files[1]), third)
    get = merging_files.TensorFile.__getitem__

    def count(file, name):
        reads[file.path, name] += 1
        return get(file, name)

    monkeypatch.setattr(merging_files.TensorFile, "__getitem__", count)
    cmp.merge_files(rule, [*files[:2], third], tmp_path / "out", files[2])
    assert {path for path, _ in reads} == {*files, third}
    assert set(reads.values()) == passes


def save_bad(path, kind):
    weights = load_file(path)
    if kind == "text":
        path.write_text("no weights")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "gone":
        path.unlink()
    else:
        weights |= {
            "nan": {"b.weight": torch.full((3, 4, 2), float("nan"))},
            "inf": {"a.bias": torch.tensor([0, 0, float("inf"), 0, 0])},
            "shape": {"a.bias": torch.ones(4)},
            "more": {"c": torch.ones(1)},
            "kind": {"a.bias": torch.ones(5, dtype=torch.int64)},
        }[kind]
        save_file(weights, path)


@pytest.mark.parametrize("rule", options.one_in(2, ["interpolation", "slerp", "ties", "magmax"]))
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", ["b.weight", "NaN"]),
        ("inf", ["a.bias", "infinite"]),
        ("shape", ["a.bias", "[5]", "[4]"]),
        ("more", ["c: "]),
        ("kind", ["a.bias", "int64"]),
        ("text", ["cannot be read as a safetensors file"]),
        ("cut", ["cannot be read as a safetensors file"]),
        ("gone", ["cannot be read"]),
    ],
)
def test_bad_files_are_refused_and_nothing_is_written(rule, which, kind, words, files, tmp_path):
    if which == 2 and rule not in TASK_VECTOR_RULES:
        return
    out = tmp_path / "out.safetensors"
    as_it_was = save_old_merge(out)
    save_bad(files[which], kind)
    before = sorted(tmp_path.iterdir())
    base = ["--base", files[2]] if rule in TASK_VECTOR_RULES else []
    error = shell(rule, *files[:2], *base, "-o", out).exception
    assert isinstance(error, CmpError), error
    for word in [files[which].name, *words]:
        assert word in str(error)
    assert out.read_bytes() == as_it_was
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tries", "NEW", "OLD"], ["tries", "ties"]),
        (["interpolation", "NEW", "OLD", "--weights", "0.5,x"], ["--weights", "0.5,x"]),
        (["interpolation", "NEW", "OLD", "--base", "BASE"], ["takes no base"]),
        (["ties", "NEW", "OLD"], ["needs a base", "--base FILE", "base="]),
        (["slerp", "NEW"], ["1 models", "exactly 2"]),
        (["ties", "NEW", "--base", "BASE", "--density", "0"], ["density", "found 0.0"]),
        (["ties", "NEW", "--base", "BASE", "--scale", "nan"], ["scale", "found nan"]),
        (["lines", "NEW", "--base", "BASE", "--alpha", "-1"], ["alpha", "found -1.0"]),
        (
            ["breadcrumbs", "NEW", "--base", "BASE", "--outliers", "0.8"],
            ["outliers 0.8", "density 0.3"],
        ),
    ],
)
def test_misuse_is_refused_by_name(arguments, words, files, tmp_path):
    places = dict(zip(("NEW", "OLD", "BASE"), files, strict=True))
    out = tmp_path / "out.safetensors"
    error = shell(*(places.get(argument, argument) for argument in arguments), "-o", out).exception
    assert isinstance(error, CmpError), error
    for word in words:
        assert word in str(error)
    assert not out.exists()


@pytest.mark.parametrize("kind", [str, Path])
def test_one_path_in_place_of_a_list_is_refused(files, tmp_path, kind):
    with pytest.raises(CmpError, match=r"new\.safetensors': give a list of files"):
        cmp.merge_files("interpolation", kind(files[0]), tmp_path / "out.safetensors")


def test_a_model_is_not_written_over(files):
    before = files[1].read_bytes()
    error = shell("interpolation", *files[:2], "-o", files[1]).exception
    assert isinstance(error, CmpError) and "one of the models" in str(error)
    assert files[1].read_bytes() == before


@pytest.mark.parametrize("name", ["thesis.txt", "other.safetensors", "empty.safetensors"])
def test_nothing_but_a_merge_is_replaced(files, tmp_path, name):
    out = tmp_path / name
    out.write_bytes(files[0].read_bytes() if name.startswith("other") else b"")
    before = out.read_bytes()
    error = shell("interpolation", *files[:2], "-o", out).exception
    assert isinstance(error, CmpError) and name in str(error)
    assert out.read_bytes() == before


@pytest.mark.long
def test_killed_while_it_writes(files, tmp_path):
    """SIGKILL at the first tensor that is written: the old file is whole, nothing new has its
    name."""
    out = tmp_path / "out.safetensors"
    as_it_was = save_old_merge(out)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cmp.merging import files\n"
        "def slow(*arguments, plain=files.iter_merged, **others):\n"
        "    for named_tensor in plain(*arguments, **others):\n"
        "        yield named_tensor\n"
        "        print('written', flush=True); time.sleep(60)\n"
        "files.iter_merged = slow\n"
        "paths = [Path(x) for x in sys.argv[1:]]\n"
        "files.merge_files('interpolation', paths[:2], paths[2])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, files[:2]), str(out)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert out.read_bytes() == as_it_was
    assert shell("interpolation", *files[:2], "-o", out).exit_code == 0
    assert identical(load_file(out), merge("interpolation", [load_file(x) for x in files[:2]]))


def anonymous_megabytes():
    """This process's memory that is not backed by files, or 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_many_files_take_the_memory_of_a_few_tensors(tmp_path):
    """20 files of 8 MB each, in tensors of 2 MB."""
    if not anonymous_megabytes():
        pytest.skip("the system does not say what memory a process has")
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({str(i): torch.full((1 << 19,), float(number)) for i in range(4)}, paths[-1])
    before, peak = anonymous_megabytes(), []
    merging_files.merge_files(
        "interpolation", paths, tmp_path / "out.safetensors",
        progress=lambda count: peak.append(anonymous_megabytes() - before),
    )  # fmt: skip
    assert len(peak) > 20 and max(peak) < 24
    result = load_file(tmp_path / "out.safetensors")
    assert all(torch.allclose(x, torch.tensor(9.5)) for x in result.values())


def test_what_cannot_be_written_to_is_refused_before_anything_is_read(files, tmp_path):
    counts = []
    (tmp_path / "link.safetensors").symlink_to(files[0])
    os.mkfifo(tmp_path / "fifo.safetensors")
    for name in ("link.safetensors", "fifo.safetensors", "a" * 300, "."):
        with pytest.raises(CmpError, match=r"already exists as a link|cannot be written"):
            merging_files.merge_files(
                "interpolation", files[:2], tmp_path / name, progress=counts.append
            )
    assert counts == []


def test_progress_hears_of_all_the_work(files, tmp_path):
    counts = []
    out = tmp_path / "out.safetensors"
    merging_files.merge_files("interpolation", files[:2], out, progress=counts.append)
    assert merging.merged_bytes(files[:2]) - 3000 < sum(counts) <= merging.merged_bytes(files[:2])
