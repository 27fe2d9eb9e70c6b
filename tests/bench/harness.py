"""What the sections of `h100.py` share: where they measure, how they are gone through, training."""

import dataclasses
import functools
import gc
import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cmp import budgets, config, mixtures, models
from cmp.bench import gpu
from cmp.bench.jpegs import SIZE
from cmp.bench.networks import TASK
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.embedded import packed
from cmp.losses import model_loss
from cmp.scale import decoding
from cmp.scale.devices import DEVICES
from cmp.scale.execution import ExecutionConfig
from cmp.training import StepResult, create_optimizer, make_train_state, train_step

Values = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """Where things are measured, and how large they are.

    Attributes:
        device: "cuda", or "cpu".
        small: Whether networks are tiny.
        work: A folder for data.
        out: A folder for results.
    """

    device: str
    small: bool
    work: Path
    out: Path

    def size(self, usual: Any, small: Any) -> Any:
        """Return one of two values: the second where everything is small."""
        return small if self.small else usual

    @property
    def model(self) -> str:
        """The network that is measured."""
        return self.size("ViT-B-16", "bench-nano")

    @property
    def batch(self) -> int:
        """Samples per batch."""
        return self.size(512, 8)

    def prepare(
        self,
        *settings: str,
        captions: str = "short",
        steps: int = 40,
        pixels: tuple[int, int] = SIZE,
    ) -> tuple[RunConfig, Corpus]:
        """Return the config and the data of a run on JPEGs.

        Args:
            *settings: Changes of the config, such as "method.name=lora".
            captions: A key of `cmp.bench.pictures.LENGTHS`.
            steps: Steps per task; two where everything is small, in fp32, since few CPUs compute
                bf16 fast.
            pixels: Width and height of the JPEGs.
        """
        embedded = packed.load_embedded()
        made, corpus = gpu.prepare(self.model, embedded, self.batch, self.work, captions, pixels)
        sizes = [f"training.steps={self.size(steps, 2)}"] + ["training.precision=fp32"] * self.small
        settings = (*sizes, *settings)
        return config.parse(config.override(made.to_dict(), settings), "h100"), corpus


Measure = Callable[[Lab], Values]
SECTIONS: dict[int, dict[str, Measure]] = {1: {}, 2: {}, 3: {}}
"""Stage -> name of a section -> what measures it."""


def section(stage: int, name: str) -> Callable[[Measure], Measure]:
    """Return a decorator that adds a function to the sections of a stage."""

    def add(measure: Measure) -> Measure:
        SECTIONS[stage][name] = measure
        return measure

    return add


def seconds_of(call: Callable[[], object], times: int = 1) -> float:
    """Return the seconds of a call, on average, the device's work included."""
    gpu.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        call()
    gpu.synchronize()
    return (time.perf_counter() - started) / times


def release() -> None:
    """Give back the memory on a card of tensors that nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def gradients(
    run_config: RunConfig,
    corpus: Corpus,
    device: str,
    precision: str = "fp32",
    way: ExecutionConfig | None = None,
) -> dict[str, Tensor]:
    """Return the gradients of a run's first step of task 1, by name, as fp64 on the CPU."""
    training = dataclasses.replace(run_config.training, precision=precision)
    run_config = dataclasses.replace(run_config, training=training)
    state = make_train_state(run_config, corpus, device=device, execution=way)
    pools, optimizer, found = mixtures.task_pools(run_config, corpus), create_optimizer(state), {}

    def keep(*_: object) -> None:
        for name, parameter in state.model.named_parameters():
            found[name] = cast(Tensor, parameter.grad).detach().double().cpu()

    optimizer.register_step_pre_hook(keep)
    side = models.preprocessing(state.model).size
    batch = mixtures.make_batch(run_config, corpus, pools[TASK], TASK, 0, side)
    train_step(state, optimizer, batch, TASK, 0, 0.0)
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the norm of the difference of some gradients, as a part of the others' norm."""
    apart = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return math.sqrt(apart / sum(float(x.square().sum()) for x in other.values()))


