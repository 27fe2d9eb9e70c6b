"""What one H100 has to show of the package, each value beside what was predicted of it.

`python h100.py STAGE...` works through the sections of some stages, each by itself: an error is
recorded, and the others go on. A stage's results are JSON in $OUT, `stage-1.json` and so on; the
status is 1 if a section failed. With --small everything runs on a CPU, on tiny networks, to show
that it works; its numbers then mean nothing.
"""

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from harness import (
    SECTIONS,
    Lab,
    Values,
    distance,
    gradients,
    measure_loop,
    seconds_of,
    section,
    work_through,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmp import arithmetic, config, evaluation, mixtures, models
from cmp.bench import gpu
from cmp.bench.jpegs import decoding_rates
from cmp.bench.networks import TASK
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.merging import apply
from cmp.project import build_folder
from cmp.registry import option_names
from cmp.runs import checkpoints, identity, store
from cmp.runs.checkpoints import SCHEMA, CheckpointManager, Progress, RunState
from cmp.runs.machine import machine_record
from cmp.scale import compiling, devices
from cmp.scale.decoding import worker_count
from cmp.scale.execution import ExecutionConfig
from cmp.training import make_train_state, train_task
from lab.evidence import studies

PREDICTED: dict[str, dict[str, float]] = {
    "ceilings": {"product TFLOP/s": 798, "copy TB/s": 3.0},
    "loader": {"4 processes, images/s": 5000, "15 processes, images/s": 19000},
    "decoding": {
        "298 x 224": 1031,
        "500 x 375": 384,
        "640 x 480": 258,
        "800 x 600": 174,
        "1024 x 768": 120,
    },
    "short captions": {"ms": 168, "samples/s": 3041, "% of peak": 34.3, "peak GB": 47.2},
    "short captions, compiled": {"ms": 134, "samples/s": 3813, "% of peak": 42.9},
    "long captions": {"ms": 193, "samples/s": 2650, "% of peak": 33.3, "peak GB": 47.2},
    "long captions, compiled": {"ms": 153, "samples/s": 3337, "% of peak": 42.0},
    "waits": {"per step": 0},
    "open_clip": {"ms": 193},
    "open_clip, compiled": {"ms": 153},
    "large model": {"micro-batches, ms": 875, "micro-batches, GB": 43.5, "recomputed, ms": 1095},
    "checkpoint": {"whole s": 3.4, "until it goes on s": 1.0, "GB": 1.8},
    "small runs": {"most to one": 5},
}
"""Section -> value -> what an H100 is expected to show, with ViT-B-16 at batch 512, and ViT-L-14 in
micro-batches of 128. Nothing of it was measured on a card: steps were predicted from a trace of
their kernels that version 0.3 had, open_clip's as a step of long captions, memory by `cmp.budgets`;
rates of products and copies are those that the trace assumed; and the loader's images come from the
rate of one core of a CPU, 1,281 a second, times the cores. What a core decodes was measured on a
core of another CPU."""
LIMITS = {
    "fp32 against the CPU": 5e-3,  # convolutions are TF32 on a card, as torch has it by default
    "bf16 against fp32": 5e-2,
    "micro-batches": 1e-4,
    "recomputed activations": 1e-4,
}
"""How far gradients may be apart, as a part of their norm."""


@section(1, "machine")
def measure_machine(lab: Lab) -> Values:
    """Note what the machine is."""
    shared = os.statvfs("/dev/shm")
    return machine_record(lab.device) | {
        "cores": os.cpu_count(),
        "decoding processes": worker_count(torch.device(lab.device)),
        "shared memory GB": shared.f_bavail * shared.f_frsize / 1e9,
    }


@section(1, "ceilings")
def measure_ceilings(lab: Lab) -> Values:
    """Multiply large matrices and copy a large tensor."""
    side, size = lab.size((8192, 2**31), (128, 2**16))
    noise = torch.Generator(lab.device).manual_seed(0)
    x = torch.randn(side, side, generator=noise, device=lab.device).bfloat16()
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=lab.device)
    calls = {"product": lambda: x @ x, "copy": lambda: target.copy_(source)}
    seconds = {name: min(seconds_of(call, 10) for _ in range(3)) for name, call in calls.items()}
    return {
        "product TFLOP/s": 2 * side**3 / seconds["product"] / 1e12,
        "copy TB/s": 2 * size / seconds["copy"] / 1e12,
    }


