"""A packed dataset is there whole, or not at all."""

import json
import os

import numpy as np
import pytest

from benchmark import build, drawn, variants
from cmp import config, streams
from cmp.embedded import manifest, packed
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


def test_inverted_images_are_those_of_new_concepts_alone():
    corpus, inverted = packed.load_embedded(), variants.load_inverted()
    rows = corpus.table["dataset"].isin(corpus.by_role("adapt")).to_numpy()
    before, after = corpus.images.numpy(), inverted.images.numpy()
    assert (after[rows, :3] == 255 - before[rows, :3]).all()
    assert (after[rows, 3] == before[rows, 3]).all() and (after[~rows] == before[~rows]).all()
    changed = {name for name in corpus.hashes if corpus.hashes[name] != inverted.hashes[name]}
    assert changed == {*corpus.by_role("adapt")}


def test_months_have_unequal_sizes_names_that_return_and_wrong_captions():
    corpus, months = packed.load_embedded(), variants.load_months()
    stream = config.Stream("given", tasks=variants.MONTHS)
    updates = streams.task_rows(months, stream, 0)
    assert {*np.concatenate(updates)} == {*streams.adaptation_rows(corpus)}
    sizes = [len(rows) for rows in updates]
    assert 5 * min(sizes) < max(sizes)
    classes = [{*streams.class_names(months, rows)} for rows in updates]
    count = {name: sum(name in own for own in classes) for name in set().union(*classes)}
    assert {*count.values()} == {1, 2, 3}
    texts = [
        [tuple(each.texts[n] for n in each.caption_ids[each.caption_starts[row] :][:1])
         for row in np.concatenate(updates)]
        for each in (corpus, months)
    ]  # fmt: skip
    wrong = np.mean([before != after for before, after in zip(*texts, strict=True)])
    assert 0.8 * variants.WRONG_SHARE < wrong <= variants.WRONG_SHARE
