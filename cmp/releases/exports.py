"""The shared part of exports to other libraries' formats. An export is compared with the network,
and its folder is only written if both give the same features."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from cmp import models, starts
from cmp.errors import CmpError
from cmp.files import atomic_folder, check_target, file_digest
from cmp.models import Network
from cmp.parsing import read_json
from cmp.seeds import torch_generator

TOLERANCE = 1e-5
"""The largest accepted difference in any entry of a feature, a unit vector in fp32."""
TEXTS = (
    "", "a cat", "A photo of two Dogs, running!", "the shop's 3 red shoes (size 42)",
    "Straße in München, 1987", "猫の写真", "an octopus 🐙", "a very long description of " * 30,
)  # fmt: skip
"""Texts whose features are compared: empty, in capitals, in other scripts, and longer than any
tower accepts."""
PICTURES = 8
EXPORT_FILE = "export.json"
"""The file in each export with the sha256 of the others, by which a later export knows them."""


@dataclass(frozen=True)
class Probe:
    """Images and texts, and their features by the network.

    Attributes:
        pixels: Normalised images, [8, 3, S, S].
        tokens: Tokens of `TEXTS`, [8, L].
        image_features: Unit features of the images, [8, E].
        text_features: Unit features of the texts, [8, E].
    """

    pixels: Tensor
    tokens: Tensor
    image_features: Tensor
    text_features: Tensor


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        differences: The largest difference from the network's features, of images and of texts.
        loading: Lines of Python that load it.
        notes: Sentences on what is missing in it, or works differently than in open_clip.
    """

    differences: tuple[float, float]
    loading: str
    notes: list[str]


@torch.no_grad()
def make_probe(name: str, model: Network) -> Probe:
    """Return the images and texts whose features are compared, the same every time.

    Args:
        name: The model's name, which determines its tokenizer.
        model: Its network, in evaluation mode and on the CPU.
    """
    generator, side = torch_generator("export", 0), models.preprocessing(model).size
    fine = torch.randn(PICTURES // 2, 3, side, side, generator=generator)
    coarse = torch.randn(PICTURES - len(fine), 3, 4, 4, generator=generator)
    pixels = torch.cat([fine, F.interpolate(coarse, side, mode="bilinear")])
    with starts.quiet_logging():
        tokens = models.tokenizer(name)([*TEXTS])
    features = models.encode_image(model, pixels), models.encode_text(model, tokens)
    return Probe(pixels, tokens, *features)


def text_tower(model: Network) -> Any:
    """Return a network's text tower: a part of it, or the network itself if it is a CLIP."""
    return getattr(model, "text", model)


def compare_features(probe: Probe, image: Tensor, text: Tensor, what: str) -> tuple[float, float]:
    """Return the largest differences in the features of images and of texts.

    Args:
        probe: The network's features.
        image: The other format's features of the images, [8, E].
        text: Its features of the texts, [8, E].
        what: The format, for the error.

    Raises:
        CmpError: One of them is above `TOLERANCE`.
    """
    pairs = (image, probe.image_features), (text, probe.text_features)
    for found, expected in pairs:
        if found.shape != expected.shape:
            raise CmpError(
                f"{what}: features have shape {[*found.shape]}, but the network's have "
                f"{[*expected.shape]}; nothing was written"
            )
    image_difference, text_difference = ((x - y).abs().max().item() for x, y in pairs)
    if not max(image_difference, text_difference) <= TOLERANCE:  # NaN is refused, too
        raise CmpError(
            f"{what}: features differ from the network's by {image_difference:.1g} (images) and "
            f"{text_difference:.1g} (texts), more than {TOLERANCE:g}; nothing was written"
        )
    return image_difference, text_difference


@contextlib.contextmanager
def export_folder(folder: Path, names: set[str]) -> Iterator[Path]:
    """Write the folder of an export, whole or not at all, with the sha256 of its files.

    Args:
        folder: The folder; an earlier export in it is replaced.
        names: The files that an export may have, besides `EXPORT_FILE`.

    Yields:
        An empty folder to fill, see `cmp.files.atomic_folder`.

    Raises:
        CmpError: The folder contains other files, files of these names that no export wrote, or
            files that have changed since; or it cannot be written.
    """
    check_folder(folder, names)
    with atomic_folder(folder) as partial:
        yield partial
        record = partial / EXPORT_FILE
        tree = read_json(record) if record.exists() else {}
        files = {path.name: file_digest(path) for path in partial.iterdir() if path != record}
        write_json(record, tree | {"files": files})
        check_folder(folder, names)  # files may have been added meanwhile


def check_file(file: Path) -> None:
    """Check that an export as a file replaces nothing but an earlier one.

    Args:
        file: The file of weights.

    Raises:
        CmpError: It exists, and no export wrote it, or a program has saved it again since.
    """
    check_target(file)
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as weights:
        # only what `export_weights` writes: other programs leave it out or add to it
        if {*(weights.metadata() or {})} == {models.PREPROCESSING}:
            return
    if file.exists():
        raise CmpError(
            f"{file}: has changed since `cmpt export`, or is not from it, and would be lost; name "
            "another file"
        )


def check_folder(folder: Path, names: set[str]) -> None:
    """Check that an export as a folder replaces nothing but an earlier one.

    Args:
        folder: The folder.
        names: As for `export_folder`.

    Raises:
        CmpError: The folder contains something that no export wrote, or that has changed since,
            such as a model that was trained further and saved in its place.
    """
    record, written = folder / EXPORT_FILE, {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no export wrote it
        listed = dict(read_json(record)["files"])
        written = {name: digest for name, digest in listed.items() if name in names}
        written[EXPORT_FILE] = file_digest(record)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_file = path.is_file() and not path.is_symlink()
        is_written = is_file and written.get(path.name) == file_digest(path)
        if not is_written and path.name != ".DS_Store":  # which a Mac adds to a folder
            raise CmpError(
                f"{folder}: {path.name!r} has changed since `cmpt export`, or is not from it, and "
                "would be lost; name a new folder"
            )


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a tree as indented JSON."""
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