@section(1, "gradients")
def compare_gradients(lab: Lab) -> Values:
    """Compare the gradients of one batch: on the CPU, and on the card in every way."""
    settings = ("training.precision=fp32", "optimizer.clip=1e9")
    find = functools.partial(
        gradients, *lab.prepare(*settings, f"training.batch={lab.size(16, 8)}")
    )
    torch.set_num_threads(lab.size(os.cpu_count() or 1, 1))
    on_cpu = find("cpu")
    torch.set_num_threads(1)
    plain, half = find(lab.device), find(lab.device, "bf16")
    parts = find(lab.device, way=ExecutionConfig(micro_batch=5))
    again = find(lab.device, way=ExecutionConfig(checkpoint_activations=True))
    found: Values = {
        "fp32 against the CPU": distance(plain, on_cpu),
        "bf16 against fp32": distance(half, plain),
        "micro-batches": distance(parts, plain),
        "recomputed activations": distance(again, plain),
    }
    if beyond := [key for key, limit in LIMITS.items() if not found[key] <= limit]:
        raise AssertionError(f"gradients are too far apart: {found}, above all {beyond}")
    return found | {"bf16 twice the same": distance(find(lab.device, "bf16"), half) == 0}


@section(1, "loader")
def measure_loader(lab: Lab) -> Values:
    """Decode batches by some numbers of processes, and do nothing with them."""
    run_config, corpus = lab.prepare("training.steps=10000")
    pools, found = mixtures.task_pools(run_config, corpus)[TASK], {}
    state = make_train_state(run_config, corpus, device=lab.device)
    for count in lab.size((1, 4, 8, 15), (1,)):
        os.environ["CMP_WORKERS"] = str(count)
        batches = state.batches(pools, TASK, range(10000))

        def take(number: int, batches: Any = batches) -> None:
            for _ in range(number):
                next(batches)

        take(2 * count)  # what is ready when all processes have started
        seconds = seconds_of(functools.partial(take, 4 * count))
        found[f"{count} processes, images/s"] = 4 * count * lab.batch / seconds
    del os.environ["CMP_WORKERS"]
    return found


@section(1, "decoding")
def measure_decoding(lab: Lab) -> Values:
    """Decode and crop photographs of usual sizes on one core, images per second."""
    return decoding_rates(lab.size(200, 3))


for _captions in ("short", "long"):
    for _ending, _way in (("", ExecutionConfig()), (", compiled", gpu.COMPILED)):
        section(1, f"{_captions} captions{_ending}")(
            functools.partial(measure_loop, captions=_captions, way=_way)
        )


section(1, "500 x 375, compiled")(
    functools.partial(measure_loop, captions="short", way=gpu.COMPILED, pixels=(500, 375))
)


@section(1, "flash attention")
def check_flash(lab: Lab) -> Values:
    """Run the image tower with flash attention as the only choice, which fails where it cannot be
    used, and with the kernel that torch chooses."""
    model = models.create_model(lab.model).to(lab.device)
    side, noise = models.preprocessing(model).size, torch.Generator(lab.device).manual_seed(0)
    pixels = torch.randn(lab.batch, 3, side, side, generator=noise, device=lab.device)

    def encode() -> Tensor:
        with torch.autocast(lab.device, torch.bfloat16):
            features = models.encode_image(model, pixels)
        features.sum().backward()
        return features.detach()

    chosen, times = encode(), lab.size(10, 1)
    found: Values = {"as torch chooses, ms": 1e3 * seconds_of(encode, times)}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found["largest difference"] = float((encode() - chosen).abs().max())
        found["flash, ms"] = 1e3 * seconds_of(encode, times)
    return found


