"""Datasets side by side, packed in memory or in their files: what training draws from and
evaluation looks at."""

import functools
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cmp import distributed
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.registry import plugins


class DatasetInfo(Protocol):
    """What the core asks of a dataset's manifest. role: "adapt", "eval", "transfer" or one of
    `POOL_DATA_ROLES`; task: "classification" or "retrieval"; prompt: of the zero-shot classifier,
    with one {}; year: in which the dataset came out."""

    name: str
    role: str
    task: str
    prompt: str
    year: int | None


class ImageFiles(Protocol):
    """Images that are decoded when they are asked for, as uint8 [B, 3, side, side]."""

    def at(self, side: int) -> "ImageFiles":
        """The same images; what indexing gives is of this side."""

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        """The middle of each image."""

    def random_crops(
        self, rows: np.ndarray, side: int, generator: np.random.Generator, local: slice
    ) -> Tensor:
        """A random part of each image of a batch, of those that `local` chooses."""


@dataclass(frozen=True)
class Corpus:
    """All images of some datasets.

    images: uint8 [N, 4, H, W], RGBA; or, of files, what gives uint8 [B, 3, side, side].
    table: a row an image: `dataset`, `split`, `label` (a class name), `group`.
    texts: the distinct captions; `caption_ids[caption_starts[i]:caption_starts[i + 1]]` are image
        i's captions as positions in `texts`.
    datasets: the manifests by name; classes: each dataset's class names in label order.
    hashes: dataset -> sha256 of its pixels and table; of files, of their names, sizes and texts.
    """

    images: Tensor | ImageFiles
    table: pd.DataFrame
    texts: list[str]
    caption_ids: np.ndarray
    caption_starts: np.ndarray
    datasets: dict[str, DatasetInfo]
    classes: dict[str, list[str]]
    hashes: dict[str, str]

    @property
    def in_files(self) -> bool:
        """Whether images are decoded when they are asked for."""
        return not isinstance(self.images, Tensor)

    def check_side(self, side: int, model: str) -> None:
        """`CmpError` if the images are of one size, and that is another than the model takes."""
        if not self.in_files and side not in self.images.shape[2:]:
            raise CmpError(
                f"model.name: {model!r} takes images of {side} pixels, the data have "
                f"{self.images.shape[-1]}"
            )

    def rows(self, split: str, **equal: str) -> np.ndarray:
        """Positions of a split's images, restricted by column values such as dataset="shapes"."""
        chosen = (self.table["split"] == split).to_numpy()
        for column, value in equal.items():
            chosen = chosen & (self.table[column] == value).to_numpy()
        return np.flatnonzero(chosen)

    def by_role(self, role: str) -> list[str]:
        """Names of the datasets of a role."""
        return [name for name, dataset in self.datasets.items() if dataset.role == role]

    def captions(self, row: int) -> list[str]:
        """The captions of one image."""
        start, stop = self.caption_starts[row : row + 2]
        return [self.texts[index] for index in self.caption_ids[start:stop]]


def load_corpus(config: RunConfig) -> Corpus:
    """What a run of this config sees: `config.data`."""
    return load_data(config.data)


def load_data(source: str) -> Corpus:
    """The data of a named source, or of a folder of manifests; `CmpError` if they cannot be used.

    Sources are the entry points of the group "cmp.data": functions that return a `Corpus`, and
    "folder", which takes the folder's path.
    """
    if source in named_sources():
        return plugins("cmp.data")[source]()
    return plugins("cmp.data")["folder"](source)


def named_sources() -> list[str]:
    """The names that `config.data` may have beside the path of a folder."""
    return sorted(plugins("cmp.data").keys() - {"folder"})


