"""Two variants of the embedded benchmark, as data sources of their own.

Both change only what arrives in the stream; the pool and the images of earlier concepts stay.
"""

import dataclasses
import functools
import hashlib

import numpy as np
import pandas as pd
import torch

from cmp.data import Corpus, build_corpus
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests
from cmp.seeds import numpy_generator

MONTHS = 20
MOST_RETURNS = 3
"""In how many months a class arrives at most."""
WRONG_SHARE = 0.1
"""Fraction of the training images of a dataset that have the caption of another class."""


@functools.cache
def load_inverted() -> Corpus:
    """Return the embedded benchmark with the colours of all new concepts inverted, in training and
    tests. No base was trained on such images."""
    corpus = packed.load_embedded()
    arriving = corpus.by_role("adapt")
    images = corpus.images.clone()
    images[torch.tensor(corpus.table["dataset"].isin(arriving)), :3] ^= 255
    changed = {name: _digest("inverted", corpus.hashes[name]) for name in arriving}
    return dataclasses.replace(corpus, images=images, hashes=corpus.hashes | changed)


@functools.cache
def load_months() -> Corpus:
    """Return the embedded benchmark as twenty months, for `stream.order=given`. A class arrives in
    one to three months, the largest month expects ten times as many images as the smallest, and a
    tenth of the training images have a wrong caption."""
    tables, about = [], []
    for dataset in embedded_manifests().values():
        opened = packed.read_packed(dataset)
        table, digest = opened.table, opened.data_hash()
        table = table.assign(dataset=dataset.name, split=packed.splits_of(opened))
        if dataset.role == "adapt":
            table, digest = _arrive_by_month(table), _digest("months", digest)
        tables.append(table)
        about.append((dataset, opened.header.classes, digest))
    return build_corpus(packed.load_embedded().images, tables, about)


def _arrive_by_month(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a dataset with the months of its training images, some of which have
    captions of other classes."""
    shares = numpy_generator("months", 0).permutation(np.geomspace(1, 10, MONTHS))
    numbers = numpy_generator(f"months/{table['dataset'].iat[0]}", 0)
    training = np.flatnonzero(table["split"] == "train")
    labels, captions = table["label"].to_numpy()[training], table["captions"].to_numpy(copy=True)
    updates = np.full(len(table), "", dtype=object)
    for label in np.unique(labels):
        own = training[labels == label]
        count = numbers.integers(1, MOST_RETURNS + 1)
        months = numbers.choice(MONTHS, count, replace=False, p=shares / shares.sum())
        updates[own] = [f"{months[place % count] + 1:02}" for place in range(len(own))]
    wrong = numbers.choice(len(training), int(WRONG_SHARE * len(training)), replace=False)
    for place in wrong:
        others = training[labels != labels[place]]
        captions[training[place]] = table["captions"].iat[numbers.choice(others)]
    return table.assign(update=updates, captions=captions)


def _digest(variant: str, digest: str) -> str:
    """Return a hash of a dataset that a variant changes."""
    return hashlib.sha256(f"{variant} {digest}".encode()).hexdigest()
