"""DoRA: each row of W + scale B A is brought to a trained length m, which starts as W's own; the
length that it has is held fixed in the gradient (spec 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.methods import adapters
from cmp.methods.lora import LoraAdapter


def row_norms(weight: Tensor) -> Tensor:
    """Of the rows of a weight read as a matrix, [out]; above zero, so that one can divide."""
    norms = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


class DoraAdapter(LoraAdapter):
    """One layer's A, B and m."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__(weight, rank, scale)
        self.magnitude = nn.Parameter(weight.new_ones(len(weight)))

    @torch.no_grad()
    def rest(self, weight: Tensor) -> None:
        """B is zero and m the lengths of W's rows."""
        super().rest(weight)
        self.magnitude.copy_(row_norms(weight))

    def whole(self, weight: Tensor) -> Tensor:
        """m (W + scale B A) / |W + scale B A|, row by row."""
        direction = super().whole(weight)
        gain = self.magnitude / row_norms(direction)
        return direction * gain.view(-1, *[1] * (weight.ndim - 1))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Through the whole weight: to scale outputs instead would keep all of them for the
        gradient of m, half as much memory again for a third less of the products."""
        return F.linear(x, self.whole(weight), bias)


METHOD = adapters.adapter_method(DoraAdapter)