def build_corpus(
    images: Tensor | ImageFiles,
    tables: list[pd.DataFrame],
    about: list[tuple[DatasetInfo, list[str], str]],
) -> Corpus:
    """images: of all rows of the tables. about: (manifest, classes, hash) of each table."""
    table = pd.concat(tables, ignore_index=True)
    captions = table.pop("captions")
    lengths = captions.map(len).to_numpy()
    ids, texts = pd.factorize(np.concatenate(captions.to_numpy()))
    for column in ("dataset", "split", "label"):
        table[column] = table[column].astype("category")
    names = [dataset.name for dataset, _, _ in about]
    return Corpus(
        images=images,
        table=table[["dataset", "split", "label", "group"]],
        texts=list(texts),
        caption_ids=ids,
        caption_starts=np.concatenate([[0], np.cumsum(lengths)]),
        datasets=dict(zip(names, (dataset for dataset, _, _ in about), strict=True)),
        classes=dict(zip(names, (classes for _, classes, _ in about), strict=True)),
        hashes=dict(zip(names, (digest for _, _, digest in about), strict=True)),
    )


IMAGE_SIZE = 32
"""Side of an embedded image in pixels: the resolution that the models see."""

WHOLE_BATCH = slice(None)
"""All samples of a batch, where some of them could be asked for."""

ROTATION = 0.3  # radians, either way
SCALE = (0.75, 1.25)
SHIFT = 0.15  # of half the image's side, either way
BRIGHTNESS, CONTRAST, SATURATION = 0.08, (0.85, 1.15), (0.3, 1.4)
TINTED, TINT = 0.6, 0.35  # share of tinted backgrounds, and how dark they may be


def to_rgb(images: Tensor) -> Tensor:
    """uint8 RGBA [B, 4, H, W] over white, or RGB [B, 3, H, W] -> RGB in [0, 1], [B, 3, H, W]."""
    x = images.float() / 255
    if x.shape[1] == 3:
        return x
    return x[:, :3] * x[:, 3:] + 1 - x[:, 3:]


def augment(
    images: Tensor, generator: torch.Generator, part: tuple[int, int] | None = None
) -> Tensor:
    """uint8 RGBA [B, 4, H, W] -> RGB in [0, 1]: one affine map, a background, contrast,
    brightness and saturation.

    All randomness comes from `generator` (CPU), so a batch is a function of its state. RGB images
    [B, 3, H, W] are random parts of photographs already, and stay as they are. part: (number of the
    first, number in all), where these are some of a batch; they look as they do in it.
    """
    if images.shape[1] == 3:
        return to_rgb(images)
    first, count = part or (0, len(images))
    here = slice(first, first + len(images))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        noise = torch.rand(count, *shape, generator=generator)[here]
        return (low + (high - low) * noise).to(images.device, non_blocking=True)

    angle, scale = uniform(-ROTATION, ROTATION), uniform(*SCALE)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    right, down = uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)
    rows = [torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)]
    grid = affine_grid(torch.stack(rows, 1), *images.shape[2:])
    x = images.float()
    x[:, :3] *= x[:, 3:] / 255  # premultiplied
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    tinted = uniform(0, 1, 1, 1) < TINTED
    background = 1 - TINT * uniform(0, 1, 3, 1) * tinted
    contrast, brightness = uniform(*CONTRAST, 1, 1), uniform(-BRIGHTNESS, BRIGHTNESS, 1, 1)
    mix, offset = colour_map(background, contrast, brightness, uniform(*SATURATION, 1, 1))
    return torch.baddbmm(offset, mix, x.flatten(2)).clamp_(0, 1).view_as(x[:, :3])


def colour_map(
    background: Tensor, contrast: Tensor, brightness: Tensor, saturation: Tensor
) -> tuple[Tensor, Tensor]:
    """All that happens to a pixel's colour as one affine map from premultiplied RGBA in [0, 255]
    to RGB: matrix [B, 3, 4] and offset [B, 3, 1]. background: [B, 3, 1], the others [B, 1, 1].

    In that order: what is transparent shows the background, times contrast, plus brightness, and
    saturation moves each channel away from their mean. A map of the pixels for each of these takes
    four times as long.
    """
    own = torch.eye(3, device=background.device)
    mix = saturation * own + (1 - saturation) / 3  # grey + saturation * (x - grey)
    over = torch.cat([own.expand(len(background), 3, 3), -background], 2) / 255
    return mix @ (contrast * over), mix @ (contrast * background + brightness)


