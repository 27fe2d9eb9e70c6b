"""Compile the towers of a network."""

import warnings

import torch
from torch import nn

from cmp import models
from cmp.errors import CmpError, first_line
from cmp.models import Network

BACKEND = "inductor"
"""The backend that compiles the graphs of `compile_towers`."""
LAUNCH_BOUND = 50_000_000
"""Number of weights below which the host takes longer to launch the kernels of a step than a GPU
takes to run them. For bench-nano, 2.9 ms against 1.1 ms were predicted from a trace."""


def is_launch_bound(model: nn.Module) -> bool:
    """Return whether a step of a network is so short that kernel launches dominate it."""
    return sum(x.numel() for x in model.parameters()) < LAUNCH_BOUND


def compile_towers(model: Network, replay: bool) -> None:
    """Compile both towers as whole graphs, at their first batch, keeping the names of weights.

    For a small network, the kernels of a tower are recorded once per shape and then launched
    together as a CUDA graph. A graph writes to the same memory at every launch, so a step may
    launch it only once. A tower that cannot be traced as one graph is left uncompiled, with a
    warning that says why. Call this function in the context in which a step calls the towers, with
    gradients and within `cmp.arithmetic.autocast`.

    Args:
        model: The network, changed in place.
        replay: Whether each tower sees only one batch per step, and so may be a CUDA graph.

    Raises:
        CmpError: The network is on a CPU, where compiled bf16 convolutions can give gradients that
            are not finite (torch 2.13).
    """
    if model.logit_scale.device.type == "cpu" and BACKEND == "inductor":
        raise CmpError(
            "--compile: gradients are not reliable on a CPU; use --device cuda, or leave out "
            "--compile"
        )
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    device, side = model.logit_scale.device, models.preprocessing(model).size
    pixels = torch.zeros(2, 3, side, side, device=device)
    tokens = torch.ones(2, model.context_length, dtype=torch.long)
    towers = {"image": (model.visual, lambda: models.encode_image(model, pixels))}
    text = getattr(model, "transformer", None) or getattr(model, "text", None)
    if text is not None:  # texts have many lengths
        towers["text"] = (text, lambda: models.encode_text(model, tokens))
    mode = "reduce-overhead" if replay and is_launch_bound(model) else None
    for layer in models.batch_norms(model):
        layer.eval()  # until training begins: black images must not move their statistics
    for kind, (tower, call) in towers.items():
        try:
            tower.compile(fullgraph=True, backend="eager")  # traces without compiling
            call()
        except TorchDynamoException as error:
            tower._compiled_call_impl = None
            reason = first_line(error)
            warnings.warn(f"--compile: the {kind} tower is not compiled ({reason})", stacklevel=2)
        else:
            torch._dynamo.reset()
            # not `fullgraph`, which ends the run where one of many batch sizes, or a hook that a
            # method adds, cannot be compiled; a second batch size is compiled for all sizes
            dynamic = True if kind == "text" else None
            tower.compile(backend=BACKEND, dynamic=dynamic, mode=mode)
