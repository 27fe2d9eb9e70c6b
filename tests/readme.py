"""Run the commands of README and the manual, each as a process, in a clone of its own.

`python -m tests.readme` clones what is committed into an empty folder, sets up `.venv` there, makes
the files and runs that the commands name, and then runs every command of the pages' shell blocks
from the root of the clone, in their order. `WAYS` has what stands for a command that is not run
exactly as printed: one that needs a card, a cluster or hours, or names a run.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "book/manual.md")
PRINTED = ""
PLANNED = " --dry-run || test $? -eq 1"
"""Ends a plan whose data or card are not there; it says so by status 1."""
ONE_CHAPTER = "sed 's/--profile quick/--profile quick --chapter 00/'"
WAYS = {
    # what the Makefile says, with one chapter; the copies without JupyterLab
    "make study": f"make --dry-run study | {ONE_CHAPTER} | bash -e",
    "make lab": "make --dry-run lab | sed 's/cmpt lab/cmpt lab --prepare/' | bash -e",
    "make env && source .venv/bin/activate": PRINTED,
    "cmpt tune --start ViT-B-16:laion2b_s34b_b88k --data pictures/2026-01 --pool pictures/general "
    "--retain pictures/kept -o tuned.yaml":
        "cmpt tune --start small --data pictures/2026-01 --pool pictures/general "
        "--retain pictures/kept -o tuned.yaml",
    "cmpt update --start ViT-B-16:laion2b_s34b_b88k --data pictures/2026-01 --pool "
    "pictures/general --retain pictures/kept --settings tuned.yaml -o releases/2026-01":
        "cmpt update --start small --data pictures/2026-01 --pool pictures/general "
        "--retain pictures/kept --settings tuned.yaml -o releases/2026-01",
    "cmpt compare ViT-B-16:laion2b_s34b_b88k releases/2026-01 --gate first.yaml":
        "cmpt compare small releases/2026-01 --gate first.yaml || test $? -eq 1",
    "cmpt update releases/2026-01 --data pictures/2026-02 -o releases/2026-02": PRINTED,
    "cmpt compare releases/2026-01 releases/2026-02 --gate gate.yaml":
        "cmpt compare releases/2026-01 releases/2026-02 --gate gate.yaml || test $? -eq 1",
    "cmpt update releases/2026-02 --data pictures/2026-03 -o releases/2026-03": PRINTED,
    "cmpt compare releases/2026-01 releases/2026-03 --gate since-january.yaml":
        "cmpt compare releases/2026-01 releases/2026-03 --gate since-january.yaml || test $? -eq 1",
    "cmpt release slim releases/2026-01": PRINTED,
    "make site": PRINTED,
    "make test": "make --dry-run test",
    "cmpt run cpu mixture.buffer=0 mixture.update=0.67 mixture.pretraining=0.33": PRINTED,
    "cmpt run cpu recipe=default schedule.peak=0.0024": PRINTED,
    "cmpt run cpu method.name=lora training.budget=1": PRINTED,
    "cmpt config schedule": PRINTED,
    "cmpt results ls": PRINTED,
    "cmpt results rm ID": "cmpt results rm {trial}",
    "cmpt results verify ID": "cmpt results verify {kept}",
    "cmpt merge ties new.safetensors old.safetensors --base start.safetensors "
    "-o merged.safetensors": PRINTED,
    "for weights in 0.25,0.75 0.5,0.5 0.75,0.25; do cmpt merge interpolation new.safetensors "
    "old.safetensors --weights $weights -o tried.safetensors && cmpt eval small "
    "--start tried.safetensors --split validation; done": PRINTED,
    "cmpt budget --method full --method lora,rank=4": PRINTED,
    "cmpt plan --model ViT-B-16 --gpu-hours 8 --updates 20 > plan.yaml": PRINTED,
    "cmpt stream show stream.order=similarity": PRINTED,
    "cmpt data list": PRINTED,
    "cmpt eval small --seed 3": PRINTED,
    "cmpt study front merging --jobs 2 --publish": "cmpt study front merging --jobs 2 --dry-run",
    "cmpt book --chapter 03 -P weight=0.5": PRINTED,
    "cmpt bench step": "cmpt bench step --model tiny --rounds 1",
    "cmpt bench features": "cmpt bench features --model tiny --rounds 1",
    "papermill book/03_merging.ipynb out.ipynb -p profile cpu -p weight 0.5": PRINTED,
    "cmpt doctor --profile gpu": "cmpt doctor --profile gpu || test $? -eq 1",
    "cmpt run gpu --dry-run": f"cmpt run gpu{PLANNED}",
    "cmpt run gpu": f"cmpt run gpu{PLANNED}",
    "cmpt run gpu model.name=ViT-L-14 model.start=laion2b_s32b_b82k --micro-batch 128 "
    "--checkpoint-activations": "cmpt run gpu model.name=ViT-L-14 model.start=laion2b_s32b_b82k "
    f"--micro-batch 128 --checkpoint-activations{PLANNED}",
    "torchrun --nproc-per-node 4 -m cmp run gpu": "torchrun --nproc-per-node 2 -m cmp run quick "
    "stream.tasks=2 training.steps=3",
    "srun -K -N 2 --ntasks-per-node 4 python -m cmp run gpu": f"python -m cmp run gpu{PLANNED}",
    "cmpt run gpu --compile --tensorboard _build/board": "cmpt run gpu --compile --tensorboard "
    f"_build/board{PLANNED}",
    "cmpt export ID -o new.safetensors": "cmpt export {kept} -o exported.safetensors",
    "cmpt export ID -o new --to hf": "cmpt export {kept} -o new --to hf",
    "cmpt export ID -o new --to transformers": "cmpt export --help",  # its extra is not there
    "cmpt export ID -o new --to onnx": "cmpt export --help",
    "cmpt book --profile gpu --chapter 04": "cmpt book --profile gpu --chapter 04 --dry-run",
    "cmpt bench gpu": "cmpt bench --help",
    "torchrun --nproc-per-node 4 --shutdown-timeout 100 -m cmp run gpu & run=$!":
        "torchrun --shutdown-timeout 100 --help",
    "trap 'kill -TERM $run; wait $run; scontrol requeue $SLURM_JOB_ID' TERM": PRINTED,
    "wait $run": PRINTED,
    "cmpt study first-real --dry-run": f"cmpt study first-real{PLANNED}",
    "cmpt study first-real": f"cmpt study first-real{PLANNED}",
    "cmpt data init pictures/new": PRINTED,
    "cmpt data init pictures/kept --role eval": PRINTED,
    "cmpt data check pictures --list faults.txt": PRINTED,
    "cmpt run cpu data=pictures": PRINTED,
    "cmpt run gpu data=pictures": f"cmpt run gpu data=pictures{PLANNED}",
    "cmpt run cpu data=pictures stream.order=given stream.tasks=12":
        "cmpt run cpu data=months stream.order=given stream.tasks=12 training.steps=3",
    "ray start --head --port 6379 --disable-usage-stats": "ray start --help",
    "ray start --address HEAD:6379": "ray start --help",
    "RAY_ADDRESS=HEAD:6379 cmpt study front --backend ray --jobs 64":
        "cmpt study front --backend ray --jobs 64 --dry-run",
    "export RAY_AUTH_MODE=token": PRINTED,
    "ray get-auth-token --generate": "ray get-auth-token --help",
    "export RAY_AUTH_TOKEN=TOKEN": PRINTED,
    "srun cmpt study front --jobs 4 --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT":
        "cmpt study front --jobs 4 --shard 1/8 --dry-run",
    "[ $? -ne 143 ] || scontrol requeue $SLURM_JOB_ID": PRINTED,
    "python3 -m http.server --bind 127.0.0.1 --directory _build/html":
        "python3 -m http.server --help",
}  # fmt: skip
"""Command of a page, without its comment -> what is run; a run of our own stands for each `ID`."""
SMALL = "stream.tasks=2 training.steps=3"
WEIGHTS = """
import cmp
from safetensors.torch import save_file