def measure_loop(
    lab: Lab,
    *settings: str,
    captions: str,
    way: ExecutionConfig,
    steps: int = 40,
    pixels: tuple[int, int] = SIZE,
) -> Values:
    """Train a task by a run's own loop and loader; the arguments are those of `Lab.prepare`, and
    `way`, how a step is computed. "waiting" is the part of the time that it waited for images."""
    release()
    run_config, corpus = lab.prepare(*settings, captions=captions, steps=steps, pixels=pixels)
    state = make_train_state(run_config, corpus, device=lab.device, execution=way)
    pools, losses, seconds = mixtures.task_pools(run_config, corpus)[TASK], [], []
    times, waits = [], []

    def note(_: int, result: StepResult) -> None:
        losses.append(result.loss)
        times.append(time.perf_counter())
        waits.append(decoding.seconds_waited())

    def train() -> None:
        seconds.append(gpu.task_step_seconds(state, pools, note))

    peak, batch = gpu.peak_bytes(train, times=1), run_config.training.batch
    flops = step_flops(run_config.model.name, batch, captions)
    return {
        "ms": 1e3 * seconds[0],
        "samples/s": batch / seconds[0],
        "peak GB": peak / 1e9,
        "% of peak": 100 * flops / seconds[0] / DEVICES["h100"].peak,
        "waiting": (waits[-1] - waits[0]) / (times[-1] - times[0]),
        "losses": [losses[0].item(), losses[-1].item()],
    }


@functools.cache
def step_flops(name: str, batch: int, captions: str) -> int:
    """Return the FLOPs of a step with captions of a kind, see `cmp.bench.pictures.LENGTHS`."""
    model = models.create_on_meta(name)
    side, length = models.preprocessing(model).size, model.context_length
    tokens = torch.ones(batch, length, dtype=torch.int64)
    tokens[:, min(77 if captions == "long" else 24, length) - 1] = 2  # the last has the largest id
    texts = [x.to("meta") for x in models.pack_texts(tokens)]
    pixels = torch.empty(batch, 3, side, side, device="meta")

    def step() -> None:
        image, text = models.encode_image(model, pixels), models.encode_packed(model, texts)
        model_loss(model, image, text).backward()

    return budgets.count_flops(step)


def work_through(lab: Lab, stage: int, predicted: dict[str, dict[str, float]]) -> bool:
    """Work through the sections of a stage; print their values, and write them to `lab.out`.

    Args:
        lab: Where things are measured.
        stage: The stage.
        predicted: By section and value.

    Returns:
        Whether no section failed.
    """
    results: dict[str, Values] = {}
    for name, measure in SECTIONS[stage].items():
        release()
        result: Values = {"predicted": predicted.get(name, {}), "values": {}}
        started = time.perf_counter()
        try:
            result["values"] = measure(lab)
        except Exception as error:
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {error}"
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["ratios"] = ratios(result)
        results[name] = result
        print_section(name, result)
        path = lab.out / f"stage-{stage}.json"
        path.write_text(json.dumps(results, indent=1, default=str))
    return not any("error" in result for result in results.values())


def ratios(result: Values) -> dict[str, float]:
    """Return each value of a section over what was predicted of it, where that is not 0."""
    values, predicted = result["values"], result["predicted"]
    return {
        key: values[key] / predicted[key] for key in predicted if values.get(key) and predicted[key]
    }


def print_section(name: str, result: Values) -> None:
    """Print the values of a section, each beside what was predicted, and the ratio of both."""
    lines = [f"{name} ({result['seconds']} s) {result.get('error', '')}"]
    for key, value in result["values"].items():
        words = f"{value:.4g}" if isinstance(value, float) else str(value)
        if key in result["predicted"]:
            words += f"   predicted {result['predicted'][key]:g}"
        if key in result["ratios"]:
            words += f", ratio {result['ratios'][key]:.2f}"
        lines.append(f"  {key}: {words}")
    print("\n".join(lines), flush=True)  # at once, since two processes may print
