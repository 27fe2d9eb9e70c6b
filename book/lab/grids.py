"""Run a chapter at every point of a grid of its parameters, as for `cmpt book -P peak=3e-4,1e-3`.

Each point is a separate notebook, which later calls skip. An index beside them tabulates and draws
the final scores of the chapter's own runs.
"""

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from cmp.errors import CmpError
from cmp.files import write_atomic
from cmp.project import build_folder
from cmp.releases.templates import markdown_table
from lab import chapters, figures, run

Points = Mapping[Path, Mapping[str, str]]
MAX_POINTS = 200
STREAM_SEED = "stream_seed"
"""The parameter for the seeds of a point."""


def expand_grid(
    given: Mapping[str, str], seeds: int, valid: Mapping[str, chapters.Parameter]
) -> list[dict[str, str]]:
    """Return the points of a grid.

    Args:
        given: Parameter -> its values, separated by commas.
        seeds: The number of streams per point.
        valid: The chapter's parameters by name, with the seed of the first stream.

    Returns:
        For each point, parameter -> text of a value.

    Raises:
        CmpError: There are too many points, or a value is given twice.
    """
    lists = {name: text.split(",") for name, text in given.items()}
    if seeds > 1:
        if STREAM_SEED in lists:
            raise CmpError(
                f"--seeds {seeds}: -P {STREAM_SEED} already gives the seeds; leave out one of them"
            )
        first = valid[STREAM_SEED].default
        lists[STREAM_SEED] = [str(first + number) for number in range(seeds)]
    for name, texts in lists.items():
        kind = valid[name].type if name in valid else "str"  # an unknown name is refused later
        if len({chapters.convert_value(text, kind) for text in texts}) < len(texts):
            raise CmpError(f"-P {name}: a value is given twice; remove one")
    points = [dict(zip(lists, point, strict=True)) for point in itertools.product(*lists.values())]
    if len(points) > MAX_POINTS:
        raise CmpError(f"-P: the grid has {len(points)} points; use at most {MAX_POINTS}")
    return points


def run_grid(
    profile: str,
    number: str,
    given: Mapping[str, str],
    seeds: int = 1,
    jobs: int = 1,
    dry_run: bool = False,
    folder: Path = chapters.BOOK,
) -> Path:
    """Run a chapter at every point of a grid. A failed point does not stop the others.

    Args:
        profile: A profile of `cmp`.
        number: The chapter.
        given: Parameter -> its values, separated by commas.
        seeds: The number of streams per point, in addition to the parameters.
        jobs: The number of notebooks at a time.
        dry_run: Whether to only print the plan.
        folder: The book.

    Returns:
        The path of the index.

    Raises:
        CmpError: Before anything starts, if a parameter is invalid; at the end, if points failed.
    """
    [source] = chapters.select([number], folder)
    valid = chapters.parameters(source)
    if seeds > 1 and STREAM_SEED not in valid:
        raise CmpError(f"--seeds: {source.stem} has no runs of its own; leave it out")
    points = expand_grid(given, seeds, valid)
    target = build_folder() / "grids" / f"{source.stem}, {profile}"
    places = {target / f"{point_name(point)}.ipynb": point for point in points}
    if len(places) < len(points):
        raise CmpError(
            "-P: two values differ only in / and _, so their notebooks would have one name"
        )
    tasks = run.plan_tasks(
        (source, place, point | {"profile": profile}) for place, point in places.items()
    )
    failures = run.run_tasks(tasks, jobs, dry_run)
    index = target / "index.md"
    if not dry_run:
        write_index(index, source, places, failures)
        print(f"index: {index}")
        run.raise_failures(failures)
    return index


def point_name(point: Mapping[str, str]) -> str:
    """Return the name of a point's notebook, in which a path has "_" in place of "/"."""
    return ", ".join(f"{name} {value}" for name, value in point.items()).replace("/", "_")


def write_index(path: Path, source: Path, points: Points, failures: Collection[Path]) -> None:
    """Write the index page of a grid's notebooks, with a table and a figure.

    Args:
        path: The path of the page.
        source: The chapter.
        points: Notebook -> its point.
        failures: Notebooks that failed this time; old scores of an earlier run are left out.
    """
    rows, failed = [], []
    for target, point in points.items():
        if target in failures:
            failed.append(f"* {point_name(point)}: see `{target.stem}.failed.ipynb`")
            continue
        for name, (gained, kept) in run.run_record(target).get("ends", {}).items():
            rows.append({**point, "run": name, "A_KA": gained, "A_ZS": kept})
    table = pd.DataFrame(rows)
    parts = [f"# {source.stem} over a grid\n"]
    if rows:
        figure = figures.plot_grid(table)
        figure.savefig(path.with_name("ends.svg"), format="svg")
        parts += ["![Where the runs of each point ended](ends.svg)\n", markdown_table(table)]
    parts += ["\n## Failed\n", *failed] if failed else []
    write_atomic(path, "\n".join(parts) + "\n")
