"""Measure evaluation: images per second, a whole checkpoint, and retrieval at the size of MSCOCO's
test set."""

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cmp import evaluation, models
from cmp.bench import timing
from cmp.bench.report import Report
from cmp.config import Model
from cmp.data import Corpus
from cmp.errors import CmpError

IMAGES, CAPTIONS, WIDTH = 5_000, 5, 512
COLUMNS = ("what", "times as fast", "ms", "images/s", "MB")


def retrieval_features(images: int = IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """Return features for `evaluation.retrieval_hits`, with five texts near each image.

    Args:
        images: The number of images.

    Returns:
        Unit features of images [N, `WIDTH`] and texts [M, `WIDTH`], and each text's image [M].
    """
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, WIDTH, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(CAPTIONS)
    noise = 0.35 * torch.randn(len(owner), WIDTH, generator=generator)  # about half are found
    return image, F.normalize(image[owner] + noise, dim=1), owner


def retrieval_memory() -> float:
    """Return the MB by which retrieval increases the resident set of a new process.

    The system's high-water mark, reset when the features are ready, includes allocations of torch
    and its libraries and needs no sampling. A new process is needed because this one would reuse
    freed memory, which would not show.

    Raises:
        CmpError: The system is not Linux.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_resident_growth, torch.get_num_threads()).result()
        except OSError as error:
            raise CmpError(
                f"the memory of retrieval can only be measured on Linux ({error})"
            ) from error


def _resident_growth(threads: int) -> float:
    def status(key: str) -> int:  # KiB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    torch.set_num_threads(threads)
    features = retrieval_features()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    evaluation.retrieval_hits(*features)
    return (status("VmHWM") - before) * 1024 / 1e6


def evaluate(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure encoding test images, a model's evaluation, and retrieval."""
    images = corpus.rows("test")[:batch]
    rows = []
    for name in names:
        model = models.load_model(Model(name), 0).eval()
        rows += _compare(
            {
                f"{name} images, {precision}": functools.partial(
                    evaluation.image_features, model, corpus, images, precision
                )
                for precision in ("fp32", "bf16")
            },
            rounds,
            len(images),
        )
        rows += _compare(
            {
                f"{name} evaluation, {size or 'all'} a dataset": functools.partial(
                    evaluation.evaluate, model, name, corpus, subset=size
                )
                for size in (None, 64)
            },
            rounds,
        )
    image, text, owner = retrieval_features()
    products = functools.partial(_products, image, text)
    hits = functools.partial(evaluation.retrieval_hits, image, text, owner)
    title = f"retrieval {len(image):,} x {len(text):,}"
    rows += _compare({f"{title}, products": products, f"{title}, hits": hits}, min(rounds, 5))
    rows[-1]["MB"] = retrieval_memory()
    return Report("evaluate", "evaluation", COLUMNS, rows)


def _compare(
    calls: dict[str, Callable[[], object]], rounds: int, images: int | None = None
) -> list[dict[str, object]]:
    """Return one row per call; the first is the baseline of the others."""
    seconds = timing.interleaved(calls, rounds)
    base, *_ = seconds.values()
    rows = []
    for what, times in seconds.items():
        middle = float(np.median(times))
        row = {"what": what, "times as fast": timing.times_faster(base, times), "ms": 1e3 * middle}
        rows.append(row | ({"images/s": images / middle} if images else {}))
    return rows


def _products(image: Tensor, text: Tensor) -> None:
    """Compute only the matrix products that retrieval needs."""
    for block in image.split(evaluation.ENCODE_BLOCK):
        block @ text.T
    for block in text.split(evaluation.ENCODE_BLOCK):
        block @ image.T
