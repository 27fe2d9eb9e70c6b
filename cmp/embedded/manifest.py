"""The schema of `data_manifests/`: packages that data come from, and the datasets made of them.

`packages.yaml` pins every source (registry, version, sha256, licence). `embedded/*.yaml` holds one
dataset a file: its role, its prompt, the recipe that turns packages into images, and the counts
that the recipe must arrive at.
"""

import functools
import hashlib
import json
import string
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    StringConstraints,
    model_validator,
)

from cmp.data import POOL_DATA_ROLES
from cmp.errors import CmpError
from cmp.readers.manifest import (
    MANIFESTS,
    Counts,
    DatasetName,
    Role,
    Split,
    SplitShare,
    StrictModel,
    Text,
    read_manifest,
)

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Interval = Annotated[tuple[SplitShare, SplitShare], Field(description="half-open part of [0, 1)")]
Caption = Literal["name", "name-tags", "name-all", "subgroup-name", "tags"]

WHOLE_INTERVAL: Interval = (0.0, 1.0)


class Package(StrictModel):
    """One pinned archive of a public registry, and the thanks that we owe for it."""

    registry: Literal["npm", "pypi", "debian"]
    package: Text
    version: Text
    sha256: Sha256
    file: Annotated[str, StringConstraints(pattern=r"^[\w@%][\w.+@%-]*$", max_length=200)]
    licence: Text
    attribution: Text
    url: Text


class EmojiSplit(StrictModel):
    """Which drawing styles of which concepts: `concepts` is an interval of the codepoints' hash."""

    styles: Annotated[list[DatasetName], Field(min_length=1)]
    concepts: Interval = WHOLE_INTERVAL


class EmojiRecipe(StrictModel):
    """Emoji of some groups, matched over drawing styles by codepoint and split by concept."""

    kind: Literal["emoji"]
    groups: Annotated[list[DatasetName], Field(min_length=1)]
    label: Literal["name", "subgroup"] = "name"
    captions: Annotated[list[Caption], Field(min_length=1)]
    splits: dict[Split, EmojiSplit]


class FlagRecipe(StrictModel):
    """Country flags: `countries` of them, one image a style."""

    kind: Literal["flags"]
    countries: Annotated[int, Field(ge=2)]
    splits: dict[Split, Annotated[list[DatasetName], Field(min_length=1)]]


class IconRecipe(StrictModel):
    """Silhouettes named "<modifiers> <head>"; a head is the last word of a name.

    `heads: seen` and `new` are the two halves of the frequent heads, `other` are the less frequent
    ones, for the pool. `splits` are intervals of the icons' hash.
    """

    kind: Literal["icons"]
    heads: Literal["seen", "new", "other"]
    splits: dict[Split, Interval]


class IconSetRecipe(StrictModel):
    """Every icon of one set, each of a class of its own; `splits` are intervals of their hash."""

    kind: Literal["icon-set"]
    splits: dict[Split, Interval]


class ArrayRecipe(StrictModel):
    """Grey 28-pixel images that a package ships as arrays; `splits` counts images a class."""

    kind: Literal["digits", "animals"]
    splits: dict[Split, Annotated[int, Field(ge=1)]]


class SceneRecipe(StrictModel):
    """Images drawn by `cmp.data.procedural`; `splits` counts images a class."""

    kind: Literal["scene"]
    scene: DatasetName
    splits: dict[Split, Annotated[int, Field(ge=1)]]


class PhotoRecipe(StrictModel):
    """Cut-out photographs and drawings of a Debian package with a caption each."""

    kind: Literal["tuxpaint", "gcompris"]
    splits: dict[Split, Interval]


Recipe = Annotated[
    EmojiRecipe | FlagRecipe | IconRecipe | IconSetRecipe | ArrayRecipe | SceneRecipe | PhotoRecipe,
    Field(discriminator="kind"),
]


class Dataset(StrictModel):
    """One dataset: where it comes from, what it is for, how it is made.

    year: in which the dataset, or the one that it is made after, first came out; time-incremental
    streams go by it.
    """

    name: DatasetName
    title: Text
    role: Role
    task: Literal["classification", "retrieval"] = "classification"
    images: Text
    prompt: Text = "{}"
    sources: list[DatasetName] = []
    optional: bool = False
    year: Annotated[int, Field(ge=1900, le=2100)] | None = None
    recipe: Recipe
    counts: Counts

    @model_validator(mode="after")
    def _consistent(self) -> "Dataset":
        fields = [field for _, field, _, _ in string.Formatter().parse(self.prompt)]
        if [field for field in fields if field is not None] != [""]:
            raise ValueError(f"prompt: {self.prompt!r} must hold exactly one {{}}")
        if self.role in POOL_DATA_ROLES and set(self.recipe.splits) != {"train"}:
            raise ValueError("recipe.splits: a pool has a train split and nothing else")
        if self.role in ("eval", "transfer") and "train" in self.recipe.splits:
            raise ValueError("recipe.splits: a held-out set cannot have a train split")
        return self

    def fingerprint(self, packages: dict[str, Package]) -> str:
        """sha256 of everything that decides the packed images: this manifest and its sources."""
        sources = {name: packages[name].sha256 for name in self.sources}
        content = json.dumps(
            [self.model_dump(mode="json", exclude={"year"}), sources], sort_keys=True
        )
        return hashlib.sha256(content.encode()).hexdigest()


class Packages(StrictModel):
    """The whole of `packages.yaml`."""

    packages: dict[DatasetName, Package]


def load_packages(folder: Path = MANIFESTS) -> dict[str, Package]:
    """Every pinned package by its short name."""
    return read_manifest(folder / "packages.yaml", Packages).packages


def load_datasets(folder: Path = MANIFESTS) -> dict[str, Dataset]:
    """Every embedded dataset by name, in file order; sources must exist, names must be unique."""
    packages = load_packages(folder)
    datasets: dict[str, Dataset] = {}
    for path in sorted((folder / "embedded").glob("*.yaml")):
        dataset = read_manifest(path, Dataset)
        if dataset.name != path.stem:
            raise CmpError(f"{path}: name: must equal the file's name, {path.stem!r}")
        if missing := [source for source in dataset.sources if source not in packages]:
            raise CmpError(f"{path}: sources: {missing[0]!r} is not in packages.yaml")
        datasets[dataset.name] = dataset
    if not datasets:
        raise CmpError(f"{folder / 'embedded'}: no manifests found")
    return datasets


@functools.cache
def embedded_manifests() -> dict[str, Dataset]:
    """The manifests of the repository, read once."""
    return load_datasets()
