"""Show a stream of updates, measure class statistics for orders, or import a stream file.

Example:
    cmpt stream show stream.order=similarity
"""

from io import StringIO
from pathlib import Path

import typer

from cmp.cli import shared
from cmp.errors import explain_errors
from cmp.parsing import read_text


def show(settings: shared.Settings = None, profile: str = "cpu") -> None:
    """Show the classes, datasets and images of each update, and the passes over its images.

    Args:
        profile: Size of the run: quick, cpu or gpu, or a file of settings, NAME.yaml.

    Example:
        cmpt stream show stream.order=similarity
    """
    from cmp import config

    run_config = config.read_config(profile, settings or [])  # a wrong file is refused at once
    from cmp.data import load_data
    from cmp.readers import class_statistics

    corpus = load_data(run_config.data)
    report = class_statistics.stream_report(run_config, corpus)
    rows = [(*row[:-1], f"{row.passes:.1f}") for row in report.itertuples()]
    title = f"order {run_config.stream.order}{', reversed' * run_config.stream.reverse}"
    shared.print_table(("update", *report.columns), rows, title)


def make(
    name: str,
    model: str = "small",
    seed: shared.NotNegative = 0,
    counts: Path | None = None,
    data: str = "embedded",
    threads: shared.Threads = 2,
) -> None:
    """Measure class statistics with a base model, for sorting.

    The statistics are accuracy, loss, alignment, frequency, year and embedding.

    Args:
        name: Name of the table, for the key stream.traits.
        model: Name of the model whose base is used.
        counts: A .csv file with columns class,count: the number of texts that name each class.
            Default: counts from the pool's captions.

    Example:
        cmpt stream make mine --model small --seed 0
    """
    import torch

    from cmp import config, models
    from cmp.data import load_data
    from cmp.readers import class_statistics

    path = class_statistics.new_statistics_path(name)  # fails before the work, not after
    state = _describe_writing(path)
    torch.set_num_threads(threads)
    corpus, section = load_data(data), config.parse({"model": {"name": model}}).model
    known = None if counts is None else read_counts(counts)
    network = models.load_model(section, seed).eval()
    classes = class_statistics.measure_classes(network, model, corpus, known)
    class_statistics.write_statistics(classes, name)
    typer.echo(f"{len(classes)} classes; {state}: {path}")


def _describe_writing(path: Path) -> str:
    """Return what writing a table does, which replaces an earlier one of the same name."""
    return "replaced" if path.exists() else "written"


def read_counts(path: Path) -> dict[str, int]:
    """Return how often a text corpus names each class, from a CSV file with `class` and `count`."""
    import pandas as pd

    with explain_errors(f"{path}: expected the columns class,count", "", LookupError):
        text = StringIO(read_text(path))
        table = pd.read_csv(text, dtype={"class": str}, keep_default_na=False)
        return {str(name): int(count) for name, count in table[["class", "count"]].to_numpy()}


def import_(file: Path, name: str) -> None:
    """Import a stream file of the paper's published code, for stream.order=listed.

    Args:
        file: JSON file with a list of "DATASET+++class".
        name: Name of the table, for the key stream.traits.

    Example:
        cmpt stream import order.json mine
    """
    import pandas as pd

    from cmp.readers import class_statistics

    order = class_statistics.read_stream_file(file)
    positions = pd.DataFrame({"entry": order, "position": range(len(order))})
    state = _describe_writing(class_statistics.new_statistics_path(name))
    path = class_statistics.write_statistics(positions, name)
    datasets = len({entry.partition("+++")[0] for entry in order})
    typer.echo(f"{len(order)} classes of {datasets} datasets; {state}: {path}")
    typer.echo(f"to see its updates: cmpt stream show stream.order=listed stream.traits={name}")


app = shared.make_group(__doc__, show, make, import_)
