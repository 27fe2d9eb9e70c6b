"""How a step is computed: its arithmetic, in parts, compiled; and what a network has to allow."""

import contextlib
import functools
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from cmp import models
from cmp.config import Training
from cmp.errors import CmpError, first_line
from cmp.models import Network
from cmp.scale import processes

BACKEND = "inductor"
"""What compiles the graphs of `compile_towers`."""
LAUNCH_BOUND = 50_000_000
"""Entries of a network below which the host takes longer to launch the kernels of a step than a
card to compute them (`cmpt bench trace`): about 2.9 ms against 1.1 ms for bench-nano."""
_STOCHASTIC_LAYERS = {"p": "Dropout", "drop_prob": "DropPath", "prob": "PatchDropout"}
"""Where layers that draw at random while they train keep their rate."""


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of a forward pass: "bf16" by autocast, "fp32" as it is."""
    if device.type == "meta":  # has no arithmetic
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class ExecutionConfig:
    """How a step is computed. It decides the last bits only, so it is no part of a run's config.

    Attributes:
        micro_batch: Samples that each process sees at a time; the loss is still that of the whole
            batch. All of them where None.
        checkpoint_activations: Whether activations are computed again for the backward pass
            instead of kept.
        compile_towers: Whether torch compiles both towers, see `compile_towers`.
    """

    micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile_towers: bool = False

    @functools.cached_property  # so that a step need not ask again
    def uses_micro_batches(self) -> bool:
        """Whether no process sees the whole batch at once."""
        return self.micro_batch is not None or processes.world_size() > 1

    def record(self) -> dict[str, str]:
        """Return what a run's provenance says of it; nothing for the default."""
        count = processes.world_size()
        words = [f"{count} processes"] * (count > 1)
        words += [f"micro-batches of {self.micro_batch}"] * (self.micro_batch is not None)
        words += ["activations recomputed"] * self.checkpoint_activations
        words += ["compiled"] * self.compile_towers
        return {"execution": ", ".join(words)} if words else {}

    def outside_steps(self) -> contextlib.AbstractContextManager:
        """Return the context of all but training steps: no tower is compiled anew for the batches
        there, which have many sizes."""
        if self.compile_towers:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()

    def prepare(self, model: Network, name: str, section: Training) -> None:
        """Make a network ready.

        Args:
            model: The network, changed in place.
            name: Its name, for errors.
            section: The config section.

        Raises:
            CmpError: The network or the batch cannot be computed in this way.
        """
        if self.checkpoint_activations:
            trunk = getattr(model.visual, "trunk", None)
            if trunk is not None and not hasattr(trunk, "set_grad_checkpointing"):
                raise CmpError(
                    f"--checkpoint-activations: the image tower of {name!r} does not offer it; "
                    "transformers of open_clip do"
                )
            model.set_grad_checkpointing(True)
        if self.uses_micro_batches:
            processes.local_slice(section.batch)
            check_divisible(model, name)
        if self.compile_towers:
            with autocast(section.precision, model.logit_scale.device):
                compile_towers(model, replay=not self.uses_micro_batches)


def is_launch_bound(model: nn.Module) -> bool:
    """Return whether a step of a network is so short that launching its kernels decides."""
    return sum(x.numel() for x in model.parameters()) < LAUNCH_BOUND


def compile_towers(model: Network, replay: bool) -> None:
    """Let torch compile both towers whole, at their first batch; names of weights stay.

    The kernels of a small network's tower are recorded once for each shape, and launched all at
    once afterwards, as a CUDA graph. A graph writes to the same memory whenever it is launched,
    so a step may launch it once only. A tower that cannot be traced as one graph is left as it
    is, with a warning that says why. Call this function as a step calls the towers, with gradients
    and within `autocast`.

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
