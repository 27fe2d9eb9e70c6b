"""LNFit: the gains and biases of norms alone train, in both towers (spec 3)."""

from torch import nn

from cmp.methods import Learner, Method, train_only

NORMS = (nn.LayerNorm, nn.GroupNorm)


def prepare(learner: Learner) -> None:
    """Freeze all but the norms, found by what they are and not by what they are called."""
    found = [
        f"{place}.{name}"
        for place, module in learner.model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters()
    ]
    train_only(learner.model, found)


METHOD = Method(prepare)
