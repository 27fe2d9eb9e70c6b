"""LoRA: W + scale B A, with A [rank, in] random and B [out, rank] zero at first (Hu et al.
2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.methods import adapters
from cmp.registry import register


class LoraAdapter(adapters.Adapter):
    """A and B of one layer."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__(weight, rank, scale)
        rows, columns = weight.flatten(1).shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    @torch.no_grad()
    def begin(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw A and set B to zero."""
        adapters.init_uniform(self.down, generator)
        self.reset(weight)

    def reset(self, weight: Tensor) -> None:
        """Set B to zero."""
        self.up.zero_()

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W + scale B A."""
        return weight + (self.scale * self.up @ self.down).view_as(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b + scale B (A x)."""
        return F.linear(x, weight, bias) + F.linear(F.linear(x, self.down), self.scale * self.up)


register("method", "lora", adapters.SETTINGS, adapters=True)(adapters.adapter_method(LoraAdapter))
