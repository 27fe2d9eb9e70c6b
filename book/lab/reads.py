"""Record which files a chapter asks for while it runs, as an extension of its kernel.

This module imports nothing of the project, which reads files as it is imported.
"""

import os
import sys
from typing import Any

PATHS: set[str] = set()
"""The paths that were opened, whether or not they exist, and the patterns that were searched."""


def load_ipython_extension(shell: Any) -> None:
    """Begin to record."""
    sys.addaudithook(_note_path)


def _note_path(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], str):
        PATHS.add(os.path.abspath(args[0]))
    elif event == "pathlib.Path.glob":
        PATHS.add(os.path.abspath(os.path.join(args[0], args[1])))
