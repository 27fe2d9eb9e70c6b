"""Thousands of damaged files and hostile command lines, each in a process that is watched.

`python -m tests.fuzz --mutations 10000 --commands 600` changes what users bring (manifests, tables,
tars, pictures, configs, streams, checkpoints, studies) and what they type. Whatever comes of it is
a value or a `CmpError`: no other exception, nothing above `SECONDS`, no process above `BYTES`.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "book"), str(HERE.parent)]

import pandas as pd  # noqa: E402
import test_fuzz as small  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from pictures import classes, picture, tar, tree  # noqa: E402
from safetensors.torch import save  # noqa: E402

from cmp import cli, models  # noqa: E402
from cmp.bench import networks  # noqa: E402, F401, open_clip gets its models
from cmp.config import Model, read_config  # noqa: E402
from cmp.errors import CmpError  # noqa: E402
from cmp.project import build_folder  # noqa: E402
from cmp.readers import class_statistics, collection  # noqa: E402
from cmp.readers.manifest import load_manifests  # noqa: E402
from lab.evidence import studies  # noqa: E402

SECONDS, BYTES = 10.0, 2 * 10**9
"""The most that a case may take, in seconds of CPU and bytes of memory."""
PATIENCE = 60.0
"""Seconds without a word from a child after which its case hangs."""
BATCH = 40
"""Cases that one process goes through; it is forked from this one, which has everything loaded."""
NANO = "bench-nano"


@dataclasses.dataclass
class Case:
    """Something to try. call: what is tried, in a folder of its own."""

    name: str
    call: Callable[[Path], object]


@dataclasses.dataclass
class Outcome:
    """What came of a case: "fine", "refused", "traceback", "hang" or "memory"."""

    name: str
    kind: str
    seconds: float = 0.0
    words: str = ""


# --- files -----------------------------------------------------------------------------------

Change = Callable[[random.Random], bytes]


def spliced(good: bytes, rng: random.Random) -> bytes:
    """Good bytes with pieces cut out, put in or replaced."""
    junk = [b"\0", b"\xff", b"[" * 100, b"{", b'"', b",", b"\n", b"&a ", b"*a", b"9" * 5000, b"nan"]
    content = good[: rng.randrange(len(good))] if rng.random() < 0.15 else good
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        new = rng.choice([rng.randbytes(rng.randint(0, 8)), rng.choice(junk)])
        content = content[:start] + new + content[start + rng.randint(0, 12) :]
    if rng.random() < 0.3 and content:
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        content = bytes(flipped)
    return content


def of_bytes(good: bytes) -> Change:
    """Mutations of a file's bytes."""
    return lambda rng: spliced(good, rng)


