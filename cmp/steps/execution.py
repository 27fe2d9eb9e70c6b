"""How a step is computed: at once, in parts, by several processes. It decides the last bits only,
so it is no part of a run's config; its provenance tells.
"""

from dataclasses import dataclass

from torch import nn

from cmp.errors import CmpError
from cmp.steps import distributed

RANDOM = {"p": "Dropout", "drop_prob": "DropPath", "prob": "PatchDropout"}
"""Layers that draw from chance while they train, and where they keep their rate."""


@dataclass(frozen=True)
class Execution:
    """micro_batch: samples at a time in each process, the loss still that of the whole batch (see
    `cmp.training.gradcache`); all where left out. checkpoint_activations: what a block computes is
    computed again for its gradients, instead of kept."""

    micro_batch: int | None = None
    checkpoint_activations: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether no process sees the whole batch at once."""
        return self.micro_batch is not None or distributed.size() > 1

    def record(self) -> dict[str, str]:
        """What a run's provenance says of it; nothing for a run that is computed at once."""
        words = [
            f"{distributed.size()} processes" if distributed.size() > 1 else "",
            f"micro-batches of {self.micro_batch}" if self.micro_batch else "",
            "activations recomputed" if self.checkpoint_activations else "",
        ]
        said = ", ".join(word for word in words if word)
        return {"execution": said} if said else {}

    def prepare(self, model: nn.Module, name: str, batch: int) -> None:
        """Make a network ready; `CmpError` if it, or the batch, cannot be computed so."""
        if self.checkpoint_activations:
            trunk = getattr(model.visual, "trunk", None)
            if trunk is not None and not hasattr(trunk, "set_grad_checkpointing"):
                raise CmpError(
                    f"--checkpoint-activations: the image tower of {name!r} does not offer it; "
                    "transformers of open_clip do"
                )
            model.set_grad_checkpointing(True)
        if self.in_parts:
            distributed.mine(batch)
            check_parts(model, name)


WHOLE = Execution()
"""At once, in this process."""


def check_parts(model: nn.Module, name: str) -> None:
    """`CmpError` for a network that makes another thing of a sample with each batch it stands in,
    or with each time that it is looked at."""
    for where, layer in model.named_modules():
        kind = type(layer).__name__
        rates = [key for key, word in RANDOM.items() if word in kind and getattr(layer, key, 0)]
        if rates or isinstance(layer, nn.modules.batchnorm._BatchNorm):
            what = "draws from chance" if rates else "normalises over the batch"
            raise CmpError(
                f"model.name: {where} of {name!r} is a {kind}, which {what}: a batch in parts "
                "would be another batch; leave out --micro-batch and compute in one process"
            )
