"""Update methods, which choose what trains and what is added to the loss.

Each method has a module and is registered under its name. `parameters`, `adapters`, `layers` and
`importance` contain what several methods share.
"""

import importlib

from cmp.errors import CmpError
from cmp.registry import Option
from cmp.training import UpdateMethod

MODULES = (
    "full", "locked_image", "locked_text", "bitfit", "lnfit", "lora", "dora", "vera", "galore",
    "ewc", "si", "distillation",
)  # fmt: skip
"""The package's methods, in the order in which lists show them."""

for _name in MODULES:
    importlib.import_module(f"cmp.methods.{_name}")


def check_option(option: Option) -> None:
    """Check that a method is a function that prepares a run, or an `UpdateMethod`.

    Raises:
        CmpError: It is neither.
    """
    if not isinstance(option.value, UpdateMethod) and not callable(option.value):
        raise CmpError(
            f"method {option.name!r}: must be a function of the train state or an UpdateMethod, "
            f"not {type(option.value).__name__}"
        )
