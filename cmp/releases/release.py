"""A release: a folder with everything needed to serve a model, to judge it, and to update it.

It is written once, whole, and never changed. Only `slim` removes what only a further update
needs.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.tokenizer import HFTokenizer
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file

from cmp import config, models, starts
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.errors import CmpError, check_line, explain_errors
from cmp.files import SHORT_ID, file_digest
from cmp.parsing import parse_record, read_json, read_table, refuse_later
from cmp.readers.manifest import Prompt
from cmp.releases import arrivals
from cmp.releases import ledger as ledgers
from cmp.releases.ledger import Arrival, Ledger, checked_ledger
from cmp.runs import checkpoints
from cmp.runs.checkpoints import Progress, RunState
from cmp.runs.identity import json_digest
from cmp.starts import RECORD_FILE
from cmp.starts import RELEASE_REMEDY as REMEDY
from cmp.values import STRICT, NotNegative, Steps

SCHEMA = 1
WEIGHTS_FILE, CONFIG_FILE = HF_SAFE_WEIGHTS_NAME, HF_CONFIG_NAME
CARD_FILE, REPORT_FILE = "README.md", "report.html"
SCORES_FILE, MATRIX_FILE, HITS_FILE = "scores.parquet", "matrix.parquet", "hits.safetensors"
LOG_FILE = "log.jsonl"
LEDGER_FILE, START_FILE = "state/pictures.parquet", "state/start.safetensors"
SLIMMED_FILE = "state/slimmed"
"""An empty file that `slim` leaves, so that what it removed is not taken for lost."""
RECORD_ERRORS = LookupError, TypeError
"""Errors of a record or a table with other keys or types, besides `ValueError`."""


@checked_dataclass(frozen=True, config=STRICT)
class UpdateRecord:
    """One update of a stream.

    Attributes:
        name: Its name.
        id: Its id.
        steps: The number of training steps.
        counts: Samples per batch from the pretraining pool, the update and the buffer.
        peak: The highest learning rate.
        images: The number of its training images.
        seconds: The computing time.
        is_peak_given: Whether its settings gave the peak, which otherwise is the recipe's or that
            of the previous update.
    """

    name: Annotated[str, AfterValidator(check_line)]
    id: str
    steps: Steps
    counts: tuple[Steps, Steps, Steps]
    peak: NotNegative
    images: Steps
    seconds: NotNegative
    is_peak_given: bool = False


@checked_dataclass(frozen=True, config=STRICT)
class ReleaseRecord:
    """The content of stream.json.

    Attributes:
        schema: The version of the format.
        id: The id of the last update, which is the release's.
        parent: The id of the release that it started from, or "" for the first.
        config: The config, as a tree.
        updates: All updates so far.
        arrivals: All folders of images so far.
        provenance: The machine that computed the update.
        state: The file of the state.
        prompt: The prompt for sets whose manifest has none.
        files: The sha256 of each file of the release.
    """

    schema: Literal[SCHEMA]
    id: str
    parent: str
    config: dict[str, Any]
    updates: Annotated[tuple[UpdateRecord, ...], Field(min_length=1)]
    arrivals: tuple[Arrival, ...]
    provenance: dict[str, Any]
    state: str
    prompt: Prompt = starts.USUAL_PROMPT
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Release:
    """A release on disk. It can be used as a path to its folder.

    Attributes:
        folder: Its folder.
        record: The content of its stream.json.
        config: The config of its stream.

    Example:
        >>> cmp.read_release("releases/2026-02").record.updates[-1].name  # doctest: +SKIP
        '2026-02'
    """

    folder: Path
    record: ReleaseRecord
    config: RunConfig

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def path(self, name: str) -> Path:
        """Return the path of a file of the release, after checking its hash.

        Raises:
            CmpError: It is missing or damaged.
        """
        path = self.folder / name
        if name not in self.record.files:
            raise CmpError(f"{self.folder / RECORD_FILE}: files: lacks {name}; copy it again")
        if not path.is_file():
            again = "repeat the update that made this release with another -o"
            if name not in self.slimmable():
                why = "copy the release again"
            elif self.is_slimmed:
                why = f"`cmpt release slim` removed it, so no update can start from here; {again}"
            else:
                why = f"slimmed, or not copied whole: copy the release again, or {again}"
            raise CmpError(f"{path}: is missing; {why}")
        starts.check_recorded(path)
        return path

    def find_faults(self) -> dict[str, str]:
        """Return why files are missing or damaged, by their names. Those that `cmpt release slim`
        removed are not missing."""
        removed, faults = self.slimmable() if self.is_slimmed else (), {}
        for name in self.record.files:
            if name not in removed or (self.folder / name).exists():
                try:
                    self.path(name)
                except CmpError as error:
                    faults[name] = str(error)
        return faults

    def slimmable(self) -> tuple[str, str]:
        """Return the files that only a further update needs."""
        return self.record.state, START_FILE

    @property
    def is_slimmed(self) -> bool:
        """Whether `cmpt release slim` removed these files."""
        return (self.folder / SLIMMED_FILE).exists()

    @property
    def has_state(self) -> bool:
        """Whether these files are there, so that an update can start from the release."""
        return all((self.folder / name).exists() for name in self.slimmable())

    def ledger(self) -> Ledger:
        """Return the images that have arrived so far.

        Raises:
            CmpError: Their table or the record of their folders is damaged.
        """
        path = self.path(LEDGER_FILE)
        with explain_errors(f"{path}: cannot be read", REMEDY, *RECORD_ERRORS):
            return checked_ledger(self.record.arrivals, read_table(path, ledgers.COLUMNS))

    def corpus(self, skip_gone: bool = False, moved: Mapping[str, str] | None = None) -> Corpus:
        """Return the data so far: the images of all updates, the pool, and the retention sets.

        Args:
            skip_gone: Whether to leave out images that are gone or have changed.
            moved: Old folder -> new folder, for images that have moved.

        Raises:
            CmpError: Images are gone or have changed, and `skip_gone` is not set.
        """
        ledger, parts, _ = arrivals.locate(ledgers.move(self.ledger(), moved or {}), skip_gone)
        return arrivals.corpus_of(ledger, parts)

    def progress(self) -> Progress:
        """Return the state without its tensors, after checking the hash of the whole file."""
        path = self.path(self.record.state)
        progress = checkpoints.read_progress(path)
        if (progress.task, progress.step) != (len(self.record.updates), 0):
            raise CmpError(
                f"{path}: is not a state after {len(self.record.updates)} updates{REMEDY}"
            )
        return progress

    def state(self) -> RunState:
        """Return the state that the next update starts from, after checking its hash."""
        path = self.path(self.record.state)
        with explain_errors(f"{path}: cannot be read as a checkpoint", "", SafetensorError):
            return RunState(checkpoints.read_progress(path), load_file(path))


def is_release(folder: Path) -> bool:
    """Return whether a folder contains a release."""
    return (folder / RECORD_FILE).is_file()


def refuse_inside(path: Path, named: str) -> None:
    """Raise `CmpError` if a path is inside a release, which is never changed.

    Args:
        path: The path of an output.
        named: What a user calls it, for the message.
    """
    above = *path.absolute().parents, *path.resolve().parents  # also through a link
    if made := next(filter(is_release, above), None):
        raise CmpError(
            f"{named}: is inside the release {made}, which is never changed; give a path outside it"
        )


def read_release(folder: str | os.PathLike[str]) -> Release:
    """Return the release in a folder.

    Args:
        folder: The folder.

    Raises:
        CmpError: It contains no release, its record is damaged, or a later version wrote it.

    Example:
        >>> release = cmp.read_release("releases/2026-02")  # doctest: +SKIP
        >>> release.record.updates[-1].name  # doctest: +SKIP
        '2026-02'
    """
    folder = Path(os.path.expanduser(folder))
    if not is_release(folder):
        raise CmpError(f"{folder}: not a release, since it contains no {RECORD_FILE}")
    path = folder / RECORD_FILE
    with explain_errors(f"{path}: cannot be read", REMEDY, *RECORD_ERRORS):
        tree = read_json(path)
        if json_digest(tree["record"]) != tree["sha256"]:
            raise CmpError(f"{path}: damaged: its content is not what was written")
        refuse_later(tree["record"], "schema", SCHEMA, path)
        record = parse_record(json.dumps(tree["record"]), ReleaseRecord)
        _check_names(record)
    return Release(folder, record, config.parse(record.config, str(path)))


def _check_names(record: ReleaseRecord) -> None:
    """Raise `ValueError` if the record names a file outside its folder, which `slim` could delete,
    or a state that is not the release's."""
    for name in record.files:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/"):
            raise ValueError(f"files: {name!r}: must be a path inside the release")
    is_state = re.fullmatch(r"state/task-[\w-]+\.safetensors", record.state)
    if record.state not in record.files or not is_state:
        raise ValueError(f"state: {record.state!r}: is not the file of a state")


