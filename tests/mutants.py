"""Small faults that `make test` must find: `python -m tests.mutants [NAME ...]`.

Each mutant changes one line in a copy of the tree and runs the tests that ought to notice. It is
killed if one of them fails. The exit status is 1 if any survives, or no longer finds its line.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TREES = ("cmp", "tests", "book", "data_manifests", "weights", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """A fault: in a file, the text `old` becomes `new`; the tests are files of this folder."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    # the step
    "a looser bound of the logit scale": Mutant(
        "cmp/models.py", "MAX_LOGIT_SCALE = math.log(100)", "MAX_LOGIT_SCALE = 9.0", "test_steps"
    ),
    "no lower bound of the logit scale": Mutant(
        "cmp/training.py", ".clamp_(0, models.MAX", ".clamp_(-9, models.MAX", "test_steps"
    ),
    "gradients are not clipped": Mutant(
        "cmp/training.py",
        "model.parameters(), state.config.optimizer.clip)",
        "model.parameters(), 1e9)",
        "test_golden",
    ),
    "gradients add up over steps": Mutant(
        "cmp/training.py", "    optimizer.zero_grad()\n", "", "test_fast"
    ),
    "biases and norms decay": Mutant(
        "cmp/training.py",
        "zip(both, (config.weight_decay, 0.0), strict=True)",
        "zip(both, (config.weight_decay, 0.1), strict=True)",
        "test_fast",
    ),
    "the rate comes a step late": Mutant(
        "cmp/training.py",
        "batch, task, step, rates[step])",
        "batch, task, step, rates[step - 1])",
        "test_golden",
    ),
    # the loss
    "the loss looks one way": Mutant(
        "cmp/losses.py",
        "(F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))",
        "(F.cross_entropy(logits, target) + F.cross_entropy(logits, target))",
        "test_fast",
    ),
    "the sigmoid loss has no bias": Mutant(
        "cmp/losses.py", "image @ text.T + logit_bias", "image @ text.T", "test_parts"
    ),
    # schedules
    "a cosine never reaches its floor": Mutant(
        "cmp/schedules.py", "n - task.warmup + 1\n", "n - task.warmup\n", "test_schedules"
    ),
    "warmup ends a step early": Mutant(
        "cmp/schedules.py",
        "top * (step + 1) / warmup",
        "top * (step + 2) / warmup",
        "test_schedules",
    ),
    "a meta schedule counts warmups twice": Mutant(
        "cmp/schedules.py",
        "task.sum_before(lambda N, W, C: N - C - max(W, 1)) + unit",
        "task.sum_before(lambda N, W, C: N - C - 2 * max(W, 1)) + unit",
        "test_schedules",
    ),
    "the cooldown begins late": Mutant(
        "cmp/schedules.py",
        'min(1.0, (task.N - n) / max(task.cooldown, 1))\n\n\n@register("schedule", "wsd-sqrt"',
        'min(1.0, (task.N - n) / max(task.cooldown // 2, 1))\n\n\n@register("schedule", "wsd-sqrt"',
        "test_schedules",
    ),
    # mixtures
    "what is left of a batch goes to the last pools": Mutant(
        "cmp/mixtures.py",
        "flatnonzero(shares)[: batch - counts.sum()]",
        "flatnonzero(shares)[counts.sum() - batch :]",
        "test_mixtures",
    ),
    "an empty buffer's share goes to the pool": Mutant(
        "cmp/mixtures.py",
        "return p + b // 2, d + b - b // 2, 0",
        "return p + b, d, 0",
        "test_mixtures",
    ),
    "the buffer holds the update itself": Mutant(
        "cmp/mixtures.py",
        "buffer_history(updates[:task], labels)",
        "buffer_history(updates[: task + 1], labels)",
        "test_mixtures",
    ),
    "every epoch has one order": Mutant(
        "cmp/mixtures.py",
        '"data/{name}", seed, task, epoch).permutation',
        '"data/{name}", seed, task, 0).permutation',
        "test_mixtures",
    ),
    "the mixture changes too late": Mutant(
        "cmp/config.py",
        "passed = task / max(tasks - 1, 1)",
        "passed = task / max(tasks, 1)",
        "test_mixtures",
    ),
    # merging
    "the older model gets the newer one's weight": Mutant(
        "cmp/merging/policies.py",
        "(weight, 1 - weight) if",
        "(1 - weight, weight) if",
        "test_merging",
    ),
    "the average begins anew after each update": Mutant(
        "cmp/merging/policies.py",
        'end.memory.get("average", end.memory["zero"])',
        'end.memory["zero"]',
        "test_merging",
    ),
    "TIES elects the sign of the first model": Mutant(
        "cmp/merging/rules.py",
        "sign = taus.sum(0).sign_()",
        "sign = taus[0].sign()",
        "test_merging",
    ),
    "DARE does not rescale": Mutant(
        "cmp/merging/rules.py", ".to(tau.device)).div_(density)", ".to(tau.device))", "test_merging"
    ),
    "a merge of files leaves the base out": Mutant(
        "cmp/merging/rules.py", "blocks = [x - origin for x in blocks]", "pass", "test_merging"
    ),
    "the trained weights are scored, not the deployed ones": Mutant(
        "cmp/runs/runner.py",
        "adapters.load_merged(self.model, scored)\n",
        "adapters.load_merged(self.model, end.trained)\n",
        "test_steps",
    ),
    # methods
    "EWC pulls twice as hard": Mutant(
        "cmp/methods/ewc.py", '.get("strength") / 2 *', '.get("strength") *', "test_methods"
    ),
    "SI counts what raised the loss": Mutant(
        "cmp/methods/si.py", ".clamp_min(0)", ".abs()", "test_methods"
    ),
    "distillation looks at new samples, too": Mutant(
        "cmp/methods/distillation.py",
        "first = len(output.pixels) - output.replayed",
        "first = 0",
        "test_methods",
    ),
    # evaluation
    "recall counts one more neighbour": Mutant(
        "cmp/evaluation.py",
        "k, positions = min(k, len(targets) - skip_self)",
        "k, positions = min(k + 1, len(targets) - skip_self)",
        "test_evaluation",
    ),
    "sets count by their size": Mutant(
        "cmp/evaluation.py",
        "100 * float(scores.sum()) / len(datasets)",
        "100 * float(np.average(scores, weights=np.bincount(dataset)))",
        "test_evaluation",
    ),
    "dropout and norms stay in training mode": Mutant(
        "cmp/evaluation.py", "    model.eval()\n", "", "test_evaluation"
    ),
    # checkpoints
    "a checkpoint forgets the moments": Mutant(
        "cmp/runs/checkpoints.py",
        "optimizer.state.get(p, {})",
        "{}",
        "test_resume",
    ),
    "a resumed run forgets its average": Mutant(
        "cmp/runs/runner.py",
        "self.memory.setdefault(entry, {})[name] = x",
        "pass",
        "test_resume",
    ),
    "a damaged checkpoint is believed": Mutant(
        "cmp/runs/checkpoints.py",
        "if not match or match[3] != files.file_digest(path):",
        "if not match:",
        "test_kill",
    ),
}


