"""Precision of the forward and backward passes: fp32, or bf16 with autocast.

On a CPU without oneDNN kernels for bf16, such as one with AVX2 only, torch runs bf16 products and
convolutions seven times slower than fp32 ones. On such a CPU this module computes them in fp32,
taking and returning bf16, as bf16 kernels do internally.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmp.errors import CmpError

_PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}
"""The operations that take nearly all of the time."""


class ProductsInFp32(TorchDispatchMode):
    """A dispatch mode that computes products and convolutions of bf16 tensors in fp32.

    Results are rounded to bf16, so they differ from a bf16 kernel's only in the order of summation.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        is_bf16 = [isinstance(x, Tensor) and x.dtype is torch.bfloat16 for x in args]
        if not any(is_bf16):
            return func(*args, **kwargs)
        wide = [x.float() if narrow else x for x, narrow in zip(args, is_bf16, strict=True)]
        result = func(*wide, **kwargs)
        if isinstance(result, Tensor):
            return result.bfloat16()
        return tuple(x if x is None else x.bfloat16() for x in result)


@functools.cache
def lacks_bf16_kernels(kind: str) -> bool:
    """Return whether a kind of device, such as "cpu", is much slower in bf16 than in fp32."""
    if kind != "cpu":
        return False
    has_library = torch.backends.mkldnn.is_available()  # some builds lack it
    return not (has_library and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_products(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context for a backward pass, which keeps bf16 products fast on any device.
    `autocast` is its counterpart for the forward pass."""
    is_slow = precision == "bf16" and lacks_bf16_kernels(device.type)
    return ProductsInFp32() if is_slow else contextlib.nullcontext()


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context for a forward pass: autocast for "bf16", no change for "fp32".

    Raises:
        CmpError: The precision is neither.
    """
    if precision not in ("bf16", "fp32"):
        raise CmpError(f"precision: {precision!r}: give 'bf16' or 'fp32'")
    if device.type == "meta":  # computes nothing
        return contextlib.nullcontext()
    if precision == "bf16" and lacks_bf16_kernels(device.type):
        return _autocast_with_products_in_fp32()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def _autocast_with_products_in_fp32() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), ProductsInFp32():
        yield
