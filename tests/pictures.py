"""Small image files for tests, and manifests of them."""

import io
import tarfile
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from cmp.readers.manifest import FileSet


def picture(seed: int = 0, size=(48, 40), kind="PNG", mode="RGB") -> bytes:
    """A file of smooth colours, another for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse, mode).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def tree(root: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def classes(root: Path, names=("red fox", "snow_goose", "oak"), each=6, prefix="") -> Path:
    """One folder per class with a few pictures, equal where their paths are."""
    paths = [f"{prefix}{name}/{number}.png" for name in names for number in range(each)]
    return tree(root, {path: picture(crc32(path.encode())) for path in paths})


def tar(path: Path, members: list, mode="w") -> Path:
    """A tar of (name, content) or of whole `TarInfo`s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for each in members:
            if isinstance(each, tarfile.TarInfo):
                archive.addfile(each)
                continue
            info = tarfile.TarInfo(each[0])
            info.size = len(each[1])
            archive.addfile(info, io.BytesIO(each[1]))
    return path


def fileset(kind="folder", name="mine", **other) -> FileSet:
    """A manifest of ten lines or less; keys of its reader in `reader`."""
    reader = {"kind": kind} | other.pop("reader", {})
    about = {"name": name, "title": "Mine", "role": "adapt", "licence": "own", "reader": reader}
    return FileSet.model_validate(about | other)


def write_manifest(path: Path, kind="folder", **other) -> Path:
    """Write a manifest, see `fileset`, and return its folder."""
    text = fileset(kind, **other).model_dump_json(exclude_none=True)
    return tree(path.parent, {path.name: text.encode()})
