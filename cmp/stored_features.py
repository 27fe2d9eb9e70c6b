"""Store the features of images while the image tower does not change.

Each image that a run may draw is encoded once, in one or more views, and steps read features by
image and view instead of running the tower (Zhai et al. 2022, LiT, section 3.2).
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cmp import models
from cmp.config import RunConfig
from cmp.data import NOISE, Corpus, augment, to_device, to_rgb
from cmp.evaluation import ENCODE_BLOCK, encode_blocks, evaluation_mode, image_blocks
from cmp.models import Network
from cmp.seeds import numpy_generator


@dataclasses.dataclass(frozen=True, eq=False)
class StoredFeatures:
    """Features of some images of a corpus.

    Attributes:
        tower: The digest of the image tower that computed them.
        places: For each image of the corpus, its column in the table, or -1, int [N].
        table: Unit features by view and image, fp32 on the CPU, [views, M, E].
    """

    tower: str
    places: np.ndarray
    table: Tensor

    def read(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Return the features of images in their views, [B, E].

        Args:
            rows: Corpus positions, [B].
            views: The view of each image, from 0, [B].
        """
        return self.table[torch.from_numpy(views), torch.from_numpy(self.places[rows])]


def store_features(
    config: RunConfig,
    corpus: Corpus,
    model: Network,
    rows: np.ndarray,
    views: int,
    stored: StoredFeatures | None = None,
) -> StoredFeatures:
    """Return the stored features of a run, with all images at `rows` among them.

    Args:
        config: The run's config.
        corpus: Its data.
        model: Its network.
        rows: Corpus positions; they may occur more than once.
        views: Stored views of each image.
        stored: What is stored already. It is encoded again only if the tower has changed.
    """
    tower = models.weights_digest(model.visual)
    if stored is None or stored.tower != tower:
        places, tables = np.full(len(corpus.table), -1), []
    else:
        places, tables = stored.places.copy(), [stored.table]
    rows = np.unique(rows)
    if len(new := rows[places[rows] < 0]):
        places[new] = places.max() + 1 + np.arange(len(new))
        encoded = [encode_view(config, corpus, model, new, view) for view in range(views)]
        tables.append(torch.stack(encoded).cpu())
    return StoredFeatures(tower, places, torch.cat(tables, 1))


def encode_view(
    config: RunConfig, corpus: Corpus, model: Network, rows: np.ndarray, view: int
) -> Tensor:
    """Return the features of one view of some images, [len(rows), E].

    All blocks have the same size, so that the features of an image do not depend on the others.

    Args:
        config: The run's config.
        corpus: Its data.
        model: Its network.
        rows: Corpus positions.
        view: 0 for the images as in an evaluation; others are augmented.
    """
    padded = np.pad(rows, (0, -len(rows) % ENCODE_BLOCK), "edge")
    if view == 0:
        blocks = image_blocks(model, corpus, padded)
    else:
        blocks = augmented_blocks(config, corpus, model, padded, view)
    count = len(padded) // ENCODE_BLOCK
    with (
        evaluation_mode(model),
        tqdm(blocks, f"encoding images, view {view + 1}", count, leave=False, disable=None) as bar,
    ):
        return encode_blocks(model, bar, config.training.precision)[: len(rows)]


def augmented_blocks(
    config: RunConfig, corpus: Corpus, model: Network, rows: np.ndarray, view: int
) -> Iterator[Tensor]:
    """Yield blocks of augmented images as RGB in [0, 1]. How an image is augmented depends on its
    dataset, its place there and the view."""
    device, side = model.logit_scale.device, models.preprocessing(model).size
    numbers = view_numbers(corpus, rows, config.seeds.augment, view)
    blocks = [slice(n, n + ENCODE_BLOCK) for n in range(0, len(rows), ENCODE_BLOCK)]
    if isinstance(corpus.images, Tensor):
        for block in blocks:
            images = to_device(corpus.images[rows[block]], device)
            yield augment(images, torch.from_numpy(numbers[block]).float())
    else:
        crop = functools.partial(_crop, corpus, rows, numbers, side)
        for images in corpus.images.ahead(crop, blocks, device):
            yield to_rgb(to_device(images, device))


def _crop(corpus: Corpus, rows: np.ndarray, numbers: np.ndarray, side: int, block: slice) -> Tensor:
    """Return the crops of a block, uint8 [ENCODE_BLOCK, 3, side, side]."""
    assert not isinstance(corpus.images, Tensor)
    return corpus.images.random_crops(rows[block], side, numbers[block, :4])


def view_numbers(corpus: Corpus, rows: np.ndarray, seed: int, view: int) -> np.ndarray:
    """Return the numbers in [0, 1) from which the augmentation of images is drawn, [B, NOISE].

    Args:
        corpus: The data.
        rows: Corpus positions, [B].
        seed: The augmentation seed.
        view: The view.
    """
    dataset, numbers = corpus.table["dataset"].to_numpy(str), np.empty((len(rows), NOISE))
    for name in np.unique(dataset[rows]):
        own = np.flatnonzero(dataset == name)
        drawn = numpy_generator("augment/view", seed, view, name).random((len(own), NOISE))
        is_own = dataset[rows] == name
        numbers[is_own] = drawn[np.searchsorted(own, rows[is_own])]
    return numbers
