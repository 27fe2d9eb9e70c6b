"""Orders of classes: make, import, show."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.table import Table

from cmp import config, models, streams
from cmp.cli.shared import Data, Seed, Threads, console
from cmp.data import corpus as corpora
from cmp.data import traits
from cmp.errors import CmpError
from cmp.evaluation import measuring
from cmp.files import whole_file
from cmp.mixtures import exposures
from cmp.plots import inputs as plot_inputs
from cmp.streams import listed

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("make")
def make(
    name: Annotated[str, typer.Argument(help="What stream.traits will call the tables.")],
    model: Annotated[str, typer.Option(help="The model whose base measures.")] = "tiny",
    seed: Seed = 0,
    counts: Annotated[
        Path | None, typer.Option(help="A .csv, class,count: how often a corpus names each class.")
    ] = None,
    data: Data = "embedded",
    threads: Threads = 2,
) -> None:
    """Measure, with one base, what orders and selections go by: accuracy, loss, alignment,
    frequency, year and embedding of each class; alignment and cluster of each pool image."""
    torch.set_num_threads(threads)
    corpus, chosen = corpora.named(data), config.parse({"model": {"name": model}, "seed": seed})
    known = None if counts is None else read_counts(counts)
    network = models.load(chosen.model, chosen.seeds.init).eval()
    classes = measuring.classes(network, model, corpus, known)
    console.print(f"{len(classes)} classes: {traits.write(classes, name, 'classes')}")
    images = measuring.pool(network, model, corpus)
    console.print(f"{len(images)} images of pools: {traits.write(images, name, 'pool')}")


def read_counts(path: Path) -> dict[str, int]:
    """How often a corpus names each class, from a CSV file with the columns `class` and `count`."""
    try:
        table = pd.read_csv(path, keep_default_na=False)
        return {str(name): int(count) for name, count in table[["class", "count"]].to_numpy()}
    except (OSError, ValueError, LookupError) as error:
        raise CmpError(f"{path}: expected the columns class,count ({error})") from error


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help='A JSON list of "DATASET+++class".')],
    name: Annotated[str, typer.Argument(help="What stream.traits will call it.")],
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the summary.")] = 20,
) -> None:
    """Take over a stream file of the published reference, for stream.order=listed."""
    order = listed.read(file)
    blocks = streams.cut(order, tasks)
    path = traits.write(listed.table(order), name, "classes")
    datasets = len({entry.partition("+++")[0] for entry in order})
    sizes = pd.Series([len(block) for block in blocks]).value_counts(sort=False)
    words = ", ".join(f"{count} of {size}" for size, count in sizes.items())
    console.print(f"{len(order)} classes of {datasets} datasets: {path}", highlight=False)
    console.print(f"cut into {tasks} tasks: {words}", highlight=False)


@app.command("show")
def show(
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value ..., such as stream.order=similarity.")
    ] = None,
    profile: Annotated[str, typer.Option(help="quick or cpu.")] = "cpu",
    picture: Annotated[Path | None, typer.Option(help="Draw tasks x datasets as a .png.")] = None,
) -> None:
    """What arrives in each task of a stream: classes, datasets, images, passes over them."""
    chosen = config.parse(config.override(config.profile(profile), settings or []), "cmp stream")
    data = corpora.of(chosen)
    found = exposures.report(chosen, data)
    table = Table(title=f"order {chosen.stream.order}{', reversed' * chosen.stream.reverse}")
    for column in ("task", *found.columns):
        table.add_column(column, justify="right")
    for row in found.itertuples():
        *whole, passes = row
        table.add_row(*map(str, whole), f"{passes:.1f}")
    console.print(table)
    if picture:
        blocks = streams.blocks(data, chosen.stream, chosen.seeds.stream)
        figure = plot_inputs.stream(streams.class_counts(blocks), found)
        with whole_file(picture) as partial:
            figure.savefig(partial, format="png", dpi=144)
        console.print(f"picture: {picture}")
