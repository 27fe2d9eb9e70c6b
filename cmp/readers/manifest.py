"""The schema of manifests of image files: the reader's own data, and FoMo-in-Flux.

A collection is a folder of manifests; `config.data` is its name or its path. Ten lines are enough
for a set:

    name: pictures
    title: What the shop sells
    role: adapt
    prompt: a photo of a {}
    licence: our own
    reader: {kind: folder, path: .}
"""

import contextlib
import glob
import os
import re
import string
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints

from cmp.config import POOL_DATA_ROLES
from cmp.errors import CmpError, name_choices
from cmp.files import MAX_YAML_BYTES, first_fault, read_text, read_yaml
from cmp.project import build_folder
from cmp.readers.files import is_inside

_IN_WHEEL = Path(__file__).resolve().parent.parent / "data_manifests"
MANIFESTS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_WHEEL.parents[1] / "data_manifests"
"""The manifests that come with this package: inside it in a wheel, beside it in a checkout."""
STATISTICS = MANIFESTS / "traits"
"""Tables of class statistics that come with this package."""

SPLIT_SHARES: dict[str, dict[str, float]] = {
    "pool": {"train": 1.0}, "substitute": {"train": 1.0},
    "eval": {"validation": 0.2, "test": 0.8}, "transfer": {"test": 1.0},
    "adapt": {"train": 0.7, "validation": 0.1, "test": 0.2},
}  # fmt: skip
"""Role -> the splits that its sets may have, and their shares where the files do not say."""


def _check_prompt(prompt: str) -> str:
    """Return the prompt if it has exactly one placeholder, without a format of its own."""
    fields = [field for _, *field in string.Formatter().parse(prompt) if field[0] is not None]
    if fields != [["", "", None]]:
        raise ValueError(f"{prompt!r:.80} must hold exactly one {{}}")
    return prompt


def _check_name(name: str) -> str:
    """Return the name if results and ids of runs can hold it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        words = "at most 100 letters, digits, - and _, the first a letter or digit"
        raise ValueError(f"{name!r:.80} must be {words}")
    return name


SetName = Annotated[str, AfterValidator(_check_name)]
DatasetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
UpdateName = Annotated[Text, BeforeValidator(lambda x: str(x) if type(x) is int else x)]
"""The month or number of an update, or a day in quotes, which would be no text without them."""
Prompt = Annotated[Text, AfterValidator(_check_prompt)]
SplitShare = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]
Role = Literal["pool", "substitute", "adapt", "eval", "transfer"]
Year = Annotated[int, Field(ge=1900, le=2100)]


class StrictModel(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A frozen pydantic model that refuses unknown keys, and numbers that are none."""


class PictureReader(StrictModel):
    """How the pictures of a set are seen, whatever its layout; all readers have these keys.

    Attributes:
        transparency: "white" lays what is transparent over white. "as-open-clip" drops the
            transparency, as open_clip's own transform does: the colours below it show.
        exif: "ignore" takes pictures as they are stored, as open_clip's own transform does; "apply"
            turns them upright, as their EXIF data say.
    """

    transparency: Literal["white", "as-open-clip"] = "white"
    exif: Literal["ignore", "apply"] = "ignore"


class FolderReader(PictureReader):
    """Images in a folder per class: `class/picture.jpg`, or `train/class/picture.jpg`.

    Attributes:
        kind: "folder".
        path: The folder, relative to the manifest's. One that lies elsewhere must hold pictures
            above all, see `tables.pictures_folder`.
    """

    kind: Literal["folder"]
    path: Text = "."


class TableReader(PictureReader):
    """A table with one row per image: CSV, TSV (tabs), Parquet, or a frame in memory.

    Attributes:
        kind: "csv" (also for TSV), "parquet" or "frame".
        path: The file, or a pattern of several.
        image: Column of the image: a path that starts from the table's folder, or the bytes of
            the file.
        caption: Column of the caption, a text or a list of texts.
        label: Column of the class name.
        split: Column of the split.
        update: Column of the update that an image arrives in, see `FileSet.update`.
    """

    kind: Literal["csv", "parquet", "frame"]
    path: Text = "."
    image: Text = "filepath"
    caption: Text | None = "title"
    label: Text | None = None
    split: Text | None = None
    update: Text | None = None