def write_record(folder: Path, record: ReleaseRecord) -> None:
    """Write stream.json into a folder, with the hashes of all other files in it."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    digests = {str(path.relative_to(folder)): file_digest(path) for path in paths}
    tree = json.loads(json.dumps(asdict(record) | {"files": digests}))
    text = json.dumps({"sha256": json_digest(tree), "record": tree}, indent=1)
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def write_ledger(ledger: Ledger, path: Path) -> None:
    """Write the images of a ledger as a table."""
    kinds = {int: pa.int64(), str: pa.string(), list: pa.list_(pa.string())}
    schema = pa.schema([(name, kinds[kind]) for name, kind in ledgers.COLUMNS.items()])
    table = pa.Table.from_pandas(ledger.pictures, schema, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path)


def write_served_model(model: models.Network, name: str, folder: Path) -> None:
    """Write a network, its config and its tokenizer so that open_clip loads them as
    `local-dir:FOLDER`.

    Args:
        model: The network.
        name: Its name.
        folder: The folder to write into.
    """
    about = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": asdict(models.preprocessing(model)),
    }
    models.export_weights(model, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    tokenizer = models.tokenizer(name)
    if isinstance(tokenizer, HFTokenizer):  # open_clip looks for its files in the folder
        tokenizer.save_pretrained(folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file to a second path, or copy it; of a link, the file that it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def slim(folder: str | Path) -> int:
    """Remove the weights and moments that only a further update needs, keeping the ledger.

    Args:
        folder: The release.

    Returns:
        The number of bytes freed.
    """
    release = read_release(folder)
    paths = [release.folder / name for name in release.slimmable()]
    for path in paths:
        if not path.parent.resolve().is_relative_to(release.folder.resolve()):
            raise CmpError(
                f"{path.parent}: is a link to another folder, in which nothing is deleted; "
                "put the release's own folder in its place"
            )
    # releases of one stream may share a file by hard links; then deleting one link frees nothing
    stats = [path.stat() for path in paths if path.exists()]
    freed = sum(stat.st_size for stat in stats if stat.st_nlink == 1)
    if stats:
        with contextlib.suppress(OSError):  # it is there already, or the disk is full
            (release.folder / SLIMMED_FILE).touch(exist_ok=False)
    for path in paths:
        path.unlink(missing_ok=True)
    return freed


def releases_beside(release: Release) -> list[Release]:
    """Return the other releases in the folder above a release, without those that are damaged."""
    beside = []
    for folder in sorted(release.folder.absolute().parent.glob("*/")):
        with contextlib.suppress(CmpError, OSError):
            if is_release(folder) and not folder.samefile(release.folder):
                beside.append(read_release(folder))
    return beside


def describe(release: Release) -> str:
    """Return a line on a release."""
    last = release.record.updates[-1]
    return (
        f"release {release.record.id[:SHORT_ID]}: update {len(release.record.updates)}, {last.name}"
    )