for seed, name in enumerate(("new", "old", "start")):
    save_file(cmp.create_model("small", seed).state_dict(), f"{name}.safetensors")
"""
RUNS = {
    "trial": f"cmpt run quick {SMALL} seed=6",
    "kept": f"cmpt run quick {SMALL} seed=7 --keep-weights",
}
"""Runs that `WAYS` names."""


def printed_commands() -> list[str]:
    """Return the commands of the pages' shell blocks, without comments."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [found for line in lines if (found := re.sub(r"(^|\s+)#.*", "", line))]


class Clone:
    """A clone of the project, with an environment of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        own = ("PYTHONPATH", "CMP_BUILD", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")
        self.environment = {key: value for key, value in os.environ.items() if key not in own}
        self.environment["PATH"] = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"

    def run(self, command: str) -> None:
        """Run a line of a shell in the clone's root; its output is shown where it fails."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        words = f"status {done.returncode}" if done.returncode else "well"
        print(f"{words}, {time.monotonic() - began:.0f} s: {command.strip()}", flush=True)
        if done.returncode:
            raise SystemExit(done.stdout)

    def new_run(self, command: str) -> str:
        """Compute a run and return its id."""
        before = self.runs()
        self.run(command)
        [run_id] = self.runs() - before
        return run_id

    def runs(self) -> set[str]:
        """Return the ids of all runs, finished or not."""
        return {path.name for path in (self.folder / "_build/runs").glob("[0-9a-f]*")}


