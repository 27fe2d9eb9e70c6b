"""Predict a training step on an H100 from its kernels, eager and compiled, see
`cmp.runs.kernels`."""

from typing import Any

from cmp import models
from cmp.bench import networks
from cmp.bench.report import Report
from cmp.errors import CmpError
from cmp.runs.kernels import (
    BANDWIDTH,
    HOST,
    KINDS,
    LAUNCH,
    PEAK,
    PRODUCT_RATE,
    Kernel,
    fuse,
    trace_step,
)
from cmp.scale import compiling

CAPTIONS = (24, 77)
"""Average number of tokens per traced caption; at most the context length."""
COLUMNS = ("step", "ms", "products", "samples/s", "% of peak", "kernels", "GB", "host")


def table_row(
    name: str, kernels: list[Kernel], batch: int, is_replayed: bool = False
) -> dict[str, Any]:
    """Return a row of the table that sums up a step's kernels.

    Args:
        name: The name of the row.
        kernels: The kernels of the step.
        batch: The number of samples of the step.
        is_replayed: Whether the host launches compiled parts as CUDA graphs, with one launch each.
    """
    seconds, flops = sum(k.seconds for k in kernels), sum(k.flops for k in kernels)
    products = sum(k.seconds for k in kernels if k.flops)
    size = sum(k.bytes for k in kernels if not k.flops)
    host = HOST * sum(not (is_replayed and k.region) for k in kernels)
    cells = (1e3 * seconds, 1e3 * products, batch / seconds, 100 * flops / seconds / PEAK)
    values = (name, *cells, len(kernels), size / 1e9, 1e3 * host)
    return dict(zip(COLUMNS, values, strict=True))


def kind_seconds(kernels: list[Kernel]) -> dict[str, float]:
    """Return the seconds of a step's kernels by kind, in the order of `kernels.KINDS`."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        seconds[kernel.kind] += kernel.seconds
    return seconds


def describe_kinds(kernels: list[Kernel]) -> str:
    """Return how long a step's kernels take by kind, in words."""
    return ", ".join(f"{1e3 * x:.1f} ms {kind}" for kind, x in kind_seconds(kernels).items())


def trace(names: list[str], rounds: int, batch: int | None) -> Report:
    """Predict a training step on an H100, eager and with compiled towers, in bf16.

    Nothing is measured, so `rounds` is not used.
    """
    rows, flops, others = [], [], []
    for name in names:
        size = batch or networks.SIZES.get(name, networks.SIZE)
        model = models.create_on_meta(name)
        if not hasattr(model, "transformer"):
            raise CmpError(f"--model: {name!r}: give a network with CLIP's own text tower")
        longest, is_replayed = model.context_length, compiling.is_launch_bound(model)
        for caption in sorted({min(caption, longest) for caption in CAPTIONS}):
            recorder = trace_step(models.create_on_meta(name), size, caption)
            title = f"{name} {caption}"
            rows.append(table_row(title, recorder.kernels, size))
            fused = fuse(recorder.kernels, recorder.casts)
            rows.append(table_row(f"{title} compiled", fused, size, is_replayed))
            others.append(f"{title} by kind: {describe_kinds(recorder.kernels)}")
            others.append(f"{title} compiled by kind: {describe_kinds(fused)}")
            total = sum(kernel.flops for kernel in recorder.kernels)
            flops.append(
                f"{title}: captions of {caption} tokens, batch {size}, {total / 1e12:.3g} TFLOP"
            )
    notes = [
        *flops,
        *others,
        f"assumed for an H100: products at {PRODUCT_RATE / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12} "
        f"TB/s, at least {LAUNCH * 1e6:.0f} us per kernel; % of peak: of {PEAK / 1e12:.0f} TFLOP/s",
        "products: their ms; GB: read and written outside products; host: ms for launches at "
        f"{HOST * 1e6:.0f} us per kernel, while the GPU works, without a small network's compiled "
        "towers, which are CUDA graphs; nothing is measured",
    ]
    return Report("trace", "a training step on an H100, predicted", COLUMNS, rows, notes)