class TarReader(PictureReader):
    """Tars as webdataset writes them: `key.jpg`, `key.txt` (caption), `key.cls`, `key.json`.

    Attributes:
        kind: "tars".
        path: A pattern, such as `shards/*.tar`.
    """

    kind: Literal["tars"]
    path: Text


class PairReader(PictureReader):
    """Images with texts beside them, as img2dataset writes: `00000/000001.jpg` with `.txt`.

    The texts are as in tars: `.txt` (caption), `.cls` (label), `.json` (with the keys "caption"
    and "label").

    Attributes:
        kind: "pairs".
        path: The folder, as in `FolderReader`.
    """

    kind: Literal["pairs"]
    path: Text = "."


class FomoReader(PictureReader):
    """FoMo-in-Flux's layout: `FOLDER/` or `FOLDER.tar`, with `00_info/FOLDER_train.json`.

    Attributes:
        kind: "fomo".
        folder: The folder's name.
        resized: Whether the authors also offer smaller images, listed in
            `00_info/FOLDER_train_224.json`.
    """

    kind: Literal["fomo"]
    folder: SetName
    resized: bool = False


FILE_ENDINGS = {"csv": (".csv", ".tsv"), "parquet": (".parquet",), "tars": (".tar",)}
"""`reader.kind` -> what files of it that lie outside of the manifest's folder must be called."""
READERS = (FolderReader, TableReader, TarReader, PairReader, FomoReader)
Reader = Annotated[
    FolderReader | TableReader | TarReader | PairReader | FomoReader, Field(discriminator="kind")
]
READER_OF_KIND: dict[str, type[PictureReader]] = {
    kind: reader for reader in READERS for kind in get_args(reader.model_fields["kind"].annotation)
}
"""`reader.kind` -> the reader that says which other keys there are."""


class Counts(StrictModel):
    """How many classes and images a set must have.

    Attributes:
        classes: Number of classes.
        train: Number of training images.
        validation: Number of validation images.
        test: Number of test images.
    """

    classes: Annotated[int, Field(ge=1)]
    train: Annotated[int, Field(ge=0)] = 0
    validation: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0


class SetManifest(StrictModel):
    """What every set says of itself.

    Attributes:
        title: One line on it.
        role: "adapt", "eval", "transfer", "pool" or "substitute".
        year: Year in which the set, or the one that it is made after, first came out;
            time-incremental streams go by it.
    """

    title: Text
    role: Role
    year: Year | None = None


