"""Compute steps in micro-batches, in several processes, compiled, and without waiting for
checks."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmp.arithmetic import autocast
from cmp.data import Batch
from cmp.errors import CmpError
from cmp.models import Network
from cmp.scale import processes
from cmp.scale.compiling import compile_towers
from cmp.scale.losses import is_large, shared_loss
from cmp.scale.micro_batches import check_divisible, encode_in_parts
from cmp.training import Execution, Features, Report, TrainState

DEFERRED = {"cuda"}
"""Devices on which the host does not wait to check that a step was finite."""


@dataclass(frozen=True)
class ExecutionConfig(Execution):
    """How steps are computed. This affects only the last bits, so it is not part of a run's config.

    Attributes:
        micro_batch: Samples that each process encodes at a time; None for all. The loss is still
            that of the whole batch.
        checkpoint_activations: Whether to recompute activations in the backward pass instead of
            storing them.
        compile_towers: Whether to compile both towers, see `cmp.scale.compiling`.
    """

    micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile_towers: bool = False

    @property
    def sees_whole_batch(self) -> bool:
        """Whether a step sees its whole batch at once."""
        return self.micro_batch is None and processes.world_size() == 1

    def record(self) -> dict[str, str]:
        """Return this execution's entry in a run's provenance; empty for the default."""
        count = processes.world_size()
        facts = {
            f"{count} processes": count > 1,
            f"micro-batches of {self.micro_batch}": self.micro_batch is not None,
            "activations recomputed": self.checkpoint_activations,
            "compiled": self.compile_towers,
        }
        words = [fact for fact, is_so in facts.items() if is_so]
        return {"execution": ", ".join(words)} if words else {}

    def prepare(self, state: TrainState) -> None:
        """Prepare a network.

        Args:
            state: The network, changed in place, and its run.

        Raises:
            CmpError: The network or the batch does not work with this execution.
        """
        model, name = state.model, state.config.model.name
        if self.checkpoint_activations:
            trunk = getattr(model.visual, "trunk", None)
            if trunk is not None and not hasattr(trunk, "set_grad_checkpointing"):
                raise CmpError(
                    f"--checkpoint-activations: the image tower of {name!r} does not support it; "
                    "leave it out, or choose an open_clip transformer"
                )
            model.set_grad_checkpointing(True)
        if not self.sees_whole_batch:
            processes.local_slice(state.config.training.batch)
            check_divisible(model, name)
        if self.compile_towers:
            with autocast(state.config.training.precision, model.logit_scale.device):
                compile_towers(model, replay=self.sees_whole_batch)

    def own_samples(self, batch: int) -> slice:
        """Return the samples of a batch that this process loads."""
        return processes.local_slice(batch)

    def encode(self, state: TrainState, batch: Batch, task: int, step: int) -> Features:
        """Return the features of a batch."""
        if self.sees_whole_batch:
            return super().encode(state, batch, task, step)
        own = self.own_samples(len(batch.rows))
        size = self.micro_batch or own.stop - own.start
        return encode_in_parts(state, batch, task, step, own, size)

    def loss(self, model: Network, features: Features) -> Tensor:
        """Return the loss that the network was pretrained with. It is computed in parts for several
        processes, and for a large batch in micro-batches; otherwise, all logits exist at once."""
        batch = len(features.image)
        if self.sees_whole_batch or not is_large(batch):
            return super().loss(model, features)
        return shared_loss(model, features.image, features.text, self.own_samples(batch))

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], most: float
    ) -> Tensor:
        """Clip gradients to a norm of at most `most`, and return the original norm.

        On a GPU, a fused optimiser divides them in its own step, which saves a pass over them.
        """
        parameters = [x for x in parameters if x.grad is not None]
        if not parameters or not _is_deferred(optimizer, parameters[0]):
            return super().clip(optimizer, parameters, most)
        norm = nn.utils.get_total_norm([cast(Tensor, x.grad) for x in parameters])
        cast(Any, optimizer).grad_scale = (norm / most).clamp(min=1).float()  # whatever the weights
        return norm

    def check(
        self, state: TrainState, optimizer: torch.optim.Optimizer, finite: Tensor, report: Report
    ) -> None:
        """Check that a step is finite before it changes the weights, without waiting for a GPU.

        On a GPU, the optimiser itself skips a step that is not finite. The host finds out during
        the next step, while the GPU is busy.

        Args:
            state: The network and its run, which remembers the step until it is known to be finite.
            optimizer: The optimiser. If it cannot skip a step, the host waits.
            finite: Whether the step is finite, bool [].
            report: Returns the error.

        Raises:
            Diverged: This step or the previous one is not finite.
        """
        self.wait(state)
        if not _is_deferred(optimizer, finite):
            super().check(state, optimizer, finite, report)
            return
        cast(Any, optimizer).found_inf = (~finite).float()
        state.unchecked.append((copy_to_host(finite), report))

    def wait(self, state: TrainState) -> None:
        """Wait until the host knows whether the last step was finite; raise `Diverged` if not."""
        while state.unchecked:
            is_finite, report = state.unchecked.pop()
            if not is_finite():
                raise report()

    def outside_steps(self) -> contextlib.AbstractContextManager:
        """Return the context for everything computed between training steps. Batches there have
        many sizes, and compiled towers are not recompiled for them."""
        if self.compile_towers:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()


def _is_deferred(optimizer: torch.optim.Optimizer, x: Tensor) -> bool:
    """Return whether the optimiser of a tensor's device can skip a step and divide gradients, as
    for mixed precision, and the host need not wait for it."""
    can_scale = getattr(optimizer, "_step_supports_amp_scaling", False)
    return can_scale and x.device.type in DEFERRED


def copy_to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor from a GPU, and return a function that waits for the copy but not for
    later work on the GPU."""
    if x.device.type not in DEFERRED:
        return lambda: x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait
