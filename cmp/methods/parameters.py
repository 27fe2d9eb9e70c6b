"""Choose the parameters that a method trains."""

from collections.abc import Mapping

from torch import Tensor, nn

from cmp.errors import CmpError
from cmp.training import trainable_parameters


def train_only(model: nn.Module, names: list[str]) -> None:
    """Freeze all parameters except these; raise `CmpError` as `check_not_frozen` does."""
    check_not_frozen(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def check_not_frozen(model: nn.Module, names: list[str]) -> None:
    """Check that a method can train the given parameters.

    Raises:
        CmpError: There are none, or the user froze one of them.
    """
    if not names:
        raise CmpError(
            "method.name: this model has no parameters for this method to train; choose another "
            "method"
        )
    if frozen := set(names) - trainable_parameters(model).keys():
        raise CmpError(
            f"method.name: {min(frozen)} is in a frozen tower; call requires_grad_(True) on it, "
            "or choose a method that does not train it"
        )


def check_rank(rank: int, weights: Mapping[str, Tensor], advice: str) -> None:
    """Check that a rank is at most the width of every weight, treated as a matrix [out, rest].

    Args:
        rank: The rank.
        weights: The weights by name.
        advice: The end of the error message.

    Raises:
        CmpError: The rank is too high; the message names the narrowest weight.
    """
    widths = {name: min(x.flatten(1).shape) for name, x in weights.items()}
    name = min(widths, key=widths.__getitem__)
    if rank > widths[name]:
        rows, columns = weights[name].flatten(1).shape
        raise CmpError(
            f"method.rank: {rank} exceeds the width of {name}, a matrix of {rows} x {columns}; "
            f"use at most {widths[name]}{advice}"
        )
