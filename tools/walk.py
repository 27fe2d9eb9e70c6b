"""Count how far a reader walks through the code: `python -m tools.walk` counts three walks.

1. The distinct functions of `cmp` that `cmpt run quick` enters before its first training step:
   336 in 0.3.0, where one machine may enter a few that another does not.
2. The calls of functions of `cmp` from the draw of a batch to its loss, in the second step, when
   nothing is computed for the first time.
3. The calls of functions of `cmp` in one merge of state dicts with one setting.

Each walk is counted in a process of its own; the data must be built. The `cmp` is counted that
Python imports.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

PACKAGE = Path(importlib.util.find_spec("cmp").origin).parent


class Arrived(BaseException):
    """A walk is over."""


def walk(start: Callable[[], object], ends: str = "") -> dict[str, int]:
    """Count calls of functions of the package, nested ones and comprehensions among them.

    Args:
        start: What is called.
        ends: The function whose entry ends the count, by module and name; "" for none.
    """
    calls: list[CodeType] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # and no body of a class or a module
        if event != "call" or not is_function or not code.co_filename.startswith(str(PACKAGE)):
            return
        if f"{Path(code.co_filename).stem}.{code.co_name}" == ends:
            raise Arrived
        calls.append(code)

    sys.setprofile(profile)
    try:
        start()
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
    functions = {code for code in calls if not code.co_name.startswith("<")}
    files = {code.co_filename for code in calls}
    return {"calls": len(calls), "functions": len(functions), "files": len(files)}


def run_to_first_step() -> dict[str, int]:
    """`cmpt run quick` up to its first `train_step`, with an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(os.environ.get("CMP_BUILD", PACKAGE.parent / "_build")) / "data"
        (Path(folder) / "data").symlink_to(data.absolute())
        os.environ["CMP_BUILD"] = folder
        sys.argv = ["cmpt", "run", "quick"]
        from cmp.cli import main

        return walk(main, "training.train_step")


def batch_to_loss() -> dict[str, int]:
    """The second step of a run, from its batch to the loss."""
    import cmp

    config = cmp.RunConfig(training=cmp.Training(precision="fp32"))  # alike on any machine
    state = cmp.make_train_state(config, cmp.load_data("embedded"))
    pools = cmp.task_pools(state.config, state.corpus)
    optimizer = cmp.create_optimizer(state)

    def step(number: int) -> None:
        batch = next(state.batches(pools[0], 0, [number]))
        cmp.train_step(state, optimizer, batch, 0, number, 1e-3)

    step(0)
    return walk(lambda: step(1), "arithmetic.bf16_products")  # what is entered after the loss


def merge_with_a_setting() -> dict[str, int]:
    """A merge by TIES with a density, with a setting that no earlier merge had."""
    import torch

    import cmp

    names = [f"layer.{number}.weight" for number in range(4)]
    base, one, other = ({name: torch.randn(8, 8) for name in names} for _ in range(3))
    cmp.merge("ties", [one, other], base=base, density=0.5)
    return walk(lambda: cmp.merge("ties", [one, other], base=base, density=0.3))


WALKS = {
    "functions before the first step": run_to_first_step,
    "calls from a batch to its loss": batch_to_loss,
    "calls of a merge with one setting": merge_with_a_setting,
}


def count_all() -> dict[str, dict[str, int]]:
    """Return the counts of each walk."""
    counts = {}
    for name, function in WALKS.items():
        command = [sys.executable, "-m", "tools.walk", function.__name__]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        counts[name] = json.loads(done.stdout.splitlines()[-1])
    return counts


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(globals()[sys.argv[1]]()))
    else:
        for name, counted in count_all().items():
            print(f"{name}: {', '.join(f'{number} {what}' for what, number in counted.items())}")
