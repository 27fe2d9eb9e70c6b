"""Explorers: interactive views over pure functions, whose controls draw the same figures again.

An explorer shows its picture and its sentence from the first draw on, so an executed notebook holds
them without a kernel.
"""

import dataclasses
import functools
import html
import io
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from cmp import config, evaluation, models, streams
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.experiments import evidence, paper, planner, results, statistics, verdicts
from cmp.merging.apply import merge
from cmp.merging.rules import Weights
from cmp.readers.files import read_yaml
from cmp.registry import get_option, option_names
from lab import analyses, chapters, figures

LIKE = "thirds"
"""The setting of a published study whose neighbours in the triangle predict."""
SIZES = ("training.batch", "stream.tasks", "training.steps", "mixture.replay", "mixture.policy")
"""What the mixture explorer sets beside the shares; stored runs speak of their own alone."""
CAPACITY = 1000
"""Images that a buffer holds that needs a number."""
SUBSET = 64
"""Images per dataset that the path explorer scores."""
CONTROLS = read_yaml(chapters.BOOK / "explorers.yaml")

Named = Mapping[str, Any] | None
Drawn = tuple[Figure, str, str]
"""What an explorer shows: the picture, a sentence of plain text, and details as HTML."""


def explorer(controls: Mapping[str, widgets.Widget], draw: Callable[..., Drawn]) -> widgets.VBox:
    """Put controls above what is drawn from their values.

    The picture is one image widget whose bytes are replaced, so nothing flickers and no figure is
    left for the notebook to show. It is there from the start, for pages without a kernel.

    Args:
        controls: Widgets by the names under which `draw` takes their values.
        draw: Where it raises `CmpError`, the message is the sentence and the last picture stays.

    Returns:
        The explorer.
    """
    sentence, details = widgets.HTML(), widgets.HTML()
    picture = widgets.Image(format="png", layout={"max_width": "100%", "width": "900px"})

    def update(_: Any = None) -> None:
        try:
            figure, words, more = draw(**{name: widget.value for name, widget in controls.items()})
        except CmpError as error:
            words = html.escape(str(error), quote=False)
            sentence.value = f"<b>Refused:</b> {words}. Below is what was drawn before."
            return
        sentence.value = html.escape(words, quote=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144)
        picture.value, details.value = file.getvalue(), more

    for control in controls.values():
        if control.has_trait("style"):
            control.style.description_width = "initial"
        if control.has_trait("continuous_update"):
            control.continuous_update = False
        control.observe(update, names="value")
    update()
    box = widgets.Box([*controls.values()], layout={"flex_flow": "row wrap"})
    return widgets.VBox([box, sentence, picture, *([details] if details.value else [])])


def make_controls(explorer: str, options: Named = None, values: Named = None) -> dict[str, Any]:
    """Make the controls that `CONTROLS` lists.

    Args:
        explorer: The explorer's key there.
        options: What menus offer, by name, where the list does not say.
        values: What controls begin with, by name, where the list does not say.

    Returns:
        Widgets by name.
    """
    controls, computed = {}, {"options": options or {}, "value": values or {}}
    for name, listed in CONTROLS[explorer].items():
        about = listed | {key: given[name] for key, given in computed.items() if name in given}
        controls[name] = getattr(widgets, about.pop("widget"))(**about)
    return controls


def _sizes(published: pd.DataFrame | None, setting: str = "") -> dict[str, Any]:
    """Return the sizes of a published setting, by default the first, by the names of controls."""
    if published is None:
        return {}
    configs = results.setting_configs(published)
    run = configs[setting or next(iter(configs))]
    sizes = {"tasks": run.stream.tasks, "steps": run.training.steps, "batch": run.training.batch}
    return sizes | {"replay": run.mixture.replay}


def html_table(table: pd.DataFrame, index: str = "") -> str:
    """Return a table as HTML: scores with one digit, shares with two; a named index comes first."""
    table = table.rename_axis(index).reset_index() if index else table
    shares, score = dict.fromkeys([*"PDB", "distance"], "{:.2f}".format), "{:.1f}".format
    return table.to_html(border=0, index=False, formatters=shares, float_format=score)


def copyable(assignments: list[str]) -> str:
    """Return the command of a run with these key=value as HTML that a click marks."""
    lines = html.escape(" \\\n    ".join(["cmpt run cpu", *assignments]))
    about = '<b>Copy as config</b> (a click marks it all)<pre style="user-select: all">'
    return f"{about}{lines}</pre>"


def run_arguments(run: config.RunConfig) -> list[str]:
    """Return the key=value arguments of `cmpt run cpu` that make a run, quoted for a shell."""
    profile = dict(config.flat_keys(config.parse(config.profile("cpu")).to_dict()))
    return [
        shlex.quote(f"{key}={json.dumps(value, separators=(',', ':'))}".replace('"', ""))
        for key, value in config.flat_keys(run.to_dict())
        if value != profile[key]
    ]


