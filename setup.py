"""What pyproject.toml cannot say: an editable install has the book's package `lab` as well.

It is of a checkout, whose chapters import `lab` wherever their kernels start. A wheel has `cmp`.
"""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWithBook(editable_wheel):
    """The command behind `pip install -e .`."""

    def run(self) -> None:
        """Make the editable wheel of `cmp` and `lab`."""
        self.distribution.packages += ["lab", "lab.figures"]
        self.distribution.package_dir |= {"lab": "book/lab"}
        super().run()


setup(cmdclass={"editable_wheel": EditableWithBook})
