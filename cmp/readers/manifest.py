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

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cmp.data import POOL_DATA_ROLES, named_sources
from cmp.errors import CmpError
from cmp.files import build_folder, read_yaml

_IN_WHEEL = Path(__file__).resolve().parent.parent / "data_manifests"
MANIFESTS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_WHEEL.parents[1] / "data_manifests"
"""The manifests that come with this package: within it in a wheel, beside it in a checkout."""
STATISTICS = MANIFESTS / "traits"
"""Tables of class statistics that come with this package."""

SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]
SPLIT_SHARES: dict[str, dict[str, float]] = {
    "pool": {"train": 1.0}, "substitute": {"train": 1.0},
    "eval": {"test": 1.0}, "transfer": {"test": 1.0},
    "adapt": {"train": 0.7, "validation": 0.1, "test": 0.2},
}  # fmt: skip
"""By role, the splits that a set may have, and their shares where its files do not say."""


def manifest_folders(source: str) -> list[tuple[Path, Path]]:
    """(folder of manifests, folder of data) of a collection: of this package, such as "fomo", whose
    data lie in `_build/fomo` with whatever manifests lie there too; or at a path, where both are
    one. `CmpError` if there is neither."""
    own = MANIFESTS / source
    if source in named_sources() and source != "embedded":
        data = build_folder() / source
        return [(own, data), (data, data)]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        known = ", ".join(named_sources())
        raise CmpError(f"data: {source!r} is no folder of manifests, nor one of {known}")
    return [(folder, folder)]


DatasetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
SplitShare = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]
Role = Literal["pool", "substitute", "adapt", "eval", "transfer"]


class StrictModel(BaseModel):
    """Unknown keys and silent conversions are errors; instances are values."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FolderReader(StrictModel):
    """`class/picture.jpg`; or `train/class/picture.jpg`, where the top folders are splits."""

    kind: Literal["folder"]
    path: Text = "."


class TableReader(StrictModel):
    """A row an image: CSV, TSV (tabs) or Parquet. image, caption, label and split name columns;
    the image is a path, in Parquet also the file's bytes. `frame` is a table in memory."""

    kind: Literal["csv", "parquet", "frame"]
    path: Text = "."
    image: Text = "filepath"
    caption: Text | None = "title"
    label: Text | None = None
    split: Text | None = None


class TarReader(StrictModel):
    """Tars as of webdataset, of members `key.jpg`, `key.txt` (caption), `key.cls` (label) and
    `key.json`. path: a pattern such as `shards/*.tar`."""

    kind: Literal["tars"]
    path: Text


class FomoReader(StrictModel):
    """The reference's layout: `FOLDER/` or `FOLDER.tar`, with `00_info/FOLDER_train.json`; or, of
    images made smaller beforehand, `00_info/FOLDER_train_224.json`."""

    kind: Literal["fomo"]
    folder: SetName
    resized: bool = False


Reader = Annotated[FolderReader | TableReader | TarReader | FomoReader, Field(discriminator="kind")]


class Counts(StrictModel):
    """What the recipe must arrive at, in images a split, and in classes."""

    classes: Annotated[int, Field(ge=1)]
    train: Annotated[int, Field(ge=0)] = 0
    validation: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0


class FileSet(StrictModel):
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
    splits: dict[Split, SplitShare] = Field(default_factory=dict)
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
            kind = "a pool" if self.role in POOL_DATA_ROLES else "a held-out set"
            raise ValueError(f"splits: {kind} has no {min(alien)!r}")
        return self

    def allowed(self) -> list[str]:
        """The splits that a set of this role may have; images of others are not used."""
        return list(SPLIT_SHARES[self.role])

    def shares(self) -> dict[str, float]:
        """Of images whose split nothing tells: split -> share."""
        return dict(self.splits) or SPLIT_SHARES[self.role]


Place = tuple[FileSet, Path]
"""A set, and the folder that the paths in its manifest are relative to."""


def manifests(source: str) -> list[Place]:
    """Every set of a collection, in the order of the files; `CmpError` if there is none, or two
    bear one name."""
    found: dict[str, Place] = {}
    for manifests, data in manifest_folders(source):
        for path in sorted(manifests.glob("*.yaml")):
            dataset = read_manifest(path, FileSet)
            if dataset.name in found:
                raise CmpError(f"{path}: name: {dataset.name!r} is the name of another set, too")
            found[dataset.name] = (dataset, data)
    if not found:
        raise CmpError(
            f"{source}: no manifests (*.yaml) lie there; `cmpt data init {source}` writes one"
        )
    return list(found.values())


def read_manifest(path: Path, schema: type[BaseModel]) -> BaseModel:
    """Parse one manifest; a `CmpError` names the file and the key of the first fault."""
    content = read_yaml(path)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        fault = faults[0]  # a misspelt key first, then the one that is missing for it
        key = ".".join(map(str, fault["loc"])) or "(whole file)"
        raise CmpError(f"{path}: {key}: {fault['msg']} (found {fault['input']!r:.80})") from error
