"""What the manifests promise, and what a bad one gets."""

import pytest

from cmp.config import POOL_DATA_ROLES
from cmp.embedded import manifest, packed
from cmp.embedded.manifest import embedded_manifests, load_packages
from cmp.errors import CmpError
from cmp.readers.index import count_images
from cmp.readers.manifest import MANIFESTS, read_manifest
from tests.attribution import PAGE, attribution_text

GOOD = """
name: example
title: An example
role: eval
images: dots
recipe: {kind: scene, scene: shapes, splits: {test: 2}}
counts: {classes: 42, test: 84}
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "example.yaml"


def load(path, text):
    path.write_text(text)
    return read_manifest(path, manifest.Dataset)


def test_the_example_is_good(path):
    assert load(path, GOOD).counts.test == 84


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("title: An example\n", "", "title"),
        ("role: eval", "role: evaluate", "role"),
        ("splits: {test: 2}", "splits: {test: many}", "recipe.scene.splits.test"),
        ("splits: {test: 2}", "splits: {test: 0}", "recipe.scene.splits.test"),
        ("kind: scene", "kind: scenery", "recipe"),
        ("scene: shapes", "scene: letters", "recipe.scene.scene"),
        ("images: dots", "images: dots\nprompt: no hole", "prompt"),
        ("images: dots", "images: dots\nprompt: '{} and {}'", "prompt"),
        ("images: dots", "images: dots\ncolour: red", "colour"),
        ("images: dots", "images: dots\nsources: [/etc/passwd]", "sources.0"),
        ("images: dots", "images: dots\nsources: [../secret]", "sources.0"),
        ("name: example", "name: ../example", "name"),
        ("name: example", "name: /example", "name"),
        ("counts: {classes: 42, test: 84}", "counts: {classes: -1}", "counts.classes"),
        ("name: example", "name: [", "YAML"),
    ],
)
def test_a_bad_manifest_is_refused_with_file_and_key(path, old, new, key):
    assert old in GOOD
    with pytest.raises(CmpError) as error:
        load(path, GOOD.replace(old, new))
    assert "example.yaml" in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sha256", "abc"), ("file", "/tmp/x.tgz"), ("file", "../x.tgz"), ("registry", "ftp")],
)
def test_a_bad_package_is_refused_with_file_and_key(tmp_path, key, value):
    packages = tmp_path / "packages.yaml"
    lines = (MANIFESTS / "packages.yaml").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
    lines[first] = f"    {key}: {value}"
    packages.write_text("\n".join(lines))
    with pytest.raises(CmpError, match=rf"packages\.yaml: packages\.\w+\.{key}"):
        load_packages(tmp_path)


def test_the_embedded_manifests_are_well_formed():
    for name, dataset in embedded_manifests().items():
        assert name == dataset.name
        assert {*dataset.sources} <= load_packages().keys(), name
        splits = {*dataset.recipe.splits}
        assert (splits == {"train"}) == (dataset.role in POOL_DATA_ROLES), name
        assert "train" not in splits or dataset.role not in ("eval", "transfer"), name


def test_fingerprint_moves_with_the_manifest_and_with_its_sources(monkeypatch):
    packages = load_packages()
    dataset = embedded_manifests()["new-digits"]
    before = manifest.store_fingerprint(dataset)
    other = dataset.model_copy(update={"prompt": "digit {}"})
    assert manifest.store_fingerprint(other) != before
    moved = packages | {"mnist": packages["mnist"].model_copy(update={"sha256": "0" * 64})}
    monkeypatch.setattr(manifest, "load_packages", lambda: moved)
    assert manifest.store_fingerprint(dataset) != before


def test_every_source_is_used_and_credited():
    used = {source for d in embedded_manifests().values() for source in d.sources}
    assert used == set(load_packages())


def test_the_attribution_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert attribution_text(page) == page


def test_built_counts_equal_the_manifests():
    for dataset in embedded_manifests().values():
        opened = packed.read_packed(dataset)
        assert count_images(opened.table) == dataset.counts.model_dump(), dataset.name
        assert opened.header.classes == sorted(set(opened.table["label"]))
