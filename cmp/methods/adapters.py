"""Adapters: small trainable matrices added to frozen weights, and merging the two.

A layer keeps its name and weight, and its adapter is a child module, so a state dict contains both.
`merged_state_dict` returns the combined weights, which are scored, merged and saved.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cmp.errors import CmpError, did_you_mean
from cmp.methods.parameters import check_not_frozen, check_rank
from cmp.models import Network
from cmp.seeds import torch_generator
from cmp.training import TrainState, UpdateMethod

SETTINGS: dict[str, Any] = {"rank": 5, "scale": 1.0, "targets": (), "fold": True}
"""The config keys of every adapter method, with their default values."""
DEFAULT_TARGETS = (
    "q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj",
    "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
"""Layers that get adapters by default, in addition to all convolutions: attention and both layers
of the MLP, as named in open_clip and timm."""


class Adapter(nn.Module):
    """The adapter of one layer. A convolution's weight is treated as a matrix [out, in * k * k]."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        """Initialise with the shape and device of a layer's weight."""
        super().__init__()
        self.rank, self.scale = rank, scale

    def begin(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw initial values on the CPU that have no effect on the layer."""
        raise NotImplementedError

    def reset(self, weight: Tensor) -> None:
        """Reset the adapter so that it has no effect on the layer."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the combined weight of layer and adapter."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the combined output of layer and adapter, [..., in] -> [..., out]."""
        raise NotImplementedError


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return self.adapter.linear(x, self.weight, self.bias)


class AdaptedConv2d(nn.Conv2d):
    """A convolution with an adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:  # [B, in, H, W] -> [B, out, H', W']
        return self._conv_forward(x, self.adapter.merged_weight(self.weight), self.bias)


ADAPTED = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}


@torch.no_grad()
def init_uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a matrix [out, in] uniformly within 1 / sqrt(in) of zero, as torch initialises a linear
    layer."""
    return x.copy_((2 * torch.rand(x.shape, generator=generator) - 1) * x.shape[1] ** -0.5)


def target_layers(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that get adapters, by name.

    Args:
        model: The network.
        targets: Parts of names; if empty, all convolutions and `DEFAULT_TARGETS`.

    Raises:
        CmpError: No layer has a target in its name.
    """
    named = model.named_modules()
    layers: dict[str, Any] = {name: layer for name, layer in named if type(layer) in ADAPTED}
    for target in targets:
        if not any(f".{target}." in f".{name}." for name in layers):
            parts = {part for name in layers for part in name.split(".") if not part.isdigit()}
            hint = did_you_mean(target, parts) or f"; choose from {', '.join(sorted(parts))}"
            raise CmpError(f"method.targets: no layer has {target!r} in its name{hint}")
    return {
        name: layer
        for name, layer in layers.items()
        if any(f".{target}." in f".{name}." for target in targets or DEFAULT_TARGETS)
        or (not targets and isinstance(layer, nn.Conv2d))
    }


def attach(
    model: nn.Module, make: Callable[[Tensor], Adapter], rank: int, targets: tuple[str, ...]
) -> None:
    """Attach adapters to layers in place, and freeze everything else.

    Args:
        model: The network.
        make: Creates the adapter for a layer's weight.
        rank: The rank, which is checked.
        targets: As in `target_layers`.

    Raises:
        CmpError: A layer cannot have this rank, or is frozen.
    """
    layers = target_layers(model, targets)
    weights = {name: layer.weight for name, layer in layers.items()}
    check_not_frozen(model, [f"{name}.weight" for name in weights])
    check_rank(rank, weights, ", or leave it out of method.targets")
    model.requires_grad_(False)
    for layer in layers.values():
        layer.adapter = make(layer.weight)
        layer.__class__ = ADAPTED[type(layer)]


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear | AdaptedConv2d]:
    """Return the layers with adapters, by name."""
    kinds = (AdaptedLinear, AdaptedConv2d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


@torch.no_grad()
def merged_state_dict(
    model: nn.Module, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Return a copy of the weights under their original names, with adapters merged in.

    Args:
        model: The network.
        device: The device of the copy. Default: that of the network.
    """
    weights = {name: x.detach().to(device, copy=True) for name, x in model.state_dict().items()}
    for name, layer in adapted_layers(model).items():
        merged_weight = layer.adapter.merged_weight(layer.weight)
        weights[f"{name}.weight"] = merged_weight.to(device, copy=True)
        for key in layer.adapter.state_dict():
            del weights[f"{name}.adapter.{key}"]
    return weights


@torch.no_grad()
def load_merged(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights from `merged_state_dict`, and reset adapters to have no effect."""
    adapters = {name: x for name, x in model.state_dict().items() if ".adapter." in name}
    model.load_state_dict(adapters | weights)
    for layer in adapted_layers(model).values():
        layer.adapter.reset(layer.weight)


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge adapters into the weights within this context, and restore everything exactly
    afterwards."""
    if not adapted_layers(model):
        yield
        return
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    load_merged(model, merged_state_dict(model))
    try:
        yield
    finally:
        model.load_state_dict(before)


def merge_and_unload(model: Network) -> Network:
    """Merge adapters into the weights permanently, and return the network with its original
    layers."""
    load_merged(model, merged_state_dict(model))
    plain = {kind: own for own, kind in ADAPTED.items()}
    for layer in adapted_layers(model).values():
        del layer.adapter
        layer.__class__ = plain[type(layer)]
    return model


def begin_task(state: TrainState, task: int) -> None:
    """Merge adapters into the weights and restart them, unless they are kept between tasks."""
    if task and not state.config.method.fold:
        return
    if task:
        load_merged(state.model, merged_state_dict(state.model))
    for name, layer in adapted_layers(state.model).items():
        generator = torch_generator("adapter", state.config.seeds.init, name, task)
        layer.adapter.begin(layer.weight, generator)


def adapter_method(kind: Callable[[Tensor, int, float], Adapter]) -> UpdateMethod:
    """Return the method that trains one kind of adapter, (weight, rank, scale) -> adapter."""

    def prepare(state: TrainState) -> None:
        section = state.config.method
        rank, scale = section.get("rank"), section.get("scale")
        attach(state.model, lambda w: kind(w, rank, scale), rank, section.targets)
        begin_task(state, 0)

    return UpdateMethod(prepare, begin_task)
