"""DoRA: each row of W + scale B A is rescaled to a trained length m (Liu et al. 2024).

m starts as the lengths of W's rows. The gradient treats a row's current length as constant.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.methods import adapters
from cmp.methods.lora import LoraAdapter
from cmp.registry import register


def row_norms(weight: Tensor) -> Tensor:
    """Return the row lengths of a weight treated as a matrix, [out], all above zero."""
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
        """Return the output of the merged weight.

        Scaling the outputs instead would save a third of the products, but needs half as much
        memory again, to keep all outputs for the gradient of m.
        """
        return F.linear(x, self.merged_weight(weight), bias)


register("method", "dora", adapters.SETTINGS, adapters=True)(adapters.adapter_method(DoraAdapter))