def draw_pictures(folder: Path, classes: int, pictures: int, first: int = 0) -> None:
    """Draw pictures of coloured shapes, in a folder per class, others for each first number."""
    for kind in range(classes):
        (place := folder / f"shape {kind}").mkdir(parents=True)
        for number in range(first, first + pictures):
            image = Image.new("RGB", (32, 32), (255, 255, 255 - number))
            draw, corner = ImageDraw.Draw(image), (2 + number % 7, 2 + number % 5)
            colour = (37 * kind % 256, 91 * kind % 256, 3 * number % 256)
            draw.regular_polygon((*(14 + x for x in corner), 9), 3 + kind % 6, fill=colour)
            image.save(place / f"{number}.png")


def prepare(clone: Clone) -> dict[str, str]:
    """Make the files that the commands name, and the runs of `RUNS`; return their ids."""
    clone.run("cmpt data build")
    clone.run("pip install --quiet --require-hashes -c constraints.txt ray")
    clone.run(f"python -c '{WEIGHTS}'")
    draw_pictures(clone.folder / "pictures" / "new", 20, 60)
    draw_pictures(clone.folder / "pictures" / "kept", 20, 12, first=60)
    draw_pictures(clone.folder / "pictures" / "general", 20, 12, first=80)
    for month in range(1, 4):
        draw_pictures(
            clone.folder / "pictures" / f"2026-0{month}", 3 + month, 20, first=100 + 30 * month
        )
    gate = re.search(r"^```yaml\n(.*?)^```", (ROOT / PAGES[0]).read_text("utf-8"), re.M | re.S)[1]
    for name in ("first.yaml", "gate.yaml", "since-january.yaml"):
        (clone.folder / name).write_text(gate)
    for month in range(1, 13):
        folder = clone.folder / "months" / f"2026-{month:02}"
        draw_pictures(folder, 3, 20)
        clone.run(f"cmpt data init months/{folder.name}")
        [manifest] = folder.glob("*.yaml")
        manifest.write_text(f"{manifest.read_text()}update: {folder.name}\n")
    return {name: clone.new_run(command) for name, command in RUNS.items()}


def main() -> None:
    """Run all of it; the first command that fails ends it."""
    printed = printed_commands()
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone(Path(folder) / "clone")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone.folder], check=True)
        clone.run(f"make PYTHON={sys.executable} .venv/.ready")
        ids = prepare(clone)
        for command in printed:
            way = WAYS[command]
            for name, run_id in ids.items():
                way = way.replace(f"{{{name}}}", run_id)
            clone.run(way or command)
    print(f"{len(printed)} commands ran")


if __name__ == "__main__":
    main()
