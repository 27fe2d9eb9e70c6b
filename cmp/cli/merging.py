"""`cmp merge`: models made of models."""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from cmp.cli.shared import Threads, console
from cmp.config.merging import OF_RULES
from cmp.errors import CmpError
from cmp.merging import streamed
from cmp.merging.rules import RULES, How

DEFAULT = How()


def merge(
    rule: Annotated[str, typer.Argument(help=", ".join(RULES))],
    models: Annotated[list[Path], typer.Argument(help="Safetensors files, newest first.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    base: Annotated[
        Path | None, typer.Option(help="What the models were trained from, for task vectors.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One a model, such as 0.7,0.3; equal ones by default.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Of the merged task vector.")] = None,
    density: Annotated[float | None, typer.Option(help="Share that is kept.")] = None,
    outliers: Annotated[float | None, typer.Option(help="Share dropped at the top.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LiNeS: of the first block.")] = None,
    beta: Annotated[float | None, typer.Option(help="LiNeS: from first to last.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of rules that draw by chance.")] = 0,
    threads: Threads = 1,
) -> None:
    """Merge models tensor by tensor; the file says in its metadata what it was made of."""
    torch.set_num_threads(threads)
    if rule not in RULES:
        raise CmpError(f"no rule is called {rule!r}; there are {', '.join(RULES)}")
    given = {
        "weights": None if weights is None else numbers(weights), "scale": scale,
        "density": density, "outliers": outliers, "alpha": alpha, "beta": beta,
    }  # fmt: skip
    how = settings(rule, {key: value for key, value in given.items() if value is not None}, seed)
    record = {key: getattr(how, key) for key in given if rule in users(key)}
    record |= {"seed": seed} if rule in ("random", "dare", "dare-ties") else {}
    paths = [*models, *([base] if base else [])]
    bar = tqdm(total=streamed.work(paths), desc=rule, unit="B", unit_scale=True, disable=None)
    with bar:
        streamed.merge_files(rule, models, out, base, how, record, bar.update)
    console.print(f"{out}: {rule} of {len(models)} models", highlight=False)


def users(key: str) -> tuple[str, ...]:
    """The rules that a setting is for."""
    return OF_RULES["weight" if key == "weights" else key]


def settings(rule: str, given: dict[str, object], seed: int) -> How:
    """What was given, in its ranges; `CmpError` for what the rule does not take."""
    for key, value in given.items():
        if rule not in users(key):
            raise CmpError(f"--{key} {value}: {rule!r} takes none, only {', '.join(users(key))}")
    how = dataclasses.replace(DEFAULT, **given, draw=(seed,))
    top = how.outliers if rule in users("outliers") else 0.0
    good = {
        "scale": (how.scale is None or 0 < how.scale < float("inf"), "above 0"),
        "density": (0 < how.density <= 1, "above 0 and at most 1"),
        "outliers": (0 <= top <= 1 - how.density, f"from 0 to 1 - density {how.density:g}"),
        "alpha": (0 <= how.alpha < float("inf"), "at least 0"),
        "beta": (0 <= how.beta < float("inf"), "at least 0"),
    }
    for key, (is_good, wanted) in good.items():
        if rule in users(key) and not is_good:
            raise CmpError(f"--{key} {getattr(how, key):g}: must be a number {wanted}")
    return how


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError as error:
        raise CmpError(f"--weights {text!r}: expected numbers such as 0.7,0.3") from error
