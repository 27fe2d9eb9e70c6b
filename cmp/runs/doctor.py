"""What a run needs, and whether it is here: asked before anything starts."""

import importlib.metadata
import re
import shutil
from dataclasses import dataclass

import open_clip
import torch

from cmp import models
from cmp.budgets import counting
from cmp.config import STARTS, RunConfig, parse
from cmp.data import corpus as corpora
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.models import foreign
from cmp.paths import ROOT, build_folder
from cmp.runs import forecast

HERE, MISSING, OPTIONAL = "here", "missing", "optional"
GIGA = 1e9
CARD_MEMORY = 80e9  # of `forecast.CARD`
ROOM = 0.9  # of a card's memory that a step may take
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """One thing that is needed, its state (`HERE`, `MISSING` or `OPTIONAL`) and a sentence."""

    what: str
    state: str
    sentence: str


def data_of(run_config: RunConfig) -> Corpus:
    """The data of a run; `CmpError` where there are none of the size that its model takes."""
    corpus = corpora.of(run_config)
    corpus.check_side(image_side(run_config.model.name), run_config.model.name)
    return corpus


def image_side(name: str) -> int:
    """Pixels of the images that a model takes; none of its weights are needed."""
    known = open_clip.get_model_config(name) or {}
    side = known.get("vision_cfg", {}).get("image_size") or models.blank(name).visual.image_size
    return side[0] if isinstance(side, tuple) else side


def of_run(run_config: RunConfig, device: str = "cuda") -> list[Check]:
    """What `needs` says, whether a step fits the card's memory, and how long the run may take."""
    return [
        *needs(run_config, device),
        _memory(run_config, device),
        Check("time", HERE, forecast_sentence(run_config)),
    ]


def needs(run_config: RunConfig, device: str = "cuda") -> list[Check]:
    """Data, weights and card of a run."""
    return [_data(run_config), _weights(run_config), _card(device)]


def _data(run_config: RunConfig) -> Check:
    try:
        corpus = data_of(run_config)
    except CmpError as error:
        return Check("data", MISSING, str(error).removeprefix("data: "))
    return Check("data", HERE, f"{len(corpus.table)} images of {len(corpus.datasets)} datasets")


def _weights(run_config: RunConfig) -> Check:
    name, start = run_config.model.name, run_config.model.start
    if models.has_start(run_config):
        return Check("weights", HERE, f"{start!r} of {name!r}")
    if start in STARTS:
        return Check("weights", MISSING, f"{start!r} of {name!r}: `cmp pretrain {name}` makes them")
    if start != foreign.HUB and not foreign.tag(name, start):
        return Check("weights", MISSING, f"{start!r}: neither a file nor a tag of {name!r}")
    where = name if start == foreign.HUB else foreign.tag(name, start).get("hf_hub", "its address")
    return Check("weights", MISSING, f"{start!r} of {name!r}: the run fetches them from {where}")


def _card(device: str) -> Check:
    if device == "cpu":
        return Check("device", HERE, f"the CPU, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return Check("device", MISSING, "torch finds no CUDA card, or is built without CUDA")
    found = torch.cuda.get_device_properties(device)
    return Check("device", HERE, f"{found.name}, {found.total_memory / GIGA:.0f} GB")


def _memory(run_config: RunConfig, device: str) -> Check:
    """What a step holds, by account in fp32, against the card's; and micro-batches that fit."""
    card = device != "cpu" and torch.cuda.is_available()
    there = torch.cuda.get_device_properties(device).total_memory if card else CARD_MEMORY
    of = "the card" if card else f"a {forecast.CARD}"
    size = run_config.training.batch
    fits, needed = {}, 0.0
    while size >= 2:
        needed = _bytes(run_config, size)
        fits[size] = needed
        if needed <= ROOM * there:
            break
        size //= 2
    whole = fits[run_config.training.batch]
    said = f"a step holds {whole / GIGA:.0f} GB at once in fp32, {of} has {there / GIGA:.0f} GB"
    if size == run_config.training.batch:
        return Check("memory", HERE, said)
    advice = f"--micro-batch {size} holds {needed / GIGA:.0f} GB"
    return Check("memory", OPTIONAL, f"{said}; in bf16 activations take about half, and {advice}")


def _bytes(run_config: RunConfig, batch: int) -> float:
    tree = run_config.to_dict()
    tree["training"] |= {"batch": batch, "budget": None}
    return counting.cost(parse(tree, "memory")).memory


def forecast_sentence(run_config: RunConfig) -> str:
    """How long a run's training may take on a named card, and that this is an estimate."""
    hours = forecast.on_card(run_config) / 3600
    return (
        f"{hours:.2g} hours of training on one {forecast.CARD}: an estimate from FLOPs at "
        f"{forecast.SHARE:.0%} of its {forecast.PEAK / 1e12:.0f} TFLOP/s in bf16, not measured; "
        "reading images and evaluations come on top"
    )


def of_setup() -> list[Check]:
    """The embedded benchmark: packages, data, bases, disk; and what is optional."""
    return [*_packages(), _embedded(), _bases(), _disk(), _browser(), _optional_card()]


def _packages() -> list[Check]:
    """Those of requirements.txt that are not installed, or one line that all are."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=~!\[; ]", x)[0] for x in lines if x and x[0] not in "#-"]
    absent = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        return [Check("packages", MISSING, f"{', '.join(absent)}: `make study` installs them")]
    said = f"all {len(names)}, torch {torch.__version__}, open_clip {open_clip.__version__}"
    return [Check("packages", HERE, said)]


def _embedded() -> Check:
    try:
        corpus = corpora.load()
    except CmpError as error:
        return Check("data", MISSING, str(error).removeprefix("data: "))
    return Check("data", HERE, f"{len(corpus.table)} images of {len(corpus.datasets)} datasets")


def _bases() -> Check:
    counts = {name: len(models.shipped(name)) for name in models.EMBEDDED}
    said = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return Check("bases", HERE if counts.get("tiny") else MISSING, said or "none")


def _disk() -> Check:
    folder = next(p for p in [build_folder(), *build_folder().absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free / GIGA
    return Check("disk", HERE if free > 1 else MISSING, f"{free:.0f} GB free at {build_folder()}")


def _browser() -> Check:
    found = next((name for name in BROWSERS if shutil.which(name)), None)
    said = found or "none; the tests that open the explorers in a browser are skipped"
    return Check("browser", HERE if found else OPTIONAL, said)


def _optional_card() -> Check:
    found = _card("cuda")
    return Check("card", found.state if found.state == HERE else OPTIONAL, found.sentence)
