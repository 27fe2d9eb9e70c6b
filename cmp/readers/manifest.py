"""The schema of manifests for image files: user data and FoMo-in-Flux.

A collection is a folder of manifests, and `config.data` is its name or path. Ten lines are enough
for a dataset:

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
import shlex
import string
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints

from cmp.config import POOL_DATA_ROLES
from cmp.errors import CmpError, check_line, name_choices
from cmp.parsing import MAX_YAML_BYTES, explain_fault, first_fault, read_text, read_yaml
from cmp.project import build_folder, shipped_folder
from cmp.readers.files import (
    APPLE_DOUBLE,
    NoFilesError,
    exists,
    is_inside,
    note_folder,
    note_path,
)
from cmp.values import Share

MANIFESTS = shipped_folder("data_manifests")
"""The manifests shipped with this package."""
STATISTICS = MANIFESTS / "traits"
"""Tables of class statistics shipped with this package."""

SPLIT_SHARES: dict[str, dict[str, float]] = {
    "pool": {"train": 1.0}, "substitute": {"train": 1.0},
    "eval": {"validation": 0.2, "test": 0.8}, "transfer": {"test": 1.0},
    "adapt": {"train": 0.7, "validation": 0.1, "test": 0.2},
}  # fmt: skip
"""Role -> the splits that its datasets may have, and their shares if the files do not define
splits."""
LONGEST_NAME = 100
"""The most characters of a dataset's name."""


def check_prompt(prompt: str) -> str:
    """Return the prompt if it has exactly one placeholder, without a format spec."""
    fields = [field for _, *field in string.Formatter().parse(prompt) if field[0] is not None]
    if fields != [["", "", None]]:
        raise ValueError(f"{prompt!r:.80} must contain exactly one {{}}")
    return check_line(prompt)


def _check_name(name: str) -> str:
    """Return the name if it is valid in results and run ids."""
    if len(name) > LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"{name!r:.80} must be at most {LONGEST_NAME} letters, digits, - and _, the first a "
            "letter or digit"
        )
    return name


