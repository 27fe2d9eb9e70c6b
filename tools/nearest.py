"""Name the tests nearest to a module: `python -m tools.nearest cmp/mixtures.py` prints their files.

They are `tests/test_NAME.py` for a module NAME, unless `NEAREST` says otherwise. The whole suite
tests more of a module than they do.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEAREST = {
    "cmp/buffers.py": "mixtures",
    "cmp/data.py": "readers",
    "cmp/errors.py": "config",
    "cmp/faults.py": "hostile",
    "cmp/files.py": "kill",
    "cmp/losses.py": "shared_loss parts",
    "cmp/parsing.py": "hostile",
    "cmp/project.py": "first_screen",
    "cmp/sources.py": "registry own_options",
    "cmp/starts.py": "models",
    "cmp/towers.py": "layers",
    "cmp/training.py": "steps",
    "cmp/bench": "fast",
    "cmp/cli": "cli",
    "cmp/embedded": "packed",
    "book/benchmark/packages.py": "fetch",
    "book/lab/evidence": "studies",
    "book/lab/evidence/claims.py": "verdicts",
    "cmp/releases/hub.py": "going_on",
    "cmp/runs/paper.py": "scaling",
    "cmp/runs/preflight.py": "forecast",
    "book/lab/evidence/scores.py": "verdicts",
    "cmp/readers/class_statistics.py": "measuring",
    "cmp/merging": "merging",
    "cmp/merging/files.py": "merge_files",
    "cmp/methods": "methods",
    "cmp/readers": "readers",
    "cmp/releases": "compare",
    "cmp/releases/arrivals.py": "updates",
    "cmp/releases/hugging_face.py": "exports",
    "cmp/releases/ledger.py": "releases",
    "cmp/releases/onnx_files.py": "exports",
    "cmp/releases/release.py": "releases",
    "cmp/releases/tuning.py": "months",
    "cmp/releases/update.py": "updates months",
    "cmp/releases/update_plan.py": "updates",
    "cmp/runs": "runs",
    "cmp/runs/boards.py": "logs",
    "cmp/runs/checkpoints.py": "resume",
    "cmp/runs/lookup.py": "results",
    "cmp/runs/machine.py": "runs",
    "cmp/runs/verify.py": "results",
    "cmp/scale": "parts",
    "cmp/scale/compiling.py": "steps",
    "cmp/scale/decoding.py": "loader",
    "cmp/scale/devices.py": "gpu_profile",
    "cmp/scale/losses.py": "shared_loss parts",
}
"""Of modules without a test file of their name, the words for `test_WORD.py`: by file, or for what
is left of a folder."""


def nearest_tests(module: Path) -> list[Path]:
    """Return the test files of a module.

    Args:
        module: The module's path, absolute or within the checkout.

    Raises:
        KeyError: Nothing is known of the module.
    """
    place = (ROOT / module).relative_to(ROOT)
    named = f"test_{place.stem}.py"
    if place.as_posix() in NEAREST or not (ROOT / "tests" / named).exists():
        key = place if place.as_posix() in NEAREST else place.parent
        return [ROOT / "tests" / f"test_{word}.py" for word in NEAREST[key.as_posix()].split()]
    return [ROOT / "tests" / named]


if __name__ == "__main__":
    print(*(path.relative_to(ROOT) for name in sys.argv[1:] for path in nearest_tests(Path(name))))