def of_tree(tree_: object, dump: Callable[[object], bytes]) -> Change:
    """Mutations of a file that is a tree of keys, or of its bytes."""

    def change(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return spliced(dump(tree_), rng)
        value = tree_
        for _ in range(rng.randint(1, 2)):
            way = rng.choice(small.paths_of(value)[1:] or [()])
            kind = rng.choice(["replace", "replace", "delete", "rename"])
            value = small.changed(value, way, kind, rng.choice(VALUES))
        return dump(value)

    return change


VALUES = [
    *small.VALUES, "/dev/zero", "/**/*", "**/*", "{:d}", "{!x}", "{:>9999999999}", "a" * 300, "..",
    "csv", "tars", "parquet", "folder", "skip", "test", "holdout", "hf-hub:///", 2**31 - 1, 1e300,
]  # fmt: skip


def table(rows: int = 24) -> pd.DataFrame:
    """A table of pictures that lie in `pictures`."""
    names = [f"oak/{n % 6}.png" for n in range(rows)]
    frame = {"filepath": names, "title": [f"a tree {n}" for n in range(rows)], "label": "oak"}
    return pd.DataFrame(frame | {"split": ["train", "test"] * (rows // 2)})


def manifest(kind: str, **reader: object) -> dict:
    about = {"name": "mine", "title": "Mine", "role": "adapt", "licence": "own"}
    keys = {"prompt": "a {}", "faults": "skip", "year": 2020, "zero_shot": 50.0}
    splits = {"train": 0.7, "validation": 0.1, "test": 0.2}
    return about | keys | {"splits": splits, "reader": {"kind": kind, **reader}}


COLUMNS = {"image": "filepath", "caption": "title", "label": "label", "split": "split"}
MANIFESTS = {
    "folder": manifest("folder", path="."),
    "csv": manifest("csv", path="t.csv", **COLUMNS),
    "tsv": manifest("csv", path="t.tsv", **COLUMNS),
    "jsonl": manifest("jsonl", path="t.jsonl", **COLUMNS),
    "parquet": manifest("parquet", path="t.parquet", **COLUMNS | {"image": "image"}),
    "tars": manifest("tars", path="*.tar"),
}
LAYOUT = {
    "csv": "t.csv", "tsv": "t.tsv", "jsonl": "t.jsonl", "parquet": "t.parquet", "tars": "t.tar"
}  # fmt: skip


def good_files(folder: Path) -> dict[str, bytes]:
    """A collection in every layout, made in a folder."""
    classes(folder, ["oak", "elm"], 6)
    kinds = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
    pictures = {f"elm/x.{kind.lower()}": picture(7, kind=kind) for kind in kinds}
    bytes_ = [(folder / name).read_bytes() for name in table()["filepath"]]
    held = [(f"{n}.{end}", content) for n in range(6)
            for end, content in (("png", picture(n)), ("txt", b"a tree"), ("cls", b"oak"),
                                 ("json", b'{"caption": "a tree"}'))]  # fmt: skip
    tar(folder / "t.tar", held)
    files = {
        "t.csv": table().to_csv(index=False).encode(),
        "t.tsv": table().to_csv(index=False, sep="\t").encode(),
        "t.jsonl": table().to_json(orient="records", lines=True).encode(),
        "t.parquet": small.to_parquet(table().assign(image=bytes_)),
        "t.tar": (folder / "t.tar").read_bytes(),
    }
    tree(folder, files | pictures)
    return files | pictures


def check(folder: Path) -> None:
    """Look at a collection as `cmpt data check` and a run do."""
    for place in load_manifests(str(folder)):
        collection.dataset_state(*place)
    collection.load_folder(str(folder))


def collection_case(name: str, layout: str, file: str, content: bytes, about: bytes) -> Case:
    def call(folder: Path) -> None:
        shutil.copytree(GOOD, folder / "c", symlinks=True)
        (folder / "c" / file).write_bytes(content)
        (folder / "c/m.yaml").write_bytes(about)
        check(folder / "c")

    return Case(name, call)


GOOD = Path()
"""A folder with a good collection, made once."""


def weights(form: str) -> bytes:
    """A checkpoint of `bench-nano`."""
    network = models.create_fused_model(NANO, 1)
    state = {name: x.detach().half() for name, x in network.state_dict().items()}
    if form == "safetensors":
        return save(state, {"preprocess_cfg": json.dumps({"resize_mode": "squash"})})
    target = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": state}, target)
    return target.getvalue()


def cases_of_files(count: int, rng: random.Random) -> Iterator[Case]:
    """Mutations of every kind of file, in turn."""
    files = good_files(GOOD)
    study = small.yaml.safe_load((studies.STUDIES / "scaling.yaml").read_text())
    stream = [f"{d}+++{c}" for d in "ab" for c in range(20)]
    local = {"model_cfg": models.open_clip.get_model_config(NANO), "preprocess_cfg": {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
        "fill_color": 0, "mode": "RGB", "size": 32}}  # fmt: skip
    config = small.RUN["config"]
    made = {form: weights(form) for form in ("safetensors", "pt")}
    plain = {
        "config.yaml": (of_tree(config, small.to_yaml), lambda p: read_config(str(p), [])),
        "config as JSON": (of_tree(config, small.to_json), lambda p: read_config(str(p), [])),
        "stream": (of_tree(stream, small.to_json), class_statistics.read_stream_file),
        "study": (of_tree(study, small.to_yaml), read_study),
        "local-dir": (of_tree(local, small.to_json), read_local),
        "safetensors": (of_bytes(made["safetensors"]), lambda p: models.load_from_file(NANO, p)),
        "pt": (of_bytes(made["pt"]), lambda p: models.load_from_file(NANO, p)),
    }
    ends = {"stream": "x.json", "safetensors": "x.safetensors", "pt": "x.pt"}
    for name in itertools.islice(itertools.cycle([*MANIFESTS, *files, *plain]), count):
        if name in MANIFESTS:
            about = of_tree(MANIFESTS[name], small.to_yaml)(rng)
            yield collection_case(f"manifest, {name}", name, "oak/0.png", picture(1), about)
        elif name in files:
            layouts = {file: layout for layout, file in LAYOUT.items()}
            layout = layouts.get(name, "folder")
            about = small.to_yaml(MANIFESTS[layout] | {"faults": rng.choice(["skip", "refuse"])})
            yield collection_case(name, layout, name, spliced(files[name], rng), about)
        else:
            change, read = plain[name]
            yield file_case(name, ends.get(name, "x.yaml"), change(rng), read)


def file_case(name: str, file: str, content: bytes, read: Callable[[Path], object]) -> Case:
    def call(folder: Path) -> None:
        (folder / file).write_bytes(content)
        read(folder / file)

    return Case(name, call)


def read_study(path: Path) -> None:
    studies.STUDIES = path.parent
    path.rename(path.with_name("77.yaml"))
    studies.load_study("77").configs("quick")


def read_local(path: Path) -> None:
    path.rename(path.with_name("open_clip_config.json"))
    path.with_name("open_clip_model.safetensors").write_bytes(weights("safetensors"))
    models.preprocessing(models.load_model(Model(f"local-dir:{path.parent}", "hub"), 0))


# --- command lines ---------------------------------------------------------------------------

WORDS = [
    "", " ", "0", "-1", "-5", "1", "2", "1e300", "inf", "nan", "99999999999999999999", "2147483647",
    "100000", "../..", "/dev/zero", "/dev/null/x", "/", ".", "~nobody", "FIFO", "TEXT", "FOLDER",
    "a" * 300, "a/" * 3000, "é\u202e", "\udcff", "{:>9999999999}", "{!x}", "tiny", "ViT-B-16",
    "quick", "embedded", "fomo", "front", "99", "hf-hub:///", "local-dir:/no", "None", "true", "[1",
    "seed=1", "seed=-1", "data=FIFO", "data=/", "model.name=hf-hub:a", "model.start=/dev/zero",
    "model.name=local-dir:FOLDER", "training.batch=2147483647", "training.steps=99999999999",
    "training.budget=1e300", "training.budget=1e-300", "stream.tasks=2147483647", "foo=1",
    "a.b.c=1", "stream.order=listed", "stream.traits=../x", "schedule.peak=nan",
    "schedule.warmup=1e300", "mixture.capacity=99999999999", "method.rank=2147483647",
    "method.targets=[foo]", "model={}",
    "merging.policy=ema", "seeds=[]", "recipe=foo", "TABLE", "WEIGHTS",
]  # fmt: skip
COMPUTES = {"run": "--dry-run", "study": "--dry-run", "book": "--dry-run"}
"""Commands that would work for minutes at a good word, and what keeps them from it."""
LEFT_OUT = ("site", "bench", "pretrain", "data build", "results verify", "stream make")
"""Commands whose good words all take minutes, or download."""


def all_commands() -> dict[str, list]:
    """The parameters of every command by its words."""
    found = {}
    for name, command in typer.main.get_command(cli.app).commands.items():
        for child, each in getattr(command, "commands", {None: command}).items():
            found[f"{name} {child}" if child else name] = each.params
    return {name: params for name, params in found.items() if name not in LEFT_OUT}


def cases_of_commands(count: int, rng: random.Random) -> Iterator[Case]:
    """Command lines of each command in turn, with words that do not belong there."""
    commands = all_commands()
    for name in itertools.islice(itertools.cycle(commands), count):
        arguments = [*name.split(), *filter(None, [COMPUTES.get(name)])]
        for parameter in commands[name]:
            is_argument = parameter.param_type_name == "argument"
            if is_argument and (parameter.required or rng.random() < 0.6):
                arguments += rng.choices(WORDS, k=rng.randint(1, 3 if parameter.nargs < 0 else 1))
            elif not is_argument and parameter.name != "help" and rng.random() < 0.35:
                flag = rng.choice(parameter.opts)
                arguments += [flag] if parameter.is_flag else [flag, rng.choice(WORDS)]
        if rng.random() < 0.1:
            place = rng.randrange(len(arguments) + 1)
            arguments.insert(place, rng.choice(["--", "-x", "--plugin"]))
        yield command_case(arguments)


def command_case(arguments: list[str]) -> Case:
    def call(folder: Path) -> None:
        places = {"FIFO": folder / "fifo", "TEXT": folder / "t.txt", "FOLDER": folder / "empty",
                  "TABLE": folder / "t.csv", "WEIGHTS": folder / "w.safetensors"}  # fmt: skip
        os.mkfifo(places["FIFO"])
        places["FOLDER"].mkdir()
        tree(folder, {"t.txt": b"text", "t.csv": b"class,count\na,1\n",
                      "w.safetensors": save({"a": torch.zeros(2, 2)})})  # fmt: skip
        words = arguments
        for word, place in places.items():
            words = [each.replace(word, str(place)) for each in words]
        os.environ["CMP_BUILD"] = str(folder / "build")
        (folder / "build").mkdir()
        (folder / "build/data").symlink_to(DATA)
        os.chdir(folder)
        sys.argv = ["cmpt", *words]
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise CmpError(f"status {stop.code}") from stop

    return Case(" ".join(arguments)[:300], call)


DATA = (build_folder() / "data").resolve()

# --- processes -------------------------------------------------------------------------------


def work_through(cases: list[Case], start: int, report: int) -> None:
    """Try cases in this process, a child; tell of each when it begins and when it ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in range(start, len(cases)):
        tell(report, (number, None))
        began = time.process_time()  # which other processes do not affect
        kind, words = "fine", ""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir("/"):
            try:
                cases[number].call(Path(folder))
            except CmpError as error:
                kind, words = "refused", str(error)
            except BaseException:
                kind, words = "traceback", traceback.format_exc()[-1500:]
            os.chdir("/")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > BYTES:
            tell(report, (number, ("memory", time.process_time() - began, words)))
            os._exit(3)  # the peak would be that of every case after it
        tell(report, (number, (kind, time.process_time() - began, words)))
    os._exit(0)


def tell(report: int, message: object) -> None:
    content = pickle.dumps(message)
    os.write(report, len(content).to_bytes(4, "big") + content)


def try_all(cases: list[Case]) -> list[Outcome]:
    """Try cases in a child after another; one that hangs or dies costs the case it was at."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            work_through(cases, len(outcomes), writer)
        os.close(writer)
        begun = listen(reader, cases, outcomes)
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if begun == len(outcomes):  # it began this case and did not end it
            died = os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL
            words = f"signal {os.WTERMSIG(status)}" if died else ""
            outcomes.append(Outcome(cases[begun].name, "traceback" if died else "hang", 0, words))
    return outcomes


def listen(reader: int, cases: list[Case], outcomes: list[Outcome]) -> int:
    """Hear a child until it ends or is silent for too long; the last case that it began."""
    begun = -1
    with os.fdopen(os.dup(reader), "rb", buffering=0) as file:
        while select.select([file], [], [], PATIENCE)[0]:
            size = file.read(4)
            if not size:
                break
            content, length = b"", int.from_bytes(size, "big")
            while len(content) < length:
                content += file.read(length - len(content))
            begun, result = pickle.loads(content)
            if result:
                kind, seconds, words = result
                kind = "hang" if seconds > SECONDS and kind != "memory" else kind
                outcomes.append(Outcome(cases[begun].name, kind, seconds, words))
    return begun


def fuzz(mutations: int, commands: int, seed: int) -> tuple[list[Outcome], list[Outcome]]:
    """Try mutated files and hostile command lines.

    Returns:
        What came of the files, and of the command lines.
    """
    global GOOD
    os.environ["HF_HUB_OFFLINE"] = "1"
    rng, results = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as build:
        GOOD = Path(folder)
        os.environ["CMP_BUILD"] = build
        for made in (cases_of_files(mutations, rng), cases_of_commands(commands, rng)):
            outcomes: list[Outcome] = []
            while batch := [*itertools.islice(made, BATCH)]:
                outcomes += try_all(batch)
            results.append(outcomes)
    return results[0], results[1]


def main() -> None:
    """Print what came of all cases, and the bad ones in full."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given, bad = parser.parse_args(), []
    found = fuzz(given.mutations, given.commands, given.seed)
    for what, outcomes in zip(("files", "command lines"), found, strict=True):
        counts = collections.Counter(outcome.kind for outcome in outcomes)
        slowest = max(outcomes, key=lambda outcome: outcome.seconds, default=Outcome("", ""))
        longest = f"the slowest {slowest.seconds:.1f} s, {slowest.name}"
        print(f"{len(outcomes)} {what}: {dict(counts)}; {longest}")
        bad += [outcome for outcome in outcomes if outcome.kind not in ("fine", "refused")]
    for outcome in bad:
        print(f"\n{outcome.kind.upper()} {outcome.name!r}\n{outcome.words}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
