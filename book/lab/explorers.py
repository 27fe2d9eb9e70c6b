"""Explorers: views of published runs with controls that respond immediately.

An explorer is a script of `lab/js`, the same in a notebook and on the site, over a table that is
made here. In a notebook, the script asks the kernel for the table, for computed answers, and for
runs. The notebook's file contains a still picture in its place.
"""

import asyncio
import base64
import functools
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from benchmark import packages
from cmp import config, schedules
from cmp.embedded import manifest
from cmp.errors import CmpError
from cmp.parsing import read_yaml
from cmp.registry import Option, get_option, option_names
from cmp.runs.launch import changes_to_cpu
from lab import analyses, chapters, figures, keeping, live_runs
from lab.evidence import claims, fronts, planner, results, studies, verdicts, workers
from lab.evidence.scores import claims_level, estimate_mean, t_factor
from lab.surface import collect_surface

SCRIPTS = Path(__file__).with_name("js")
NEEDS = ("d3", "state", "form", "export", "plane", "runs", "workbench", "schedules")
"""Scripts that explorers import, ordered so that each comes after its own imports."""
SHEET = read_yaml(chapters.BOOK / "explorers.yaml")
AXES = ["A_KA", "A_ZS"]

Answer = Callable[[Mapping[str, Any]], Any]


@functools.cache
def script(name: str) -> str:
    """Return the text of a script; for "d3", the pinned package as a module.

    Raises:
        CmpError: d3 is not on this machine and cannot be downloaded.
    """
    if name != "d3":
        return (SCRIPTS / f"{name}.js").read_text(encoding="utf-8")
    package = manifest.load_packages(chapters.BOOK / "_theme")["d3"]
    archive = packages.fetch_package(package, "run `cmpt lab`")
    text = packages.archive_member(archive, "package/dist/d3.min.js").decode()
    # if there is another script loader, d3 would register with it
    return (
        f"const define = undefined, exports = undefined;\n{text}\nexport default globalThis.d3;\n"
    )


