"""How weights are combined: functions of some models' weights, newest first, and of the weights
theta_0 before the stream. They change neither and share no tensor with them (spec 4)."""

from collections.abc import Callable

from torch import Tensor

from cmp.config import Merging

Weights = dict[str, Tensor]
Rule = Callable[[list[Weights], Weights, Merging], Weights]


def interpolation(models: list[Weights], zero: Weights, merging: Merging) -> Weights:
    """w theta_newest + the others' equal shares of 1 - w, in fp32; `merging.weight` is w."""
    rest = (1 - merging.weight) / max(len(models) - 1, 1)
    shares = [merging.weight, *[rest] * (len(models) - 1)] if len(models) > 1 else [1.0]

    def mean(name: str) -> Tensor:
        pairs = zip(shares, models, strict=True)
        return sum(share * each[name].float() for share, each in pairs).to(zero[name].dtype)

    return {name: mean(name) for name in zero}


RULES: dict[str, Rule] = {"interpolation": interpolation}
"""By `merging.rule`."""
