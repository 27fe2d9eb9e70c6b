"""The trace of a training step: what a card would launch, counted without one."""

import ast
import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from cmp import cli, models
from cmp.bench import networks, trace
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.runs import kernels as tracing
from cmp.runs.kernels import Kernel
from lab.evidence import BOOK

NANO, BATCH = "bench-nano", 8


def test_a_network_that_cannot_be_traced_is_named():
    with pytest.raises(
        CmpError, match="--model: 'ViT-B-16-SigLIP': give a network with CLIP's own"
    ):
        trace.trace(["ViT-B-16-SigLIP"], 1, None)


def test_flops_and_bytes_are_those_of_the_step():
    model = models.create_on_meta(NANO)
    with FlopCounterMode(display=False) as counter:
        recorder = tracing.trace_step(model, BATCH, 16)
    assert sum(kernel.flops for kernel in recorder.kernels) == counter.get_total_flops() > 0
    entries = sum(x.numel() for x in model.parameters())
    update = sum(kernel.bytes for kernel in tracing.update_kernels(model))
    assert update == pytest.approx(4 * (1 + 8) * entries, rel=1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())
    linear = [k for k in recorder.kernels if k.flops and k.region == "image"][1]
    assert {size % 2 for size in linear.writes.values()} == {0}  # bf16
    assert {kernel.region for kernel in recorder.kernels} == {"", "image", "text", "backward"}


def test_operations_between_products_become_one_kernel():
    """A product of x, then y + 1 in fp32, its cast, and a product of that; 8 bytes a value."""
    x, y, wide, more, narrow, z = ((number, 0) for number in range(6))
    kernels = [
        Kernel({x: 8}, {y: 8}, flops=5, region="image"),
        Kernel({y: 8}, {wide: 16}, 0, True, "image"),
        Kernel({wide: 16}, {more: 16}, 0, True, "image"),
        Kernel({more: 16}, {narrow: 8}, 0, True, "image"),
        Kernel({narrow: 8}, {z: 8}, flops=5, region="image"),
        Kernel({wide: 16}, {(6, 0): 8}, 0, True, "backward"),
    ]
    fused = tracing.fuse(kernels, {wide: y})
    assert [kernel.bytes for kernel in fused] == [16, 16, 16, 16]
    assert fused[1].reads == {y: 8}
    assert fused[1].writes == {narrow: 8}
    assert fused[3].reads == {y: 8}  # what is saved for the backward pass is the narrow one
    plain = tracing.fuse(kernels, {})
    assert plain[1].writes == {wide: 16, narrow: 8}
    outside = [Kernel(k.reads, k.writes, k.flops, k.is_fusible) for k in kernels]
    assert len(tracing.fuse(outside, {})) == len(kernels)


def test_bench_trace_from_a_shell(tmp_path, monkeypatch):
    """It needs no data."""
    monkeypatch.setattr(packed, "load_embedded", lambda: pytest.fail("loads data"))
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    monkeypatch.setitem(networks.SIZES, NANO, BATCH)
    result = CliRunner().invoke(cli.app, ["bench", "trace", "--model", NANO])
    assert result.exception is None, result.output
    assert "nothing is measured" in result.stdout
    rows = json.loads((tmp_path / "bench" / "trace.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [f"{NANO} 16", f"{NANO} 16 compiled"]
    eager, compiled = rows
    assert eager["kernels"] > compiled["kernels"] > 100
    assert eager["GB"] > compiled["GB"]
    assert 0 < 4 * compiled["host"] < eager["host"]  # most are launched at once
    assert eager["products"] == compiled["products"] < compiled["ms"] < eager["ms"]


def test_every_kernel_is_of_a_kind():
    recorder = tracing.trace_step(models.create_on_meta(NANO), BATCH, 16)
    fused = tracing.fuse(recorder.kernels, recorder.casts)
    eager, compiled = trace.kind_seconds(recorder.kernels), trace.kind_seconds(fused)
    for kinds, kernels in ((eager, recorder.kernels), (compiled, fused)):
        assert list(kinds) == list(tracing.KINDS) and min(kinds.values()) > 0
        assert sum(kinds.values()) == pytest.approx(sum(kernel.seconds for kernel in kernels))
    assert eager["products"] == compiled["products"]
    assert compiled["casts"] < eager["casts"] and compiled["residuals"] < eager["residuals"]
    assert tracing.kind_of("addmm", 5) == "products" and tracing.kind_of("add_", 0) == "residuals"
    assert tracing.kind_of("_scaled_dot_product_flash_attention", 5) == "attention"


@pytest.mark.parametrize(("captions", "tokens"), [("short", 24), ("long", 77)])
def test_what_h100_py_predicts_is_what_the_trace_says(captions, tokens):
    """Its numbers are frozen before a card is at hand."""
    predicted = ast.literal_eval(
        next(
            ast.unparse(node.value)
            for node in ast.parse((Path(__file__).parent / "bench" / "h100.py").read_text()).body
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PREDICTED"
        )
    )
    recorder = tracing.trace_step(models.create_on_meta("ViT-B-16"), 512, tokens)
    ways = {"": recorder.kernels, ", compiled": tracing.fuse(recorder.kernels, recorder.casts)}
    for ending, kernels in ways.items():
        row, found = trace.table_row("", kernels, 512), predicted[f"{captions} captions{ending}"]
        cells = [1e3 * sum(kernel.seconds for kernel in kernels), row["% of peak"]]
        cells += [1e3 * seconds for seconds in trace.kind_seconds(kernels).values()]
        line = f"| {tokens} tokens{ending} | {' | '.join(f'{x:.1f}' for x in cells)} |"
        assert line in (BOOK / "manual.md").read_text(encoding="utf-8").splitlines(), line
        for key in ("ms", "samples/s", "% of peak"):
            assert row[key] == pytest.approx(found[key], rel=0.005)
    assert predicted["ceilings"]["copy TB/s"] == pytest.approx(tracing.BANDWIDTH / 1e12)
    products = 0.8e12 * predicted["ceilings"]["product TFLOP/s"]
    assert products == pytest.approx(tracing.PRODUCT_RATE)