class Explorer(anywidget.AnyWidget):
    """An explorer in a notebook.

    Attributes:
        kept: What the page keeps for when it is opened again: state, pins, size of runs and
            guesses, as in `state.js`.
        runs: The runs that it trains or has trained, in the order of requests. Each has the `key`
            of its setting, a `size`, a `label`, `words` on its status, its `progress`, and the
            `trail` of its scores so far.
    """

    _esm = SCRIPTS / "loader.js"
    kept = traitlets.Dict().tag(sync=True)
    runs = traitlets.List().tag(sync=True)

    def __init__(
        self,
        name: str,
        table: Mapping[str, Any],
        still: Mapping[str, str],
        state: Mapping[str, Any] | None = None,
        answer: Answer | None = None,
    ):
        """Prepare the explorer.

        Args:
            name: The name of the script.
            table: The data that the script shows, ready for JSON.
            still: What is shown without a kernel, by MIME type, see `draw_still`.
            state: The initial state, in addition to the table's defaults.
            answer: Answers the script's questions, in its own thread.
        """
        super().__init__()
        self.still, self._answer = still, answer
        scripts = [(each, script(each)) for each in (*NEEDS, name)]
        style = (SCRIPTS / "explorers.css").read_text(encoding="utf-8")
        about = {"kind": "start", "name": name, "scripts": scripts, "style": style}
        self._start = about | {"table": table, "state": state or {}}
        self._stops: dict[tuple[str, str], asyncio.Event] = {}
        self._tasks: set[asyncio.Task] = set()
        self.on_msg(self._hear)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | self.still, metadata | keeping.kernel_mark()

    def _hear(self, _: Any, message: dict[str, Any], __: Any) -> None:
        verb = message.get("verb")
        run = message.get("size", ""), message.get("key", "")
        if verb == "start":
            self.send(self._start)
        elif verb == "ping":
            self.send({"kind": "pong"})
        elif verb == "run" and run not in self._stops:
            self._forget(run)
            about = {"size": run[0], "key": run[1], "label": message["label"], "heard": True}
            self.runs = [*self.runs, about | {"words": "asked", "progress": 0.0, "trail": []}]
            self._begin(self._run(run, message["changes"]))
        elif verb == "stop" and run in self._stops:
            self._stops[run].set()
        elif verb == "forget" and run not in self._stops:
            self._forget(run)
        elif verb == "ask" and self._answer:
            self.send({"kind": "heard", "id": message["id"]})
            self._begin(self._reply(message["id"], message["request"]))

    def _begin(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the event loop keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    def _forget(self, run: tuple[str, str]) -> None:
        self.runs = [each for each in self.runs if (each["size"], each["key"]) != run]

    def _tell(self, run: tuple[str, str], **about: Any) -> None:
        self.runs = [
            each | about if (each["size"], each["key"]) == run else each for each in self.runs
        ]

    async def _run(self, run: tuple[str, str], changes: Mapping[str, Any]) -> None:
        self._stops[run] = stop = asyncio.Event()
        try:
            async for about in live_runs.follow_run(changed_run(run[0], changes), stop):
                self._tell(run, **about)
        except Exception as error:  # otherwise its row would wait forever
            self._tell(run, words=f"failed: {workers.failure_reason(error)}", over=True)
        finally:
            del self._stops[run]

    async def _reply(self, identity: Any, request: Mapping[str, Any]) -> None:
        try:
            content = {"answer": await asyncio.to_thread(self._answer, request)}
        except Exception as error:  # otherwise the script would wait forever
            content = {"refused": workers.failure_reason(error)}
        self.send({"kind": "answer", "id": identity} | content)


def changed_run(profile: str, changes: Mapping[str, Any]) -> config.RunConfig:
    """Return the run of a profile with changes by dotted key."""
    assignments = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return config.parse(config.override(config.profile(profile), assignments), "explorer")


def draw_still(
    name: str,
    figure: Figure,
    words: str,
    state: Mapping[str, Any] | None = None,
    table: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return what is shown instead of an explorer without a kernel.

    Args:
        name: The explorer's name. A page with a table of that name replaces the still with the
            explorer.
        figure: The picture.
        words: A description of the picture.
        state: The explorer's initial state, in addition to the table's defaults.
        table: The explorer's table, if only the notebook has it. Its `script` names the explorer's
            script, if that has another name.

    Returns:
        HTML and PNG by MIME type. An executed notebook keeps both, one after the other.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    how = "This is a still picture: run the cell in JupyterLab to use its controls."
    text = f'<p>{html.escape(words)}</p><p class="how">{how}</p>'
    if table is not None:
        data = json.dumps(table).replace("</", "<\\/")  # it would end the script
        text += f'<script type="application/json">{data}</script>'
    start = f' data-start="{html.escape(json.dumps(state))}"' if state else ""
    place = f'<div class="answering" data-explorer="{name}"{start}>{text}</div>'
    return {"text/html": place, "image/png": base64.b64encode(file.getvalue()).decode()}


def stored_runs(published: pd.DataFrame) -> list[dict[str, Any]]:
    """Tabulate published settings for a script.

    Args:
        published: The result of `lab.analyses.published_settings`.

    Returns:
        For each setting: `label`; the number of `planned` streams; `changes` to the profile `cpu`
        by dotted key; `ends`, replicate -> (A_KA, A_ZS) on the whole test; their means `at`, and
        the half-widths `half` of their intervals, `None` if there are none yet; and `gain`, see
        `stored_gain`.
    """
    configs, scores = results.setting_configs(published), verdicts.run_scores(published)
    first = published.groupby("setting")[["planned", "study"]].first()
    rows = []
    for name, run in configs.items():
        ends = scores.loc[name, AXES].round(2)
        planned, bases = int(first.at[name, "planned"]), scores.loc[name, "base"]
        means = [estimate_mean(ends[axis], bases, planned) for axis in AXES]
        changes = {
            key: value
            for key, value in changes_to_cpu(run).items()
            if not key.startswith(("seed", "evaluation"))
        }
        about = {"label": name, "planned": planned, "changes": changes}
        about["ends"] = ends.rename(index=str).T.to_dict("list")
        about["at"] = [round(mean.value, 4) for mean in means]
        about["gain"] = stored_gain(str(first.at[name, "study"]), name)
        rows.append(about | {"half": half_widths([mean.half for mean in means])})
    return rows


def stored_gain(study: str, setting: str) -> dict[str, Any] | None:
    """Return the A_ZS of a published setting at equal A_KA, in points beyond the front of plain
    fine-tuning.

    Args:
        study: The study.
        setting: The setting.

    Returns:
        `value`, and the pseudo-values by base, of which intervals of differences are made; `None`
        if the front does not reach the setting's A_KA.
    """
    try:
        gain = verdicts.gain_of(study, setting, claims.load_claims().fronts["plain"])
    except CmpError:
        return None
    if gain.is_bound:
        return None
    bases = {str(base): round(value, 3) for base, value in gain.pseudo.items()}
    return {"value": round(float(gain.values.mean()), 3), "bases": bases}


def half_widths(halves: Sequence[float]) -> list[float] | None:
    """Return half-widths of intervals for a script, or None if one is not known."""
    return None if np.isnan(halves).any() else np.round(halves, 2).tolist()


def profile_settings() -> dict[str, dict[str, Any]]:
    """Return the settings of each profile with an embedded model by dotted key, for a YAML file."""
    return {name: dict(config.flat_keys(config.profile(name))) for name in SHEET["sizes"]}


def common_table(name: str, study: str, published: pd.DataFrame) -> dict[str, Any]:
    """Return the shared part of the tables for the explorers of schedules and mixtures."""
    front = analyses.front_points(claims.load_claims().fronts["plain"])
    first, count = studies.CONFIRMING
    bases = {str(n): first + n % count for n in range(verdicts.REPLICATES)}
    factors = {n: round(t_factor(n, claims_level()), 4) for n in range(2, count + 1)}
    return SHEET[name] | {
        "runs": stored_runs(published),
        "band": analyses.runs_of_size("quick", study)[AXES].round(2).to_numpy().tolist(),
        "front": front[AXES].round(2).to_numpy().tolist(),
        "sizes": {name: f"{name}: {words}" for name, words in SHEET["sizes"].items()},
        "profiles": profile_settings(),
        "bases": bases,
        "factors": factors,
    }


def schedule_table() -> dict[str, Any]:
    """Return the table of the explorer of schedules."""
    published = analyses.published_settings(*analyses.SCHEDULES)
    table = common_table("schedule", "rates", published)
    configs = results.setting_configs(published)
    # what differs in more than its schedule would be shown as another setting
    table["runs"] = [
        row | {"schedule": _schedule_state(configs[row["label"]])}
        for row in table["runs"]
        if all(key.startswith("schedule.") for key in row["changes"])
    ]
    cpu = config.parse(config.profile("cpu"), "cpu")
    usual = _schedule_state(cpu)
    return table | {
        "tasks": cpu.stream.tasks,
        "steps": cpu.training.steps,
        "usual": usual,
        "defaults": usual | {"lock": False},
        "curves": {
            name: {"settings": option_keys(each), "overStream": each.facts["over_stream"]}
            for name, each in options("schedule").items()
        },
        "metas": {
            name: {"settings": option_keys(each), "curve": each.facts["curve"]}
            for name, each in options("meta_schedule").items()
        },
    }


def options(kind: str) -> dict[str, Option]:
    """Return the options of a kind by name."""
    return {name: get_option(kind, name) for name in option_names(kind)}


def option_keys(option: Option) -> list[str]:
    """Return the config keys of an option that a script knows: shares, not steps."""
    return [key for key in option.settings if not key.endswith("_steps")]


def _schedule_state(run: config.RunConfig) -> dict[str, Any]:
    """Return a schedule's keys, with defaults for those that the config does not set."""
    section = run.to_dict()["schedule"]
    for key, share in schedules.DEFAULT_SHARES.items():
        steps = section.pop(f"{key}_steps")
        if section[key] is None:
            section[key] = share if steps is None else steps / run.training.steps
    return section


def schedule_explorer(**state: Any) -> Explorer:
    """Explore the learning rate over a stream, the final scores of such runs, and a forecast.

    Args:
        **state: The initial state, such as `name="rsqrt", meta="rsqrt", peak=0.0016`, and the
            `size` of runs.

    Returns:
        The explorer.
    """
    table = schedule_table()
    runs = [run for run in table["runs"] if run["label"] in SHEET["schedule"]["still"]]
    curves = {}
    for run in runs:
        schedule = changed_run("cpu", run["changes"]).schedule
        curves[run["label"]] = analyses.learning_rates(schedule, table["tasks"], table["steps"])
    words = "The learning rates of " + " and ".join(
        f"{run['label']} (A_KA {run['at'][0]:.1f}%, A_ZS {run['at'][1]:.1f}%)" for run in runs
    )
    still = draw_still("schedule", figures.plot_learning_rates(curves), words, state)
    return Explorer("schedule", table, still, state)


PARTS = 40
"""Steps from one corner of the triangle of mixtures to the next."""


def mixture_table() -> dict[str, Any]:
    """Return the table of the explorer of mixtures.

    `grid` has one row per point of the triangle: `at`, in parts of `parts`; `value`, the
    interpolated A_KA and A_ZS and the A_ZS beyond plain fine-tuning's front at that A_KA. From
    `batch`, `steps`, `tasks` and the images in the `pool` and in an `update` (all of the same
    size), the script counts how often an image is seen. `streams` has the `tasks` and the `batch`
    of each size of runs.
    """
    published = analyses.published_settings(*analyses.MIXTURES)
    table = common_table("mixture", "mixtures", published)
    surface = collect_surface(published, "thirds")
    places = dict(zip(surface.names, surface.shares.tolist(), strict=True))
    # another pool has no place in the triangle
    table["runs"] = [
        row | {"shares": places[row["label"]]} for row in table["runs"] if row["label"] in places
    ]
    grid = [(p, d, PARTS - p - d) for p in range(PARTS + 1) for d in range(PARTS + 1 - p)]
    shares = np.vstack([np.divide(grid, PARTS), np.full(3, 1 / 3)])
    scores = surface.weights(shares) @ surface.scores  # [replicates, points, 2]
    means = analyses.front_points(claims.load_claims().fronts["plain"])
    front = fronts.fit_front(*means[["peak", *AXES]].to_numpy().T)
    rows = []
    for at, values in zip([*grid, ()], scores.swapaxes(0, 1), strict=True):
        row = {"at": at, "value": None}
        rows.append(row)
        if not np.isnan(values).any():
            gained, kept = values.mean(axis=0)
            covered = gained >= front.accumulation[0]
            beyond = round(kept - front.retention_at(gained), 2) if covered else None
            row["value"] = [*np.round([gained, kept], 2).tolist(), beyond]
    runs = {size: config.parse(config.profile(size), size) for size in SHEET["sizes"]}
    run = runs["cpu"]
    return table | {
        "parts": PARTS,
        "grid": rows[:-1],
        "third": rows[-1],
        "misses": surface.misses().round(2).tolist(),
        "batch": run.training.batch,
        "steps": run.training.steps,
        "tasks": run.stream.tasks,
        "streams": {
            size: {"tasks": each.stream.tasks, "batch": each.training.batch}
            for size, each in runs.items()
        },
        "pool": run.mixture.replay * analyses.POOL,
        "update": planner.ARRIVING / run.stream.tasks,
    }


def mixture_explorer(**state: Any) -> Explorer:
    """Explore the composition of batches, how often an image is seen, and the final scores of such
    runs.

    Args:
        **state: The initial state, such as `shares=[0.2, 0.4, 0.4]`, and the `size` of runs.

    Returns:
        The explorer.
    """
    surface = collect_surface(analyses.published_settings(*analyses.MIXTURES), "thirds")
    words = "Final scores for each mixture of pool, update and buffer."
    still = draw_still("mixture", figures.plot_triangles(surface), words, state)
    return Explorer("mixture", mixture_table(), still, state)


TABLES = {"schedule": schedule_table, "mixture": mixture_table}
"""Functions that make the table of each explorer that works on the site without a kernel."""