SetName = Annotated[str, AfterValidator(_check_name)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Line = Annotated[Text, AfterValidator(check_line)]
UpdateName = Annotated[Line, BeforeValidator(lambda x: str(x) if type(x) is int else x)]
"""The month, the day or the number of an update."""
Prompt = Annotated[Text, AfterValidator(check_prompt)]
Split = Literal["train", "validation", "test"]
Role = Literal["pool", "substitute", "adapt", "eval", "transfer"]
Year = Annotated[int, Field(ge=1900, le=2100)]


class StrictModel(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A frozen pydantic model that rejects unknown keys, NaN and infinity."""


class PictureReader(StrictModel):
    """How the images of a dataset are read. All readers have these keys.

    Attributes:
        transparency: "white" puts transparent parts over white. "as-open-clip" resizes an image
            first and then drops the transparency, as open_clip's own transform does, which shows
            the colours below.
        exif: "ignore" reads images as stored, as open_clip's own transform does. "apply" turns them
            upright by their EXIF data.
        draft: How small a JPEG may be decoded before it is cropped for training: with no side
            shorter than twice that of the crop ("double"), or than the crop's ("side"). The latter
            takes about half the time for photographs of 640 x 480 and more.
        resize: What resamples a crop for training: Pillow, or torch, which takes about half the
            time for decoding and cropping together. The box of a crop then has whole pixels.
            `draft` and `resize` change pixels, so another value is another run.
    """

    transparency: Literal["white", "as-open-clip"] = "white"
    exif: Literal["ignore", "apply"] = "ignore"
    draft: Literal["double", "side"] = "double"
    resize: Literal["pillow", "torch"] = "pillow"


class FolderReader(PictureReader):
    """Images in one folder per class: `class/picture.jpg`, or `train/class/picture.jpg`.

    Attributes:
        kind: "folder".
        path: The folder, relative to the manifest's. A folder elsewhere must contain mostly images,
            see `folders.pictures_folder`.
    """

    kind: Literal["folder"]
    path: Text = "."


class TableReader(PictureReader):
    """A table with one row per image: CSV, TSV (tabs), JSON lines or Parquet.

    Attributes:
        kind: "csv" (also for TSV), "jsonl" or "parquet".
        path: The file, or a pattern for several.
        image: The column of the image: a path relative to the table's folder, or the bytes of the
            file.
        caption: The column of the caption, a text or a list of texts.
        label: The column of the class name. Integers of a Parquet file that Hugging Face's
            `datasets` wrote stand for the names in its metadata.
        split: The column of the split. Without one, the table's folder gives it if it is called
            like a split, as `test` is. So do the top folders of paths and the beginnings of the
            tables' names, if they name several splits.
        update: The column of the update in which an image arrives, see `FileSet.update`.
    """

    kind: Literal["csv", "jsonl", "parquet"]
    path: Text = "."
    image: Text = "filepath"
    caption: Text | None = "title"
    label: Text | None = None
    split: Text | None = None
    update: Text | None = None


class TarReader(PictureReader):
    """Tars in the format of webdataset: `key.jpg`, `key.txt` (caption), `key.cls`, `key.json`.

    Attributes:
        kind: "tars".
        path: A pattern, such as `shards/*.tar`. A tar's folder gives the split if it is called like
            one. So do the beginnings of the tars' names, if they name several splits.
    """

    kind: Literal["tars"]
    path: Text


class PairReader(PictureReader):
    """Images with texts beside them, in the format of img2dataset: `00000/000001.jpg` with `.txt`.

    The texts are the same as in tars: `.txt` (caption), `.cls` (label), `.json` (with the keys
    "caption" and "label").

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


FILE_ENDINGS = {
    "csv": (".csv", ".tsv"), "jsonl": (".jsonl",), "parquet": (".parquet",), "tars": (".tar",)
}  # fmt: skip
"""`reader.kind` -> the endings that files outside the manifest's folder must have."""
Reader = Annotated[
    FolderReader | TableReader | TarReader | PairReader | FomoReader, Field(discriminator="kind")
]
READER_OF_KIND: dict[str, type[PictureReader]] = {
    kind: reader
    for reader in get_args(get_args(Reader)[0])
    for kind in get_args(reader.model_fields["kind"].annotation)
}
"""`reader.kind` -> the reader, which defines the other keys."""


class Counts(StrictModel):
    """The number of classes and images that a dataset must have.

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
    """The part of a manifest that all datasets have.

    Attributes:
        title: A one-line description.
        role: "adapt", "eval", "transfer", "pool" or "substitute".
        year: The year in which the dataset, or the one it is modelled on, was first published, used
            by time-incremental streams.
    """

    title: Line
    role: Role
    year: Year | None = None


class FileSet(SetManifest):
    """A dataset of image files: its purpose, and how to read it.

    Attributes:
        name: The dataset's name in results.
        task: By default "classification" if images have labels, and "retrieval" otherwise.
        images: What the images look like.
        prompt: The prompt of the zero-shot classifier, and the caption of images without one.
        licence: The licence of the images.
        reader: The location and layout of the images.
        splits: Split -> share, for images without a given split; the default is in `SPLIT_SHARES`.
            A pool may keep its splits as a former "adapt" dataset: then only its "train" images are
            replayed, and the others are neither trained on nor scored. Without splits, the whole
            pool is replayed.
        update: The update in which the dataset arrives, such as 2026-01, unless its images name
            updates themselves. `stream.order=given` makes each update a task.
        faults: "refuse" the dataset if any of it cannot be used, or "skip" what cannot.
        beside: "embedded" adds the embedded pool and retention sets, for the embedded models.
        counts: The expected counts, if known.
        zero_shot: The published zero-shot score of OpenCLIP's ViT-B/32, in percent.
    """

    name: SetName
    task: Literal["classification", "retrieval"] | None = None
    images: str = ""
    prompt: Prompt = "a photo of a {}"
    licence: Line
    reader: Reader
    splits: dict[Split, Share] = Field(default_factory=dict)
    update: UpdateName | None = None
    faults: Literal["refuse", "skip"] = "refuse"
    beside: Literal["embedded"] | None = None
    counts: Counts | None = None
    zero_shot: Annotated[float, Field(ge=0, le=100)] | None = None

    @pydantic.model_validator(mode="after")
    def _check_splits(self) -> "FileSet":
        if self.splits and abs((total := sum(self.splits.values())) - 1) > 1e-6:
            raise ValueError(f"splits: the shares must sum to 1, not {total:g}")
        alien = set(self.splits) - set(self.allowed_splits())
        if alien and self.role not in POOL_DATA_ROLES:
            allowed = " and ".join(self.allowed_splits())
            raise ValueError(
                f"splits: a held-out dataset cannot have {min(alien)!r}, only {allowed}"
            )
        return self

    def allowed_splits(self) -> list[str]:
        """Return the splits that a dataset with this role may have. Images of other splits are left
        out."""
        return list(SPLIT_SHARES[self.role])

    def find_files(self, root: Path) -> list[Path]:
        """Return the files that match the reader's pattern, sorted.

        Args:
            root: The folder that the pattern starts from, unless it is absolute.

        Raises:
            NoFilesError: There are none.
            CmpError: The path is not that of a regular file, the pattern would search folders
                outside the root, or it matches links that lead out of the root or files outside it
                without the reader's endings.
            OSError: A folder or file cannot be looked at.
        """
        pattern, parts = self.reader.path, Path(self.reader.path).parts
        if "**" in parts and (os.path.isabs(pattern) or ".." in parts):
            raise CmpError(
                f"{self.name}: reader.path: {pattern!r:.80}: ** works only within {root}"
            )
        pattern = os.path.join(glob.escape(str(root)), pattern)
        paths = map(Path, glob.iglob(pattern, recursive=True, include_hidden=True))
        files = sorted(path for path in paths if exists(path) and path.is_file())
        files = [path for path in files if not path.name.startswith(APPLE_DOUBLE)]
        for path in files:
            note_path(path)
        self._note_searched(root, bool(files))
        if not files:
            # glob passes over a disk that fails
            kind = CmpError if exists(os.path.join(root, self.reader.path)) else NoFilesError
            raise kind(f"{self.name}: reader.path: no file matches {pattern:.200}")
        endings, what = FILE_ENDINGS[self.reader.kind], f"{self.name}: reader.path: {pattern:.200}"
        for path in [path for path in files if not is_inside(path, root)]:
            if is_inside(path.parent, root):
                raise CmpError(
                    f"{self.name}: reader.path: {path} is a link out of the manifest's folder; "
                    "copy the file into it"
                )
            if path.suffix.lower() not in endings:  # the message names neither
                raise CmpError(
                    f"{what} matches files outside the manifest's folder that do not match "
                    f"*{endings[0]}; narrow it to files that do"
                )
        return files

    def _note_searched(self, root: Path, has_found: bool) -> None:
        """Note the folders in which the reader's pattern looks, where other files may arrive.

        Raises:
            OSError: One of them cannot be listed, which glob passes over. A lack of permission
                counts only if nothing was found, as disks have folders of the system.
        """
        parts = Path(self.reader.path).parts
        first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        last = len(parts) if parts[-1:] == ("**",) else len(parts) - 1  # ** also looks inside
        for n in range(first, last + 1):
            above = os.path.join(glob.escape(str(root)), *parts[:n])
            matches = glob.iglob(above, recursive=True, include_hidden=True)
            for folder in filter(os.path.isdir, matches):
                note_folder(folder)
                try:
                    with os.scandir(folder) as entries:
                        next(entries, None)
                except PermissionError:
                    if not has_found:
                        raise


def manifest_folders(source: str) -> list[tuple[Path, Path]]:
    """Return the folders of a collection's manifests and data.

    Args:
        source: "fomo", or the path of a folder. The data of "fomo" are in `fomo` in the build
            folder, which may contain more manifests.

    Returns:
        (folder of manifests, folder of data) pairs.

    Raises:
        CmpError: If `source` is neither.
    """
    if source == "fomo":
        data = build_folder() / source
        return [(MANIFESTS / source, data), (data, data)]
    folder = Path(os.path.expanduser(source))
    if not os.path.isdir(folder):  # works for any text
        from cmp.data import named_sources  # imports torch

        if source in (names := named_sources()):
            raise CmpError(
                f"data: {source!r} is not read from manifests; give fomo or a folder of manifests"
            )
        raise CmpError(
            f"data: {source!r:.200} is neither a folder that exists nor one of {', '.join(names)}"
        )
    return [(folder, folder)]


def load_manifests(source: str) -> list[tuple[FileSet, Path]]:
    """Read the manifests of a collection.

    Args:
        source: See `manifest_folders`.

    Returns:
        (manifest, folder that its paths are relative to) pairs, in the order of the files.

    Raises:
        CmpError: There is no manifest, one is faulty, two datasets have the same name, or
            manifests are at two levels.
    """
    for folder, _ in manifest_folders(source):
        refuse_two_levels(find_manifests(folder, "*.yaml"), find_manifests(folder, "*/*.yaml"))
    located: dict[str, tuple[FileSet, Path]] = {}
    for path, data in manifest_files(source):
        dataset = read_manifest(path, FileSet)
        if dataset.name in located:
            raise CmpError(
                f"{path}: name: another dataset is also called {dataset.name!r}; choose another "
                "name"
            )
        located[dataset.name] = (dataset, data)
    if not located:
        raise CmpError(f"{source}: no manifests (*.yaml); write one with {init_command(source)}")
    return list(located.values())


def init_command(folder: str | Path) -> str:
    """Return the command that writes a manifest for a folder, in backquotes."""
    return f"`cmpt data init {shlex.quote(str(folder))}`"


def manifest_files(source: str) -> list[tuple[Path, Path]]:
    """Return the manifests of a collection, each with the folder that its paths start from.

    They are in the collection's folder or, if that has none, each in the folder of its data.

    Args:
        source: See `manifest_folders`.
    """
    files = []
    for folder, data in manifest_folders(source):
        paths = [(path, data) for path in sorted(folder.glob("*.yaml"))]
        files += paths or [(path, path.parent) for path in sorted(folder.glob("*/*.yaml"))]
    return [(path, data) for path, data in files if not path.name.startswith(APPLE_DOUBLE)]


def find_manifests(folder: Path, pattern: str) -> list[Path]:
    """Return the files with the keys of a manifest, valid or not, skipping other YAML files.

    Args:
        folder: The folder.
        pattern: The pattern for files in the folder.
    """
    return sorted(path for path in folder.glob(pattern) if _is_manifest(path))


def _is_manifest(path: Path) -> bool:
    if path.name == "manifest.yaml":  # what is wrong with it is said where it is read
        return True
    with contextlib.suppress(OSError, ValueError):
        text = read_text(path, MAX_YAML_BYTES)
        return all(re.search(rf"\b{key}[\"']?\s*:", text) for key in ("role", "reader"))
    return False


def refuse_two_levels(upper: list[Path], lower: list[Path]) -> None:
    """Raise an error if there are manifests both in a folder and in folders inside it.

    The inner manifests would not be read, and their images would count as classes of the outer
    dataset, so that held-out images would be trained on.

    Args:
        upper: The manifests in the folder.
        lower: The manifests in the inner folders.

    Raises:
        CmpError: There are both.
    """
    if upper and lower:
        raise CmpError(
            f"{upper[0]} and {lower[0]}: the manifests of a collection must be at one level, or "
            "images of the second would count as the first's; give each dataset, with its "
            "manifest, its own folder beside the others"
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
        CmpError: The file cannot be read or does not fit; the message names the first invalid
            key.
    """
    try:
        return schema.model_validate(read_yaml(path))
    except pydantic.ValidationError as error:
        key, fault = first_fault(error)
        known = _known_keys(fault["loc"], schema)
        hint = name_choices(str(fault["loc"][-1]), known, "the keys are") if known else ""
        raise explain_fault(str(path), key.removesuffix(".[key]"), fault, hint) from error


def _known_keys(loc: tuple[Any, ...], schema: type[BaseModel]) -> Collection[str]:
    """Return the valid keys beside an unknown one, if this module knows them."""
    if len(loc) > 2 and loc[0] == "reader":
        known = READER_OF_KIND[loc[1]].model_fields
        return sorted(known, key=PictureReader.model_fields.__contains__)  # its own first
    return schema.model_fields if len(loc) == 1 else ()
