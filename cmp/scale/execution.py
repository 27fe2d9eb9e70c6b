"""How a step is computed: in micro-batches, by several processes, compiled, without waiting."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from cmp.arithmetic import autocast
from cmp.data import Batch
from cmp.errors import CmpError, Diverged
from cmp.scale import processes
from cmp.scale.compiling import compile_towers
from cmp.scale.micro_batches import check_divisible, encode_in_parts
from cmp.training import Execution, Features, TrainState

DEFERRED = {"cuda"}
"""Devices that the host does not wait for to learn whether a step was finite."""

UncheckedStep = tuple[Callable[[], Tensor], Callable[[], Diverged]]
"""Of a step: what waits until the host knows whether it was finite, and the error if it was not."""


@dataclass(frozen=True)
class ExecutionConfig(Execution):
    """How a step is computed. It decides the last bits only, so it is no part of a run's config.

    Attributes:
        micro_batch: Samples that each process sees at a time; the loss is still that of the whole
            batch. All of them where None.
        checkpoint_activations: Whether activations are computed again for the backward pass
            instead of kept.
        compile_towers: Whether torch compiles both towers, see `cmp.scale.compiling`.
    """

    micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile_towers: bool = False
    _unchecked: list[UncheckedStep] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @functools.cached_property  # so that a step need not ask again
    def sees_whole_batch(self) -> bool:
        """Whether a step sees its whole batch at once."""
        return self.micro_batch is None and processes.world_size() == 1

    def settings(self) -> dict[str, bool | int]:
        """Return what differs from the default, by name."""
        names = ("micro_batch", "checkpoint_activations", "compile_towers")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def record(self) -> dict[str, str]:
        """Return what a run's provenance says of it; nothing for the default."""
        count = processes.world_size()
        words = [f"{count} processes"] * (count > 1)
        words += [f"micro-batches of {self.micro_batch}"] * (self.micro_batch is not None)
        words += ["activations recomputed"] * self.checkpoint_activations
        words += ["compiled"] * self.compile_towers
        return {"execution": ", ".join(words)} if words else {}

    def prepare(self, state: TrainState) -> None:
        """Make a network ready.

        Args:
            state: The network, changed in place, and its run.

        Raises:
            CmpError: The network or the batch cannot be computed in this way.
        """
        model, name = state.model, state.config.model.name
        self._unchecked.clear()
        if self.checkpoint_activations:
            trunk = getattr(model.visual, "trunk", None)
            if trunk is not None and not hasattr(trunk, "set_grad_checkpointing"):
                raise CmpError(
                    f"--checkpoint-activations: the image tower of {name!r} does not offer it; "
                    "transformers of open_clip do"
                )
            model.set_grad_checkpointing(True)
        if not self.sees_whole_batch:
            processes.local_slice(state.config.training.batch)
            check_divisible(model, name)
        if self.compile_towers:
            with autocast(state.config.training.precision, model.logit_scale.device):
                compile_towers(model, replay=self.sees_whole_batch)

    def own_samples(self, batch: int) -> slice:
        """Return which of the samples of a batch this process loads."""
        return processes.local_slice(batch)

    def encode(self, state: TrainState, batch: Batch, task: int, step: int) -> Features:
        """Return the features of a batch, from which its loss is computed."""
        if self.sees_whole_batch:
            return super().encode(state, batch, task, step)
        own = self.own_samples(len(batch.rows))
        size = self.micro_batch or own.stop - own.start
        return encode_in_parts(state, batch, task, step, own, size)

    def check(
        self, optimizer: torch.optim.Optimizer, finite: Tensor, report: Callable[[], Diverged]
    ) -> None:
        """Check a step before its weights change, without waiting for a card.

        On a card, the optimiser itself skips a step that is not finite. The host learns of it
        during the next step, while the card is busy.

        Args:
            optimizer: What takes the step. The host waits if it cannot skip one.
            finite: Whether the step is finite, bool [].
            report: Returns the error.

        Raises:
            Diverged: This step, or the one before, is not finite.
        """
        self.wait()
        can_skip = getattr(optimizer, "_step_supports_amp_scaling", False)  # for mixed precision
        if not (can_skip and finite.device.type in DEFERRED):
            super().check(optimizer, finite, report)
            return
        cast(Any, optimizer).found_inf = (~finite).float()
        self._unchecked.append((copy_to_host(finite), report))

    def wait(self) -> None:
        """Wait until the host knows whether the last step was finite; raise `Diverged` if not."""
        while self._unchecked:
            is_finite, report = self._unchecked.pop()
            if not is_finite():
                raise report()

    def outside_steps(self) -> contextlib.AbstractContextManager:
        """Return the context of all that is computed between training steps: no tower is compiled
        anew for the batches there, which have many sizes."""
        if self.compile_towers:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()


def copy_to_host(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor from a card; return what waits for it, and for nothing that the card
    is given to do afterwards."""
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
