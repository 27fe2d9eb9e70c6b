"""What a network has to allow before a step is computed in parts or compiled."""

import warnings

import torch
from torch import nn

from cmp import models
from cmp.errors import CmpError
from cmp.models import Network

BACKEND = "inductor"
"""What compiles the graphs of `compile_towers`."""
_STOCHASTIC_LAYERS = {"p": "Dropout", "drop_prob": "DropPath", "prob": "PatchDropout"}
"""Where layers that draw at random while they train keep their rate."""


def compile_towers(model: Network) -> None:
    """Let torch compile both towers whole, at their first batch; names of weights stay.

    A tower that cannot be traced as one graph is left as it is, with a warning that says why. Call
    it as a step calls the towers, with gradients and within `autocast`.

    Args:
        model: The network, changed in place.

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
    for kind, (tower, call) in towers.items():
        try:
            tower.compile(fullgraph=True, backend="eager")  # traces, and compiles nothing
            call()
        except TorchDynamoException as error:
            tower._compiled_call_impl = None
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"--compile: the {kind} tower stays as it is ({reason})", stacklevel=2)
        else:
            torch._dynamo.reset()
            tower.compile(fullgraph=True, backend=BACKEND, dynamic=kind == "text")


def check_divisible(model: nn.Module, name: str) -> None:
    """Check that a network treats each sample alike, whatever batch it is in.

    Raises:
        CmpError: A layer normalises over the batch or draws at random.
    """
    for where, layer in model.named_modules():
        kind = type(layer).__name__
        rates = [getattr(layer, key, 0) for key, word in _STOCHASTIC_LAYERS.items() if word in kind]
        if any(rates) or isinstance(layer, nn.modules.batchnorm._BatchNorm):
            what = "draws at random" if any(rates) else "normalises over the batch"
            raise CmpError(
                f"model.name: {where} of {name!r} is a {kind}, which {what}: a batch in parts "
                "would be another batch; leave out --micro-batch and compute in one process"
            )
