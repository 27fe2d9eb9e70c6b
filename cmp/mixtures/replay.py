"""The pool that is replayed for the sake of retention: which data, and which part is kept."""

import hashlib
from collections.abc import Callable

import numpy as np

from cmp.config import Mixture
from cmp.data import traits
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.mixtures.choice import lowest, ranks
from cmp.seeds import numpy_generator

POOLS = {"pretraining": "pool", "substitute": "substitute"}
"""By `mixture.pool`: the role of the datasets that are replayed."""

Keys = list[np.ndarray]


def random(corpus: Corpus, pool: np.ndarray, priority: np.ndarray) -> Keys:
    """Any image is as likely to be kept as any other."""
    return [priority]


def clustered(corpus: Corpus, pool: np.ndarray, priority: np.ndarray) -> Keys:
    """As many images of each cluster of image features, as far as it has them."""
    return [priority, ranks(traits.of_images(corpus, pool)["cluster"].to_numpy(), priority)]


def aligned(corpus: Corpus, pool: np.ndarray, priority: np.ndarray) -> Keys:
    """The images whose captions a base finds nearest to them."""
    return [priority, -traits.of_images(corpus, pool)["alignment"].to_numpy()]


SELECTIONS: dict[str, Callable[[Corpus, np.ndarray, np.ndarray], Keys]] = {
    "random": random, "clustered": clustered, "aligned": aligned,
}  # fmt: skip
"""By `mixture.select`: (corpus, positions of the pool's images in it, their random priorities) ->
keys of `choice.lowest`."""


def replay_pool(corpus: Corpus, mixture: Mixture, seed: int) -> np.ndarray:
    """The fixed part of the pool that is kept for replay, as sorted positions in the corpus.

    `CmpError` if the batch wants a pool that these data do not have.
    """
    pool, kept = _choose(corpus, mixture, seed)
    return pool[kept]


def digest(corpus: Corpus, mixture: Mixture, seed: int) -> str:
    """sha256 of which images of the pool are kept, which stands for all that decided it."""
    _, kept = _choose(corpus, mixture, seed)
    return hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()


def _choose(corpus: Corpus, mixture: Mixture, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the whole pool in the corpus, sorted positions in the pool that are kept)."""
    train = corpus.rows("train")
    of_role = corpus.by_role(POOLS[mixture.pool])
    pool = train[corpus.table["dataset"].iloc[train].isin(of_role).to_numpy()]
    if len(pool) == 0:
        if mixture.pretraining > 0:
            raise CmpError(f"mixture.pool: {mixture.pool!r}: there is no such pool in these data")
        return pool, pool
    size = max(1, round(mixture.replay * len(pool)))
    priority = np.argsort(numpy_generator("replay", seed).permutation(len(pool)))
    return pool, lowest(SELECTIONS[mixture.select](corpus, pool, priority), size)