def affine_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of the output looks in the input: maps [B, 2, 3] -> [B, height, width, 2].

    `F.affine_grid` without aligned corners, as one product: fourteen times as fast on a CPU.
    """
    y, x = ((2 * torch.arange(size, device=maps.device) + 1) / size - 1 for size in (height, width))
    ones = torch.ones(height, width, device=maps.device)
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width), ones], -1)
    grid = places.view(-1, 3) @ maps.reshape(-1, 3).T  # [height * width, B * 2]
    return grid.view(height, width, -1, 2).permute(2, 0, 1, 3)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std by channel, [B, 3, H, W]."""
    mean, std = (_channels(tuple(values), x.device, x.dtype) for values in (mean, std))
    return (x - mean).div_(std)


@functools.lru_cache
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, since a copy of a list to a GPU waits for it."""
    return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)


PREFETCH = 2
"""Batches that each process makes ahead."""


def worker_count(device: torch.device) -> int:
    """How many processes decode: `$CMP_WORKERS`; by default none beside training on a CPU, and for
    a GPU all cores but one, or of its share of them where several processes train on a machine.
    None in a study's workers, which may have no children."""
    if multiprocessing.current_process().daemon:
        return 0
    asked = os.environ.get("CMP_WORKERS")
    if asked is None:
        cores = (os.cpu_count() or 1) // distributed.local_world_size()
        return max(1, cores - 1) if device.type == "cuda" else 0
    if not asked.isdecimal() or int(asked) > 1024:
        raise CmpError(f"CMP_WORKERS: {asked!r}: expected a number of processes, 0 to 1024")
    return int(asked)


class _BlockDataset(Dataset):
    """Images in blocks, whole."""

    def __init__(self, corpus: Corpus, blocks: tuple[Tensor, ...], side: int):
        self.files, self.blocks = corpus.images.at(side), blocks

    def __getitem__(self, number: int) -> Tensor:
        return self.files[self.blocks[number]]


def prefetch(dataset: Dataset, order: range, count: int, device: torch.device) -> Iterator:
    """The items of a dataset in the given order, made by `count` other processes. They are forked
    where that is possible, so that what is in memory is shared."""
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=count,
            collate_fn=_identity,
            pin_memory=device.type == "cuda",
            prefetch_factor=PREFETCH,
        )
    )


def _identity(item):
    return item


def stored_images(
    corpus: Corpus, rows: np.ndarray, size: int, side: int, device: torch.device
) -> Iterator[Tensor]:
    """Images as they are stored, or the middles of those in files, in blocks of `size`: uint8
    [size, 4, H, W] or [size, 3, side, side]."""
    blocks = torch.from_numpy(rows).split(size)
    if not corpus.in_files:
        return (corpus.images[block] for block in blocks)
    dataset, count = _BlockDataset(corpus, blocks, side), worker_count(device)
    if not count:
        return (dataset[number] for number in range(len(blocks)))
    return prefetch(dataset, range(len(blocks)), count, device)


@dataclass(frozen=True)
class Batch:
    """Samples of one step.

    Attributes:
        rows: Their positions in the corpus, [B].
        images: uint8 RGBA [B, 4, H, W], or RGB crops of files [B, 3, H, W]; of some of the samples
            only where a process asked for its own.
        texts: Each sample's caption as a position in the corpus, [B].
        replayed: How many samples at the end come from the pretraining pool.
    """

    rows: np.ndarray
    images: Tensor
    texts: Tensor
    replayed: int = 0


POOL_DATA_ROLES = ("pool", "substitute")
"""Roles that are replayed and never scored: what the bases learned, and what could stand in for it
where that is not to be had."""
