"""A packed dataset is there whole, or not at all."""

import json
import os

import numpy as np
import pytest

from cmp.embedded import build, drawn, manifest, packed
from cmp.embedded.manifest import embedded_manifests
from cmp.errors import CmpError


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    return embedded_manifests()["shapes"]


def test_what_is_written_is_read(dataset):
    samples = drawn.make_scenes(dataset.recipe, {})
    assert not manifest.is_built(dataset)
    packed.write_packed(dataset, samples)
    opened = packed.read_packed(dataset)
    np.testing.assert_array_equal(opened.images, samples[0])
    assert opened.header.classes == sorted(drawn.SCENES["shapes"])
    assert list(opened.table["captions"][0]) == samples[1][0][-1]


@pytest.mark.long
def test_building_twice_gives_the_same_bits_and_the_second_time_nothing_to_do(dataset):
    assert build.build_datasets(["shapes"], jobs=1) == ["shapes"]
    first = packed.read_packed(dataset).header
    assert build.build_datasets(["shapes"], jobs=1) == []
    packed.write_packed(dataset, drawn.make_scenes(dataset.recipe, {}))
    assert packed.read_packed(dataset).header == first


def test_other_counts_than_the_manifest_are_refused(dataset):
    counts = dataset.counts.model_copy(update={"test": 1})
    wrong = dataset.model_copy(update={"counts": counts})
    with pytest.raises(CmpError, match=r"shapes\.yaml: counts"):
        packed.write_packed(wrong, drawn.make_scenes(dataset.recipe, {}))
    assert not manifest.is_built(dataset)


def test_another_manifest_makes_the_store_stale(dataset):
    packed.write_packed(dataset, drawn.make_scenes(dataset.recipe, {}))
    changed = dataset.model_copy(update={"title": "Other shapes"})
    assert not manifest.is_built(changed)
    with pytest.raises(CmpError, match="cmpt data build shapes"):
        packed.read_packed(changed)


@pytest.mark.parametrize("failing", ["save", "rename"])
def test_an_interrupted_write_leaves_what_was_there(dataset, monkeypatch, failing):
    samples = drawn.make_scenes(dataset.recipe, {})
    packed.write_packed(dataset, samples)
    before = packed.read_packed(dataset).header

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((np, "save") if failing == "save" else (os, "rename")), full)
    with pytest.raises(CmpError, match="No space left"):
        packed.write_packed(dataset, samples)
    monkeypatch.undo()
    monkeypatch.setenv("CMP_BUILD", str(manifest.store_path("x").parents[1]))
    assert before.fingerprint == manifest.store_fingerprint(dataset)


@pytest.mark.parametrize("damage", ["header", "images", "shorter", "table", "missing"])
def test_damage_is_named(dataset, damage):
    packed.write_packed(dataset, drawn.make_scenes(dataset.recipe, {}))
    folder = manifest.store_path("shapes")
    if damage == "header":
        (folder / "store.json").write_text("{")
    elif damage == "images":
        (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:1000])
    elif damage == "shorter":
        np.save(folder / "images.npy", np.zeros((3, 4, 32, 32), np.uint8))
    elif damage == "table":
        (folder / "samples.parquet").write_bytes(b"nothing")
    else:
        header = json.loads((folder / "store.json").read_text())
        del header["classes"]
        (folder / "store.json").write_text(json.dumps(header))
    with pytest.raises(CmpError, match="shapes"):
        packed.read_packed(dataset)


@pytest.mark.long
def test_pixels_that_are_not_what_was_written_are_refused(dataset):
    packed.write_packed(dataset, drawn.make_scenes(dataset.recipe, {}))
    with open(manifest.store_path("shapes") / "images.npy", "r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x17" * 100)
    with pytest.raises(CmpError, match=r"images\.npy is damaged; run `cmpt data"):
        packed.read_packed(dataset)
    assert manifest.is_built(dataset)
    assert build.build_datasets(["shapes"], jobs=1) == ["shapes"]
    packed.read_packed(dataset)


def test_a_damaged_digest_is_refused(dataset):
    """A run's id is made of it, and the table's file is still what was written."""
    packed.write_packed(dataset, drawn.make_scenes(dataset.recipe, {}))
    path = manifest.store_path("shapes") / "store.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"table_sha256": "0" * 64}))
    with pytest.raises(CmpError, match=r"samples\.parquet is damaged"):
        packed.read_packed(dataset)
