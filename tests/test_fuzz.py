"""Damaged and hostile files: every reader gives a `CmpError` or a value, soon and in little memory.

Each reader is first shown a good file, then files made from it: pieces cut out, put in or replaced,
and trees with a key deleted or a value that no one expects.
"""

import contextlib
import hashlib
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from benchmark import packages
from cmp import NUMERICS, config, models
from cmp.config import read_config
from cmp.embedded import manifest, packed
from cmp.embedded.manifest import Dataset, Packages, embedded_manifests
from cmp.errors import CmpError
from cmp.files import file_digest, listed_file
from cmp.readers.manifest import MANIFESTS, read_manifest
from cmp.runs import checkpoints, identity, store
from lab import chapters, run
from lab.evidence import results, studies

pytestmark = pytest.mark.filterwarnings("ignore:The following metadata:UserWarning")

SECONDS = 2.0
"""Of processor time, for one file."""
MEMORY = 2**30
"""What this process may take beyond what it holds when the tests begin."""

BOUNDED = settings(
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", autouse=True)
def _little_memory(tmp_path_factory):
    """Bound what the process may take, once the libraries that chapters load late are there."""
    read_chapter(tmp_path_factory.mktemp("first"), CHAPTER.encode())
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def survives(read: Callable[[], Any]) -> str:
    """Call a reader; what it said if it refused. Anything but a `CmpError` is raised."""
    began = time.process_time()
    try:
        read()
        said = ""
    except CmpError as error:
        said = str(error)
        assert said.strip()
    assert time.process_time() - began < SECONDS
    return said


# Mutations


def nested(depth: int) -> list:
    """A list in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = [
    *(None, True, False, 0, -1, 1, 3.5, 2**31, 10**30, 10**4000, -1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "a", "A" * 20_000, "\0", "a\0b", "../../etc/passwd"),
    *("{} {}", "{0.__class__}", "{", "%s", "é\u2028\u202e\U0001f600\ufeff", "1e400", "null"),
    *([], {}, [None], {"": None}, {"a": {"b": {"c": 1}}}, [1, "a", {}], nested(150)),
]


def paths_of(tree: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value of a tree, the whole first."""
    pairs = tree.items() if isinstance(tree, dict) else ()
    pairs = enumerate(tree) if isinstance(tree, list) else pairs
    return [path, *(found for key, value in pairs for found in paths_of(value, (*path, key)))]


def changed(tree: Any, path: tuple, change: str, value: Any) -> Any:
    """A copy of a tree in which the value at `path` is replaced, deleted or renamed."""
    if not path:
        return value
    tree = json.loads(json.dumps(tree))
    *parents, leaf = path
    node = tree
    for parent in parents:
        node = node[parent]
    if change == "replace":
        node[leaf] = value
    elif change == "rename" and isinstance(node, dict):
        node[str(value)[:200]] = node.pop(leaf)
    else:
        del node[leaf]
    return tree


def mutated_trees(tree: Any) -> st.SearchStrategy:
    """Trees that differ from a good one in one or two places."""
    change = st.sampled_from(["replace", "replace", "delete", "rename"])

    def once(found: Any) -> st.SearchStrategy:
        ways = st.sampled_from(paths_of(found)[1:] or [()])
        return st.builds(changed, st.just(found), ways, change, st.sampled_from(VALUES))

    return once(tree) | once(tree).flatmap(once)


def spliced(good: bytes) -> st.SearchStrategy:
    """Bytes that differ from good ones in up to three places."""
    junk = st.binary(max_size=8) | st.sampled_from(
        [b"\0", b"\xff", b"[" * 100, b"{", b'"', b"&a ", b"*a", b"!!bool ", b": ", b"9" * 5000]
    )
    place = st.tuples(st.integers(0, len(good)), st.integers(0, 12), junk)

    def apply(places: list[tuple[int, int, bytes]]) -> bytes:
        content = good
        for start, length, new in places:
            content = content[:start] + new + content[start + length :]
        return content

    return st.lists(place, min_size=1, max_size=3).map(apply)


def damaged(good: bytes) -> st.SearchStrategy:
    """Random bytes, the beginning of good ones, and good ones changed in places."""
    beginnings = st.integers(0, len(good) - 1).map(lambda size: good[:size])
    return st.binary(max_size=200) | beginnings | spliced(good) | spliced(good)


def to_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def to_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode()


# Good files


def small_metrics() -> pd.DataFrame:
    rows = [
        {"task": t, "scope": "full", "dataset": d, "role": r, "score": 10.0 * t, "metric": "top-1"}
        for t in (0, 1)
        for d, r in (("new-flags", "adapt"), ("shapes", "eval"))
    ]
    return pd.DataFrame(rows)


def to_parquet(table: pd.DataFrame) -> bytes:
    target = io.BytesIO()
    table.to_parquet(target, index=False)
    return target.getvalue()


def to_npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


RUN_CONFIG = config.parse(config.PROFILES["quick"])
IDENTITY = {"config": RUN_CONFIG.changes()}
RUN = {
    "format": store.RUN_FORMAT,
    "id": identity.json_digest(IDENTITY),
    "identity": IDENTITY,
    "config": RUN_CONFIG.to_dict(),
    "weights_sha256": "0" * 64,
    "provenance": {"seconds": 1.5, "threads": 1, "torch": "2"},
    "files": {},
}
PROGRESS = {
    "schema": checkpoints.SCHEMA, "run": RUN["id"], "config": RUN["config"], "task": 1, "step": 2,
    "metrics": small_metrics().to_dict("records"), "seconds": 2.5, "machine": {"threads": 1},
}  # fmt: skip
PIXELS = np.zeros((2, 4, 32, 32), np.uint8)
HEADER = {
    "format": manifest.STORE_FORMAT,
    "fingerprint": "x",
    "images_sha256": hashlib.sha256(PIXELS).hexdigest(),
    "classes": ["a", "b"],
}
SAMPLES = pd.DataFrame({
    "split": ["train", "test"], "label": ["a", "b"], "group": ["a", "b"], "source": ["s", "s"],
    "captions": [["one"], ["two", "three"]],
})  # fmt: skip
HEADER["table_sha256"] = hashlib.sha256(SAMPLES.to_json().encode()).hexdigest()
STUDY = {
    "question": "Does it work?", "replicates": 2, "live": ["a"],
    "settings": {"a": {}, "b": {"schedule.peak": 0.0005}, "joint": {"joint": True}},
}  # fmt: skip
RECORD = {"stamp": {"text": "0", "a.yaml": "1"}, "parameters": {"seeds": 1}, "seconds": 2.5}
NOTEBOOK = {"cells": [], "nbformat": 4, "nbformat_minor": 5, "metadata": {"cmp": RECORD}}
CHAPTER = """---
jupytext:
  formats: ipynb,md:myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell} ipython3
:tags: [parameters]

profile: str = "quick"  # quick or cpu
seeds: int = 1  # bases and streams
```
"""


def checkpoint(progress: str) -> bytes:
    return save({"weights/a": torch.zeros(2)}, {"progress": progress})


def archive_zip() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("package/a", b"x" * 600)
        opened.writestr("package/b", b"y")
    return target.getvalue()


def archive_tar(mode: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as opened:
        info = tarfile.TarInfo("package/a")
        info.size = 600
        opened.addfile(info, io.BytesIO(b"x" * 600))
    return target.getvalue()


# Readers: each gets a folder of its own and the content of the file that is damaged.


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read. tree, dump: for files that are trees of keys."""

    read: Callable[[Path, bytes], Any]
    good: bytes
    tree: Any = None
    dump: Callable[[Any], bytes] | None = None


def put(path: Path, content: bytes) -> Path:
    """Write a file anew: an old one may still be mapped into memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def of_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    """Read a file of this name in the folder."""
    return lambda folder, content: read(put(folder / name, content))


read_packages = of_file("packages.yaml", lambda path: read_manifest(path, Packages))
read_dataset = of_file("x.yaml", lambda path: read_manifest(path, Dataset).model_dump_json())
read_run_config = of_file(
    "x.yaml", lambda path: read_config(str(path), ["training.batch=8"]).changes()
)
read_study = of_file("studies/77.yaml", lambda _: studies.load_study("77").configs("quick"))
read_chapter = of_file("00_x.md", lambda path: chapters.check_parameters(path, {"seeds": "2"}))
read_archive = of_file("x.tgz", lambda path: list(packages.archive_members(path)))


class SmallNetwork(torch.nn.Linear):
    """A network that is created and read in no time."""

    def __init__(self, name: str):
        super().__init__(3, 2)
        self.logit_bias = None
        self.visual = SimpleNamespace(preprocess_cfg=asdict(open_clip.transform.PreprocessCfg()))


def read_weights(folder: Path, content: bytes) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "create_fused_model", SmallNetwork)
        return models.load_from_file("tiny", put(folder / "x.safetensors", content)).weight


def read_checkpoint(folder: Path, content: bytes) -> Any:
    digest = hashlib.sha256(content).hexdigest()
    path = put(folder / f"task-1-step-2-{digest}.safetensors", content)
    try:
        state = checkpoints.read_checkpoint(path)
        return pd.DataFrame(state.progress.metrics)
    finally:
        path.unlink()


def read_progress(folder: Path, content: bytes) -> Any:
    return read_checkpoint(folder, checkpoint(content.decode("utf-8", "replace")))


def read_run(folder: Path, run: bytes, metrics: bytes | None = None) -> Any:
    """With the hashes that the files would have if they had been written so."""
    place = store.run_folder(RUN["id"])
    path = put(place / store.METRICS, metrics or GOOD_METRICS)
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        tree = json.loads(run)
        if "files" in tree and "identity" in tree:
            tree["files"] = {store.METRICS: file_digest(path)}
        run = to_json(tree | {"sha256": identity.json_digest(tree)})
    put(place / "run.json", run)
    return store.load_run(RUN["id"])


def read_metrics(folder: Path, content: bytes) -> Any:
    return read_run(folder, to_json(RUN), content)


def read_packed(header: bytes, images: bytes, table: bytes) -> Any:
    dataset = embedded_manifests()["shapes"]
    place = manifest.store_path("shapes")
    put(place / "store.json", header)
    put(place / "images.npy", images)
    put(place / "samples.parquet", table)
    opened = packed.read_packed(dataset)
    return opened.data_hash(), int(opened.images.sum())


def read_header(folder: Path, content: bytes) -> Any:
    manifest.is_built(embedded_manifests()["shapes"])
    return read_packed(content, to_npy(PIXELS), GOOD_SAMPLES)


def read_images(folder: Path, content: bytes) -> Any:
    return read_packed(to_json(HEADER), content, GOOD_SAMPLES)


def read_samples(folder: Path, content: bytes) -> Any:
    header = HEADER | {"file_sha256": hashlib.sha256(content).hexdigest()}
    return read_packed(to_json(header), to_npy(PIXELS), content)


def read_published(folder: Path, content: bytes) -> Any:
    put(folder / "studies" / "77.yaml", to_yaml(STUDY))
    with listed_file(folder / "results" / "77.parquet") as partial:
        partial.write_bytes(content)
    return results.published_metrics("77")


def read_notebook_record(folder: Path, content: bytes) -> Any:
    put(folder / "00_x.ipynb", content)
    source = put(folder / "00_x.md", CHAPTER.encode())
    [task] = run.plan_tasks([(source, folder / f"{source.stem}.ipynb", {})])
    return f"{task.seconds or 0:.0f} {run.changed_since([task])[task.target]}"


GOOD_METRICS = to_parquet(small_metrics())
GOOD_SAMPLES = to_parquet(SAMPLES)
HEADER["file_sha256"] = hashlib.sha256(GOOD_SAMPLES).hexdigest()
ABOUT = {"run": "0" * 64, "weights": "0" * 64, "config": "{}", "setting": "a", "replicate": 0}
MADE = json.dumps({"numerics": NUMERICS, "threads": 1})
GOOD_RESULTS = to_parquet(small_metrics().assign(provenance=MADE, **ABOUT))
GOOD_WEIGHTS = save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
PACKAGES = yaml.safe_load((MANIFESTS / "packages.yaml").read_text())
FEW = {"packages": dict(list(PACKAGES["packages"].items())[:2])}
EMOJI = yaml.safe_load((MANIFESTS / "embedded" / "new-emoji-living.yaml").read_text())


def of_tree(read: Callable, tree: Any, dump: Callable[[Any], bytes]) -> Reader:
    return Reader(read, dump(tree), tree, dump)


READERS = {
    "packages": of_tree(read_packages, FEW, to_yaml),
    "dataset": of_tree(read_dataset, EMOJI, to_yaml),
    "run config": of_tree(read_run_config, RUN["config"], to_yaml),
    "run config, one seed": of_tree(read_run_config, {"seed": 3, "seeds": {"data": 1}}, to_yaml),
    "study": of_tree(read_study, STUDY, to_yaml),
    "progress": of_tree(read_progress, PROGRESS, to_json),
    "run": of_tree(read_run, RUN, to_json),
    "header": of_tree(read_header, HEADER, to_json),
    "notebook": of_tree(read_notebook_record, NOTEBOOK, to_json),
    "checkpoint": Reader(read_checkpoint, checkpoint(json.dumps(PROGRESS))),
    "metrics": Reader(read_metrics, GOOD_METRICS),
    "images": Reader(read_images, to_npy(PIXELS)[:128] + bytes(2 * 4 * 32 * 32)),
    "samples": Reader(read_samples, GOOD_SAMPLES),
    "weights": Reader(read_weights, GOOD_WEIGHTS),
    "published": Reader(read_published, GOOD_RESULTS),
    "chapter": Reader(read_chapter, CHAPTER.encode()),
    "zip": Reader(read_archive, archive_zip()),
    "tar": Reader(read_archive, archive_tar("w")),
    "tgz": Reader(read_archive, archive_tar("w:gz")),
    "txz": Reader(read_archive, archive_tar("w:xz")),
}
TREES = [name for name, reader in READERS.items() if reader.dump]
YAML_TREES = [name for name in TREES if READERS[name].dump is to_yaml]
JSON_TREES = [name for name in TREES if READERS[name].dump is to_json]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the test's own, where the package builds, keeps studies and publishes."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(studies, "STUDIES", tmp_path / "studies")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(manifest, "store_fingerprint", lambda dataset: "x")
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_the_good_file_is_read(folder, name):
    reader = READERS[name]
    assert survives(lambda: reader.read(folder, reader.good)) == ""


def some_are_refused(folder: Path, name: str, contents: st.SearchStrategy) -> bool:
    """Show a reader many files, each of which it must survive; whether it refused any. A notebook
    whose record is damaged counts as one without a record."""
    refused = []

    @BOUNDED
    @given(contents)
    def check(content):
        refused.append(bool(survives(lambda: READERS[name].read(folder, content))))

    check()
    return any(refused) or name == "notebook"


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes(folder, name):
    assert some_are_refused(folder, name, damaged(READERS[name].good))


@pytest.mark.parametrize("name", TREES)
def test_mutated_trees(folder, name):
    reader = READERS[name]
    assert some_are_refused(folder, name, mutated_trees(reader.tree).map(reader.dump))


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)
HOSTILE_YAML = {
    "a billion laughs": LAUGHS,
    "a list of itself": "a: &a [*a]",
    "a mapping of itself": "a: &a {b: *a}",
    "merged into itself": "a: &a {<<: *a}",
    "a word for a truth": "a: !!bool maybe",
    "a word for a time": "a: !!timestamp maybe",
    "nothing for a number": "a: !!int ''",
    "sixty times sixty times": f"a: {'1:' * 400}1.5",
    "too long to print": f"a: 0x{'f' * 6000}",
    "too long to read": f"a: {'9' * 6000}",
    "a date": "a: 2020-01-01",
    "a date that cannot be": "a: 2020-13-45",
    "a date for a key": "2020-01-01: 1",
    "bytes": "a: !!binary aaaa",
    "a set": "a: !!set {x}",
    "an object": "a: !!python/object/apply:os.system [ls]",
    "a list for a key": "? [1, 2]\n: 3",
    "half a character": 'a: "\\ud800"',
    "a NUL": "a: \0",
    "an escaped NUL": 'a: "\\0"',
    "lists in lists": f"a: {'[' * 900}",
    "lists in lists, closed": f"a: {'[' * 200}{']' * 200}",
    "mappings in mappings": "".join(f"{' ' * n}a:\n" for n in range(400)),
    "many documents": "a: 1\n---\na: 2",
    "another version": "%YAML 9.9\n---\na: 1",
    "nothing": "",
    "a mark of byte order": "\ufeffa: 1",
    "a long line": f"a: {'b' * 200_000}",
    "a long key": f"{'b' * 900}: 1",
    "an endless number": "a: 1e999999999",
}
HOSTILE_JSON = {
    "lists in lists": "[" * 100_000,
    "mappings in mappings": '{"a":' * 100_000,
    "too long to read": '{"id": ' + "9" * 10_000 + "}",
    "half a character": '{"id": "\\ud800"}',
    "a NUL": '{"id": "\\u0000"}',
    "not a number": "NaN",
    "an endless number": '{"id": 1e999999}',
    "a list": "[]",
    "a word": '"metadata"',
    "nothing": "",
    "null": "null",
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
@pytest.mark.parametrize("name", YAML_TREES)
def test_hostile_yaml_is_refused_alone_and_in_a_good_file(folder, name, text):
    for before in (b"", READERS[name].good):
        said = survives(lambda before=before: READERS[name].read(folder, before + text.encode()))
        may_be_empty = before or name.startswith("run config")
        assert ".yaml" in said or (text == "" and may_be_empty)


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
@pytest.mark.parametrize("name", JSON_TREES)
def test_hostile_json_is_refused(folder, name, text):
    said = survives(lambda: READERS[name].read(folder, text.encode()))
    assert said or name == "notebook"


@BOUNDED
@given(
    st.lists(
        st.sampled_from([*config.defaults(), "seed", "seeds", "a.b", "", ".", "..", "stream"])
    ),
    st.lists(st.sampled_from([*map(str, VALUES), *HOSTILE_YAML.values()]), min_size=8),
)
def test_settings(keys, values):
    given_settings = [f"{key}={value}" for key, value in zip(keys, values, strict=False)]
    tree = config.profile("quick")
    survives(lambda: config.parse(config.override(tree, given_settings)).changes())


@pytest.mark.parametrize(
    "setting",
    [
        ".".join("a" * 3000) + "=1", "seeds=5", "seeds=ab", "seeds=[1]", "seed=" + "9" * 30,
        "model.name=" + "a" * 300, "model.name=../../x", 'model.name="a\\0b"',
        "training.steps=" + "9" * 4000, "training.batch=" + "9" * 4000,
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(setting):
    tree = config.profile("quick") | {"seed": 1}
    assert survives(lambda: config.parse(config.override(tree, [setting])))


def test_joint_training_of_endless_tasks_is_refused(folder):
    endless = {"joint": True, "stream.tasks": 2**20, "training.steps": 2**30}
    grid = to_yaml(STUDY | {"settings": {"a": endless}})
    assert "at most" in survives(lambda: read_study(folder, grid))


@pytest.mark.parametrize(
    "line",
    [
        f"a: int = {'-' * 6000}1", f"a: int = {'(' * 300}", f"a: int = {'9' * 6000}",
        f"a: int = {'1 + ' * 3000}1", "a: int = {[]: 1}", "a: int", "a: list = []", "a = 1",
        "a\0: int = 1", "seeds: str = 'three'  # bases", "device: int = 3  # where",
    ],
)  # fmt: skip
def test_a_hostile_parameter_is_refused(folder, line):
    content = CHAPTER.replace("seeds: int = 1  # bases and streams", line)
    source = put(folder / "00_x.md", content.encode())
    assert "00_x" in survives(lambda: chapters.check_parameters(source, {}))


def test_lines_are_counted_as_python_counts_them():
    cell = "a: int = 1  # x\x0cé\x0c\x1c\nb: str = 'é'  # y"
    assert [p.help[:1] for p in chapters.declared_parameters(cell).values()] == ["x", "y"]


SHAPES = [[0], [2**62], [2**32, 2**32], [0, 2**62], [-1], [2.5], "2", None, [2] * 300]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["F32", "I64", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "X"])
def test_weights_of_another_shape_or_kind_are_refused(folder, shape, dtype):
    about = {"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, 24]}}
    header = json.dumps(about).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(24)
    assert survives(lambda: read_weights(folder, content))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_longer_than_its_file_is_refused(folder, length):
    content = length.to_bytes(8, "little") + b"{}"
    assert survives(lambda: read_weights(folder, content))
    assert survives(lambda: read_checkpoint(folder, content))


NPY_HEADERS = [
    f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}"
    for kind, shape in (
        ("'|u1'", "(2, 4, 32, 32, )"), ("'|O'", "(2, 4, 32, 32)}"), ("'|u1'", "(-1, 4, 32, 32)}"),
        ("'|u1'", f"({2**62}, 4, 32, 32)}}"), ("'|u1'", f"({2**80}, 4, 32, 32)}}"),
        ("[('a', '|u1')]", "(2, 4, 32, 32)}"), ("__import__('os')", "(2,)}"),
    )
]  # fmt: skip
NPY_HEADERS += ["(" * 5000, "-" * 9000 + "1", "'''", ""]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("header", NPY_HEADERS, ids=range(len(NPY_HEADERS)))
def test_an_array_header_that_cannot_be_is_refused(folder, header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    assert "shapes" in survives(lambda: read_images(folder, content + bytes(8192)))


def test_what_numpy_would_open_as_something_else_is_refused(folder):
    target = io.BytesIO()
    np.savez(target, images=PIXELS)
    assert "shapes" in survives(lambda: read_images(folder, target.getvalue()))
    assert "shapes" in survives(lambda: read_images(folder, b""))


def test_a_zip_that_lies_of_its_size_is_not_unpacked_beyond_it(folder):
    size, target = 32 * 2**20, io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a", bytes(size))
    content = target.getvalue().replace(size.to_bytes(4, "little"), b"\x08\0\0\0")
    tracemalloc.start()
    try:
        assert "cannot be read" in survives(lambda: read_archive(folder, content))
        assert tracemalloc.get_traced_memory()[1] < size / 8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)], ids=["password", "compression"])