class Triangle(anywidget.AnyWidget):
    """A triangle of three shares that sum to one, with a handle and points that can be chosen.

    Attributes:
        value: The shares of pool, update and buffer.
        points: Stored mixtures, each {"shares": [P, D, B], "name": ...}.
    """

    _esm = Path(__file__).with_name("triangle.js")
    value = traitlets.List(traitlets.Float(), [1 / 3, 1 / 3, 1 / 3]).tag(sync=True)
    points = traitlets.List(traitlets.Dict()).tag(sync=True)


def schedule_explorer(published: pd.DataFrame | None = None) -> widgets.VBox:
    """Explore the learning rate over a stream: schedule, meta schedule, their keys, tasks, steps.

    "Hold this one" keeps a setting in grey, to compare with, until it is pressed again.

    Args:
        published: Published metrics, of which the nearest settings are listed, and whose sizes it
            begins with.

    Returns:
        The explorer.
    """
    stored = None if published is None else analyses.stored_schedules(published)
    metas = [meta for meta in option_names("meta_schedule") if meta != "free"]
    defaults = dataclasses.asdict(config.Schedule()) | config.DEFAULT_SHARES | _sizes(published)
    menus = {"name": option_names("schedule"), "meta": metas}
    controls = make_controls("schedule", menus, defaults)
    current: dict[str, np.ndarray] = {}
    held: dict[str, np.ndarray] = {}

    def draw(peak: float, hold: bool, **values) -> Drawn:
        nonlocal current, held
        keys = analyses.schedule_keys(values["name"], values["meta"])
        for key in controls.keys() - {"name", "meta", "peak", "tasks", "steps", "hold"}:
            controls[key].disabled = key not in keys
        for key, value in values.items():
            values[key] = round(value, 6) if isinstance(value, float) else value  # stray digits
        run = analyses.schedule_run(peak=float(f"{peak:.3g}"), **values)
        rates = analyses.schedule_rates(run)
        held = (held or current) if hold else {}  # `current` is what was drawn before
        current = {f"{analyses.schedule_label(run)}, peak {run.schedule.peak:g}": rates}
        curves = current | {f"held: {name}": other for name, other in held.items()}
        details = ("" if stored is None else _nearest(run, stored)) + copyable(run_arguments(run))
        return figures.plot_learning_rates(curves), schedule_sentence(run, rates), details

    return explorer(controls, draw)


def schedule_sentence(run: config.RunConfig, rates: np.ndarray) -> str:
    """Say the mean learning rate against the peak, and the path length.

    Args:
        run: A run.
        rates: Its learning rates, [tasks, steps].

    Returns:
        The sentence.
    """
    mean, (tasks, steps) = rates.mean(), rates.shape
    return (
        f"Mean rate {mean:.2g} = {mean / run.schedule.peak:.2f} of the peak {run.schedule.peak:g}, "
        f"over {tasks} tasks x {steps} steps; path length (the sum of all rates) {rates.sum():.3g}."
    )


def _nearest(run: config.RunConfig, stored: pd.DataFrame) -> str:
    """Return the stored runs whose schedules are nearest, as HTML."""
    near = analyses.nearest_schedules(run, stored)
    if near.empty:
        return f"<p>No stored run is of a stream of {run.stream.tasks} tasks.</p>"
    return (
        "<b>The nearest stored runs</b>, by the sum of the rates of each task: distance 0.69 is a "
        f"factor of two in each. Scores after the stream, means over replicates{html_table(near)}"
    )


def mixture_explorer(published: pd.DataFrame | None = None) -> widgets.VBox:
    """Explore what a batch is made of, how often an image is seen, and what such runs scored.

    Args:
        published: Published metrics with a setting `LIKE`, which predict, and whose sizes it
            begins with.

    Returns:
        The explorer.
    """
    surface = None if published is None else analyses.surface(published, LIKE)
    stored = zip(surface.names, surface.shares.tolist(), strict=True) if surface else ()
    triangle = Triangle(points=[{"name": name, "shares": shares} for name, shares in stored])
    menus = {"policy": option_names("buffer")}
    values = {"policy": config.Mixture().policy} | _sizes(published, LIKE)
    controls = {"shares": triangle} | make_controls("mixture", menus, values)

    def draw(shares, batch, tasks, steps, replay, policy) -> Drawn:
        needs = get_option("buffer", policy).facts["capacity"] == "required"
        buffer = {"policy": policy, "capacity": CAPACITY if needs else None}
        run = analyses.mixture_run(shares, batch, tasks, steps, replay=round(replay, 6), **buffer)
        mixture = run.mixture
        parts, passes = analyses.mixture_counts(mixture, batch, tasks, steps, mixture.replay)
        details = (_prediction(run, surface) if surface else "") + copyable(run_arguments(run))
        if policy != config.Mixture().policy:
            details = f"<p>Drawn is a buffer that keeps all, not {policy!r}.</p>{details}"
        return figures.plot_batch(parts, passes), mixture_sentence(mixture, passes), details

    return explorer(controls, draw)


