"""DoRA: each row of W + scale B A is brought to a trained length m (Liu et al. 2024).

m starts as the lengths of W's rows; the length that a row has is held fixed in the gradient.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.methods import adapters
from cmp.methods.lora import LoraAdapter
from cmp.registry import register


def row_norms(weight: Tensor) -> Tensor:
    """Return the lengths of a weight's rows, read as a matrix, [out]; above zero."""
    norms = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


class DoraAdapter(LoraAdapter):
    """A, B and m of one layer."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__(weight, rank, scale)
        self.magnitude = nn.Parameter(weight.new_ones(len(weight)))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Set B to zero and m to the lengths of W's rows."""
        super().reset(weight)
        self.magnitude.copy_(row_norms(weight))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return m (W + scale B A) / |W + scale B A|, row by row."""
        direction = super().merged_weight(weight)
        gain = self.magnitude / row_norms(direction)
        return direction * gain.view(-1, *[1] * (weight.ndim - 1))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output through the merged weight.

        Scaling outputs instead would keep all of them for the gradient of m: half as much memory
        again for a third less of the products.
        """
        return F.linear(x, self.merged_weight(weight), bias)


register("method", "dora", adapters.SETTINGS, adapters=True)(adapters.adapter_method(DoraAdapter))