@section(1, "waits")
def count_waits(lab: Lab) -> Values:
    """Count how often, and where, the host waits for the card in a step of a run."""
    run_config, corpus = lab.prepare(steps=8)
    state = make_train_state(run_config, corpus, device=lab.device, execution=ExecutionConfig())
    pools = mixtures.task_pools(run_config, corpus)[TASK]
    switch = torch.cuda.set_sync_debug_mode if lab.device == "cuda" else lambda mode: None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        switch("warn")
        train_task(state, pools, TASK)
        switch("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchron" in str(w.message)]
    steps = run_config.training.steps
    at = {place: count / steps for place, count in Counter(places).most_common()}
    return {"per step": len(places) / steps, "at": at}


def measure_open_clip(lab: Lab, compiled: bool) -> Values:
    """Train open_clip's own network by its own loss, the batch on the card beforehand."""
    model: Any = models.create_fused_model(lab.model).to(lab.device).train()
    call = torch.compile(model, backend=compiling.BACKEND) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    side, noise = models.preprocessing(model).size, torch.Generator(lab.device).manual_seed(0)
    pixels = torch.randn(lab.batch, 3, side, side, generator=noise, device=lab.device)
    words = "a red fox, seen from the side on a bright day, with a wall of old stones behind it"
    tokens = models.tokenizer(lab.model)([words] * lab.batch).to(lab.device)

    def step() -> None:
        with torch.autocast(lab.device, torch.bfloat16):
            output = call(pixels, tokens)
            features = output["image_features"], output["text_features"]
            loss = open_clip.ClipLoss()(*features, output["logit_scale"])
        optimizer.zero_grad()
        cast(Tensor, loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    peak = gpu.peak_bytes(step, times=lab.size(5, 1))
    seconds = seconds_of(step, lab.size(20, 1))
    return {"ms": 1e3 * seconds, "samples/s": lab.batch / seconds, "peak GB": peak / 1e9}


section(2, "open_clip")(functools.partial(measure_open_clip, compiled=False))
section(2, "open_clip, compiled")(functools.partial(measure_open_clip, compiled=True))


@section(2, "large model")
def measure_large(lab: Lab) -> Values:
    """Train a larger network in quarters of a batch, activations kept or computed again."""
    setting, found = f"model.name={lab.size('ViT-L-14', lab.model)}", {}
    for words, again in (("micro-batches", False), ("recomputed", True)):
        way = ExecutionConfig(lab.batch // 4, checkpoint_activations=again)
        values = measure_loop(lab, setting, captions="short", way=way, steps=6)
        found |= {f"{words}, ms": values["ms"], f"{words}, GB": values["peak GB"]}
    return found


@section(2, "checkpoint")
def measure_checkpoint(lab: Lab) -> Values:
    """Save and restore the state of a run."""
    run_config, corpus = lab.prepare(steps=2)
    state = make_train_state(run_config, corpus, device=lab.device, execution=ExecutionConfig())
    train_task(state, mixtures.task_pools(run_config, corpus)[TASK], TASK)
    model, optimizer = state.model, state.optimizer
    with CheckpointManager("h100") as manager:
        tree, machine = run_config.to_dict(), machine_record()

        def save() -> None:
            progress = Progress(SCHEMA, "benchmark", tree, TASK, 1, [], 0.0, machine)
            manager.save(RunState(progress, checkpoints.state_tensors(model, optimizer)))

        found = {"whole s": seconds_of(save)}
        manager.in_background = True
        found["until it goes on s"] = seconds_of(save)
        manager.finish()
        [path, *_] = checkpoints.checkpoint_files(manager.folder)
        found["GB"] = path.stat().st_size / 1e9
        tensors = checkpoints.read_checkpoint(path).tensors
        found["restore s"] = seconds_of(lambda: checkpoints.restore(tensors, model, optimizer))
        manager.remove()
    return found


@section(2, "merging")
def measure_merging(lab: Lab) -> Values:
    """Merge two networks by some rules, on the CPU and on the device."""
    base, found = models.create_model(lab.model).state_dict(), {}
    for device in dict.fromkeys(["cpu", lab.device]):
        start = {name: x.to(device) for name, x in base.items()}
        tuned = {name: x * 1.01 if x.is_floating_point() else x for name, x in start.items()}
        for rule in ("interpolation", "slerp", "task-arithmetic", "ties", "magmax"):
            below = None if rule in ("interpolation", "slerp") else start
            merge = functools.partial(apply.merge, rule, [tuned, start], below)
            found[f"{rule}, {device}, ms"] = 1e3 * seconds_of(merge)
    return found


@section(2, "evaluation")
def measure_evaluation(lab: Lab) -> Values:
    """Score a network on the collection's test images, twice."""
    _, corpus = lab.prepare()
    model = models.create_model(lab.model).to(lab.device)
    score = functools.partial(evaluation.evaluate, model, lab.model, corpus)
    found = {f"{which} s": seconds_of(score) for which in ("first", "second")}
    return found | {"images": len(corpus.rows("test"))}


@section(2, "methods")
def measure_methods(lab: Lab) -> Values:
    """Train a few steps by every update method."""
    found = {}
    for name in lab.size(option_names("method"), ("full", "ewc")):
        settings = [f"method.name={name}", f"training.batch={lab.size(64, 8)}"]
        settings += ["method.batches=1"] * (name == "ewc")
        values = measure_loop(lab, *settings, captions="short", way=ExecutionConfig(), steps=6)
        found[f"{name}, ms"] = values["ms"]
    return found


def run_cmpt(*arguments: str, **options: Any) -> subprocess.Popen:
    """Start `cmpt`, which knows the networks of benchmarks as well, and return its process."""
    program = "from cmp.bench import networks; from cmp.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", program, *arguments], **options)


