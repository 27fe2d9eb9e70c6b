"""The atlas: the final scores and settings of every published run."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

import cmp
from cmp import config
from cmp.errors import CmpError
from cmp.runs import store
from lab import chapters, explorers, figures, first_screen
from lab.evidence import claims, guidelines, results, studies
from lab.evidence.claims import ClaimsFile
from lab.explorers import AXES

FIELDS = {
    "study": "Study",
    "method": "Method",
    "merging": "Merging",
    "schedule": "Schedule",
    "mixture": "Mixture: pool/update/buffer (%)",
    "updates": "Updates T",
    "network": "Network",
    "split": "Scored on",
}
"""The fields by which runs are filtered and coloured, and their labels."""
OWN = "your own runs"


def atlas_table(own: bool = False) -> dict[str, Any]:
    """Return a table of all published runs and, on request, those in the reader's store.

    Args:
        own: Whether to include unpublished stored runs, each as its own setting.

    Returns:
        `fields`: labels by key; `settings`: for each setting its `name`, the fields, the `changes`
        of its first run to the profile `cpu`, its final `names` for the pictures of the first
        screen if stored, the `claims` and `fronts` that it belongs to, and whether it is `own`;
        `runs`: [index in `settings`, replicate, A_KA, A_ZS]; `verdicts` by claim; `pictures`: those
        of the first screen.
    """
    numbers, families = _chapters_by_study(), [*map(claims.load_claims, claims.FAMILIES)]
    rows, runs, published, ends = [], [], set[str](), first_screen.final_names()
    for study in sorted(path.stem for path in results.RESULTS.glob("*.parquet")):
        metrics = results.published_metrics(study)
        published |= {*metrics["run"]}
        family = study.removeprefix(studies.BAND).removesuffix("-more")
        words = f"{numbers[family]} · {study}" if family in numbers else study
        words += " (explores)" * studies.load_study(study).explores
        configs = results.setting_configs(metrics)
        rows += [
            {"name": name, "study": words, **_about_setting(configs[name])}
            | ({"names": ends[study, name]} if (study, name) in ends else {})
            | _parts_in_claims(study, name, families)
            for name in configs
        ]
        runs += _run_rows(metrics, len(rows) - len(configs))
    if own:
        rows_own, metrics = _own_runs(published)
        runs += _run_rows(metrics, len(rows)) if rows_own else []
        rows += rows_own
    first = first_screen.stored_table()
    judged = guidelines.judged_claims(*claims.FAMILIES)[["reading", "claimed", "sentence"]].T
    return {
        "fields": FIELDS,
        "settings": rows,
        "runs": runs,
        "verdicts": judged.to_dict(),
        "profiles": explorers.profile_settings(),
        "defaults": {"split": "test", "colour": "merging"},
        "pictures": {key: first[key] for key in ("images", "sprite")},
    }


def _chapters_by_study() -> dict[str, str]:
    """Return the numbers of the chapters that use each study, such as "00, 08"."""
    found: dict[str, list[str]] = {}
    for number, source in chapters.chapters().items():
        for study in re.findall(r'load_study\("([\w-]+)"\)', chapters.source_text(source)):
            found.setdefault(study, []).append(number)
    return {study: ", ".join(numbers) for study, numbers in found.items()}


def _about_setting(run: config.RunConfig) -> dict[str, Any]:
    """Return the fields of a setting except its study, and its `changes`."""
    mixture, merging, schedule, model = run.mixture, run.merging, run.schedule, run.model
    ends = dict.fromkeys((mixture.shares, mixture.last or mixture.shares))
    shares = " to ".join("/".join(f"{100 * share:.0f}" for share in each) for each in ends)
    return {
        "method": run.method.name,
        "merging": merging.policy + f", {merging.rule}" * (merging.rule != "interpolation"),
        "schedule": schedule.name + f", meta {schedule.meta}" * (schedule.meta != "none"),
        "mixture": shares + f", {mixture.pool} pool" * (mixture.pool != "pretraining"),
        "updates": run.stream.tasks,
        "network": model.name + f", {model.start}" * (model.start != "annealed"),
        "split": run.evaluation.split,
        "changes": explorers.changes_to_cpu(run),
    }


def _parts_in_claims(study: str, name: str, families: Sequence[ClaimsFile]) -> dict[str, list[str]]:
    """Return the claims that compare a setting and the fronts that it lies on, if any."""
    names = [
        claim.name
        for family in families
        for claim in family.claims
        if any(name in term.of and claim.study_of(term) == study for term in claim.terms)
    ]
    fronts = [
        words
        for words, front in families[0].fronts.items()
        if front.study == study and name in front.settings
    ]
    return {key: found for key, found in (("claims", names), ("fronts", fronts)) if found}


def _run_rows(metrics: pd.DataFrame, first: int) -> list[list[float]]:
    """Return the final scores of runs, on the whole split or, if that was not scored, on its
    subset.

    Args:
        metrics: The metrics of settings, which are numbered in order from `first`.
    """
    places = {name: first + place for place, name in enumerate(metrics["setting"].unique())}
    table = store.trajectory(metrics).query("scope in ('full', 'subset')").dropna(subset=AXES)
    table = store.after_last_task(table).sort_values("scope", kind="stable")  # "full" comes first
    ends = table.drop_duplicates(["setting", "replicate"])
    ends = ends.assign(place=[places[name] for name in ends["setting"]]).round(2)
    return ends[["place", "replicate", *AXES]].astype(object).to_numpy().tolist()


def _own_runs(published: set[str]) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Return unpublished stored runs on the book's data, as settings and metrics."""
    shown = {run_id[: store.SHORT_ID] for run_id in published}
    rows, tables = [], [pd.DataFrame()]
    for run_id in store.stored_ids():
        with contextlib.suppress(CmpError):  # damaged, as `cmpt results ls` reports
            if run_id not in shown and (run := store.load_run(run_id)).config.data == "embedded":
                scope = "" if "full" in set(run.metrics["scope"]) else ", scored on the subset"
                about = {"name": f"run {run_id}{scope}", "study": OWN, "own": True}
                rows.append(about | _about_setting(run.config))
                tables.append(run.metrics.assign(setting=run_id, replicate=0))
    return rows, pd.concat(tables, ignore_index=True)


def atlas_explorer(**state: Any) -> explorers.Explorer:
    """Explore the final scores of all published runs and the reader's own.

    Args:
        **state: The initial state, such as `study="04 · rates", colour="schedule"`.

    Returns:
        The explorer.
    """
    table = atlas_table(own=True)
    about = pd.DataFrame(table["settings"])[["study", "split", "merging"]]
    runs = pd.DataFrame(table["runs"], columns=["place", "replicate", *AXES])
    runs = runs.join(about, on="place").query("split == 'test' and study != @OWN")
    runs = runs[~runs["study"].str.contains(studies.BAND)]  # these are shorter
    words = f"Where {len(runs):,} published runs of {len(runs['study'].unique())} studies ended."
    figure = figures.plot_ends(runs.assign(merges=runs["merging"] != "none"))
    title = "At an A_KA of 44 to 60%, most runs with the highest A_ZS used merging"
    still = explorers.draw_still("atlas", figures.with_title(figure, title), words, state)
    return explorers.Explorer("atlas", table, still, state, answer=_answer)


def _answer(request: Mapping[str, Any]) -> list[str]:
    """Return a setting's final names for the pictures of the first screen."""
    run = explorers.changed_run("cpu", request["changes"])
    return first_screen.names_at_end(run, cmp.load_data("embedded"))
