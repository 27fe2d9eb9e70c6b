"""The arithmetic of the forward and the backward pass: fp32, or bf16 by autocast.

On a CPU for which oneDNN has no kernels in bf16, such as one with AVX2 alone, torch computes its
products and convolutions seven times as slowly as in fp32. There they are computed in fp32, from
operands in bf16 to results in bf16, as kernels in bf16 do inside.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """A mode in which products and convolutions of bf16 tensors are computed in fp32.

    Their results are in bf16 again, so each differs from that of a kernel in bf16 by the order of
    its sums alone.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute one operation."""
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
    """Return whether devices of a kind, such as "cpu", compute bf16 much more slowly than fp32."""
    if kind != "cpu":
        return False
    has_library = torch.backends.mkldnn.is_available()  # some builds are without it
    return not (has_library and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_products(device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of a backward pass, in which products of bf16 tensors are fast on any
    device; `autocast` is that of a forward pass."""
    return ProductsInFp32() if lacks_bf16_kernels(device.type) else contextlib.nullcontext()


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of a forward pass: "bf16" by autocast, "fp32" as it is."""
    if device.type == "meta":  # has no arithmetic
        return contextlib.nullcontext()
    if precision == "bf16" and lacks_bf16_kernels(device.type):
        return _autocast_with_products_in_fp32()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def _autocast_with_products_in_fp32() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), ProductsInFp32():
        yield
