"""What pyproject.toml cannot say: an editable install has the book's packages, commands and data.

It is of a checkout, whose chapters import them wherever their kernels start. A wheel has `cmp`.
"""

import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

BOOK = ("lab", "lab.evidence", "lab.figures", "benchmark")
COMMANDS = ("study", "book", "site", "lab", "plan", "pretrain", "data.build", "results.verify")
SOURCES = ("embedded-inverted = benchmark.variants:load_inverted",
           "embedded-months = benchmark.variants:load_months")  # fmt: skip


class EditableWithBook(editable_wheel):
    """The command behind `pip install -e .`."""

    def run(self) -> None:
        """Make the editable wheel of `cmp` and the book's packages."""
        about = self.distribution
        about.packages += BOOK
        about.package_dir |= {name: f"book/{name}" for name in ("lab", "benchmark")}
        about.entry_points["cmp.commands"] = [
            f"{name} = lab.commands:{name.rpartition('.')[2]}" for name in COMMANDS
        ]
        about.entry_points["cmp.data"] += SOURCES
        with warnings.catch_warnings():  # it warns of folders that hide installed packages
            warnings.filterwarnings("ignore", "Editable installation")
            super().run()


# an egg-info folder beside `cmp` would hide the commands of an editable install
Path("_build").mkdir(exist_ok=True)
setup(
    cmdclass={"editable_wheel": EditableWithBook},
    options={"egg_info": {"egg_base": "_build"}, "build": {"build_base": "_build/wheel"}},
)
