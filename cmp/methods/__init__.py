"""Update methods: what trains, and what is added to the loss (design rule 3).

A method is a module of this package with a `METHOD`, and a name in `config.Method`: "locked-image"
is `locked_image.py`. Everything else finds it by its name.
"""

from torch import Tensor, nn

from cmp.errors import CmpError
from cmp.training import trainable_parameters


def train_only(model: nn.Module, names: list[str]) -> None:
    """Freeze all but these parameters; raises as `check_thawed` does."""
    check_not_frozen(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def check_not_frozen(model: nn.Module, names: list[str]) -> None:
    """`CmpError` if there are no such parameters, or if one of them was frozen by someone else."""
    if not names:
        raise CmpError("method.name: this model has nothing that the method could train")
    if frozen := set(names) - trainable_parameters(model).keys():
        raise CmpError(
            f"method.name: {min(frozen)} lies in a tower that is frozen; call "
            "requires_grad_(True) on it, or choose a method that leaves it alone"
        )


def check_rank(rank: int, weights: dict[str, Tensor], advice: str) -> None:
    """`CmpError` if a weight, read as a matrix [out, rest], is narrower; it names the narrowest."""
    widths = {name: min(x.flatten(1).shape) for name, x in weights.items()}
    name = min(widths, key=widths.get)
    if rank > widths[name]:
        rows, columns = weights[name].flatten(1).shape
        raise CmpError(
            f"method.rank: {rank} is above the width of {name}, a matrix of {rows} x {columns}; "
            f"at most {widths[name]}{advice}"
        )
