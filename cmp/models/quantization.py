"""Weights in 8 bits: every row of a matrix as whole numbers from -127 to 127, with its scale."""

import torch
from torch import Tensor

SCALE = ".scale"
LARGEST = 127


def quantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels as int8 [rows, ...] and `NAME.scale` [rows], all else in 16 bits.

    The error of an entry is at most half a scale, that is, 1/254 of its row's largest entry.
    """
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        if x.dim() < 2:
            found[name] = x.half()
            continue
        scale = x.flatten(1).abs().amax(dim=1).float() / LARGEST
        scale = scale.where(scale > 0, torch.ones_like(scale))
        found[name] = (x.float() / _column(scale, x)).round().to(torch.int8)
        found[name + SCALE] = scale
    return found


def dequantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 weights of what `quantized` made; of others the same in fp32."""
    return {
        name: x.float() * _column(weights[name + SCALE], x)
        if name + SCALE in weights
        else x.float()
        for name, x in weights.items()
        if not name.endswith(SCALE)
    }


def _column(scale: Tensor, x: Tensor) -> Tensor:
    """A row's scale [rows], shaped to be multiplied with x [rows, ...]."""
    return scale.view(-1, *[1] * (x.dim() - 1))
