"""The schema of `data_manifests/`: source packages, and the datasets made from them.

`packages.yaml` pins every source (registry, version, sha256, licence). Each file `embedded/*.yaml`
defines a dataset: its role, its prompt, the recipe that turns packages into images, and the counts
that the recipe must produce.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cmp.errors import CmpError
from cmp.parsing import parse_json
from cmp.project import build_folder
from cmp.readers.manifest import (
    LONGEST_NAME,
    MANIFESTS,
    Counts,
    Prompt,
    SetManifest,
    Split,
    StrictModel,
    Text,
    read_manifest,
)
from cmp.values import Share

DatasetName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=LONGEST_NAME)
]
Interval = Annotated[tuple[Share, Share], Field(description="half-open part of [0, 1)")]
Caption = Literal["name", "name-tags", "name-all", "subgroup-name", "tags"]
ImagesPerClass = Annotated[int, Field(ge=1)]
Names = Annotated[list[DatasetName], Field(min_length=1)]

STORE_FORMAT = 5
"""Increase this when the layout of a store or the samples of a recipe change."""


class Package(StrictModel):
    """A pinned archive of a public registry, with its attribution.

    Attributes:
        registry: "npm" or "pypi".
        package: The package's name in the registry.
        version: Its version.
        sha256: The hex digest of the archive.
        file: The file name of the archive.
        licence: The licence of the content.
        attribution: What it is, and who made it.
        url: The home page.
    """

    registry: Literal["npm", "pypi"]
    package: Text
    version: Text
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    file: Annotated[str, StringConstraints(pattern=r"^[\w@%][\w.+@%-]*$", max_length=200)]
    licence: Text
    attribution: Text
    url: Text


class EmojiSplit(StrictModel):
    """The drawings in a split.

    Attributes:
        styles: The drawing styles.
        concepts: The interval of codepoint hashes.
    """

    styles: Names
    concepts: Interval = (0.0, 1.0)


class EmojiRecipe(StrictModel):
    """A recipe for emoji of some groups, matched across drawing styles by codepoint and split by
    concept.

    Attributes:
        kind: "emoji".
        groups: The groups in Emojibase.
        label: What to use as the class name.
        captions: What to make captions from.
        splits: Split -> drawings.
    """

    kind: Literal["emoji"]
    groups: Names
    label: Literal["name", "subgroup"] = "name"
    captions: Annotated[list[Caption], Field(min_length=1)]
    splits: dict[Split, EmojiSplit]


class FlagRecipe(StrictModel):
    """A recipe for country flags, with one image per country and style.

    Attributes:
        kind: "flags".
        countries: The number of countries.
        splits: Split -> drawing styles.
    """

    kind: Literal["flags"]
    countries: Annotated[int, Field(ge=2)]
    splits: dict[Split, Names]


class IconRecipe(StrictModel):
    """A recipe for silhouettes named "<modifiers> <head>"; the head is the last word of a name.

    Attributes:
        kind: "icons".
        heads: "seen" and "new" are the two halves of the frequent heads, "other" the less frequent.
        splits: Split -> interval of the hashes of icon names.
    """

    kind: Literal["icons"]
    heads: Literal["seen", "new", "other"]
    splits: dict[Split, Interval]


class IconSetRecipe(StrictModel):
    """A recipe for every icon of a set, each its own class.

    Attributes:
        kind: "icon-set".
        splits: Split -> interval of the hashes of icon names.
    """

    kind: Literal["icon-set"]
    splits: dict[Split, Interval]


class ArrayRecipe(StrictModel):
    """A recipe for grey images of 28 x 28 pixels that a package ships as arrays.

    Attributes:
        kind: "digits" or "animals".
        splits: Split -> images per class.
    """

    kind: Literal["digits", "animals"]
    splits: dict[Split, ImagesPerClass]


class SceneRecipe(StrictModel):
    """A recipe for images drawn by `benchmark.drawn`.

    Attributes:
        kind: "scene".
        scene: A key of `drawn.SCENES`.
        splits: Split -> images per class.
    """

    kind: Literal["scene"]
    scene: Literal["shapes", "sprites", "solids", "counting"]
    splits: dict[Split, ImagesPerClass]


Recipe = Annotated[
    EmojiRecipe | FlagRecipe | IconRecipe | IconSetRecipe | ArrayRecipe | SceneRecipe,
    Field(discriminator="kind"),
]


class Dataset(SetManifest):
    """A dataset: its sources, its purpose, and how it is made.

    Attributes:
        name: The dataset's name, which is also that of its file.
        task: "classification" or "retrieval".
        images: What the images look like.
        prompt: The prompt of the zero-shot classifier.
        sources: The short names of its packages.
        recipe: How packages become images.
        counts: The classes and images that the recipe must produce.
    """

    name: DatasetName
    task: Literal["classification", "retrieval"] = "classification"
    images: Text
    prompt: Prompt = "{}"
    sources: list[DatasetName] = Field(default_factory=list)
    recipe: Recipe
    counts: Counts

    @property
    def licence(self) -> str:
        """The licences of the packages that its images come from."""
        licences = {load_packages()[source].licence for source in self.sources}
        return ", ".join(sorted(licences)) or "our own drawings"


class Packages(StrictModel):
    """The content of `packages.yaml`.

    Attributes:
        packages: Packages by short name.
    """

    packages: dict[DatasetName, Package]


@functools.cache
def load_packages(folder: Path = MANIFESTS) -> dict[str, Package]:
    """Return the pinned packages, cached.

    Args:
        folder: The folder of `packages.yaml`.

    Returns:
        Packages by short name.

    Raises:
        CmpError: The file is invalid.
    """
    return read_manifest(folder / "packages.yaml", Packages).packages


@functools.cache
def embedded_manifests() -> dict[str, Dataset]:
    """Return the manifests of the embedded datasets by name, in the order of the files, cached."""
    paths = sorted((MANIFESTS / "embedded").glob("*.yaml"))
    return {path.stem: read_manifest(path, Dataset) for path in paths}


def select_datasets(names: list[str] | None = None) -> list[Dataset]:
    """Return the manifests of the given datasets.

    Args:
        names: The datasets; all by default.

    Raises:
        CmpError: There is no such dataset.
    """
    datasets = embedded_manifests()
    if unknown := [name for name in names or () if name not in datasets]:
        raise CmpError(f"no dataset is called {unknown[0]!r}; choose from {', '.join(datasets)}")
    return [datasets[name] for name in dict.fromkeys(names or datasets)]


def store_path(name: str) -> Path:
    """Return the folder of a built dataset.

    Args:
        name: The dataset.
    """
    return build_folder() / "data" / name


def store_fingerprint(dataset: Dataset) -> str:
    """Return the fingerprint that a store must have to be used for a manifest.

    It covers everything that determines the images: the manifest and its sources.

    Args:
        dataset: The manifest.
    """
    content = dataset.model_dump(mode="json", exclude={"year"})
    content["optional"] = False  # a former key, kept so that fingerprints stay the same
    sources = {name: load_packages()[name].sha256 for name in dataset.sources}
    text = json.dumps([content, sources], sort_keys=True)
    return f"{STORE_FORMAT}:{hashlib.sha256(text.encode()).hexdigest()}"


def is_built(dataset: Dataset) -> bool:
    """Return whether there is a store made from exactly this manifest, without reading its data.

    Args:
        dataset: The manifest.
    """
    try:
        content = parse_json((store_path(dataset.name) / "store.json").read_text())
        return content["fingerprint"] == store_fingerprint(dataset)
    except (OSError, ValueError, KeyError, TypeError):
        return False
