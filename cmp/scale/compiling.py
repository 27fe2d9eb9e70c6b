"""Towers that torch compiles."""

import warnings

import torch
from torch import nn

from cmp import models
from cmp.errors import CmpError, first_line
from cmp.models import Network

BACKEND = "inductor"
"""What compiles the graphs of `compile_towers`."""
LAUNCH_BOUND = 50_000_000
"""Entries of a network below which the host takes longer to launch the kernels of a step than a
card to compute them (`cmpt bench trace`): about 2.9 ms against 1.1 ms for bench-nano."""


def is_launch_bound(model: nn.Module) -> bool:
    """Return whether a step of a network is so short that launching its kernels decides."""
    return sum(x.numel() for x in model.parameters()) < LAUNCH_BOUND


def compile_towers(model: Network, replay: bool) -> None:
    """Let torch compile both towers whole, at their first batch; names of weights stay.

    The kernels of a small network's tower are recorded once for each shape, and launched all at
    once afterwards, as a CUDA graph. A graph writes to the same memory whenever it is launched,
    so a step may launch it once only. A tower that cannot be traced as one graph is left as it
    is, with a warning that says why. Call this function as a step calls the towers, with gradients
    and within `cmp.models.autocast`.

    Args:
        model: The network, changed in place.
        replay: Whether each tower sees one batch in a step, and may be a CUDA graph.

    Raises:
        CmpError: It is on a CPU, where compiled convolutions in bf16 have had gradients that are
            not finite (torch 2.13).
    """
    if model.logit_scale.device.type == "cpu" and BACKEND == "inductor":
        raise CmpError("--compile: on a CPU its gradients cannot be trusted; it is for a CUDA card")
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    device, side = model.logit_scale.device, models.preprocessing(model).size
    pixels = torch.zeros(2, 3, side, side, device=device)
    tokens = torch.ones(2, model.context_length, dtype=torch.long)
    towers = {"image": (model.visual, lambda: models.encode_image(model, pixels))}
    text = getattr(model, "transformer", None) or getattr(model, "text", None)
    if text is not None:  # texts come in all lengths
        towers["text"] = (text, lambda: models.encode_text(model, tokens))
    mode = "reduce-overhead" if replay and is_launch_bound(model) else None
    for kind, (tower, call) in towers.items():
        try:
            tower.compile(fullgraph=True, backend="eager")  # traces, and compiles nothing
            call()
        except TorchDynamoException as error:
            tower._compiled_call_impl = None
            reason = first_line(error)
            warnings.warn(f"--compile: the {kind} tower stays as it is ({reason})", stacklevel=2)
        else:
            torch._dynamo.reset()
            tower.compile(fullgraph=True, backend=BACKEND, dynamic=kind == "text", mode=mode)