def finish_cmpt(*arguments: str) -> str:
    """Run `cmpt` to its end and return what it said; raise AssertionError if it fails."""
    process = run_cmpt(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, errors = process.communicate()
    if process.returncode:
        raise AssertionError(f"cmpt {arguments[0]}: status {process.returncode}: {errors[-600:]}")
    return said


@section(3, "killed and resumed")
def kill_and_resume(lab: Lab) -> Values:
    """Kill a run within a task, go on, ask it to stop by SIGTERM, and go on to its end; where
    everything is small, without the first two, which other tests do on a CPU."""
    run_config, _ = lab.prepare(f"evaluation.subset={lab.size(8, 1)}", "evaluation.full=false")
    settings = [f"training.steps={lab.size(60, 10)}"]
    file, found = lab.work / "run.yaml", {}
    file.write_text(json.dumps(config.override(run_config.to_dict(), settings)))
    command = ("run", str(file), "--device", lab.device, "--keep-weights")
    signals = ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143))
    for number, status in signals[lab.size(0, 1) :]:
        log = lab.out / f"run-{number.name}.log"
        with log.open("w") as output:
            process = run_cmpt(*command, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None and not re.search(r" [1-9]\d*/\d+ \[", log.read_text()):
                time.sleep(0.05)  # until the bar shows a step
            time.sleep(lab.size(5, 0))
            process.send_signal(number)
            found[f"s until {number.name} has ended it"] = seconds_of(process.wait)
        if process.returncode != status:
            raise AssertionError(f"{number.name}: status {process.returncode}; {log} says more")
    found["then s"] = seconds_of(lambda: found.update(said=finish_cmpt(*command)[-110:]))
    return found


@section(3, "export")
def export_run(lab: Lab) -> Values:
    """Export the run of the section before as a folder of the hub, and load it by open_clip."""
    records = (build_folder() / "runs").glob("*/run.json")
    newest = max(records, key=lambda path: path.stat().st_mtime).parent.name
    folder = lab.work / "exported"
    finish_cmpt("export", newest, "--to", "hf", "-o", str(folder))
    model: Any = open_clip.create_model_from_pretrained(
        f"local-dir:{folder}", return_transform=False
    )
    kept = store.final_model(store.load_run(newest))
    digests = [models.weights_digest(each) for each in (models.split_attention(model), kept)]
    return {"the same weights": digests[0] == digests[1], "files": sorted(os.listdir(folder))}


@section(3, "update and compare")
def update_and_compare(lab: Lab) -> Values:
    """Update a network with two folders of pictures, one after the other, by `cmpt update`, and
    compare both releases by `cmpt compare`."""
    _, corpus = lab.prepare()
    months, found = [lab.work / f"month-{number}" for number in (1, 2)], {}
    files = cast(Any, corpus.images)
    for month, rows in zip(months, np.array_split(corpus.rows("train"), 2), strict=True):
        for row in rows.tolist():
            path = month / f"{corpus.table['label'].iloc[row]}" / f"{row}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.read(row))
    batch = lab.size(128, 8)
    settings = [f"training.batch={batch}", "training.passes=2", "evaluation.subset=8"]
    settings += ["training.precision=fp32"] * lab.small
    start, releases = (
        ["--start", f"{lab.model}:random"],
        [lab.work / f"{x.name}-out" for x in months],
    )
    for month, release in zip(months, releases, strict=True):
        shutil.rmtree(release, ignore_errors=True)
        command = ["update", *start, *settings, "--data", month, "-o", release]
        command = [*map(str, command), "--device", lab.device]
        found[f"update {month.name} s"] = seconds_of(functools.partial(finish_cmpt, *command))
        start = [str(release)]
    page = lab.out / "compare.html"
    command = ["compare", *map(str, releases), "--report", str(page), "--device", lab.device]
    command += ["--subset", str(lab.size(200, 2))]
    found["compare s"] = seconds_of(functools.partial(finish_cmpt, *command))
    return found | {"page MB": page.stat().st_size / 1e6}


@section(3, "cmpt bench gpu")
def run_benchmark(lab: Lab) -> Values:
    """Run `cmpt bench gpu`; on a CPU, which it refuses, what it measures of a tiny network."""
    if lab.small:
        rows = gpu.measure(*lab.prepare(), rounds=1)
    else:
        finish_cmpt("bench", "gpu", "--rounds", "3", "--model", "small", "--model", lab.model)
        rows = json.loads((build_folder() / "bench" / "gpu.json").read_text())["rows"]
    return {str(row["path"]): {key: str(row[key]) for key in row} for row in rows}


@section(3, "small runs")
def measure_small_runs(lab: Lab) -> Values:
    """Compute runs of an embedded network, several at a time on one card, as a study does."""
    settings, rates = lab.size(["model.name=small"], ["model.name=tiny-half", "stream.tasks=2"]), {}
    settings.append(f"evaluation.subset={lab.size(64, 4)}")
    settings += [f"training.steps={lab.size(40, 2)}", "model.start=random"]
    for jobs in lab.size((1, 4, 8), (2,)):
        seeds = [f"seed={1000 * jobs + number}" for number in range(lab.size(2, 1) * jobs)]
        trees = [config.override(config.profile("quick"), [*settings, seed]) for seed in seeds]
        runs = [config.parse(tree, "h100") for tree in trees]
        studies.compute_runs(runs, jobs, lab.device, finished=lambda run: None)
        stored = [store.load_run(identity.run_id_of(run)) for run in runs]
        seconds = float(np.median([run.provenance["seconds"] for run in stored]))
        rates[f"{jobs} processes, runs an hour"] = 3600 * jobs / seconds
    return rates | {"most to one": max(rates.values()) / next(iter(rates.values()))}


def main() -> None:
    """Work through the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", type=int, choices=SECTIONS)
    parser.add_argument("--small", action="store_true", help="on a CPU, with tiny networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, out = (Path(os.environ[name]).absolute() for name in ("H100_WORK", "OUT"))
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        packed.load_embedded()
    except CmpError as error:
        sys.exit(f"h100.py: the embedded data are needed, and nothing was measured: {error}")
    lab = Lab("cpu" if arguments.small else "cuda", arguments.small, work, out)
    if lab.small:
        gpu.DEVICE, gpu.STEPS, devices.SIDE[lab.device] = lab.device, 1, 128
        compiling.BACKEND = "eager"  # inductor is refused on a CPU
        arithmetic.lacks_bf16_kernels = lambda kind: False  # dynamo refuses the mode for it
    went_well = [work_through(lab, stage, PREDICTED) for stage in arguments.stages]
    sys.exit(0 if all(went_well) else 1)


if __name__ == "__main__":
    main()
