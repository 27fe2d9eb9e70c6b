"""The data of a run: datasets in one corpus, and images prepared for training and evaluation."""

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
"""Side of an embedded image in pixels, the resolution that the models see."""
COLUMNS = ["dataset", "split", "label", "group", "update"]
"""The columns of `Corpus.table`."""
WHOLE_BATCH = slice(None)
"""Selects all samples; with several processes, each selects its own."""

RANDOM_RANGES = (
    (-0.3, 0.3), (0.75, 1.25), (-0.15, 0.15), (-0.15, 0.15),
    (0.0, 1.0), (0.0, 0.35), (0.0, 0.35), (0.0, 0.35),
    (0.85, 1.15), (-0.08, 0.08), (0.3, 1.4),
)  # fmt: skip
"""Bounds of what `augment` draws for an image: the angle in radians; the scale; the shift right and
down as fractions of half the side; whether the background is tinted, and by how much each channel
is darkened; contrast, brightness and saturation."""
NOISE = len(RANDOM_RANGES)
TINT_PROBABILITY = 0.6


@checked_dataclass(frozen=True, config=STRICT)
class Preprocessing:
    """How images are prepared for a network, with the keys and values of open_clip's
    `PreprocessCfg`.

    Attributes:
        size: Pixels per side.
        mode: The colour mode.
        mean: Subtracted from each channel, in [0, 1].
        std: Each channel is then divided by this.
        interpolation: The resampling filter; "random" applies in training and means bicubic in
            evaluation.
        resize_mode: "shortest" crops the central square, "squash" ignores the aspect ratio,
            "longest" pads to a square.
        fill_color: The value of each channel in the padding.
    """

    size: Count = 224
    mode: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: Annotated[int, Field(ge=0, le=255)] = 0


class DatasetInfo(Protocol):
    """What the core reads from a dataset's manifest.

    Attributes:
        name: The dataset's name.
        role: "adapt", "eval", "transfer" or one of `cmp.config.POOL_DATA_ROLES`.
        task: "classification" or "retrieval".
        prompt: The prompt of the zero-shot classifier, with one {}.
        year: The year in which the dataset was published.
    """

    name: str
    role: str
    task: str
    prompt: str
    year: int | None


class ImageFiles(Protocol):
    """Images that are decoded when they are indexed."""

    def at(self, preprocessing: Preprocessing) -> "ImageFiles":
        """Return the same images, which indexing prepares for a network."""
        ...

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        """Return images prepared for evaluation, uint8 [B, 3, size, size]."""
        ...

    def random_crops(self, rows: np.ndarray, side: int, numbers: np.ndarray) -> Tensor:
        """Return the crop of each image that its row of `numbers`, [B, 4], determines, uint8
        [B, 3, side, side]."""
        ...

    def ahead(
        self, make: Callable[[Any], Any], keys: Sequence, device: torch.device
    ) -> Iterator[Any]:
        """Return an iterator over `make`'s result for each key, possibly computed ahead of its use
        on a device."""
        ...


class Batch(NamedTuple):
    """The samples of one step.

    Attributes:
        rows: Their positions in the corpus, [B].
        images: uint8 RGBA [B, 4, H, W], or RGB crops of files [B, 3, H, W]; only those of a
            process's own samples if it selected some.
        texts: Each sample's caption as a position in the corpus, [B].
        replayed: How many samples at the end come from the pretraining pool.
    """

    rows: np.ndarray
    images: Tensor
    texts: Tensor
    replayed: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """All N images of one or more datasets.

    Attributes:
        images: uint8 RGBA [N, 4, H, W], or files that are decoded when they are indexed.
        table: One row per image: `dataset`, `split`, `label` (a class name), `group` (shared by
            images that are not independent observations) and `update` (the update it arrives in, or
            "").
        texts: The distinct captions.
        caption_ids: Positions in `texts`. The captions of image i run from `caption_starts[i]` to
            `caption_starts[i + 1]`.
        caption_starts: [N + 1].
        datasets: The manifests by dataset.
        classes: Class names in label order by dataset.
        hashes: By dataset, the sha256 of pixels and table; for files, of names, sizes and texts.
        noted: By dataset of files, what other programs may read differently, see
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
        """Whether images are decoded from files when they are indexed."""
        return not isinstance(self.images, Tensor)

    def on(self, device: torch.device | str) -> "Corpus":
        """Return the corpus with its images on a device, if they are in memory."""
        if self.in_files or torch.device(device).type != "cuda":
            return self
        return dataclasses.replace(self, images=cast(Tensor, self.images).to(device))

    def check_side(self, side: int, model: str) -> None:
        """Check that a model takes images of this corpus's size; images in files fit any model.

        Args:
            side: Pixels per side that the model takes.
            model: The model's name.

        Raises:
            CmpError: The images have a different size.
        """
        if isinstance(self.images, Tensor) and self.images.shape[2:] != (side, side):
            raise CmpError(
                f"model.name: {model!r} takes images of {side} pixels, but the data have "
                f"{self.images.shape[-1]}"
            )

    def rows(self, split: str, **columns: str) -> np.ndarray:
        """Return the positions of a split's images, filtered by values of other columns.

        Args:
            split: "train", "validation", "test" or, for pools, "fresh".
            **columns: Required values by column, such as dataset="shapes".
        """
        chosen = np.ones(len(self.table), bool)
        for column, value in {"split": split, **columns}.items():
            chosen &= (self.table[column] == value).to_numpy()
        return np.flatnonzero(chosen)

    def by_role(self, role: str) -> list[str]:
        """Return the names of the datasets with a role."""
        return [name for name, dataset in self.datasets.items() if dataset.role == role]

    def captions(self, row: int) -> list[str]:
        """Return the captions of one image."""
        start, stop = self.caption_starts[row : row + 2]
        return [self.texts[index] for index in self.caption_ids[start:stop]]


def load_data(source: str) -> Corpus:
    """Return the data of a source.

    Sources are entry points of the group `cmp.data`: functions that return a `Corpus`, and
    "folder", which takes the folder's path. A process reads a folder once, and again only when a
    file has changed or been added: a manifest, an image, a text beside it, a table or a tar.

    Args:
        source: The name of a source, or the path of a folder with manifests.

    Raises:
        CmpError: The data are missing, damaged, or do not match their manifests.

    Example:
        >>> corpus = cmp.load_data("embedded")
        >>> len(corpus.by_role("adapt"))  # datasets whose classes arrive in the stream
        10
    """
    if source in named_sources():
        return load_entry("cmp.data", source)()
    return load_entry("cmp.data", "folder")(source)


def named_sources() -> list[str]:
    """Return the names that `config.data` accepts besides the path of a folder."""
    return sorted({*entry_names("cmp.data")} - {"folder"})


def build_corpus(
    images: Tensor | ImageFiles,
    tables: list[pd.DataFrame],
    descriptions: list[tuple[DatasetInfo, list[str], str]],
) -> Corpus:
    """Return a corpus made of one or more datasets.

    Args:
        images: The images of all datasets.
        tables: A table per dataset with the columns of `Corpus.table` (`update` is optional) and
            `captions`, lists of texts.
        descriptions: The manifest, classes and hash of each dataset, see `Corpus`.
    """
    table = pd.concat(tables, ignore_index=True)
    captions = table["captions"]
    # objects: an array of strings would give every caption as much memory as the longest
    flat = np.array([text for own in captions for text in own], dtype=object)
    ids, texts = pd.factorize(flat)
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
    """Return a tensor on a device without making the host wait.

    A copy from unpinned memory would wait for all work that is queued on a GPU.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_rgb(images: Tensor) -> Tensor:
    """Return images as RGB in [0, 1], [B, 3, H, W], with transparent pixels over white.

    Args:
        images: uint8 RGBA [B, 4, H, W] or RGB [B, 3, H, W].
    """
    x = images.float() / 255
    return x if x.shape[1] == 3 else x[:, :3] * x[:, 3:] + 1 - x[:, 3:]


