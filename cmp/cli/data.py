"""Datasets: build, list, show, check, init."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cmp.cli.shared import ROLE_NAMES, Data, Seed, Threads, console, import_lab
from cmp.embedded.manifest import (
    embedded_manifests,
    is_built,
    load_datasets,
    load_packages,
    select_datasets,
)
from cmp.errors import CmpError
from cmp.files import atomic_file, project_folder
from cmp.readers.manifest import load_manifests

if TYPE_CHECKING:
    from cmp.readers.collection import DatasetState

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("build")
def build_(
    names: Annotated[list[str] | None, typer.Argument(help="Datasets; all by default.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one a core.")] = None,
) -> None:
    """Fetch the packages that are missing, render and pack them; nothing to do is a second."""
    from cmp.embedded import build

    built = build.build_datasets(names, jobs)
    console.print(
        f"{len(built)} datasets built, {len(select_datasets(names)) - len(built)} up to date"
    )


@app.command("list")
def list_() -> None:
    """Every dataset with its role and counts."""
    table = Table()
    table.add_column("dataset", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for column in ("classes", "train", "val.", "test"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for role in ROLE_NAMES:
        for dataset in (d for d in embedded_manifests().values() if d.role == role):
            c = dataset.counts
            numbers = [str(n) if n else "" for n in (c.classes, c.train, c.validation, c.test)]
            state = "built" if is_built(dataset) else "missing"
            table.add_row(dataset.name, role, *numbers, state)
        table.add_section()
    console.print(table)
    console.print("; ".join(f"{role}: {name}" for role, name in ROLE_NAMES.items()))


@app.command("show")
def show(
    name: str,
    sheet_file: Annotated[
        Path | None, typer.Option("--sheet", help="Write 64 images here.")
    ] = None,
) -> None:
    """What a dataset is, where it comes from, and samples of it."""
    from cmp.embedded import packed, sheets

    [dataset] = select_datasets([name])
    packages = load_packages()
    console.print(f"[bold]{dataset.name}[/bold]: {dataset.title}")
    console.print(f"role: {ROLE_NAMES[dataset.role]}; task: {dataset.task}")
    console.print(f"images: {dataset.images}\nprompt: {dataset.prompt!r}", highlight=False)
    for source in dataset.sources:
        p = packages[source]
        console.print(f"source: {p.attribution}, {p.licence}, {p.package} {p.version} ({p.url})")
    opened = packed.read_packed(dataset)
    counts = opened.table["split"].value_counts()
    sizes = ", ".join(f"{n} {split}" for split, n in counts.items())
    console.print(f"{len(opened.header.classes)} classes; images: {sizes}")
    for row in opened.table.iloc[:: max(1, len(opened.table) // 6)].itertuples():
        texts = " | ".join(row.captions)
        console.print(f"  {row.split:10} {row.source}: {texts}", markup=False, highlight=False)
    if sheet_file:
        sheets.contact_sheet(opened, sheet_file)
        console.print(f"contact sheet: {sheet_file}")


@app.command("check")
def check(
    name: Annotated[
        str, typer.Argument(help="embedded, fomo, or the path of a folder of manifests.")
    ] = "embedded",
    decode: Annotated[bool, typer.Option(help="Decode every image, once.")] = True,
) -> None:
    """What there is of every set: present, absent, partial, wrong counts, faulty. The status is 1
    if anything that is there cannot be used as it is."""
    from cmp.embedded import packed
    from cmp.readers import collection

    if name == "embedded":
        good = {each.name: packed.is_intact(each) for each in select_datasets()}
        for each in (each for each, intact in good.items() if not intact):
            console.print(f"{each}: not built or damaged; run `cmpt data build {each}`")
        console.print(f"{sum(good.values())} of {len(good)} embedded sets are intact")
        raise typer.Exit(0 if all(good.values()) else 1)
    states = [collection.dataset_state(*place, decode) for place in load_manifests(name)]
    console.print(states_table(states))
    reasons: dict[str, list[str]] = {}
    for each in (each for each in states if each.reason):
        reasons.setdefault(each.reason, []).append(each.dataset.name)
    for why, names in reasons.items():
        console.print(f"{', '.join(names)}: {why}", markup=False, highlight=False)
    skipped = [s for s in states if s.state in ("partial", "faulty") and s.dataset.faults == "skip"]
    usable = sum(s.state == "present" for s in states) + len(skipped)
    absent = sum(s.state == "absent" for s in states)
    console.print(f"{usable} of {len(states)} sets can be used, {absent} are absent")
    raise typer.Exit(0 if usable + absent == len(states) and usable else 1)


def states_table(states: list["DatasetState"]) -> Table:
    """A row a set: what was found, out of what its manifest counts."""
    table = Table()
    for column in ("set", "role"):
        table.add_column(column, no_wrap=True)
    for column in ("classes", "train", "val.", "test", "B/32 %"):
        table.add_column(column, justify="right")
    table.add_column("state", no_wrap=True)
    for state in states:
        counts = state.index.counts() if state.index else {}
        expected = state.dataset.counts
        cells = []
        for key in ("classes", "train", "validation", "test"):
            found, wanted = counts.get(key, 0), getattr(expected, key) if expected else None
            used = key == "classes" or key in state.dataset.allowed_splits()
            of = f"/{wanted}" if wanted else ""
            cells.append(f"{found}{of}" if used and (found or of) else "")
        score = state.dataset.zero_shot
        shown = "" if score is None else f"{score:.1f}"
        table.add_row(state.dataset.name, state.dataset.role, *cells, shown, state.state)
    return table


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures, tars or tables.")],
    write: Annotated[bool, typer.Option(help="Write the manifest; else only print it.")] = True,
) -> None:
    """Look into a folder and write a manifest of what is there, with what is left to fill in."""
    from cmp.readers import infer

    path, text, words = infer.infer_manifest(folder)
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if write:
        infer.write_manifest(path, text)
        console.print(f"written: {path}; `cmpt data check {folder}` checks it", highlight=False)


@app.command("attribution")
def attribution_() -> None:
    """Write ATTRIBUTION.md from the manifests."""
    from cmp.embedded import sheets

    path = project_folder() / "ATTRIBUTION.md"
    path.write_text(sheets.attribution_text(load_packages(), load_datasets()))
    console.print(f"wrote {path}")


stream_app = typer.Typer(no_args_is_help=True, help=__doc__)


@stream_app.command("make")
def stream_make(
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
    import torch

    from cmp import config, models, streams
    from cmp.data import load_data
    from cmp.experiments import statistics

    torch.set_num_threads(threads)
    corpus, chosen = load_data(data), config.parse({"model": {"name": model}, "seed": seed})
    known = None if counts is None else read_counts(counts)
    network = models.load_model(chosen.model, chosen.seeds.init).eval()
    classes = statistics.measure_classes(network, model, corpus, known)
    console.print(f"{len(classes)} classes: {streams.write_statistics(classes, name, 'classes')}")
    images = statistics.measure_pool(network, model, corpus)
    console.print(
        f"{len(images)} images of pools: {streams.write_statistics(images, name, 'pool')}"
    )


def read_counts(path: Path) -> dict[str, int]:
    """How often a corpus names each class, from a CSV file with the columns `class` and `count`."""
    import pandas as pd

    try:
        table = pd.read_csv(path, keep_default_na=False)
        return {str(name): int(count) for name, count in table[["class", "count"]].to_numpy()}
    except (OSError, ValueError, LookupError) as error:
        raise CmpError(f"{path}: expected the columns class,count ({error})") from error


@stream_app.command("import")
def stream_import(
    file: Annotated[Path, typer.Argument(help='A JSON list of "DATASET+++class".')],
    name: Annotated[str, typer.Argument(help="What stream.traits will call it.")],
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the summary.")] = 20,
) -> None:
    """Take over a stream file of the published reference, for stream.order=listed."""
    import pandas as pd

    from cmp import streams

    order = streams.read_stream_file(file)
    blocks = streams.cut_into_tasks(order, tasks)
    path = streams.write_statistics(streams.stream_table(order), name, "classes")
    datasets = len({entry.partition("+++")[0] for entry in order})
    sizes = pd.Series([len(block) for block in blocks]).value_counts(sort=False)
    words = ", ".join(f"{count} of {size}" for size, count in sizes.items())
    console.print(f"{len(order)} classes of {datasets} datasets: {path}", highlight=False)
    console.print(f"cut into {tasks} tasks: {words}", highlight=False)


@stream_app.command("show")
def stream_show(
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value ..., such as stream.order=similarity.")
    ] = None,
    profile: Annotated[str, typer.Option(help="quick or cpu.")] = "cpu",
    picture: Annotated[Path | None, typer.Option(help="Draw tasks x datasets as a .png.")] = None,
) -> None:
    """What arrives in each task of a stream: classes, datasets, images, passes over them."""
    from cmp import config, streams
    from cmp.data import load_corpus
    from cmp.experiments import statistics

    chosen = config.parse(config.override(config.profile(profile), settings or []), "cmpt stream")
    data = load_corpus(chosen)
    found = statistics.stream_report(chosen, data)
    table = Table(title=f"order {chosen.stream.order}{', reversed' * chosen.stream.reverse}")
    for column in ("task", *found.columns):
        table.add_column(column, justify="right")
    for row in found.itertuples():
        *whole, passes = row
        table.add_row(*map(str, whole), f"{passes:.1f}")
    console.print(table)
    if picture:
        blocks = streams.task_classes(data, chosen.stream, chosen.seeds.stream)
        figure = import_lab("figures.inputs").stream(streams.class_counts(blocks), found)
        with atomic_file(picture) as partial:
            figure.savefig(partial, format="png", dpi=144)
        console.print(f"picture: {picture}")