def test_a_zip_that_cannot_be_opened_is_refused(folder, place, value):
    content = bytearray(archive_zip())
    entry = content.index(b"PK\x01\x02")  # of the directory; the one before the data agrees
    content[entry + place] = content[place - 2] = value
    assert "cannot be read" in survives(lambda: read_archive(folder, bytes(content)))


def test_the_smallest_of_the_profile_is_a_file_too(folder):
    """`cmpt run FILE` reads an empty mapping as the defaults, and no other nothing."""
    assert survives(lambda: read_run_config(folder, b"{}")) == ""
    assert "x.yaml" in survives(lambda: read_run_config(folder, b"null"))


def test_another_error_than_ours_is_no_refusal_and_time_is_bounded(monkeypatch):
    with pytest.raises(KeyError):
        survives(lambda: {}["a"])
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.01)
    with pytest.raises(AssertionError):
        survives(lambda: sum(range(10**7)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps this limit")
def test_memory_is_bounded():
    with pytest.raises(MemoryError):
        bytearray(2 * MEMORY)


@pytest.mark.long
def test_a_few_of_the_thousands():
    """The rest by `python -m tests.fuzz`; in a process of its own, as it forks and changes much."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.fuzz", "--mutations", "54", "--commands", "18"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "54 files" in done.stdout and "18 command lines" in done.stdout
