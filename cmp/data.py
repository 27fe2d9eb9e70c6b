"""The data of a run: datasets side by side, their images as training and evaluation see them, and
images that are decoded ahead of their use."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn import functional as F

from cmp.errors import CmpError
from cmp.registry import entry_names, load_entry
from cmp.values import STRICT, Count, Positive

IMAGE_SIZE = 32
"""Side of an embedded image in pixels: the resolution that the models see."""
COLUMNS = ["dataset", "split", "label", "group", "update"]
"""The columns of `Corpus.table`."""
WHOLE_BATCH = slice(None)
"""All samples of a batch, where a process may want some of them."""

RANDOM_RANGES = (
    (-0.3, 0.3), (0.75, 1.25), (-0.15, 0.15), (-0.15, 0.15),
    (0.0, 1.0), (0.0, 0.35), (0.0, 0.35), (0.0, 0.35),
    (0.85, 1.15), (-0.08, 0.08), (0.3, 1.4),
)  # fmt: skip
"""Of what `augment` draws for an image: angle in radians, scale, shift to the right and down as
parts of half the side; whether the background has a tint, how much darker each channel is then;
contrast, brightness, saturation."""
TINT_PROBABILITY = 0.6


@checked_dataclass(frozen=True, config=STRICT)
class Preprocessing:
    """How images become what a network sees, with the keys and values of open_clip's
    `PreprocessCfg`.

    Attributes:
        size: Pixels per side.
        mode: The colours.
        mean: What is taken from each channel, in [0, 1].
        std: What each channel is then divided by.
        interpolation: The filter; "random" is for training, and bicubic in evaluation.
        resize_mode: "shortest" takes the square in the middle, "squash" gives up the proportions,
            "longest" fills up what is missing to a square.
        fill_color: What it is filled with, of each channel.
    """

    size: Count = 224
    mode: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: Annotated[int, Field(ge=0, le=255)] = 0


class DatasetInfo(Protocol):
    """What the core asks of a dataset's manifest.

    Attributes:
        name: The dataset's name.
        role: "adapt", "eval", "transfer" or one of `cmp.config.POOL_DATA_ROLES`.
        task: "classification" or "retrieval".
        prompt: Prompt of the zero-shot classifier, with one {}.
        year: When the dataset came out.
    """

    name: str
    role: str
    task: str
    prompt: str
    year: int | None


class ImageFiles(Protocol):
    """Images that are decoded when they are asked for."""

    def at(self, preprocessing: Preprocessing) -> "ImageFiles":
        """Return the same images; indexing then gives them as a network sees them."""
        ...

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        """Return images prepared for evaluation, uint8 [B, 3, size, size]."""
        ...

    def random_crops(
        self, rows: np.ndarray, side: int, generator: np.random.Generator, local: slice
    ) -> Tensor:
        """Return a random part of each image of a batch, of those that `local` chooses, uint8
        [B, 3, side, side]."""
        ...

    def ahead(
        self, make: Callable[[Any], Any], keys: Sequence, device: torch.device
    ) -> Iterator[Any]:
        """Return an iterator over what `make` makes of each key from these images, perhaps ahead of
        its use on a device."""
        ...


class Batch(NamedTuple):
    """Samples of one step.

    Attributes:
        rows: Their positions in the corpus, [B].
        images: uint8 RGBA [B, 4, H, W], or RGB crops of files [B, 3, H, W]; where a process asked
            for its own samples, of those alone.
        texts: Each sample's caption as a position in the corpus, [B].
        replayed: How many samples at the end come from the pretraining pool.
    """

    rows: np.ndarray
    images: Tensor
    texts: Tensor
    replayed: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """All N images of some datasets.

    Attributes:
        images: uint8 RGBA [N, 4, H, W], or files that are decoded when they are asked for.
        table: A row per image: `dataset`, `split`, `label` (a class name), `group` (images that
            are no independent observations share one) and `update` (the one that it arrives in,
            "" where none is named).
        texts: The distinct captions.
        caption_ids: Positions in `texts`; those from `caption_starts[i]` to `caption_starts[i + 1]`
            are the captions of image i.
        caption_starts: [N + 1].
        datasets: The manifests by dataset.
        classes: Class names in label order by dataset.
        hashes: The sha256 of pixels and table by dataset; of files, of names, sizes and texts.
        noted: By dataset of files what other programs may see in another way, see
            `cmp.readers.index.ImageIndex.noted`.

    Example:
        >>> corpus = cmp.load_data("embedded")
        >>> sorted(corpus.table["split"].unique())
        ['fresh', 'test', 'train', 'validation']
    """

    images: Tensor | ImageFiles
    table: pd.DataFrame
    texts: list[str]
    caption_ids: np.ndarray
    caption_starts: np.ndarray
    datasets: dict[str, DatasetInfo]
    classes: dict[str, list[str]]
    hashes: dict[str, str]
    noted: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def in_files(self) -> bool:
        """Whether images are decoded when they are asked for."""
        return not isinstance(self.images, Tensor)

    def on(self, device: torch.device | str) -> "Corpus":
        """Return the corpus with its images on a card, if they are in memory at all."""
        if self.in_files or torch.device(device).type != "cuda":
            return self
        return dataclasses.replace(self, images=cast(Tensor, self.images).to(device))

    def check_side(self, side: int, model: str) -> None:
        """Check that a model takes images of this size; images in files fit any model.

        Args:
            side: Pixels per side that the model takes.
            model: The model's name.

        Raises:
            CmpError: The images have another size.
        """
        if isinstance(self.images, Tensor) and side not in self.images.shape[2:]:
            words = f"takes images of {side} pixels, the data have {self.images.shape[-1]}"
            raise CmpError(f"model.name: {model!r} {words}")

    def rows(self, split: str, **columns: str) -> np.ndarray:
        """Return the positions of a split's images, of those with some values in other columns.

        Args:
            split: "train", "validation", "test" or, of pools, "fresh".
            **columns: Values by column, such as dataset="shapes".
        """
        chosen = np.ones(len(self.table), bool)
        for column, value in {"split": split, **columns}.items():
            chosen &= (self.table[column] == value).to_numpy()
        return np.flatnonzero(chosen)

    def by_role(self, role: str) -> list[str]:
        """Return the names of the datasets of a role."""
        return [name for name, dataset in self.datasets.items() if dataset.role == role]

    def captions(self, row: int) -> list[str]:
        """Return the captions of one image."""
        start, stop = self.caption_starts[row : row + 2]
        return [self.texts[index] for index in self.caption_ids[start:stop]]


def load_data(source: str) -> Corpus:
    """Return the data of a source.

    Sources are the entry points of the group `cmp.data`: functions that return a `Corpus`, and
    "folder", which takes the folder's path.

    Args:
        source: The name of a source, or the path of a folder with manifests.

    Raises:
        CmpError: The data are missing, damaged, or not as their manifests say.

    Example:
        >>> corpus = cmp.load_data("embedded")
        >>> len(corpus.by_role("adapt"))  # datasets whose classes arrive in the stream
        10
    """
    if source in named_sources():
        return load_entry("cmp.data", source)()
    return load_entry("cmp.data", "folder")(source)


def named_sources() -> list[str]:
    """Return the names that `config.data` may have beside the path of a folder."""
    return sorted({*entry_names("cmp.data")} - {"folder"})


def build_corpus(
    images: Tensor | ImageFiles,
    tables: list[pd.DataFrame],
    descriptions: list[tuple[DatasetInfo, list[str], str]],
) -> Corpus:
    """Return a corpus of some datasets.

    Args:
        images: The images of all datasets.
        tables: A table per dataset with the columns of `Corpus.table`, of which `update` may be
            missing, and `captions`, lists of texts.
        descriptions: Manifest, classes and hash of each dataset, see `Corpus`.
    """
    table = pd.concat(tables, ignore_index=True)
    captions = table["captions"]
    ids, texts = pd.factorize(np.concatenate(captions.to_numpy()))
    return Corpus(
        images=images,
        table=table.reindex(columns=COLUMNS, fill_value="").fillna("").astype("category"),
        texts=list(texts),
        caption_ids=ids,
        caption_starts=np.cumsum([0, *captions.map(len)]),
        datasets={dataset.name: dataset for dataset, _, _ in descriptions},
        classes={dataset.name: classes for dataset, classes, _ in descriptions},
        hashes={dataset.name: digest for dataset, _, digest in descriptions},
    )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, for which the host does not wait.

    A copy from memory that is not pinned would wait for all that a card has to do before it.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_rgb(images: Tensor) -> Tensor:
    """Return images as RGB in [0, 1], [B, 3, H, W], what is transparent over white.

    Args:
        images: uint8 RGBA [B, 4, H, W] or RGB [B, 3, H, W].
    """
    x = images.float() / 255
    return x if x.shape[1] == 3 else x[:, :3] * x[:, 3:] + 1 - x[:, 3:]


def augment(
    images: Tensor, generator: torch.Generator, part: tuple[int, int] | None = None
) -> Tensor:
    """Return images as RGB in [0, 1], [B, 3, H, W], changed at random.

    RGBA images get one affine map, a background, contrast, brightness and saturation. RGB images
    are random crops of photographs already and stay as they are.

    Args:
        images: uint8 RGBA [B, 4, H, W] or RGB [B, 3, H, W].
        generator: All randomness, on the CPU, so that a batch is a function of its state.
        part: Where these are some of a batch: (number of the first, number in all); they look as
            they do in the whole batch.
    """
    if images.shape[1] == 3:
        return to_rgb(images)
    first, count = part or (0, len(images))
    noise = torch.rand(count, len(RANDOM_RANGES), generator=generator)[first : first + len(images)]
    low, high = torch.tensor(RANDOM_RANGES).T
    values = to_device(low + (high - low) * noise, images.device)
    angle, scale, right, down, tinted, *_ = values.T
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([cosine, -sine, right, sine, cosine, down], 1).view(-1, 2, 3)
    tints = values[:, 5:8] * (tinted < TINT_PROBABILITY)[:, None]
    contrast, brightness, saturation = values[:, 8:, None, None].unbind(1)
    matrix, offset = colour_map(1 - tints[:, :, None], contrast, brightness, saturation)
    x = images.float()
    x[:, :3] *= x[:, 3:] / 255  # premultiplied, so that transparent pixels do not bleed
    # colours first: three channels are resampled faster than four, with the same result, since
    # both are linear
    x = torch.baddbmm(offset, matrix, x.flatten(2)).view_as(x[:, :3])
    grid = affine_grid(maps, *images.shape[2:])
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False).clamp_(0, 1)


def affine_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """Return where each pixel of the output looks in the input, [B, height, width, 2].

    It is `F.affine_grid` without aligned corners as one product, fourteen times as fast on a CPU.

    Args:
        maps: Affine maps, [B, 2, 3].
        height: Pixels of the output.
        width: Pixels of the output.
    """
    y, x = ((2 * torch.arange(size, device=maps.device) + 1) / size - 1 for size in (height, width))
    ones = torch.ones(height, width, device=maps.device)
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width), ones], -1)
    grid = places.view(-1, 3) @ maps.reshape(-1, 3).T  # [height * width, B * 2]
    return grid.view(height, width, -1, 2).permute(2, 0, 1, 3)


def colour_map(
    background: Tensor, contrast: Tensor, brightness: Tensor, saturation: Tensor
) -> tuple[Tensor, Tensor]:
    """Return all changes of a pixel's colour as one affine map, four times as fast as one by one.

    Transparent pixels show the background; then colours are multiplied by the contrast, the
    brightness is added, and the saturation moves each channel away from their mean.

    Args:
        background: [B, 3, 1].
        contrast: [B, 1, 1].
        brightness: [B, 1, 1].
        saturation: [B, 1, 1].

    Returns:
        Matrix [B, 3, 4] and offset [B, 3, 1], from premultiplied RGBA in [0, 255] to RGB in [0, 1].
    """
    identity = torch.eye(3, device=background.device)
    mix = saturation * identity + (1 - saturation) / 3  # grey + saturation * (x - grey)
    over = torch.cat([identity.expand(len(background), 3, 3), -background], 2) / 255
    return mix @ (contrast * over), mix @ (contrast * background + brightness)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (x - mean) / std per channel, [B, 3, H, W]."""
    offset, scale = (_channels(tuple(values), x.device, x.dtype) for values in (mean, std))
    return (x - offset).div_(scale)


@functools.lru_cache
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return values as [1, C, 1, 1], cached because a copy to a GPU waits for it."""
    return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)


def stored_images(
    corpus: Corpus, rows: np.ndarray, size: int, how: Preprocessing, device: torch.device
) -> Iterator[Tensor]:
    """Return an iterator over images without augmentation, in blocks.

    Args:
        corpus: The data.
        rows: Positions of the images.
        size: Images per block.
        how: How images that are decoded from files are prepared.
        device: Where they are used.

    Returns:
        uint8 RGBA [size, 4, H, W] as they are stored, or from files RGB [size, 3, side, side].
    """
    blocks = np.split(rows, range(size, len(rows), size))
    if isinstance(corpus.images, Tensor):
        return (corpus.images[block] for block in blocks)
    images = corpus.images.at(how)
    return images.ahead(images.__getitem__, blocks, device)