class FileSet(SetManifest):
    """One set of image files: what it is for, and how it is read.

    Attributes:
        name: The set's name in results.
        task: By default "classification" if images have labels, else "retrieval".
        images: What the images look like.
        prompt: Prompt of the zero-shot classifier, and caption of an image that has none.
        licence: Whose images these are.
        reader: Where the images are, and in which layout.
        splits: Split -> share, for images whose split is not given; else see `SPLIT_SHARES`. A pool
            may keep those that it had as an "adapt" set: its "train" images alone are replayed, and
            the others are neither trained on nor scored. Without splits it is replayed whole.
        update: The update that the set arrives in, such as 2026-01, where its images name none
            themselves; `stream.order=given` makes each update a task.
        faults: "refuse" the set if anything of it cannot be used, or "skip" what cannot.
        beside: "embedded" adds the embedded pool and retention sets, for the embedded models.
        counts: What must be found, if that is known.
        zero_shot: Published zero-shot score of OpenCLIP's ViT-B/32, in percent.
    """

    name: SetName
    task: Literal["classification", "retrieval"] | None = None
    images: str = ""
    prompt: Prompt = "a photo of a {}"
    licence: Text
    reader: Reader
    splits: dict[Split, SplitShare] = Field(default_factory=dict)
    update: UpdateName | None = None
    faults: Literal["refuse", "skip"] = "refuse"
    beside: Literal["embedded"] | None = None
    counts: Counts | None = None
    zero_shot: Annotated[float, Field(ge=0, le=100)] | None = None

    @pydantic.model_validator(mode="after")
    def _check_splits(self) -> "FileSet":
        if self.splits and abs((total := sum(self.splits.values())) - 1) > 1e-6:
            raise ValueError(f"splits: the shares must add up to 1, not to {total:g}")
        alien = set(self.splits) - set(self.allowed_splits())
        if alien and self.role not in POOL_DATA_ROLES:
            allowed = " and ".join(self.allowed_splits())
            raise ValueError(f"splits: a held-out set has no {min(alien)!r}, only {allowed}")
        return self

    def allowed_splits(self) -> list[str]:
        """Return the splits that a set of this role may have; images of others are left out."""
        return list(SPLIT_SHARES[self.role])

    def find_files(self, root: Path) -> list[Path]:
        """Return the files that the reader's pattern fits, sorted.

        Args:
            root: The folder that the pattern starts from, unless it is absolute.

        Raises:
            CmpError: If there is none, if the pattern would search folders beyond the root, if it
                fits files elsewhere that are not called as files of the reader's kind, or links
                that lead out of the root.
        """
        pattern, parts = self.reader.path, Path(self.reader.path).parts
        if "**" in parts and (os.path.isabs(pattern) or ".." in parts):
            raise CmpError(f"{self.name}: reader.path: {pattern!r:.80}: ** stays within {root}")
        pattern = os.path.join(glob.escape(str(root)), pattern)
        paths = map(Path, glob.iglob(pattern, recursive=True, include_hidden=True))
        files = sorted(path for path in paths if path.is_file())
        if not files:
            raise CmpError(f"{self.name}: reader.path: there is no file {pattern:.200}")
        endings, what = FILE_ENDINGS[self.reader.kind], f"{self.name}: reader.path: {pattern:.200}"
        for path in [path for path in files if not is_inside(path, root)]:
            if is_inside(path.parent, root):
                words = "is a link that leads out of the manifest's folder; put the file into it"
                raise CmpError(f"{self.name}: reader.path: {path} {words}")
            if path.suffix.lower() not in endings:  # which it is not said to be, nor its name told
                words = "fits files outside of the manifest's folder that are not called"
                raise CmpError(f"{what} {words} *{endings[0]}; name such files alone")
        return files


def manifest_folders(source: str) -> list[tuple[Path, Path]]:
    """Return where the manifests of a collection are, and their data.

    Args:
        source: A collection of this package, such as "fomo", or the path of a folder. The data of
            "fomo" are in `fomo` of the build folder, where more manifests may be.

    Returns:
        (folder of manifests, folder of data) pairs.

    Raises:
        CmpError: If `source` is neither.
    """
    from cmp.data import named_sources  # which imports torch

    if source in named_sources() and source != "embedded":
        data = build_folder() / source
        return [(MANIFESTS / source, data), (data, data)]
    folder = Path(os.path.expanduser(source))
    if not os.path.isdir(folder):  # which takes any text
        names = ", ".join(named_sources())
        raise CmpError(f"data: {source!r:.200} is no folder of manifests, nor one of {names}")
    return [(folder, folder)]


def load_manifests(source: str) -> list[tuple[FileSet, Path]]:
    """Read the manifests of a collection.

    Args:
        source: See `manifest_folders`.

    Returns:
        (set, folder that its paths are relative to) pairs, in the order of the files.

    Raises:
        CmpError: If there is no manifest, if one is faulty, if two sets have the same name, or if
            manifests lie at two levels.
    """
    for folder, _ in manifest_folders(source):
        refuse_two_levels(find_manifests(folder, "*.yaml"), find_manifests(folder, "*/*.yaml"))
    located: dict[str, tuple[FileSet, Path]] = {}
    for path, data in manifest_files(source):
        dataset = read_manifest(path, FileSet)
        if dataset.name in located:
            raise CmpError(f"{path}: name: {dataset.name!r} is the name of another set, too")
        located[dataset.name] = (dataset, data)
    if not located:
        raise CmpError(f"{source}: no manifests (*.yaml); `cmpt data init {source}` writes one")
    return list(located.values())


