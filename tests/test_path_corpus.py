"""Names and paths that would lead out of their folders: refused, or shown to stay inside."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from pictures import tar
from pydantic import ValidationError

from benchmark import packages, pretraining
from cmp import config, files, models, starts
from cmp.config import read_config
from cmp.embedded import sheets
from cmp.embedded.manifest import Dataset, Package, embedded_manifests, select_datasets
from cmp.embedded.models import WEIGHTS
from cmp.errors import CmpError
from cmp.files import (
    PARTIAL_PREFIX,
    atomic_file,
    atomic_folder,
    delete_leftovers,
    make_folder,
    partial_folder,
)
from cmp.runs import checkpoints, identity, lookup, store
from cmp.runs.lookup import unfinished_runs
from cmp.runs.runner import Observer, RunResult
from lab import chapters, run
from lab.evidence import results, studies

OUTSIDE = [
    *("../outside/secret", "../../outside/secret", "..", ".", "", "/", "/etc/passwd", "~", "~root"),
    *("./secret", "a/../../outside/secret", "..\\outside\\secret", "\\\\host\\share", "C:\\x"),
    *("a\0b", "\0", "secret\0.yaml", "a" * 300, "é/../..", "\u2024\u2024/x", "\uff0e\uff0e/x"),
    *("*", "[0-9a-f]*", "?", "**", "{a,b}", "$HOME", "$(id)", "a\nb", "-rf", "secret\n", " "),
]
IDS = [repr(name)[:24] for name in OUTSIDE]
PATHS = [name for name in OUTSIDE if not name.isalnum()]  # an id that is only long is cut short


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folders of the test's own; what lies in `outside` must be neither read nor changed."""
    outside = tmp_path / "outside"
    for folder in (outside, tmp_path / "build", tmp_path / "studies", tmp_path / "results"):
        folder.mkdir()
    (outside / "secret").write_text("secret")
    (outside / "secret.yaml").write_text("secret: 1")
    (outside / "secret.parquet").write_bytes(b"secret")
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(studies, "STUDIES", tmp_path / "studies")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """The paths that Python opens while a test runs."""
    found: list[str] = []
    real = io.open

    def spy(file, *arguments, **options):
        found.append(os.fspath(file) if isinstance(file, str | Path) else "")
        return real(file, *arguments, **options)

    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr("builtins.open", spy)
    return found


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", PATHS, ids=ascii)
@pytest.mark.parametrize("read", [studies.load_study, results.published_metrics, store.load_run])
def test_a_name_that_is_a_path_is_refused_before_anything_is_opened(place, opened, read, name):
    with pytest.raises(CmpError, match="not a valid name"):
        read(name)
    assert opened == []


def test_a_name_that_is_a_name_is_looked_for(place):
    for read, file in (
        (studies.load_study, "ies/77.yaml"),
        (results.published_metrics, "s/77.par"),
    ):
        with pytest.raises(CmpError, match="not a valid name"):
            read("7" * 300)
        with pytest.raises(CmpError, match=re.escape(file)):
            read("77")
    with pytest.raises(CmpError):
        store.load_run("7" * 300)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name], ids=ascii)
@pytest.mark.parametrize(
    "find", [lookup.find_run, lookup.find_any_run, lambda x: chapters.select([x])]
)
def test_what_no_id_begins_with_is_not_found(place, find, name):
    keep_checkpoint(OTHER_ID)
    keep_run(place)
    with pytest.raises(CmpError):
        find(name)


def test_the_empty_beginning_finds_only_what_is_alone(place):
    keep_run(place)
    assert lookup.find_run("").id == lookup.find_any_run("").id == RUN_ID
    keep_checkpoint(OTHER_ID)
    with pytest.raises(CmpError, match="several runs"):
        lookup.find_any_run("")


def test_what_is_unfinished_is_told_without_reading_its_tensors(place, monkeypatch):
    read = []
    keep_checkpoint(RUN_ID)
    keep_checkpoint(OTHER_ID)
    monkeypatch.setattr(checkpoints, "load_file", lambda path: pytest.fail("read tensors"))
    monkeypatch.setattr(files, "file_digest", lambda path: pytest.fail("read tensors"))
    assert {progress.run for progress in unfinished_runs()} == {RUN_ID, OTHER_ID}
    keep = checkpoints.read_progress
    monkeypatch.setattr(
        checkpoints, "read_progress", lambda path: read.append(path.parent.name) or keep(path)
    )
    assert lookup.find_any_run(OTHER_ID[:4]).id == OTHER_ID
    assert read == [OTHER_ID[:12]]


