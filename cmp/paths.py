"""Where things are: the repository, its manifests, and the one folder for everything built."""

import os
import re
from pathlib import Path

from cmp.errors import CmpError

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
MANIFESTS = ROOT / "data_manifests"
WEIGHTS = PACKAGE / "weights"
MODEL_CONFIGS = PACKAGE / "model_configs"

SHORT = 12
"""Characters of a run's id that name its folder and are shown to people."""


def named(folder: Path, name: str, suffix: str = "") -> Path:
    """The file or folder of this name right in `folder`; `CmpError` if it could lie elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}", name):
        raise CmpError(f"{name!r:.60}: not the name of anything in {folder}")
    return folder / f"{name}{suffix}"


def build_folder() -> Path:
    """Downloads, stores and results: `$CMP_BUILD`, else `_build` in the repository."""
    return Path(os.environ.get("CMP_BUILD") or ROOT / "_build").expanduser()