def manifest_files(source: str) -> list[tuple[Path, Path]]:
    """Return the manifests of a collection, each with the folder that its paths start from.

    They lie in the collection's folder or, where it has none, each in the folder of its own data.

    Args:
        source: See `manifest_folders`.
    """
    files = []
    for folder, data in manifest_folders(source):
        paths = [(path, data) for path in sorted(folder.glob("*.yaml"))]
        files += paths or [(path, path.parent) for path in sorted(folder.glob("*/*.yaml"))]
    return files


def find_manifests(folder: Path, pattern: str) -> list[Path]:
    """Return the files that hold the keys of a manifest, faulty or not; other YAML is passed over.

    Args:
        folder: The folder.
        pattern: Which files in it.
    """
    return sorted(path for path in folder.glob(pattern) if _is_manifest(path))


def _is_manifest(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        text = read_text(path, MAX_YAML_BYTES)
        return all(re.search(rf"\b{key}[\"']?\s*:", text) for key in ("role", "reader"))
    return False


def refuse_two_levels(upper: list[Path], lower: list[Path]) -> None:
    """Refuse manifests both in a folder and in folders inside it.

    Those inside would not be read, and their pictures would be taken for classes of the set above:
    what is to be held out would be trained on.

    Args:
        upper: The manifests in the folder.
        lower: Those in the folders inside.

    Raises:
        CmpError: If there are both.
    """
    if upper and lower:
        raise CmpError(
            f"{upper[0]} and {lower[0]}: the manifests of a collection must lie at one level, or "
            "pictures of the second would count as the first's; put each set, with its manifest, "
            "into a folder of its own beside the others"
        )


Model = TypeVar("Model", bound=BaseModel)


def read_manifest(path: Path, schema: type[Model]) -> Model:
    """Read one manifest.

    Args:
        path: A YAML file.
        schema: The pydantic model that it must fit.

    Returns:
        An instance of `schema`.

    Raises:
        CmpError: If the file cannot be read or does not fit; names the first faulty key.
    """
    try:
        return schema.model_validate(read_yaml(path))
    except pydantic.ValidationError as error:
        key, fault = first_fault(error)
        words = (str(path), key.removesuffix(".[key]"), _explain_fault(fault, schema))
        raise CmpError(": ".join(filter(None, words))) from error


def _explain_fault(fault: dict[str, Any], schema: type[BaseModel]) -> str:
    """Say what pydantic found in words that need no knowledge of it, and what to write instead."""
    what, about, value = fault["type"], fault.get("ctx", {}), fault["input"]
    if what == "value_error":  # which names the keys and their values itself
        return str(about["error"])
    if what == "missing":
        return "is missing"
    if what == "extra_forbidden":
        known = _known_keys(fault["loc"], schema)
        return f"there is no such key{_suggest(str(fault['loc'][-1]), known, 'keys')}"
    if what == "union_tag_not_found":
        known = READER_OF_KIND if fault["loc"] == ("reader",) else ()
        return f"its key {about['discriminator']} is missing{_suggest('', known, 'kinds')}"
    if what == "union_tag_invalid":
        known = re.findall(r"'(.*?)'", about["expected_tags"])
        near = _suggest(about["tag"], known, "kinds")
        return f"{about['discriminator']}: there is no {about['tag']!r:.80}{near}"
    if what in ("dict_type", "model_type", "model_attributes_type"):
        return f"must hold keys of its own (found {value!r:.80})"
    return f"{re.sub(r'^[A-Z][a-z]+ should', 'must', fault['msg'])} (found {value!r:.80})"


def _known_keys(loc: tuple[Any, ...], schema: type[BaseModel]) -> Collection[str]:
    """The keys that there are beside an unknown one, so far as this module knows them."""
    if loc[0] == "reader" and len(loc) > 2:
        known = READER_OF_KIND[loc[1]].model_fields
        return sorted(known, key=PictureReader.model_fields.__contains__)  # a kind's own come first
    return schema.model_fields if len(loc) == 1 else ()


def _suggest(name: str, known: Collection[str], what: str) -> str:
    """The nearest of the known names, and all of them."""
    return name_choices(name, known, f"the {what} are") if known else ""
