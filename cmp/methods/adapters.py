"""Adapters: small matrices beside frozen weights, and the way between both.

A layer keeps its name and its weight; its adapter is a child module, so that a state dict holds
both. `plain` gives the weights that the two amount to: what is scored, merged and saved.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cmp.errors import CmpError
from cmp.methods import check_not_frozen, check_rank
from cmp.seeds import torch_generator
from cmp.training import TrainState, UpdateMethod

DEFAULT_TARGETS = (
    "q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj",
    "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
"""Layers that get adapters by default, beside all convolutions: attention and both layers of the
MLP, as open_clip and as timm call them."""


class Adapter(nn.Module):
    """What a method puts beside one layer; a convolution's weight is read as a matrix
    [out, in * k * k]. weight: the layer's, whose shape and device it takes."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.rank, self.scale = rank, scale

    def begin(self, weight: Tensor, generator: torch.Generator) -> None:
        """Take the values of a start, drawn on the CPU, without effect on the layer."""
        raise NotImplementedError

    def rest(self, weight: Tensor) -> None:
        """Have no effect on the layer from now on."""
        raise NotImplementedError

    def whole(self, weight: Tensor) -> Tensor:
        """The weight that layer and adapter amount to."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of layer and adapter, [..., in] -> [..., out], without the whole weight."""
        raise NotImplementedError


class AdaptedLinear(nn.Linear):
    """A linear layer that an adapter was put beside."""

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return self.adapter.linear(x, self.weight, self.bias)


class AdaptedConv2d(nn.Conv2d):
    """A convolution that an adapter was put beside."""

    def forward(self, x: Tensor) -> Tensor:  # [B, in, H, W] -> [B, out, H', W']
        return self._conv_forward(x, self.adapter.whole(self.weight), self.bias)


ADAPTED = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}


@torch.no_grad()
def init_uniform(x: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    """Fill with values within 1 / sqrt(fan_in) of zero, as torch begins a linear layer."""
    if not x.is_meta:
        x.copy_((2 * torch.rand(x.shape, generator=generator) - 1) * fan_in**-0.5)
    return x


def target_layers(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers that get adapters, by name; `CmpError` for a target that no layer has."""
    able = {name: layer for name, layer in model.named_modules() if type(layer) in ADAPTED}
    for target in targets:
        if not any(f".{target}." in f".{name}." for name in able):
            parts = sorted({part for name in able for part in [name, *name.split(".")]})
            near = difflib.get_close_matches(target, parts, n=1, cutoff=0.0)
            raise CmpError(f"method.targets: no layer has {target!r}; the nearest is {near[0]!r}")
    return {
        name: layer
        for name, layer in able.items()
        if any(f".{target}." in f".{name}." for target in targets or DEFAULT_TARGETS)
        or (not targets and isinstance(layer, nn.Conv2d))
    }


def attach(model: nn.Module, make: Callable[[Tensor], Adapter], rank: int, targets=()) -> None:
    """Put adapters beside layers, in place, and freeze all else.

    `CmpError` for a rank that a layer cannot have, or for a layer that is frozen.
    """
    chosen = target_layers(model, targets)
    weights = {name: layer.weight for name, layer in chosen.items()}
    check_not_frozen(model, [f"{name}.weight" for name in weights])
    check_rank(rank, weights, ", or leave it out of method.targets")
    model.requires_grad_(False)
    for layer in chosen.values():
        layer.adapter = make(layer.weight)
        layer.__class__ = ADAPTED[type(layer)]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters, by name."""
    kinds = tuple(ADAPTED.values())
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights by their own names, adapters folded in."""
    found = {name: x.detach().clone() for name, x in model.state_dict().items()}
    for name, layer in adapted_layers(model).items():
        found[f"{name}.weight"] = layer.adapter.whole(layer.weight).clone()
        for key in layer.adapter.state_dict():
            del found[f"{name}.adapter.{key}"]
    return found


@torch.no_grad()
def load_merged(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights as `plain` gives them; adapters have no effect from then on."""
    own = {
        f"{name}.adapter.{key}": x
        for name, layer in adapted_layers(model).items()
        for key, x in layer.adapter.state_dict().items()
    }
    model.load_state_dict(own | weights)
    for layer in adapted_layers(model).values():
        layer.adapter.rest(layer.weight)


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within, adapters are folded into the weights; afterwards all is as before, to the bit."""
    if not adapted_layers(model):
        yield
        return
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    load_merged(model, merged_state_dict(model))
    try:
        yield
    finally:
        model.load_state_dict(before)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Fold adapters into the weights for good, in place: a network of open_clip's own layers."""
    load_merged(model, merged_state_dict(model))
    plain_of = {kind: own for own, kind in ADAPTED.items()}
    for layer in adapted_layers(model).values():
        del layer.adapter
        layer.__class__ = plain_of[type(layer)]
    return model


def begin_task(learner: TrainState, task: int) -> None:
    """Adapters fold into the weights and begin anew, unless they go on from task to task."""
    if task and not learner.config.method.fold:
        return
    if task:
        load_merged(learner.model, merged_state_dict(learner.model))
    for name, layer in adapted_layers(learner.model).items():
        seed = learner.config.seeds.init
        layer.adapter.begin(layer.weight, torch_generator("adapter", seed, name, task))


def adapter_method(kind: Callable[[Tensor, int, float], Adapter]) -> UpdateMethod:
    """The method that trains adapters of a kind: (weight, rank, scale) -> adapter."""

    def prepare(learner: TrainState) -> None:
        settings = learner.config.method
        rank, scale = settings.get("rank"), settings.get("scale")
        attach(learner.model, lambda w: kind(w, rank, scale), rank, settings.targets)
        begin_task(learner, 0)

    return UpdateMethod(prepare, begin_task)
