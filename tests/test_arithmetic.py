"""bf16 on a CPU: with kernels of its own, or with products in fp32."""

import pytest
import torch
from forked import small_config, small_corpus

from cmp import arithmetic, models
from cmp.errors import CmpError
from cmp.evaluation import evaluate
from cmp.mixtures import task_pools
from cmp.runs.machine import machine_record
from cmp.training import create_optimizer, make_train_state, train_step

pytestmark = pytest.mark.numbers


def bf16(*shape):
    return torch.randn(*shape).bfloat16()


def convolve(x, weight, bias):
    return torch.nn.functional.conv2d(x, weight, bias, padding=1)


PRODUCTS = {
    "conv2d": (convolve, (2, 3, 8, 8), (4, 3, 3, 3), (4,)),
    "mm": (torch.mm, (5, 7), (7, 3)),
    "addmm": (torch.addmm, (3,), (5, 7), (7, 3)),
    "bmm": (torch.bmm, (2, 5, 7), (2, 7, 3)),
    "baddbmm": (torch.baddbmm, (2, 5, 3), (2, 5, 7), (2, 7, 3)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_fp32_is_the_product_rounded_once(name):
    function, *shapes = PRODUCTS[name]
    narrow = [bf16(*shape).requires_grad_() for shape in shapes]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    with arithmetic.ProductsInFp32():
        result = function(*narrow)
        result.backward(torch.ones_like(result))
    expected = function(*wide)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(result, expected.bfloat16())
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one.grad, other.grad.bfloat16())


def test_products_of_other_types_are_left_alone():
    x = torch.randn(4, 4, dtype=torch.float64)
    with arithmetic.ProductsInFp32():
        assert torch.equal(x @ x, torch.mm(x, x)) and (x @ x).dtype is torch.float64


@pytest.mark.parametrize(("precision", "is_watched"), [("bf16", True), ("fp32", False)])
def test_only_bf16_pays_for_missing_kernels(monkeypatch, precision, is_watched):
    monkeypatch.setattr(arithmetic, "lacks_bf16_kernels", lambda kind: True)
    device = torch.device("cpu")
    for context in (arithmetic.autocast, arithmetic.bf16_products):
        with context(precision, device):
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        assert isinstance(mode, arithmetic.ProductsInFp32) == is_watched


def test_a_step_without_kernels_computes_its_bf16_products_in_fp32(monkeypatch):
    """Forward and backward. How its losses differ from those with kernels, golden runs say."""
    seen = set()

    class Watched(arithmetic.ProductsInFp32):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(getattr(x, "dtype", None) is torch.bfloat16 for x in args):
                seen.add(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(arithmetic, "lacks_bf16_kernels", lambda kind: True)
    monkeypatch.setattr(arithmetic, "ProductsInFp32", Watched)
    state = make_train_state(small_config("training.precision=bf16"), small_corpus())
    batch = next(state.batches(task_pools(state.config, state.corpus)[0], 0, [0]))
    assert train_step(state, create_optimizer(state), batch, 0, 0, 1e-3).loss.isfinite()
    aten = torch.ops.aten
    assert {aten.mm.default, aten.convolution.default, aten.convolution_backward.default} <= seen


@pytest.mark.parametrize("lacks", [True, False])
def test_a_run_says_how_bf16_was_computed(monkeypatch, lacks):
    monkeypatch.setattr("cmp.runs.machine.lacks_bf16_kernels", lambda kind: lacks)
    assert machine_record().get("bf16") == ("products in fp32" if lacks else None)


@pytest.mark.parametrize("precision", ["fp16", "bfloat16", "float32", ""])
def test_a_misspelt_precision_is_refused(precision):
    """It once meant fp32, without a word."""
    with pytest.raises(CmpError, match=f"precision: '{precision}': give 'bf16' or 'fp32'"):
        evaluate(models.create_model("tiny"), "tiny", small_corpus(), precision=precision)
