"""Where things are: the repository, its manifests, and the one folder for everything built."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
MANIFESTS = ROOT / "data_manifests"
WEIGHTS = PACKAGE / "weights"
MODEL_CONFIGS = PACKAGE / "model_configs"

SHORT = 12
"""Characters of a run's id that name its folder and are shown to people."""


def build_folder() -> Path:
    """Downloads, stores and results: `$CMP_BUILD`, else `_build` in the repository."""
    return Path(os.environ.get("CMP_BUILD", ROOT / "_build"))
