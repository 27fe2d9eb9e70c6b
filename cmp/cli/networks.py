"""`cmp eval` and `cmp pretrain`: models, scored and made."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from tqdm import tqdm

from cmp import config, evaluation, models, pretraining, runs
from cmp.cli.shared import ROLE_NAMES, Data, Seed, Threads, console
from cmp.data import corpus
from cmp.errors import CmpError
from cmp.paths import build_folder


def evaluate(
    model: Annotated[str, typer.Argument(help="An embedded model, such as tiny.")],
    seed: Seed = 0,
    start: Annotated[str, typer.Option(help="annealed or unannealed.")] = "annealed",
    weights: Annotated[
        Path | None, typer.Option(help="A file to use instead, as open_clip or a run has them.")
    ] = None,
    split: Annotated[str, typer.Option(help="test, or validation for choices.")] = "test",
    data: Data = "embedded",
    threads: Threads = 2,
) -> None:
    """Zero-shot scores on every dataset, with standard errors over concepts."""
    torch.set_num_threads(threads)
    if start not in ("annealed", "unannealed"):
        raise CmpError(f"--start: {start!r}: choose annealed or unannealed")
    if split not in ("test", "validation"):
        raise CmpError(f"--split: {split!r}: choose test or validation")
    if weights:
        network = models.from_file(model, weights)
    else:
        tree = {"model": {"name": model, "start": start}, "seed": seed}
        chosen = config.parse(tree, "cmp eval")
        network = models.load(chosen.model, chosen.seeds.init)
    scores = evaluation.evaluate(network, model, corpus.named(data), split)
    print_scores(scores, f"{model}, {weights or f'{start} base {seed}'}, {split}")


def print_scores(scores: evaluation.Scores, title: str) -> None:
    """The table of an evaluation, datasets by role, then the aggregates."""
    table = Table(title=f"{title}, in percent")
    table.add_column("dataset", no_wrap=True)
    table.add_column("role")
    table.add_column("metric")
    for column in ("score", "s.e.", "chance", "n", "ways"):
        table.add_column(column, justify="right")
    for role in ROLE_NAMES:
        rows = scores.datasets[scores.datasets["role"] == role]
        for row in rows.itertuples():
            numbers = (f"{x:.1f}" for x in (row.score, row.standard_error, row.chance))
            table.add_row(row.Index, role, row.metric, *numbers, str(row.images), str(row.classes))
        if len(rows):
            table.add_section()
    for key, value in scores.summary().items():
        error = f"{scores.aggregate(key)[1]:.1f}" if key in evaluation.ROLES else ""
        table.add_row(f"[bold]{key}[/bold]", "", "", f"[bold]{value:.1f}[/bold]", error)
    console.print(table)


def pretrain(
    model: Annotated[str, typer.Argument(help="An embedded model, such as tiny.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for weights and cards.")] = None,
    threads: Threads = 1,
) -> None:
    """Pretrain a base on the pool; write both checkpoints with their model cards."""
    torch.set_num_threads(threads)
    run_config = pretraining.pretraining_config(model, seed, *(settings or []))
    folder = out or build_folder() / "models"
    steps = run_config.training.steps + pretraining.joint_config(model, seed).training.steps
    with tqdm(total=steps, desc=f"pretrain {model} {seed}", unit=" steps") as bar:
        cards = pretraining.pretrain(run_config, corpus.load(), folder, watch(bar))
    for start, card in cards.items():
        found = card["scores"]
        values = ", ".join(f"{k} {v['value']} ± {v['standard_error']}" for k, v in found.items())
        console.print(f"{start}: {values}", highlight=False)
        shipped = models.weights_path(model, start, seed)
        if shipped.exists() and not settings and shipped.parent != folder.resolve():
            within, sentence = pretraining.compare(card, pretraining.read_card(shipped))
            console.print(f"{start}: {sentence}", highlight=False)
            if not within:
                raise typer.Exit(1)
    console.print(f"weights and cards: {folder}")


def watch(bar: tqdm) -> runs.Observer:
    """Progress with the running loss; reads the loss once every 20 steps only."""

    def step(task: int, step: int, loss: torch.Tensor, network: torch.nn.Module) -> None:
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    def after_task(done: int, scores: evaluation.Scores) -> None:
        found = ", ".join(f"{key} {value:.1f}" for key, value in scores.summary().items())
        bar.write(f"after {done} tasks: {found}")

    def resumed(steps: int) -> None:  # what was done before says nothing about the speed now
        bar.n, bar.initial = bar.n + steps, bar.initial + steps

    return runs.Observer(step, after_task, resumed)