def test_all_of_an_id_counts(place):
    keep_run(place)
    assert lookup.find_run(RUN_ID[:16]).id == RUN_ID
    with pytest.raises(CmpError, match="no stored run"):
        lookup.find_run(RUN_ID[:12] + "ffff")


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_checkpoints_are_kept_under_a_name_only(place, name):
    with pytest.raises(CmpError, match="not a valid name"), checkpoints.CheckpointManager(name):
        pass
    assert content_of(place / "build") == {}


RUN_CONFIG = config.parse(config.PROFILES["quick"])
IDENTITY = {"config": RUN_CONFIG.changes()}
RUN_ID = identity.json_digest(IDENTITY)
ROW = {"task": 0, "scope": "full", "dataset": "shapes", "role": "eval", "score": 1.0}
OTHER_ID = "fedcba987654" + "0" * 52


def keep_run(place: Path) -> str:
    """A stored run of id `RUN_ID`."""
    result = RunResult(
        pd.DataFrame([ROW]), torch.nn.Linear(1, 1), 1.0, {"threads": 1, "torch": "2"}
    )
    store.save_run(store.make_stored_run(RUN_CONFIG, result, IDENTITY))
    return RUN_ID


def first_state(run_id: str) -> checkpoints.RunState:
    """What a run saves before its first step."""
    about = RUN_CONFIG.to_dict(), 0, 0, [ROW], 0.0, {"threads": 1}
    progress = checkpoints.Progress(checkpoints.SCHEMA, run_id, *about)
    return checkpoints.RunState(progress, {"weights/a": torch.zeros(1)})


def keep_checkpoint(run_id: str) -> Path:
    """A checkpoint of an unfinished run."""
    folder = checkpoints.run_folder(run_id)
    return checkpoints.write_checkpoint(first_state(run_id), folder)


def test_checkpoints_behind_a_link_are_neither_written_nor_deleted(place):
    (place / "build" / "runs").mkdir()
    (place / "build" / "runs" / "abc").symlink_to(place / "outside")
    before = content_of(place / "outside")
    with pytest.raises(CmpError, match="link"), checkpoints.CheckpointManager("abc"):
        pass
    assert content_of(place / "outside") == before


@pytest.mark.defect
def test_what_is_no_checkpoint_is_left_alone(place):
    with checkpoints.CheckpointManager("abc") as manager:
        other = manager.folder / "other"
        other.mkdir()
        (manager.folder / "link").symlink_to(place / "outside" / "secret")
        manager.save(first_state("abc"))
        assert other.is_dir()
        assert (manager.folder / "link").is_symlink()
        manager.folder.joinpath("link").unlink()
        manager.remove()
        assert [*manager.folder.iterdir()] == [other]
    assert (place / "outside" / "secret").read_text() == "secret"


def write(whole, target: Path) -> None:
    """Write something through one of the two that write whole or not at all."""
    with whole(target) as partial:
        (partial / "x" if partial.is_dir() else partial).write_text("new")