def copy_tree(folder: Path) -> None:
    """Copy what tests need; data that are built are linked."""
    for name in TREES:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "data", "vendor", "*.ipynb")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored if name == "book" else None)
        else:
            shutil.copy(source, folder / name)
    build = Path(os.environ.get("CMP_BUILD", ROOT / "_build"))
    (folder / "_build").mkdir()
    (folder / "_build" / "data").symlink_to((build / "data").absolute())


def is_killed(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails with the fault; the tree is as before afterwards."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise LookupError(f"{mutant.file}: {text.count(mutant.old)} times {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    paths = ":".join(str(folder / name) for name in ("", "book", "tests"))
    tests = [f"tests/{name}.py" for name in mutant.tests.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not long",
        "-p",
        "no:cacheprovider",
    ]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 1


def main(names: list[str]) -> int:
    """Try the named mutants, all by default."""
    survivors = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy_tree(folder)
        for name in names or MUTANTS:
            started = time.perf_counter()
            try:
                said = "killed" if is_killed(MUTANTS[name], folder) else "SURVIVES"
            except LookupError as error:
                said = f"LOST: {error}"
            if said != "killed":
                survivors.append(name)
            print(f"{said}: {name} ({time.perf_counter() - started:.0f} s)", flush=True)
    print(f"{len(names or MUTANTS) - len(survivors)} of {len(names or MUTANTS)} killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
