"""The stream explorer: in which order classes arrive, what that makes of tasks, how it went."""

import dataclasses
import json
from typing import get_args, get_type_hints

import ipywidgets
import pandas as pd
from ipywidgets import Checkbox, Dropdown, IntSlider, ToggleButtons
from lab.explorers import schedule
from lab.explorers.view import Drawn, copyable, explorer, html_table
from lab.figures import inputs

from cmp import config, streams
from cmp.config import RunConfig, Stream
from cmp.data import Corpus
from cmp.experiments import statistics, store
from cmp.experiments.claims import final_scores, mean_over_tasks

SEEDS = 5


def stream_run(order: str, reverse: bool, equal: str, tasks: int, seed: int) -> RunConfig:
    """The `cpu` run of a stream; the seed is every seed's."""
    tree = config.profile("cpu") | {"seed": seed}
    tree["stream"] = {"order": order, "reverse": reverse, "equal": equal, "tasks": tasks}
    return config.parse(tree, "stream_explorer")


def stream_sentence(report: pd.DataFrame) -> str:
    """How unequal the tasks are, in words. report: see `exposures.report`."""
    images, passes, datasets = report["images"], report["passes"], report["datasets"]
    return (
        f"{report['classes'].sum()} classes in {len(report)} tasks. Images a task: {images.min()} "
        f"to {images.max()}, {images.max() / images.min():.1f} times as many; so a task goes over "
        f"its own images {passes.min():.1f} to {passes.max():.1f} times. Datasets a task: "
        f"{datasets.min()} to {datasets.max()}."
    )


def same_stream(run: RunConfig, published: pd.DataFrame) -> str:
    """The stored settings of this stream's order, as HTML: A_KA and A_ZS on the way and at the end,
    means over replicates."""
    trees = published.groupby("setting", sort=False)["config"].first()
    streams_of = {name: config.parse(json.loads(tree)).stream for name, tree in trees.items()}
    names = [name for name, stream in streams_of.items() if stream == run.stream]
    if not names:
        return "<p>No stored run follows this stream.</p>"
    trajectory = store.trajectory(published[published["setting"].isin(names)])
    way = mean_over_tasks(trajectory).groupby("setting", sort=False)[["A_KA", "A_ZS"]].mean()
    end = final_scores(trajectory).groupby("setting", sort=False)[["A_KA", "A_ZS"]].mean()
    table = pd.concat({"on the way": way, "at the end": end}, axis=1).loc[names]
    table.columns = [f"{name} {when} (%)" for when, name in table.columns]
    shown = table.map("{:.1f}".format).rename_axis("setting").reset_index()
    return f"<b>Stored runs of this stream</b>, means over replicates{html_table(shown)}"


def stream_explorer(corpus: Corpus, published: pd.DataFrame | None = None) -> ipywidgets.VBox:
    """Order, direction, cut, tasks and seed -> tasks x datasets, images of each task, stored runs.

    published: the metrics of a study, with their `config`, of which those of the same stream are
    listed.
    """
    kinds = {name: get_args(kind) for name, kind in get_type_hints(Stream).items()}
    orders = [name for name in kinds["order"] if name != "listed"]
    controls = {
        "order": Dropdown(options=orders, description="Order"),
        "reverse": Checkbox(False, description="Reversed"),
        "equal": ToggleButtons(options=kinds["equal"], description="Equal"),
        "tasks": IntSlider(8, min=1, max=20, description="Tasks T"),
        "seed": IntSlider(0, min=0, max=SEEDS - 1, description="Seed"),
    }

    def draw(**values) -> Drawn:
        run = stream_run(**values)
        report = statistics.stream_report(run, corpus)
        counts = streams.class_counts(streams.task_classes(corpus, run.stream, run.seeds.stream))
        known = counts.reindex(columns=sorted(corpus.by_role("adapt")), fill_value=0)
        below = "" if published is None else same_stream(run, published)
        figure = inputs.stream(known, report)
        unseeded = dataclasses.replace(run, seeds=config.Seeds())
        lines = [*schedule.assignments(unseeded), f"seed={values['seed']}"]
        return Drawn(figure, stream_sentence(report), below + copyable(lines))

    return explorer(controls, draw)