def mixture_sentence(mixture: config.Mixture, passes: pd.DataFrame) -> str:
    """Say the shares, and how often images are seen.

    Args:
        mixture: Shares of a batch.
        passes: See `cmp.experiments.statistics.expected_counts`.

    Returns:
        The sentence.
    """
    seen = passes[list(figures.POOLS)].sum(axis=1)
    return (
        f"Shares P {mixture.pretraining:.2f}, D {mixture.update:.2f}, B {mixture.buffer:.2f}. "
        f"An image of the replay pool ({passes['images'][0]:,.0f} images) is seen {seen[0]:.1f} "
        f"times, one that arrives first {seen[1]:.1f} times, one that arrives last "
        f"{seen.iloc[-1]:.1f} times."
    )


def _prediction(run: config.RunConfig, surface: analyses.Surface) -> str:
    """Return the scores of a run between stored ones, and the nearest of them, as HTML."""
    own, stored = (dict(config.flat_keys(each.to_dict())) for each in (run, surface.like))
    if differing := [key for key in SIZES if own[key] != stored[key]]:
        words = ", ".join(f"{key}={stored[key]}" for key in differing)
        return f"<p>No prediction: the stored runs are of {words}.</p>"
    if not surface.holds(run.mixture):
        return "<p>No prediction: no stored mixtures lie around this one.</p>"
    misses, near = surface.misses(), surface.nearest(run.mixture)
    ends = " and ".join(
        f"<b>{name} {row['mean']:.1f}%</b> ({row['low']:.1f} to {row['high']:.1f})"
        for name, row in surface.predict(run.mixture).iterrows()
    )
    return (
        f"<p>Between the stored runs: {ends}, 95% t-intervals over {len(surface.scores)} "
        f"replicates. Interpolation adds to them: where a stored mixture is left out, it misses by "
        f"{misses['A_KA']:.1f} and {misses['A_ZS']:.1f} points.</p>"
        f"<b>The nearest stored runs</b>, by the share of a batch that differs{html_table(near)}"
    )


def stream_explorer(corpus: Corpus, published: pd.DataFrame | None = None) -> widgets.VBox:
    """Explore in which order classes arrive, what that makes of tasks, and how such runs went.

    Args:
        corpus: The embedded benchmark.
        published: Published metrics, of which settings of the same stream are listed, and whose
            sizes it begins with.

    Returns:
        The explorer.
    """
    orders = [name for name in option_names("order") if name != "listed"]

    def draw(seed: int, **stream) -> Drawn:
        run = config.parse(config.profile("cpu") | {"seed": seed, "stream": stream})
        report = statistics.stream_report(run, corpus)
        counts = statistics.class_counts(streams.task_classes(corpus, run.stream, run.seeds.stream))
        counts = counts.reindex(columns=sorted(corpus.by_role("adapt")), fill_value=0)
        details = "" if published is None else _same_stream(run, published)
        arguments = run_arguments(dataclasses.replace(run, seeds=config.Seeds()))
        details += copyable([*arguments, f"seed={seed}"])
        return figures.plot_stream(counts, report), stream_sentence(report), details

    return explorer(make_controls("stream", {"order": orders}, _sizes(published)), draw)


def stream_sentence(report: pd.DataFrame) -> str:
    """Say how unequal the tasks of a stream are.

    Args:
        report: See `cmp.experiments.statistics.stream_report`.

    Returns:
        The sentence.
    """
    images, passes, datasets = report["images"], report["passes"], report["datasets"]
    return (
        f"{report['classes'].sum()} classes in {len(report)} tasks. Images a task: {images.min()} "
        f"to {images.max()}, {images.max() / images.min():.1f} times as many; so a task goes over "
        f"its own images {passes.min():.1f} to {passes.max():.1f} times. Datasets a task: "
        f"{datasets.min()} to {datasets.max()}."
    )


def _same_stream(run: config.RunConfig, published: pd.DataFrame) -> str:
    """Return how the stored settings of a run's stream went, as HTML."""
    configs = results.setting_configs(published)
    names = [name for name, other in configs.items() if other.stream == run.stream]
    if not names:
        return "<p>No stored run follows this stream.</p>"
    runs = verdicts.run_scores(published[published["setting"].isin(names)])
    means = runs.groupby("setting")[["way", "A_KA", "A_ZS"]].mean()
    words = ("A_KA on the way (%)", "A_KA at the end (%)", "A_ZS at the end (%)")
    columns = means.set_axis(words, axis="columns")
    table = html_table(columns.loc[names], "setting")
    return f"<b>Stored runs of this stream</b>, means over replicates{table}"


