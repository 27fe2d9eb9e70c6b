"""`cmp`: the package from a shell."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cmp import __version__, evaluation, models, pretraining, runs
from cmp.config import Model
from cmp.data import attribution, build, corpus, manifest, packed, sheet
from cmp.errors import CmpError
from cmp.paths import ROOT, build_folder

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Datasets: build, list, show.")
app.add_typer(data_app, name="data")
console = Console()

Threads = Annotated[int, typer.Option(help="Torch threads; results depend on it in the last bits.")]
Seed = Annotated[int, typer.Option(min=0, help="Number of the base.")]
ROLE_NAMES = {
    "pool": "pretraining pool",
    "adapt": "adaptation (A_KA)",
    "eval": "retention (A_ZS)",
    "transfer": "transfer (reported apart)",
}


def main() -> None:
    """Run the command line; what a user can mend is printed as a sentence, with status 2."""
    try:
        app()
    except CmpError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"cmp: {error}", markup=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    """Continual multimodal pretraining: keep a CLIP model up to date, and measure it."""
    if version:
        console.print(f"cmp {__version__}")
        raise typer.Exit


@data_app.command("build")
def data_build(
    names: Annotated[list[str] | None, typer.Argument(help="Datasets; all by default.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one a core.")] = None,
) -> None:
    """Fetch the packages that are missing, render and pack them; nothing to do is a second."""
    built = build.build(names, jobs)
    console.print(
        f"{len(built)} datasets built, {len(build.select(names)) - len(built)} up to date"
    )


@data_app.command("list")
def data_list() -> None:
    """Every dataset with its role and counts."""
    table = Table()
    table.add_column("dataset", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for column in ("classes", "train", "val.", "test"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for role in ROLE_NAMES:
        for dataset in (d for d in manifest.embedded().values() if d.role == role):
            c = dataset.counts
            numbers = [str(n) if n else "" for n in (c.classes, c.train, c.validation, c.test)]
            missing = "extra" if dataset.optional else "missing"
            state = "built" if packed.is_built(dataset) else missing
            table.add_row(dataset.name, role, *numbers, state)
        table.add_section()
    console.print(table)
    console.print("; ".join(f"{role}: {name}" for role, name in ROLE_NAMES.items()))


@data_app.command("show")
def data_show(
    name: str,
    sheet_file: Annotated[
        Path | None, typer.Option("--sheet", help="Write 64 images here.")
    ] = None,
) -> None:
    """What a dataset is, where it comes from, and samples of it."""
    [dataset] = build.select([name])
    packages = manifest.load_packages()
    console.print(f"[bold]{dataset.name}[/bold]: {dataset.title}")
    console.print(f"role: {ROLE_NAMES[dataset.role]}; task: {dataset.task}")
    console.print(f"images: {dataset.images}\nprompt: {dataset.prompt!r}", highlight=False)
    for source in dataset.sources:
        p = packages[source]
        console.print(f"source: {p.attribution}, {p.licence}, {p.package} {p.version} ({p.url})")
    opened = packed.read(dataset)
    counts = opened.table["split"].value_counts()
    sizes = ", ".join(f"{n} {split}" for split, n in counts.items())
    console.print(f"{len(opened.header.classes)} classes; images: {sizes}")
    for row in opened.table.iloc[:: max(1, len(opened.table) // 6)].itertuples():
        texts = " | ".join(row.captions)
        console.print(f"  {row.split:10} {row.source}: {texts}", markup=False, highlight=False)
    if sheet_file:
        sheet.contact_sheet(opened, sheet_file)
        console.print(f"contact sheet: {sheet_file}")


@data_app.command("attribution")
def data_attribution() -> None:
    """Write ATTRIBUTION.md from the manifests."""
    path = ROOT / "ATTRIBUTION.md"
    path.write_text(attribution.attribution(manifest.load_packages(), manifest.load_datasets()))
    console.print(f"wrote {path}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="An embedded model, such as tiny.")],
    seed: Seed = 0,
    start: Annotated[str, typer.Option(help="annealed or unannealed.")] = "annealed",
    weights: Annotated[Path | None, typer.Option(help="A safetensors file to use instead.")] = None,
    split: Annotated[str, typer.Option(help="test, or validation for choices.")] = "test",
    threads: Threads = 2,
) -> None:
    """Zero-shot scores on every dataset, with standard errors over concepts."""
    torch.set_num_threads(threads)
    if start not in ("annealed", "unannealed"):
        raise CmpError(f"--start: {start!r}: choose annealed or unannealed")
    if split not in ("test", "validation"):
        raise CmpError(f"--split: {split!r}: choose test or validation")
    if weights:
        network = models.create(model)
        models.load_weights(network, weights)
    else:
        network = models.load(Model(model, start), seed)
    scores = evaluation.evaluate(network, model, corpus.load(), split)
    print_scores(scores, f"{model}, {weights or f'{start} base {seed}'}, {split}")


def print_scores(scores: evaluation.Scores, title: str) -> None:
    """The table of an evaluation, datasets by role, then the aggregates."""
    table = Table(title=title)
    table.add_column("dataset")
    table.add_column("role")
    table.add_column("metric")
    for column in ("score %", "std. error", "chance %", "images", "classes"):
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


@app.command()
def pretrain(
    model: Annotated[str, typer.Argument(help="tiny or tiny-vit.")],
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
        cards = pretraining.pretrain(run_config, corpus.load(), folder, _watch(bar))
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


def _watch(bar: tqdm) -> runs.Observer:
    """Progress with the running loss; reads the loss once every 20 steps only."""

    def step(task: int, step: int, loss: torch.Tensor, network: torch.nn.Module) -> None:
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    def after_task(done: int, scores: evaluation.Scores) -> None:
        found = ", ".join(f"{key} {value:.1f}" for key, value in scores.summary().items())
        bar.write(f"after {done} tasks: {found}")

    return runs.Observer(step, after_task)