def augment(images: Tensor, noise: Tensor) -> Tensor:
    """Return randomly augmented images as RGB in [0, 1], [B, 3, H, W].

    RGBA images get an affine map, a background, contrast, brightness and saturation. RGB images are
    already random crops of photographs and do not change.

    Args:
        images: uint8 RGBA [B, 4, H, W] or RGB [B, 3, H, W].
        noise: For each image, `NOISE` numbers in [0, 1), on the CPU, [B, NOISE].
    """
    if images.shape[1] == 3:
        return to_rgb(images)
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
    # colours first: resampling three channels is faster than four, and gives the same result, since
    # both maps are linear
    x = torch.baddbmm(offset, matrix, x.flatten(2)).view_as(x[:, :3])
    grid = affine_grid(maps, *images.shape[2:])
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False).clamp_(0, 1)


def affine_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """Return the input coordinates of each output pixel, [B, height, width, 2].

    This is `F.affine_grid` without aligned corners as one matrix product, 14 times as fast on a
    CPU.

    Args:
        maps: Affine maps, [B, 2, 3].
        height: Height of the output in pixels.
        width: Width of the output in pixels.
    """
    y = (2 * torch.arange(height, device=maps.device) + 1) / height - 1
    x = (2 * torch.arange(width, device=maps.device) + 1) / width - 1
    ones = torch.ones(height, width, device=maps.device)
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width), ones], -1)
    grid = places.view(-1, 3) @ maps.reshape(-1, 3).T  # [height * width, B * 2]
    return grid.view(height, width, -1, 2).permute(2, 0, 1, 3)


def colour_map(
    background: Tensor, contrast: Tensor, brightness: Tensor, saturation: Tensor
) -> tuple[Tensor, Tensor]:
    """Return all colour changes of a pixel as one affine map, four times as fast as one at a time.

    Transparent pixels show the background. Colours are then multiplied by the contrast, the
    brightness is added, and the saturation moves each channel away from the mean of all three.

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
    offset, scale = _channels(tuple(mean), tuple(std), x.device, x.dtype)
    return (x - offset).div_(scale)


@functools.lru_cache
def _channels(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return both as [2, 1, C, 1, 1], cached because a copy to a GPU makes the host wait."""
    return torch.tensor([mean, std], device=device, dtype=dtype).view(2, 1, -1, 1, 1)


def stored_images(
    corpus: Corpus, rows: np.ndarray, size: int, how: Preprocessing, device: torch.device
) -> Iterator[Tensor]:
    """Return an iterator over blocks of images, without augmentation.

    Args:
        corpus: The data.
        rows: Positions of the images.
        size: Images per block.
        how: How images decoded from files are prepared.
        device: The device that will use them.

    Returns:
        uint8 RGBA [size, 4, H, W] as stored, or RGB [size, 3, side, side] from files.
    """
    blocks = np.split(rows, range(size, len(rows), size))
    if isinstance(corpus.images, Tensor):
        return (corpus.images[block] for block in blocks)
    images = corpus.images.at(how)
    return images.ahead(images.__getitem__, blocks, device)