def budget_calculator() -> widgets.VBox:
    """Explore what a step of each method costs, and how many of them a budget allows.

    Returns:
        The explorer.
    """
    names = [*models.family_names(), "ViT-B-32", "ViT-B-16"]  # these two take seconds to count
    menus = {"model": names, "names": option_names("method")}

    def draw(model, batch, tasks, total, names) -> Drawn:
        if not names:
            raise CmpError("choose a method at least (Ctrl or Cmd with a click takes several)")
        total = round(total)
        table = paper.budget_table(model, batch, total / tasks, names)
        sentence = (
            f"{total:,} steps of full fine-tuning, over {tasks} updates of {model} at batch "
            f"{batch}: {total / tasks:,.1f} of them an update."
        )
        texts = table.map(lambda x: f"{x:,.3g}" if isinstance(x, float) else f"{x:,}")
        return figures.plot_allowed_steps(table), sentence, html_table(texts, "method")

    return explorer(make_controls("budget", menus), draw)


def path_explorer(name: str, before: Weights, tuned: Weights, corpus: Corpus) -> widgets.VBox:
    """Explore the path between two models: what a slider asks for is merged and scored on the spot.

    Args:
        name: The model's name.
        before, tuned: Its weights before and after fine-tuning.
        corpus: What it is scored on, in fixed subsets of the tests.

    Returns:
        The explorer.
    """
    network = models.create_model(name).eval()
    rules = option_names("merge_rule", "weight", base=False)

    @functools.cache
    def score(rule: str, share: float) -> pd.Series:
        network.load_state_dict(merge(rule, [tuned, before], weights=(share, 1 - share)))
        summary = evaluation.evaluate(network, name, corpus, subset=SUBSET).summary()
        return pd.Series(summary, name=share)

    def draw(share: float, rule: str) -> Drawn:
        def score_at(place: float) -> pd.Series:  # at both ends every rule gives the same model
            return score(rule if 0 < place < 1 else rules[0], place)

        between = pd.DataFrame([score_at(place) for place in (0.0, 0.25, 0.5, 0.75, 1.0)])
        chosen = score_at(round(share, 6))
        words = ", ".join(f"{key} {value:.1f}%" for key, value in chosen.items())
        sentence = f"{share:.2f} of the fine-tuned weights, by {rule}: {words}."
        return figures.plot_merge_path(between, chosen), sentence, ""

    return explorer(make_controls("path", {"rule": rules}), draw)


def planner_explorer() -> widgets.VBox:
    """Explore plans: what you have and what must be kept -> a run, and where such runs ended.

    Returns:
        The explorer.
    """
    known = evidence.gather_evidence()
    names = [*models.family_names(), *paper.CATALOGUE_MODELS]
    menus = {"model": names, "device": list(planner.DEVICES)}
    for key, words in (("keep", planner.KEEP), ("new", planner.NEW)):
        menus[key] = [(f"{name}: {text}", name) for name, text in words.items()]

    def draw(hours, images, pool, other, **values) -> Drawn:
        values["images"] = images if values["model"] in paper.CATALOGUE_MODELS else None
        values |= {"pool": 0.0 if other else round(pool, 2), "other_pool": other}
        request = planner.PlanRequest(gpu_hours=float(f"{hours:.3g}"), **values)
        plan = planner.make_plan(request, known)
        return figures.plot_plan(plan, known), planner.plan_summary(plan), _plan_details(plan)

    return explorer(make_controls("planner", menus), draw)


def _plan_details(plan: planner.Plan) -> str:
    """Return costs, place, notes, effects, what was rejected, and the file, as HTML."""
    sentences = [planner.place_sentence(plan), *plan.notes]
    parts = "".join(f"<p>{html.escape(sentence, quote=False)}</p>" for sentence in sentences)
    costs = pd.Series(plan.costs).map("{:.3g}".format).to_frame("amount")
    rejected = pd.DataFrame(plan.rejected.items(), columns=["rejected", "why"])
    text = html.escape(planner.plan_as_yaml(plan, comments=False))
    return (
        f"{html_table(costs, 'what')}{parts}"
        f"<b>What each choice did in the stored runs</b>{html_table(plan.effects)}"
        f"<b>What was rejected</b>{html_table(rejected)}"
        "<b>Copy as a file for</b> <code>cmpt run FILE --dry-run</code> (a click marks it all)"
        f'<pre style="user-select: all">{text}</pre>'
    )