def test_a_file_system_that_cannot_flush_folders_is_written_to(tmp_path, monkeypatch):
    """Such as a folder that VirtualBox shares; a file that cannot be flushed is still an error."""
    flush = os.fsync

    def refuse(handle):
        if refused(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    refused = stat.S_ISDIR
    files.write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    refused = stat.S_ISREG
    with pytest.raises(CmpError, match="nothing was changed"):
        files.write_atomic(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("whole", [atomic_folder, atomic_file])
def test_writing_over_a_link_changes_nothing_behind_it(place, whole):
    before = content_of(place / "outside")
    target = place / "link"
    target.symlink_to(place / "outside")
    try:
        write(whole, target)
    except CmpError as error:
        assert str(target) in str(error)
    assert content_of(place / "outside") == before
    assert [path for path in place.iterdir() if path.name.startswith(".")] == []


THINGS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to a file": lambda path: path.symlink_to(path.parent / "outside" / "secret"),
}


@pytest.mark.parametrize("kind", THINGS)
def test_only_a_file_is_replaced_by_a_file(place, kind):
    target, before = place / "target", content_of(place / "outside")
    try:
        THINGS[kind](target)
    except PermissionError:
        pytest.skip("only root makes devices")
    status = os.lstat(target)
    with pytest.raises(CmpError, match=f"{target}: already exists as a link, a folder, a device"):
        write(atomic_file, target)
    if kind != "folder":
        with pytest.raises(CmpError, match=str(target)):
            write(atomic_folder, target)
    assert os.path.samestat(os.lstat(target), status)
    assert content_of(place / "outside") == before
    assert list(place.glob(".*")) == []


def test_a_file_is_replaced_and_the_longest_name_can_be_written(place):
    for target in (place / "target", place / ("a" * 255)):
        for _ in range(2):
            write(atomic_file, target)
        assert target.read_text() == "new"
    write(atomic_folder, place / "folder")
    write(atomic_folder, place / "folder")
    assert content_of(place / "folder") == {"x": b"new"}


@pytest.mark.parametrize("whole", [atomic_folder, atomic_file])
def test_a_file_that_is_missing_where_it_is_read_is_named(place, whole):
    target, missing = place / "target", place / "no-such-image.jpg"
    words = f"^{target}: cannot be written .*{missing}.*; nothing was changed"
    for read in (missing.read_bytes, missing.stat, lambda: shutil.copy(missing, place / "copy")):
        with pytest.raises(CmpError, match=words), whole(target):
            read()
    with pytest.raises(CmpError, match=f"^{target}: cannot be written"), whole(target) as partial:
        (partial / "none" / "x").write_text("new")
    for names in ((), ("read", None, str(target))):
        with pytest.raises(CmpError, match=f"^{target}: cannot be written"), whole(target):
            raise OSError(errno.ENOSPC, "No space left on device", *names)
    assert not target.exists() and list(place.glob(".*")) == []


def test_what_a_killed_process_left_is_deleted_and_what_another_writes_is_not(place):
    left = place / f"{PARTIAL_PREFIX}left"
    left.mkdir()
    (left / "weights").write_text("half")
    with partial_folder(place) as busy:
        assert not left.exists()
        (busy / "x").write_text("being written")
        write(atomic_file, place / "one")
        write(atomic_folder, place / "two")
        delete_leftovers(place)
        assert content_of(busy) == {"x": b"being written"}
    delete_leftovers(place)
    assert list(place.glob(".*")) == []


class Killed(BaseException):
    """After it nothing is tidied up."""


def die_after(rename, name):
    """`os.rename` of a process that is killed once it has renamed what has this name."""

    def renaming(source, target):
        rename(source, target)
        if source.name == name:
            raise Killed

    return renaming


@pytest.mark.parametrize("renamed", ["folder", "new"])
def test_a_folder_outlives_a_kill_while_it_is_replaced(place, renamed):
    target = place / "folder"
    write(atomic_folder, target)
    (target / "x").write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(files.os, "rename", die_after(files.os.rename, renamed))
        with pytest.raises(Killed):
            write(atomic_folder, target)
    assert target.exists() == (renamed == "new")
    delete_leftovers(place)
    assert content_of(target) == {"x": b"old" if renamed == "folder" else b"new"}
    assert list(place.glob(".*")) == []


def test_a_folder_that_was_replaced_and_then_deleted_does_not_come_back(place):
    left = place / f"{PARTIAL_PREFIX}left" / "previous" / "folder"
    left.mkdir(parents=True)
    delete_leftovers(place)
    assert not (place / "folder").exists() and list(place.glob(".*")) == []


@pytest.mark.parametrize("name", OUTSIDE, ids=IDS)
def test_a_models_name_is_a_name(place, opened, name):
    starts.family_names()  # reads the installed packages' entry points, the first time
    opened.clear()
    setting = f"model.name={json.dumps(name)}"
    with pytest.raises(CmpError, match=r"model\.name"):
        config.parse(config.override(config.profile("quick"), [setting]))
    with pytest.raises(CmpError):
        pretraining.pretraining_config(name, 0)
    with pytest.raises(CmpError, match="not an open_clip model"):
        models.create_model(name)
    assert [path for path in opened if not path.startswith(str(WEIGHTS.parent))] == []


def test_every_architecture_has_a_name_that_a_config_takes():
    for name in models.open_clip.list_models():
        assert config.parse({"model": {"name": name}}).model.name == name


@pytest.mark.parametrize("name", OUTSIDE, ids=IDS)
def test_a_datasets_name_is_a_name(place, name):
    tree = embedded_manifests()["shapes"].model_dump(mode="json")
    with pytest.raises(CmpError):
        select_datasets([name])
    for key, value in (("name", name), ("sources", [name])):
        with pytest.raises(ValidationError) as error:
            Dataset.model_validate(tree | {key: value})
        assert error.value.errors()[0]["loc"][0] == key


@pytest.mark.parametrize("name", OUTSIDE, ids=IDS)
def test_an_archive_lies_in_the_packages_folder(place, name):
    tree = {
        "registry": "npm", "package": "x", "version": "1", "sha256": "0" * 64,
        "licence": "MIT", "attribution": "somebody", "url": "somewhere",
    }  # fmt: skip
    with contextlib.suppress(ValidationError):  # such a name is refused, or lies there
        package = Package.model_validate(tree | {"file": name})
        inside = (place / "build" / "packages").resolve()
        assert packages.cache_path(package).resolve().parent == inside


@pytest.mark.parametrize("name", OUTSIDE, ids=IDS)
def test_configs_weights_and_cards_that_are_no_files_are_refused(place, monkeypatch, name):
    monkeypatch.chdir(place / "build")
    for path in (f"{name}.yaml", f"{name}/x.yaml", name):
        with pytest.raises(CmpError):
            read_config(path, [])
    with pytest.raises(CmpError):
        models.load_from_file("tiny", Path(name))
    with pytest.raises(CmpError):
        pretraining.read_card(Path(name))
    assert run.run_record(Path(name)) == {}


NOWHERE = ["\0", "a\0b", "a" * 300, "file/x", "/proc/nothing/x", "/dev/null/x", "file/../x"]


@pytest.fixture
def nowhere(place, monkeypatch):
    """In a folder where `file` is a file, so that nothing can lie below it."""
    monkeypatch.chdir(place / "build")
    Path("file").write_text("as it was")
    return place


@pytest.mark.parametrize("name", NOWHERE, ids=ascii)
def test_where_nothing_can_be_written_is_said(nowhere, name):
    with pytest.raises(CmpError):
        make_folder(Path(name))
    for whole in (atomic_file, atomic_folder):
        with pytest.raises(CmpError):
            write(whole, Path(name))
    assert content_of(nowhere / "build") == {"file": b"as it was"}


@pytest.mark.parametrize("name", NOWHERE, ids=ascii)
def test_models_and_sheets_that_cannot_be_written_are_refused(nowhere, monkeypatch, corpus, name):
    """A model before anything is computed."""
    monkeypatch.setattr(pretraining, "execute", lambda *_, **__: pytest.fail("computed"))
    run_config = pretraining.pretraining_config("tiny", 0)
    with pytest.raises(CmpError):
        pretraining.pretrain(run_config, corpus, Path(name), Observer())
    rows = corpus.rows("test", dataset="shapes")[:4]
    some = {"table": corpus.table.iloc[rows], "images": corpus.images[rows].numpy()}
    with pytest.raises(CmpError):
        sheets.contact_sheet(SimpleNamespace(dataset=corpus.datasets["shapes"], **some), Path(name))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archives_names_are_only_names(place, monkeypatch, kind):
    monkeypatch.chdir(place / "build")
    archive = place / "outside" / "x"
    members = [name for name in OUTSIDE if name and "\0" not in name]
    if kind == "tar":
        tar(archive, [(name, b"content") for name in members], "w:gz")
    else:
        with zipfile.ZipFile(archive, "w") as target:
            for name in members:
                if not name.endswith("/"):
                    target.writestr(name, b"content")
    before = content_of(place)
    found = dict(packages.archive_members(archive))
    assert found["../outside/secret"] == b"content"
    assert content_of(place) == before


def test_an_archives_links_and_devices_are_left_out(place):
    members: list = [("package/file", b"")]
    for kind in (
        tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE,
    ):  # fmt: skip
        info = tarfile.TarInfo(f"package/{len(members)}")
        info.type, info.linkname = kind, "../outside/secret"
        members.append(info)
    archive = tar(place / "x.tgz", members, "w:gz")
    assert dict(packages.archive_members(archive)) == {"package/file": b""}


def test_a_link_in_a_zip_is_its_text(place):
    archive = place / "x.whl"
    with zipfile.ZipFile(archive, "w") as target:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        target.writestr(info, str(place / "outside" / "secret"))
    assert packages.archive_member(archive, "link") == str(place / "outside" / "secret").encode()
