"""LoRA: W + scale B A, with A [rank, in] drawn and B [out, rank] zero at the start (spec 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.methods import adapters


class LoraAdapter(adapters.Adapter):
    """One layer's A and B."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__(weight, rank, scale)
        rows, columns = weight.flatten(1).shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    @torch.no_grad()
    def begin(self, weight: Tensor, generator: torch.Generator) -> None:
        """A is drawn, B is zero."""
        adapters.init_uniform(self.down, self.down.shape[1], generator)
        self.rest(weight)

    def rest(self, weight: Tensor) -> None:
        """B is zero."""
        self.up.zero_()

    def whole(self, weight: Tensor) -> Tensor:
        """W + scale B A."""
        return weight + (self.scale * self.up @ self.down).view_as(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b + scale B (A x)."""
        return F.linear(x, weight, bias) + F.linear(F.linear(x, self.down), self.scale * self.up)


METHOD = adapters.adapter_method(LoraAdapter)
