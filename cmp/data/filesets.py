"""The schema of manifests of image files: a reader's own pictures, and FoMo-in-Flux.

A collection is a folder of such manifests, `config.data` its name or path. Ten lines are enough:

    name: pictures
    title: What the shop sells
    role: adapt
    prompt: a photo of a {}
    licence: our own
    reader: {kind: folder, path: .}
"""

import string
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from cmp.data import manifest
from cmp.data.manifest import POOLS, Counts, Role, Share, Split, Strict, Text
from cmp.errors import CmpError
from cmp.paths import MANIFESTS, build_folder

SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]
SHARES: dict[str, dict[str, float]] = {
    "pool": {"train": 1.0}, "substitute": {"train": 1.0},
    "eval": {"test": 1.0}, "transfer": {"test": 1.0},
    "adapt": {"train": 0.7, "validation": 0.1, "test": 0.2},
}  # fmt: skip
"""By role, the splits that a set may have, and their shares where its files do not say."""


class FolderReader(Strict):
    """`class/picture.jpg`; or `train/class/picture.jpg`, where the top folders are splits."""

    kind: Literal["folder"]
    path: Text = "."


class TableReader(Strict):
    """A row an image: CSV, TSV (tabs) or Parquet. image, caption, label and split name columns;
    the image is a path, in Parquet also the file's bytes. `frame` is a table in memory."""

    kind: Literal["csv", "parquet", "frame"]
    path: Text = "."
    image: Text = "filepath"
    caption: Text | None = "title"
    label: Text | None = None
    split: Text | None = None


class TarReader(Strict):
    """Tars as of webdataset, of members `key.jpg`, `key.txt` (caption), `key.cls` (label) and
    `key.json`. path: a pattern such as `shards/*.tar`."""

    kind: Literal["tars"]
    path: Text


class FomoReader(Strict):
    """The reference's layout: `FOLDER/` or `FOLDER.tar`, with `00_info/FOLDER_train.json`; or, of
    images made smaller beforehand, `00_info/FOLDER_train_224.json`."""

    kind: Literal["fomo"]
    folder: SetName
    resized: bool = False


Reader = Annotated[FolderReader | TableReader | TarReader | FomoReader, Field(discriminator="kind")]


class FileSet(Strict):
    """One set of image files: what it is for, and how it is read.

    prompt: of the zero-shot classifier, and the caption of an image that has none. task: by default
    classification if images have labels, else retrieval. splits: shares by the hash of an image's
    name, for images whose split nothing tells. faults: whether what cannot be used refuses the set
    or is left out. beside: brings the embedded pool and retention sets, for runs of the embedded
    models. counts: what must be found, if that is known. zero_shot: the published score of
    OpenCLIP's ViT-B/32, in percent.
    """

    name: SetName
    title: Text
    role: Role
    task: Literal["classification", "retrieval"] | None = None
    images: str = ""
    prompt: Text = "a photo of a {}"
    licence: Text
    year: Annotated[int, Field(ge=1900, le=2100)] | None = None
    reader: Reader
    splits: dict[Split, Share] = Field(default_factory=dict)
    faults: Literal["refuse", "skip"] = "refuse"
    beside: Literal["embedded"] | None = None
    counts: Counts | None = None
    zero_shot: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "FileSet":
        fields = [field for _, field, _, _ in string.Formatter().parse(self.prompt)]
        if [field for field in fields if field is not None] != [""]:
            raise ValueError(f"prompt: {self.prompt!r} must hold exactly one {{}}")
        if self.splits and abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ValueError("splits: their shares must be 1 in all")
        if alien := set(self.splits) - set(self.allowed()):
            kind = "a pool" if self.role in POOLS else "a held-out set"
            raise ValueError(f"splits: {kind} has no {min(alien)!r}")
        return self

    def allowed(self) -> list[str]:
        """The splits that a set of this role may have; images of others are not used."""
        return list(SHARES[self.role])

    def shares(self) -> dict[str, float]:
        """Of images whose split nothing tells: split -> share."""
        return dict(self.splits) or SHARES[self.role]


Place = tuple[FileSet, Path]
"""A set, and the folder that the paths in its manifest are relative to."""


def folders(source: str) -> list[tuple[Path, Path]]:
    """(folder of manifests, folder of data) of a collection: of this package, such as "fomo", whose
    data lie in `_build/fomo` with whatever manifests lie there too; or at a path, where both are
    one. `CmpError` if there is neither."""
    own = MANIFESTS / source
    if "/" not in source and source not in ("embedded", "traits") and own.is_dir():
        data = build_folder() / source
        return [(own, data), (data, data)]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        known = ", ".join(sorted(named_collections()))
        raise CmpError(f"data: {source!r} is no folder of manifests, nor one of {known}")
    return [(folder, folder)]


def named_collections() -> list[str]:
    """The collections that come with this package."""
    return [path.name for path in MANIFESTS.iterdir() if path.is_dir() and path.name != "traits"]


def read_all(source: str) -> list[Place]:
    """Every set of a collection, in the order of the files; `CmpError` if there is none, or two
    bear one name."""
    found: dict[str, Place] = {}
    for manifests, data in folders(source):
        for path in sorted(manifests.glob("*.yaml")):
            dataset = manifest.read(path, FileSet)
            if dataset.name in found:
                raise CmpError(f"{path}: name: {dataset.name!r} is the name of another set, too")
            found[dataset.name] = (dataset, data)
    if not found:
        raise CmpError(
            f"{source}: no manifests (*.yaml) lie there; `cmp data init {source}` writes one"
        )
    return list(found.values())
