"""Update methods, which choose what trains and what is added to the loss.

Each method has a module and is registered under its name. `parameters`, `adapters`, `layers` and
`importance` contain what several methods share.
"""

import importlib

MODULES = (
    "full", "locked_image", "locked_text", "bitfit", "lnfit", "lora", "dora", "vera", "galore",
    "ewc", "si", "distillation",
)  # fmt: skip
"""The package's methods, in the order in which lists show them."""

for _name in MODULES:
    importlib.import_module(f"cmp.methods.{_name}")
