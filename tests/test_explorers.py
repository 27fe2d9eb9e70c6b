"""Explorers without a browser: the script's schedules, tables, what a widget answers, and runs in
processes of their own."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import synthetic
from copied import computed_by
from scipy import stats

from cmp import config, mixtures
from cmp.config import Mixture, Schedule
from cmp.errors import CmpError
from cmp.project import build_folder, project_folder
from cmp.registry import option_names
from cmp.runs import checkpoints, identity, launch, logs, lookup, store
from cmp.runs.lookup import unfinished_runs
from lab import analyses, chapters, explorers, keeping, live_runs, site
from lab.evidence import claims, planner, results
from lab.surface import collect_surface

CASES = """import { rates, drawable } from "./schedules.js";
const { cases, curves } = JSON.parse(await new Promise((resolve) => {
  let text = ""; process.stdin.on("data", (part) => (text += part)).on("end", () => resolve(text));
}));
console.log(JSON.stringify(cases.map(([s, tasks, steps]) =>
  drawable(s.name, s.meta) ? Array.from(rates(s, tasks, steps, curves)) : null)));
"""
RUN = ["stream.tasks=2", "training.steps=3", "training.batch=8", "evaluation.subset=1"]


def curves():
    return {
        name: {"settings": explorers.option_keys(option), "overStream": option.facts["over_stream"]}
        for name, option in explorers.options("schedule").items()
    }


def node(source, given, folder):
    """What a module of the scripts' folder prints as JSON, of what it reads as JSON."""
    for name in [*explorers.NEEDS, "schedule", "mixture", "kernel", "loader"]:
        (folder / f"{name}.js").write_text(explorers.script(name))
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "source.mjs").write_text(source)
    done = subprocess.run(
        ["node", "source.mjs"], cwd=folder, input=json.dumps(given), capture_output=True,
        env=os.environ | {"PATH": site.node_path()}, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def script_rates(cases, folder):
    """The rates of schedules as the explorers' script has them."""
    return node(CASES, {"cases": cases, "curves": curves()}, folder)


def test_the_reducer_and_what_is_keyed_by_it(tmp_path):
    tests = sorted((project_folder() / "tests" / "js").glob("*.test.mjs"))
    assert tests
    done = subprocess.run(
        ["node", "--test", *map(str, tests)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PATH": site.node_path()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


def every_case():
    """Each curve with each meta schedule, at several lengths of warmup and cooldown."""
    draw = np.random.default_rng(0)
    for name in option_names("schedule"):
        for meta in option_names("meta_schedule"):
            for tasks, steps in ((1, 1), (2, 5), (5, 40), (20, 17)):
                warmup = float(draw.choice([0.0, 0.1, 0.4, 1.0]))
                keys = {
                    "warmup": warmup,
                    "cooldown": float(draw.choice([0.0, 0.25, 1.0])) * (1 - warmup),
                    "shift": int(draw.integers(0, 50)), "level": float(draw.random()),
                    "decay": float(draw.random()), "peaks": tuple(draw.random(tasks)),
                }  # fmt: skip
                yield name, meta, tasks, steps, keys


def test_the_script_knows_every_schedule_of_the_package(shared_folder):
    """Each option is drawn, and at the rates that a run of it would have."""
    cases, expected = [], []
    for name, meta, tasks, steps, keys in every_case():
        used = {
            *explorers.option_keys(explorers.options("schedule")[name]),
            *explorers.option_keys(explorers.options("meta_schedule")[meta]),
        }
        with contextlib.suppress(CmpError):  # the two do not go together
            schedule = Schedule(name, meta, 0.002, **{key: keys[key] for key in used})
            with contextlib.suppress(ValueError):  # too long for the task
                expected.append(analyses.learning_rates(schedule, tasks, steps).ravel())
                cases.append([keys | {"name": name, "meta": meta, "peak": 0.002}, tasks, steps])
    assert len(cases) > 60
    assert {case[0]["name"] for case in cases} == {*option_names("schedule")}
    assert {case[0]["meta"] for case in cases} == {*option_names("meta_schedule")}
    rates = script_rates(cases, shared_folder)
    for ([keys, *_], found), wanted in zip(zip(cases, rates, strict=True), expected, strict=True):
        names = f"{keys['name']} or {keys['meta']}"
        assert found is not None, f"add {names} to book/lab/js/schedules.js"
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)


# tables


CLAIMS = claims.load_claims()
PLAIN = CLAIMS.fronts["plain"].settings


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Made-up results of the studies that the explorers read."""
    folder = tmp_path_factory.mktemp("book")
    front = {name: {"schedule.peak": float(name.split()[-1])} for name in PLAIN}
    studies_of = {
        "front": (front, [(38 + 2 * n, 54 - n) for n in range(len(front))]),
        "mixtures": (MIXTURES, [(45, 50), (35, 50), (50, 40), (44, 52), (45, 49)]),
        "rates": (RATES, [(44, 53), (43, 48)]),
    }
    with pytest.MonkeyPatch.context() as patch:
        synthetic.place(patch, folder)
        for name, (settings_of, ends) in studies_of.items():
            synthetic.write_study(name, settings_of, replicates=3)
            synthetic.publish(name, dict(zip(settings_of, ends, strict=True)))
    return folder


@pytest.fixture
def published(book, monkeypatch):
    synthetic.place(monkeypatch, book)
    monkeypatch.setattr(claims, "load_claims", lambda *_: CLAIMS)


def shares(p, d, b):
    return {"mixture.pretraining": p, "mixture.update": d, "mixture.buffer": b}


MIXTURES = {
    "thirds": {}, "no buffer": shares(0.5, 0.5, 0.0), "no pool": shares(0.0, 0.5, 0.5),
    "half": shares(0.5, 0.25, 0.25), "fresh pool": {"mixture.pool": "fresh"},
}  # fmt: skip
META = {"schedule.name": "rsqrt", "schedule.meta": "rsqrt", "schedule.peak": 1.6e-3}
RATES = {"meta-rsqrt": META, "fresh": {"optimizer.carry": False, "schedule.name": "wsd"}}


def test_the_table_of_schedules_has_every_stored_setting(published):
    table = explorers.schedule_table()
    rows = {row["label"]: row for row in table["runs"]}
    assert rows.keys() == {*PLAIN, "meta-rsqrt"}  # with fresh moments, it would be another setting
    meta, plain = rows["meta-rsqrt"], rows["plain, peak 0.00063"]
    assert meta["changes"] == META
    assert (meta["schedule"]["peak"], meta["schedule"]["warmup"]) == (1.6e-3, 0.1)
    assert plain["changes"] == {}  # it is the profile
    assert meta["ends"].keys() == {"0", "1", "2"}
    assert meta["at"] == pytest.approx(np.mean(list(meta["ends"].values()), axis=0), abs=0.01)
    assert len(table["front"]) == len(PLAIN)
    assert table["factors"][10] == pytest.approx(stats.t.isf(0.05 / 12 / 2, 9), abs=1e-3)
    assert table["bases"]["0"] == table["bases"]["10"] == 2
    json.dumps(table, allow_nan=False)


def test_the_table_of_mixtures_is_the_surface(published):
    table = explorers.mixture_table()
    surface = collect_surface(analyses.published_settings("mixtures"), "thirds")
    means = dict(zip(surface.names, surface.scores.mean(axis=0), strict=True))
    grid = {tuple(row["at"]): row["value"] for row in table["grid"]}
    parts = table["parts"]
    assert len(grid) == (parts + 1) * (parts + 2) // 2
    half = grid[parts // 2, parts // 4, parts // 4]
    assert half[:2] == pytest.approx(means["half"], abs=0.01)
    assert table["third"]["value"][:2] == pytest.approx(means["thirds"], abs=0.01)
    assert grid[0, 0, parts] is None  # no stored mixtures lie around it
    assert [row["label"] for row in table["runs"]] == ["thirds", "no buffer", "no pool", "half"]
    json.dumps(table, allow_nan=False)


SEEN = """import fs from "node:fs";
import { timesSeen } from "./mixture.js";
const { table, cases } = JSON.parse(fs.readFileSync(0, "utf-8"));
console.log(JSON.stringify(cases.map((each) => timesSeen(each, table))));
"""
CHANGING = [
    {"shares": [0.25, 0.5, 0.25], "last": (0.5, 0.25, 0.25)},  # from new to old
    {"shares": [0.0, 0.5, 0.5], "last": (0.5, 0.5, 0.0)},
    {"shares": [0.5, 0.0, 0.5], "last": (0.0, 1.0, 0.0)},
    {"shares": [0.0, 0.0, 1.0], "last": None},
]


def test_images_are_seen_as_often_as_batches_have_them(published, corpus, tmp_path):
    """For stored mixtures and for changing ones; the first update has no buffer."""
    table = explorers.mixture_table()
    stored = [{"shares": row["shares"], "last": None} for row in table["runs"]]
    assert len(stored) >= 4
    cases, run = stored + CHANGING, config.parse(config.profile("cpu"))
    tasks, steps, batch = run.stream.tasks, run.training.steps, run.training.batch
    shown = node(SEEN, {"table": table, "cases": cases}, tmp_path)
    for case, seen in zip(cases, shown, strict=True):
        p, d, b = case["shares"]
        mixture = Mixture(pretraining=p, update=d, buffer=b, last=case["last"])
        counts = [
            mixtures.batch_counts(mixture.at(task, tasks), batch, task == 0)
            for task in range(tasks)
        ]
        update = planner.ARRIVING / tasks
        wanted = {
            "pool": steps * sum(p for p, _, _ in counts) / (run.mixture.replay * analyses.POOL),
            "fresh": steps * counts[0][1] / update,
            "replayed": sum(steps * b / (t * update) for t, (_, _, b) in enumerate(counts) if t),
            "last": steps * counts[-1][1] / update,
        }
        assert seen == pytest.approx(wanted, abs=0.0501), case
    # and as often as a run draws them
    run = explorers.changed_run("cpu", {"mixture.last": [0.5, 0.25, 0.25]})
    drawn, pools = analyses.sample_counts(run, corpus), mixtures.task_pools(run, corpus)
    case = {"shares": [1 / 3] * 3, "last": [0.5, 0.25, 0.25]}
    [seen] = node(SEEN, {"table": table, "cases": [case]}, tmp_path)
    assert drawn.sum(axis=0)[pools[0].pretraining].mean() == pytest.approx(seen["pool"], rel=0.15)
    first = pools[0].update
    assert drawn[0, first].sum() / planner.ARRIVING * tasks == pytest.approx(seen["fresh"], abs=0.1)


FAULTS = """import fs from "node:fs";
import { model } from "./schedule.js";
import { accepted } from "./state.js";
const { table, cases } = JSON.parse(fs.readFileSync(0, "utf-8"));
console.log(JSON.stringify(cases.map((each) => accepted(each, model(table).kinds)[1])));
"""


def test_a_curve_of_a_reader_s_own_is_not_drawn(published, tmp_path):
    table = explorers.schedule_table()
    table["curves"]["sawtooth"] = {"settings": [], "overStream": False}
    cases = [{"name": "cosine"}, {"name": "sawtooth"}]
    usual, own = node(FAULTS, {"table": table, "cases": cases}, tmp_path)
    assert not usual and own


# what a reader takes away


FORMS = """import fs from "node:fs";
import { cellOf, FORMS } from "./export.js";
import { linked, linkTo, differing, accepted } from "./state.js";
const { explorer, table, changes, sizes } = JSON.parse(fs.readFileSync(0, "utf-8"));
const { model } = await import(`./${explorer}.js`);
const { settle, describe, kinds } = model(table);
console.log(JSON.stringify(changes.map((each) => {
  const state = settle({ ...table.defaults, ...each }, each);
  const shown = describe(state);
  const link = linkTo("https://a.b/c", explorer, differing(state, table.defaults));
  const [again, warning] = linked(link, explorer, kinds);
  const back = settle({ ...table.defaults, ...again }, {});
  const forms = sizes.map((profile) => {
    const { profiles, chapter, defaults } = table;
    const cell = cellOf(explorer, differing(state, defaults), profile);
    const about = { ...shown, profile, profiles, chapter, link: cell };
    return Object.fromEntries(Object.entries(FORMS).map(([name, form]) => [name, form(about)]));
  });
  return { ...shown, forms, warning, back: describe(back).changes };
})));
"""
SCHEDULES = [
    {}, {"warmup": 0.6}, {"peak": 1.23e-05}, {"name": "rsqrt", "meta": "rsqrt", "peak": 0.0016},
    {"name": "rsqrt", "meta": "rsqrt", "peak": 0.0016, "warmup": 0.6, "shift": 7},
    {"name": "rsqrt"}, {"name": "cosine", "meta": "cosine", "peak": 0.001},
    {"name": "infinite", "level": 0.37, "cooldown": 0.825, "warmup": 0.3},
    {"meta": "geometric", "decay": 0.9}, {"meta": "free", "peaks": [1, *[0.125] * 19]},
    {"meta": "free"}, {"meta": "free", "peaks": [1, 0.5, *[1] * 18]},
    {"meta": "free", "peaks": [n / 20 for n in range(1, 21)]},
    {"meta": "free", "peaks": [n / 20 for n in range(1, 20)] + [0.9]},
    {"name": "infinite", "warmup": 1},
]  # fmt: skip
MIXED = [
    {}, {"shares": [0.5, 0.5, 0]}, {"shares": [0.375, 0.375, 0.25]}, {"pretraining": 0.3},
    {"shares": [0.25, 0.5, 0.25], "varies": True, "last": [0.5, 0.25, 0.25]},
]  # fmt: skip


@pytest.mark.parametrize("explorer, changes", [("schedule", SCHEDULES), ("mixture", MIXED)])
def test_roundtrip_of_every_copied_form(published, explorer, changes, tmp_path):
    """What is copied computes the run that was shown, by its id, and a link shows it again."""
    table = explorers.TABLES[explorer]()
    given = {"explorer": explorer, "table": table, "changes": changes, "sizes": ["cpu", "quick"]}
    [source] = chapters.select([table["chapter"]])
    through_chapter, cells = 0, []
    for shown in node(FORMS, given, tmp_path):
        assert (shown["back"], shown["warning"]) == (shown["changes"], "")
        for size, forms in zip(given["sizes"], shown["forms"], strict=True):
            wanted = identity.run_id_of(explorers.changed_run(size, shown["changes"]))
            for form in ("command", "YAML", "Python", "papermill"):
                if forms[form] is None:  # the chapter has no parameter for it, and says so
                    assert form == "papermill" and shown["lacks"]
                    continue
                through_chapter += form == "papermill"
                found = computed_by(form, forms[form], size, tmp_path, source)
                assert identity.run_id_of(found) == wanted, f"{form}: {forms[form]}"
            cells.append((wanted, cell_state(forms["link"], explorer)))
    assert through_chapter >= 4
    again = node(FORMS, given | {"changes": [state for _, (_, state) in cells]}, tmp_path)
    for (wanted, (size, _)), shown in zip(cells, again, strict=True):
        found = explorers.changed_run(size, shown["changes"])
        assert identity.run_id_of(found) == wanted


def cell_state(text, explorer):
    """The size and the state with which a copied cell begins an explorer."""
    make = {f"{explorer}_explorer": lambda size="cpu", **state: (size, state)}
    return eval(text, {"explorers": SimpleNamespace(**make)})


def test_settings_that_differ_have_labels_and_keys_that_differ(published, tmp_path):
    for explorer, changes in (("schedule", SCHEDULES), ("mixture", MIXED)):
        table = explorers.TABLES[explorer]()
        given = {"explorer": explorer, "table": table, "changes": changes, "sizes": ["cpu"]}
        shown = node(FORMS, given, tmp_path)
        assert len({each["label"] for each in shown}) == len(changes)
        assert len({json.dumps(each["changes"], sort_keys=True) for each in shown}) == len(changes)


WALKS = """import fs from "node:fs";
import { FORMS } from "./export.js";
import { tidy } from "./form.js";
const { explorer, table, walks, sizes } = JSON.parse(fs.readFileSync(0, "utf-8"));
const { model } = await import(`./${explorer}.js`);
const { settle, fields, describe } = model(table);
let seed = 7;
const draw = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
const one = (values) => values[Math.floor(draw() * values.length)];
function value({ options, range, ...field }, now) {
  if (options) return one(options.map((each) => (Array.isArray(each) ? each[0] : each)));
  if (!range) return !now;
  const place = one([0, 1, draw(), draw()]);
  return tidy({ range, ...field }, range[0] + place * (range[1] - range[0]));
}
console.log(JSON.stringify(Array.from({ length: walks }, () => {
  let state = settle({ ...table.defaults, ...one(table.presets).state }, {});
  for (let left = one([1, 2, 3, 4, 5, 6]); left > 0; left--) {
    const field = one(fields(state).filter(({ off }) => !off));
    const changes = state.meta === "free" && draw() < 0.3
      ? { peaks: state.peaks.map(() => one([0, 1, draw()])) }
      : state.varies && draw() < 0.5
      ? { last: one(table.grid).at }
      : { [field.key]: value(field, state[field.key]) };
    state = settle({ ...state, ...changes }, changes);
  }
  const { changes } = describe(state);
  const why = (size) => describe(state, size).refused || "";
  const refused = Object.fromEntries(sizes.map((size) => [size, why(size)]));
  return { refused, changes, command: FORMS.command({ profile: "cpu", changes }) };
})));
"""


def runnable(size, changes):
    """The run of some changes, if each of its batches can be made."""
    run = explorers.changed_run(size, changes)
    tasks = run.stream.tasks
    shares = [(run.mixture.at(task, tasks), task == 0) for task in range(tasks)]
    mixtures.check_shares(run.training.batch, shares, "training.batch")
    return run


@pytest.mark.parametrize(
    "explorer, sizes, why",
    [
        ("schedule", ["cpu"], "learning rate is zero"),
        ("mixture", ["cpu", "quick"], "no sample of mixture"),
    ],
)
def test_what_a_reader_can_set_can_be_run_or_is_refused(published, explorer, sizes, why, tmp_path):
    """Walk through the form at random: every command that is handed out is one that runs."""
    table = explorers.TABLES[explorer]()
    given = {"explorer": explorer, "table": table, "walks": 150, "sizes": sizes}
    refused = set()
    for shown in node(WALKS, given, tmp_path):
        for size, words in shown["refused"].items():
            if words:
                refused.add(size)
                with pytest.raises(CmpError, match=why):
                    runnable(size, shown["changes"])
            else:
                assert runnable(size, shown["changes"])
        if not shown["refused"]["cpu"]:
            found = computed_by("command", shown["command"], "cpu", tmp_path, None)
            assert found == explorers.changed_run("cpu", shown["changes"])
    assert refused == {*sizes}


STEPS = """import fs from "node:fs";
import { model } from "./mixture.js";
const table = JSON.parse(fs.readFileSync(0, "utf-8"));
const { settle } = model(table);
const KEYS = ["pretraining", "update", "buffer"];
const inParts = (share) => Math.round(share * table.parts);
const wrong = [];
for (const from of [...table.grid.map(({ at }) => at), [1, 1, 1]]) {
  const state = settle({ ...table.defaults, shares: from }, {});
  for (const key of KEYS)
    for (const step of [-1, 1]) {
      const to = inParts(state[key]) + step;
      if (to < 0 || to > table.parts) continue;
      const changes = { [key]: to / table.parts };
      const { shares, ...next } = settle({ ...state, ...changes }, changes);
      const sum = shares.reduce((one, other) => one + other);
      if (inParts(next[key]) !== to || Math.min(...shares) < 0 || Math.abs(sum - 1) > 1e-9)
        wrong.push([from, changes, shares]);
    }
}
console.log(JSON.stringify(wrong));
"""


def test_a_step_of_a_share_s_slider_moves_it_by_one_part(published, tmp_path):
    """From every mixture of the grid, and from thirds."""
    assert node(STEPS, explorers.mixture_table(), tmp_path) == []


FAULTY = """import fs from "node:fs";
import { linked } from "./state.js";
import { model } from "./schedule.js";
const { table, states } = JSON.parse(fs.readFileSync(0, "utf-8"));
const link = (state) => `#explorer=schedule&state=${encodeURIComponent(JSON.stringify(state))}`;
const { kinds } = model(table);
console.log(JSON.stringify(states.map((state) => linked(link(state), "schedule", kinds)[1])));
"""


def test_a_link_has_a_peak_for_each_update_or_for_none(published, tmp_path):
    states = [{"meta": "free", "peaks": [0.5] * count} for count in (0, 3, 19, 20, 21)]
    given = {"table": explorers.schedule_table(), "states": states}
    said = node(FAULTY, given, tmp_path)
    assert [bool(words) for words in said] == [False, True, True, False, True]


EVERY_FORM = """import fs from "node:fs";
import { FORMS } from "./export.js";
const { settings, profiles } = JSON.parse(fs.readFileSync(0, "utf-8"));
console.log(JSON.stringify(settings.map((changes) =>
  ["command", "YAML", "Python"].map((form) =>
    FORMS[form]({ profile: "cpu", profiles, changes })))));
"""


@pytest.mark.long
def test_roundtrip_of_every_form_of_every_published_setting(tmp_path):
    published = map(results.published_metrics, [x.stem for x in results.RESULTS.glob("*.parquet")])
    settings = [
        launch.changes_to_cpu(run)
        for metrics in published
        for run in results.setting_configs(metrics).values()
    ]
    given = {"settings": settings, "profiles": explorers.profile_settings()}
    for changes, forms in zip(settings, node(EVERY_FORM, given, tmp_path), strict=True):
        wanted = explorers.changed_run("cpu", changes)
        for form, text in zip(("command", "YAML", "Python"), forms, strict=True):
            assert computed_by(form, text, "cpu", tmp_path, None) == wanted, text


# what a widget answers


class Sent(explorers.Explorer):
    """An explorer whose messages are kept."""

    def __init__(self, **more):
        self.messages = []
        super().__init__("schedule", {"a": 1}, explorers_still(), **more)

    def send(self, content, buffers=None):
        self.messages.append(content)


def explorers_still():
    return {"text/html": "<p>still</p>", "image/png": "iVBORw0KGgo="}


def hear(explorer, *messages):
    """Let an explorer hear messages in a running loop, until all it began is done."""

    async def main():
        for message in messages:
            explorer._hear(None, message, None)
            await asyncio.sleep(0)
        while explorer._tasks:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    return explorer.messages


def test_a_page_gets_scripts_in_an_order_in_which_they_load():
    [start] = hear(Sent(state={"peak": 0.1}), {"verb": "start"})
    assert (start["kind"], start["table"], start["state"]) == ("start", {"a": 1}, {"peak": 0.1})
    names = [name for name, _ in start["scripts"]]
    for place, (_, text) in enumerate(start["scripts"]):
        imported = [line for line in text.splitlines() if line.startswith("import ")]
        for line in imported:
            assert any(f'"./{other}.js"' in line for other in names[:place]), line


def test_a_notebook_keeps_the_still():
    data, _ = Sent()._repr_mimebundle_()
    assert data.keys() >= {"text/html", "image/png", "application/vnd.jupyter.widget-view+json"}


def test_an_answer_and_a_refusal():
    def answer(request):
        if request["n"] < 0:
            raise CmpError("n: must be positive")
        return request["n"] ** 2

    asks = [{"verb": "ask", "id": n, "request": {"n": n}} for n in (3, -1)]
    messages = [each for each in hear(Sent(answer=answer), *asks) if each["kind"] == "answer"]
    assert sorted(messages, key=lambda each: each["id"]) == [
        {"kind": "answer", "id": -1, "refused": "n: must be positive"},
        {"kind": "answer", "id": 3, "answer": 9},
    ]


RUN_IT = {"verb": "run", "size": "quick", "key": "k", "label": "it"}


def test_an_impossible_run_fails_with_its_sentence():
    explorer = Sent()
    hear(explorer, RUN_IT | {"changes": {"schedule.meta": "none5"}})
    [run] = explorer.runs
    assert (run["size"], run["key"], run["label"], run["heard"]) == ("quick", "k", "it", True)
    assert run["over"] and run["words"].startswith("failed: ") and "none5" in run["words"]


def test_a_run_that_breaks_is_over(monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(live_runs, "follow_run", broken)
    explorer = Sent()
    hear(explorer, RUN_IT | {"changes": {}})
    [run] = explorer.runs
    assert run["words"].startswith("failed: a bug in this program") and run["over"]
    assert run["words"].endswith("KeyError: 'a bug'")


def test_a_run_is_trained_once_and_forgotten_when_it_is_over(monkeypatch):
    """A message goes to the run that it names, and stays for a page that is opened again."""
    begun = []

    async def follow(run, stop):
        begun.append(run)
        yield {"words": "starting"}
        await stop.wait()
        yield {"words": "stopped", "over": True}

    monkeypatch.setattr(live_runs, "follow_run", follow)
    explorer, run = Sent(), RUN_IT | {"changes": {}}
    other = run | {"key": "other", "changes": {"schedule.peak": 0.001}}
    ends = [{**each, "verb": "stop"} for each in (run, other)]
    hear(explorer, run, run, other, {**run, "verb": "forget"}, *ends)
    assert [run.schedule.peak for run in begun] == [6.3e-4, 0.001]
    assert [(each["key"], each["words"]) for each in explorer.runs] == [
        ("k", "stopped"), ("other", "stopped"),
    ]  # fmt: skip
    hear(explorer, {**run, "verb": "forget"})
    assert [each["key"] for each in explorer.runs] == ["other"]
    assert {"kept", "runs"} <= {*explorer.keys}  # go to the page, also to one that comes late


def test_a_ping_is_answered():
    assert hear(Sent(), {"verb": "ping"}) == [{"kind": "pong"}]


# what is saved


def saved(process):
    """A notebook with outputs of an explorer, of two bars, and of a widget of another kind."""
    bars = "runs:   0%|          | 0/3 [00:00<?, ? runs/s]", "40 steps [00:03, 12.1 steps/s]"
    shown = [explorers_still(), *({"text/plain": bar} for bar in bars), {"text/plain": "Slider()"}]
    view = {keeping.VIEW: {"model_id": "m", "version_major": 2}}
    outputs = [{"output_type": "display_data", "metadata": {}, "data": x | view} for x in shown]
    outputs[0]["metadata"] = {keeping.MARK: {"process": process}}
    passing = {**outputs[-1], "metadata": keeping.PASSING}
    return {"cells": [{"source": "# text"}, {"outputs": [*outputs, passing]}]}


def stored(notebook, process=None):
    """The outputs of a notebook that is saved, and opened beside a kernel's process."""
    keeping.store_notebook(notebook)
    notebook = json.loads(json.dumps(notebook))
    keeping.store_notebook(notebook, process)
    return [output["data"] for output in notebook["cells"][1]["outputs"]]


@pytest.mark.defect
def test_a_saved_notebook_shows_a_picture_of_an_explorer_and_bars_as_text():
    """A viewer shows one format of an output: of HTML and a picture in one, the HTML alone."""
    html, picture, *bars, other = stored(saved(7))
    assert html | picture == explorers_still() and len(html) == len(picture) == 1
    lines = ["[progress bar: runs to 3]", "[progress bar]"]
    assert [bar["text/plain"] for bar in bars] == lines
    assert not any(keeping.VIEW in bar for bar in bars)
    assert keeping.VIEW in other  # of another widget, which is not ours to change


def test_a_reopened_notebook_finds_its_explorer_in_the_same_process_alone():
    before = saved(7)["cells"][1]["outputs"][0]["data"]
    for process, found in ((7, True), (8, False), (None, False)):
        notebook = saved(7)
        for _ in range(2):  # a restored one is saved again
            assert (stored(notebook, process)[0] == before) == found
            assert len(stored(notebook, process)) == (4 if found else 5)
    _, metadata = Sent()._repr_mimebundle_()
    assert metadata[keeping.MARK] == {"process": os.getpid()}


# runs in processes of their own


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A build folder without runs."""
    (tmp_path / "data").symlink_to((build_folder() / "data").resolve())
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    return tmp_path


def small_run(*changes):
    return config.parse(config.override(config.profile("quick"), [*RUN, *changes]))


def follow(run, stop_after=None):
    """What a run reported; it is stopped once the state begins with `stop_after`."""

    async def main():
        stop, told = asyncio.Event(), []
        async for about in live_runs.follow_run(run, stop):
            told.append(about)
            if stop_after and about.get("words", "").startswith(stop_after):
                stop.set()
        return told

    return asyncio.run(main())


def test_a_run_lands(build, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", os.path.relpath(build))  # the process has another folder
    run = small_run()
    told = follow(run)
    assert told[0]["words"] == "starting"
    assert told[-1]["done"] and told[-1]["over"]
    stored = live_runs.scores_on_way(store.load_run(identity.run_id_of(run)))
    trail = [about["trail"] for about in told if "trail" in about][-1]
    assert np.array(trail) == pytest.approx(stored[["A_KA", "A_ZS"]].to_numpy(), abs=0.01)
    again = follow(run)
    assert [about.get("words") for about in again] == [None, "done"]  # it is looked up


@pytest.mark.long
def test_a_run_stops_and_goes_on(build):
    run = small_run("training.steps=4000")
    told = follow(run, stop_after="step")
    assert told[-1] == {"words": "stopped; run it to continue", "over": True}
    [progress] = unfinished_runs()
    assert progress.step > 0  # in the middle of a task, where only a stop saves
    assert not store.is_stored(identity.run_id_of(run))


@pytest.mark.long
def test_a_run_that_fails_says_why(build):
    told = follow(small_run("training.batch=100000"))
    assert told[-1]["over"] and "training.batch: 100000 takes more samples" in told[-1]["words"]


def test_a_third_run_waits(build, monkeypatch):
    monkeypatch.setattr(lookup, "runs_in_progress", lambda: 2)
    told = follow(small_run(), stop_after="queued")
    assert [about["words"] for about in told] == [
        "queued: two runs are in progress", "stopped; run it to continue",
    ]  # fmt: skip


def test_a_run_stops_before_it_begins(build):
    told = follow(small_run("training.steps=4000"), stop_after="starting")
    assert told[-1] == {"words": "stopped; run it to continue", "over": True}


def test_a_run_that_another_program_stops_is_over(build, monkeypatch):
    begin = asyncio.create_subprocess_exec

    async def begin_and_stop(*words, **settings):
        process = await begin(*words, **settings)
        process.terminate()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", begin_and_stop)
    told = follow(small_run())
    assert told[-1] == {"words": "stopped; run it to continue", "over": True}


def test_a_log_without_any_scores_shows_no_trail(build, monkeypatch):
    """As of a run that goes on after its log was deleted: its first line has the first scores."""
    begin = asyncio.create_subprocess_exec

    async def begin_asleep(*_, **settings):
        return await begin("sleep", "1", **settings)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", begin_asleep)
    monkeypatch.setattr(logs, "read_log", lambda path: pd.DataFrame({"loss": [1.0, 0.9]}))
    told = follow(small_run())
    assert {"trail": []} in told and told[-1]["words"] == "stopped; run it to continue"


def test_a_run_that_is_killed_while_it_stops_failed(build, monkeypatch):
    kill = asyncio.subprocess.Process.kill
    monkeypatch.setattr(asyncio.subprocess.Process, "terminate", kill)
    told = follow(small_run("training.steps=4000"), stop_after="starting")
    assert told[-1] == {"words": "failed: its process ended with status -9", "over": True}


def test_a_look_at_runs_in_progress_stops_no_run_that_starts(build, monkeypatch):
    folder = checkpoints.run_folder("a" * 64)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(lock, fcntl.LOCK_UN))
        with checkpoints.CheckpointManager("a" * 64):
            assert lookup.runs_in_progress() == 1


def test_runs_in_progress_are_counted(build):
    assert lookup.runs_in_progress() == 0
    with checkpoints.CheckpointManager("a" * 64), checkpoints.CheckpointManager("b" * 64):
        assert lookup.runs_in_progress() == 2
    assert lookup.runs_in_progress() == 0


@pytest.mark.long
def test_a_run_ends_with_the_kernel(build):
    """The pipe to it closes, whatever became of who held it."""
    command = [sys.executable, "-m", "lab.live_runs"]
    process = subprocess.Popen(
        command, cwd=chapters.BOOK, stdin=subprocess.PIPE, start_new_session=True
    )
    process.stdin.write(json.dumps(small_run("training.steps=4000").to_dict()).encode() + b"\n")
    process.stdin.flush()
    run_id, end = identity.run_id_of(small_run("training.steps=4000")), time.monotonic() + 300
    while "loss" not in logs.read_log(logs.log_path(run_id)):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.stdin.close()
    assert process.wait(300) == 128 + signal.SIGTERM
    [progress] = unfinished_runs()
    assert progress.step > 0
