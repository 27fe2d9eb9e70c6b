"""VeRA: W + scale diag(b) B diag(d) A, with A and B drawn once and shared by all layers of a shape;
only the vectors d [rank] and b [out] train (Kopiczko et al. 2024).

d starts at 0.1 and b at zero, as in the VeRA paper; the reference implementation does the opposite.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.methods import adapters
from cmp.registry import register
from cmp.seeds import torch_generator
from cmp.training import TrainState, UpdateMethod

INITIAL_SCALE = 0.1


KAIMING = 6**0.5
"""The random matrices have Kaiming's uniform distribution, which is bounded by sqrt(6 / fan_in)."""


class VeraAdapter(adapters.Adapter):
    """d and b of one layer. A and B are not part of its state."""

    down: Tensor
    up: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__(weight, rank, scale)
        self.inner = nn.Parameter(weight.new_full((rank,), INITIAL_SCALE))
        self.outer = nn.Parameter(weight.new_zeros(len(weight)))

    def share(self, down: Tensor, up: Tensor) -> None:
        """Set A [rank, in] and B [out, rank], which layers may share."""
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    @torch.no_grad()
    def begin(self, weight: Tensor, generator: torch.Generator) -> None:
        """Set d and b to their initial values. Nothing is drawn, since A and B are fixed for the
        whole run."""
        self.inner.fill_(INITIAL_SCALE)
        self.reset(weight)

    def reset(self, weight: Tensor) -> None:
        """Set b to zero."""
        self.outer.zero_()

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W + scale diag(b) B diag(d) A."""
        low = (self.scale * self.outer[:, None] * self.up) @ (self.inner[:, None] * self.down)
        return weight + low.view_as(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b + scale diag(b) B diag(d) (A x)."""
        low = F.linear(x, self.inner[:, None] * self.down)
        return F.linear(x, weight, bias) + F.linear(low, self.scale * self.outer[:, None] * self.up)


_BASE_METHOD = adapters.adapter_method(VeraAdapter)


def prepare(state: TrainState) -> None:
    """Attach adapters, with one A and one B per layer shape."""
    _BASE_METHOD.prepare(state)
    shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for layer in adapters.adapted_layers(state.model).values():
        rows, columns = layer.weight.flatten(1).shape
        if (rows, columns) not in shared:
            generator = torch_generator("vera", state.config.seeds.init, rows, columns)
            rank = layer.adapter.rank
            down = adapters.init_uniform(layer.weight.new_empty(rank, columns), generator)
            up = adapters.init_uniform(layer.weight.new_empty(rows, rank), generator)
            shared[rows, columns] = (KAIMING * down, KAIMING * up)
        cast(VeraAdapter, layer.adapter).share(*shared[rows, columns])


register("method", "vera", adapters.SETTINGS, adapters=True)(
    UpdateMethod(prepare, _BASE_METHOD.begin_task)
)
