"""Updates one at a time: the same bits as a stream at once, and what a ledger keeps apart."""

import collections
import dataclasses
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import months
import numpy as np
import options
import pandas as pd
import pytest
import torch
from pictures import classes, picture, tree, write_manifest
from PIL import Image
from tqdm import tqdm
from typer.testing import CliRunner

from cmp import __version__, cli, config, evaluation, files, models, starts
from cmp.errors import CmpError, Diverged, Interrupted
from cmp.files import PARTIAL_PREFIX, file_digest
from cmp.parsing import read_yaml
from cmp.readers import checks
from cmp.releases import (
    arrivals,
    candidates,
    compare,
    gate,
    ledger,
    release,
    report,
    sentences,
    tuning,
    update,
)
from cmp.releases.update_plan import plan_update
from cmp.runs import launch, logs
from cmp.runs.checkpoints import CheckpointManager, latest_progress, write_checkpoint
from cmp.runs.identity import json_digest
from cmp.runs.runner import Observer

ONE_STEP = ("training.task_steps=[1]",)
QUICK = ("EMA",)
"""Settings that every test run compares; `make test-long` compares the others."""


pytestmark = pytest.mark.usefixtures("build")


@pytest.fixture
def own_root(root, tmp_path):
    """A copy of the months' pictures, which a test may change."""
    return shutil.copytree(root, tmp_path / "data")


@pytest.mark.parametrize(
    "setting",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in months.SETTINGS],
)
def test_one_at_a_time_ends_in_the_bits_of_all_at_once(root, tmp_path, setting):
    assert months.compare_setting(root, tmp_path / "made", 3, months.SETTINGS[setting]) == []


@pytest.mark.long
def test_twelve_months_end_in_the_bits_of_one_run(tmp_path):
    months.write_pictures(tmp_path / "data", 12)
    assert months.compare_setting(tmp_path / "data", tmp_path / "made", 12, ()) == []


def first(root, tmp_path, *settings, **pictures):
    """A release of the first month."""
    plan = months.plan_first(root, *settings, **pictures)
    return update.compute_update(plan, tmp_path / "releases" / "1")


def plan_second(made, root, *settings, **pictures):
    """The update of a release with the second month."""
    return plan_update(made, root / "y-month", settings, **pictures)


def compute_second(plan, tmp_path):
    return update.compute_update(plan, tmp_path / "releases" / "2")


@pytest.fixture(scope="module")
def releases(root, tmp_path_factory):
    """Releases of the first month and of the two first, computed once, with whole test sets."""
    folder = tmp_path_factory.mktemp("releases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(folder / "build"))
        made = first(root, folder, "evaluation.subset=null")
        compute_second(plan_second(made, root), folder)
    return folder / "releases"


@pytest.fixture
def made(releases, tmp_path):
    """A copy of the first of them, which a test may change."""
    folder = tmp_path / "releases" / "1"
    return release.read_release(shutil.copytree(releases / "1", folder))


@pytest.fixture
def later(releases, made):
    """A copy of the second, beside that of the first."""
    folder = made.folder.with_name("2")
    return release.read_release(shutil.copytree(releases / "2", folder))


def test_a_release_holds_what_serves_judges_and_goes_on(releases, made):
    names = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*.*")}
    assert names - {"stream.json"} == {*made.record.files}
    assert all(file_digest(made.folder / n) == d for n, d in made.record.files.items())
    again = release.read_release(made.folder)
    assert again.record == made.record and again.config == made.config
    [done] = made.record.updates
    assert done.name == "z-month" and done.id == made.record.id and done.steps >= 10
    trained = months.pictures_in(made.ledger(), set="catalogue", split="train")
    assert done.images == len(trained)
    later = release.read_release(releases / "2")
    first, second = (each.seconds for each in later.record.updates)
    assert first == done.seconds and 0 < second < later.progress().seconds  # that of both
    assert later.record.parent == made.record.id
    assert {x.name for x in releases.iterdir()} == {"1", "2"}  # nothing is left beside them


def test_other_users_may_read_a_release_as_any_new_file(made, tmp_path):
    (tmp_path / "plain").touch()
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    modes = {path.name: path.stat().st_mode for path in files}
    assert modes == dict.fromkeys(modes, (tmp_path / "plain").stat().st_mode)


def test_a_model_in_a_folder_is_found_by_later_updates(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, place = forked.clip_folder(tmp_path / "clip", 0), tmp_path / "elsewhere"
    settings = [*months.SMALL, *ONE_STEP]
    plan = plan_update("local-dir:clip", root / "z-month", settings, pool=root / "pool")
    made = update.compute_update(plan, tmp_path / "1")
    words = f"the config and tokenizer in {base}, so leave"
    assert words in made.path(release.CARD_FILE).read_text()
    place.mkdir()
    monkeypatch.chdir(place)
    plan_second(made, root)
    words = f"{base}: the config and tokenizer of the model are read from there"
    assert f"{words}\n" in invoke("release", "show", made.folder).stdout
    base.rename(place / "clip")
    assert f"{words}, but that is not there\n" in invoke("release", "show", made.folder).stdout
    with pytest.raises(CmpError, match=r"clip: is not there, .*put it back, or a link"):
        plan_second(made, root)
    base.symlink_to(place / "clip")
    plan_second(made, root)


def test_a_model_is_found_beside_a_folder_of_its_name(made, root, tmp_path, monkeypatch):
    """As `cmpt compare` finds it; but a release in this folder comes first."""
    monkeypatch.chdir(tree(tmp_path / "here", {"tiny/notes.txt": b""}))
    first = plan_update("tiny", root / "z-month", months.SMALL, pool=root / "pool")
    assert first.parent is None
    with pytest.raises(CmpError, match="here: not a release"):
        plan_update(tmp_path / "here", root / "y-month")
    shutil.rmtree("tiny")
    shutil.copytree(made.folder, "tiny")
    plan = plan_update("tiny", root / "y-month")
    assert plan.parent and plan.parent.record == made.record


def test_a_release_stands_for_its_folder_and_has_its_data(made, root):
    plan = plan_second(made, root)
    assert plan.parent and plan.parent.record == made.record
    corpus, count = made.corpus(), len(made.ledger().pictures)
    columns = ["split", "label", "update"]
    known = plan.corpus.table[columns].astype(str)[:count]
    assert len(corpus.table) == count
    assert corpus.table[columns].astype(str).equals(known)
    found = compare.compare(made, f"local-dir:{made.folder}", corpus, subset=2)
    assert found.is_same and (found.old, found.new) == ("1", "1")


def test_what_arrived_between_two_releases_is_new_to_an_index(made, later):
    corpus = later.corpus()
    found = compare.compare(made, later, corpus).index
    assert found.equals(compare.compare(made, later, corpus, arrived=["2 y-month"]).index)
    assert not found.equals(compare.compare(made, later, corpus, arrived=["catalogue"]).index)


@pytest.mark.long
def test_the_command_compares_two_releases_on_the_pictures_so_far(
    made, later, tmp_path, monkeypatch
):
    """A set and an update that only the new release has, without a word of where they are."""
    (tmp_path / "gate.yaml").write_text("sets: {catalogue: {drop: 100, gain: 100}}")
    seen = []
    monkeypatch.setattr("cmp.cli.comparing.print_comparison", seen.append)
    arguments = ["compare", *map(str, (made.folder, later.folder))]
    done = CliRunner().invoke(cli.app, [*arguments, "--gate", str(tmp_path / "gate.yaml")])
    assert done.exit_code == 1 and "1 of 2 limits kept" in done.stdout, done.output
    assert [*seen[0].sets.index] == ["catalogue"] and (seen[0].old, seen[0].new) == ("1", "2")
    assert seen[0].index.equals(compare.compare(made, later, later.corpus()).index)


@pytest.mark.parametrize("data", [[], ["--data", "embedded"]])
def test_a_note_on_the_pictures_of_two_releases_is_printed_only_with_them(
    made, later, root, tmp_path, monkeypatch, data
):
    """What is scored, in both directions, and what only the other release tests."""
    monkeypatch.setattr("cmp.data.load_data", lambda source: source)
    seen = []
    monkeypatch.setattr(compare, "compare", lambda *given, **others: seen.append(given[2]))
    monkeypatch.setattr("cmp.cli.comparing.print_comparison", lambda comparison: None)
    also = "also tested on the images of later updates"
    steps = (made.folder, f"local-dir:{later.folder}", "before"), (later.folder, made.folder, "now")
    for old, new, when in steps:
        done = invoke("compare", old, new, *data)
        scored = "embedded" if data else f"up to the release {later.folder}"
        assert done.exit_code == 0 and re.search(f"scored: the test images .*{scored}", done.stdout)
        assert (f"A_KA {when} can be lower" in done.stdout and also in done.stdout) == (not data)
        assert "not scored" not in done.stdout
        assert seen[-1] == "embedded" if data else len(seen[-1].by_role("adapt")) == 1
    if not data:
        assert all("2 y-month" in {*each.table["update"]} for each in seen)
        about = {"pool": root / "pool", "prompt": "a drawing of a {}"}
        own = plan_update(months.START, root / "y-month", months.SMALL, **about)
        other = update.compute_update(own, tmp_path / "other")
        said = invoke("compare", other.folder, made.folder).stdout
        assert re.search("not scored: .* from y-month, .* among its test images", said)
        assert 'scored with the prompt "{}"' in said and 'with "a drawing of a {}"' in said


@pytest.mark.parametrize("is_embedded", options.one_in(2, [True, False]))
def test_the_code_of_a_card_names_a_picture(made, root, tmp_path, is_embedded):
    """In a new process, which knows nothing but the folder of the card."""
    if not is_embedded:
        start = f"local-dir:{forked.clip_folder(tmp_path / 'clip', 0)}"
        settings = [*months.SMALL, "training.task_steps=[1]"]
        plan = plan_update(start, root / "z-month", settings, pool=root / "pool")
        made = update.compute_update(plan, tmp_path / "made")
    card = made.path(release.CARD_FILE).read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    place = tmp_path / "elsewhere"
    shutil.copytree(made.folder, place)
    (place / "picture.png").write_bytes(picture(1))
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in made.corpus().classes["catalogue"]
    assert ("cmp" in code) == is_embedded and "in the folder of this card" in code


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_card_has_the_numbers_of_its_comparison(made, root, tmp_path, monkeypatch, precision):
    """To the bit of the features: what was just trained is computed as what is loaded."""
    seen, encode = [], evaluation.encode

    def watch(*arguments):
        seen.append(encode(*arguments))
        return seen[-1]

    monkeypatch.setattr(evaluation, "encode", watch)
    settings = "evaluation.subset=null", f"training.precision={precision}"
    plan = plan_second(made, root, *settings)
    later = compute_second(plan, tmp_path)
    on_card = seen[-2:]
    found = compare.compare(made, later, later.corpus())
    for each, again in zip(on_card, seen[-2:], strict=True):
        assert each.equals(again)
    card = later.path(release.CARD_FILE).read_text()
    for name, row in pd.concat([found.summary, found.sets, found.updates]).iterrows():
        assert f"| {row['old']:.1f} | {row['new']:.1f} |" in card
        assert f"| {name} |" in card


def test_a_card_is_of_the_whole_test_sets_where_these_are_scored(root, tmp_path):
    """And not of the subsets, which are scored after each update as well."""
    made = first(root, tmp_path, "evaluation.full=true")
    later = compute_second(plan_second(made, root), tmp_path)
    scores = pd.read_parquet(later.path(release.SCORES_FILE)).query("role == 'adapt'")
    assert {*scores.loc[scores["scope"] == "subset", "images"]} == {2}
    whole = scores[scores["scope"] == "full"].set_index("task")
    for number, each in enumerate((made, later), 1):
        card = each.path(release.CARD_FILE).read_text()
        images, score = whole.loc[number, "images"], f"{whole.loc[number, 'score']:.1f}"
        assert re.search(rf"\| catalogue \| {images} \| [\d.]+ \| {score} \|", card)
        matrix = pd.read_parquet(each.path(release.MATRIX_FILE)).query("after == @number")
        assert matrix["images"].sum() == images


def test_each_update_has_a_row_and_a_gate(made, later):
    """Its own pictures, beside those of all updates together."""
    found = compare.compare(made, later, later.corpus())
    assert [*found.updates.index] == ["z-month", "y-month"]
    matrix = pd.read_parquet(later.path(release.MATRIX_FILE))
    assert matrix[["after", "update"]].to_numpy().tolist() == [[1, 1], [2, 1], [2, 2]]
    assert found.updates["new"].tolist() == matrix.loc[matrix["after"] == 2, "score"].tolist()
    assert found.updates["images"].sum() == found.sets.loc["catalogue", "images"]
    assert found.updates["lost"].sum() == found.sets.loc["catalogue", "lost"]
    limits = gate.Gate(
        last_update=gate.UpdateLimits(gain=100),
        each_update=gate.UpdateLimits(drop=100),
        updates={"y-month": gate.UpdateLimits(gain=100, lost=100)},
    )
    lines = {line.key: line for line in gate.apply_gate(limits, found)}
    assert lines["each_update.drop"].scope == "z-month" and lines["each_update.drop"].passed
    assert not lines["updates.y-month.gain"].passed and lines["updates.y-month.lost"].passed
    with pytest.raises(CmpError, match=r"gate: updates.y-mouth: .*did you mean 'y-month'"):
        gate.apply_gate(gate.Gate(updates={"y-mouth": gate.UpdateLimits(drop=1)}), found)
    assert not lines["last_update.gain"].passed and lines["last_update.gain"].scope == "y-month"
    few = gate.Gate(last_update=gate.UpdateLimits(gain=100, images=1000))
    [line] = gate.apply_gate(few, found)
    assert line.passed and not line.judged and "too few to judge it" in line.sentence
    january = dataclasses.replace(found, updates=found.updates[:1])  # nothing of the last is scored
    [line] = gate.apply_gate(dataclasses.replace(few, last_update=limits.last_update), january)
    assert not line.judged and "y-month: 0 test images" in line.sentence
    page = report.report_page(found, gate=[line])
    assert "passed: 0 limits kept, 1 not judged" in page
    page = report.report_page(found)
    assert "The same new content by update" in page and "y-month <span" in page


def test_a_month_whose_own_name_begins_with_a_number_keeps_it(made, root):
    plan = plan_second(made, root, name="2026 February")
    assert [*compare.shown_updates(plan.corpus).values()] == ["z-month", "2026 February"]
    table = pd.DataFrame({"update": pd.Categorical(["2026 February", "2026 January"])})
    shown = compare.shown_updates(SimpleNamespace(table=table))
    assert [*shown.values()] == ["2026 February", "2026 January"]


def test_nothing_is_new_to_the_index_of_a_later_release_or_of_itself(
    made, root, tmp_path, monkeypatch
):
    kept = classes(tmp_path / "kept")
    plan = plan_second(made, root, retain=[kept])
    later = compute_second(plan, tmp_path)
    for new in (made, later):
        index = compare.compare(later, new, later.corpus()).index
        assert set(index["content"]) == {"known"}


def as_released(plan):
    """What the release of an update says of its images, without one."""
    updates = [*plan.earlier, SimpleNamespace(id=plan.id)]
    record = SimpleNamespace(updates=updates, arrivals=plan.ledger.arrivals)
    return SimpleNamespace(record=record, ledger=lambda: plan.ledger, corpus=lambda: plan.corpus)


def test_updates_of_another_stream_are_new_if_their_images_are(made, later, root, tmp_path):
    """Whatever their numbers, and also where two streams part after an update in common."""
    branch = as_released(plan_update(made, classes(tmp_path / "own")))
    folder, beside = classes(tmp_path / "other"), {"pool": root / "pool"}
    other = as_released(plan_update(months.START, folder, months.SMALL, **beside))
    again = as_released(months.plan_first(root, "seed=1"))  # the images of `made`
    assert made.record.updates[0].id != again.record.updates[0].id
    cases = [
        (made, later, {"2 y-month"}), (later, made, set()), (later, branch, {"2 own"}),
        (branch, later, {"2 y-month"}), (later, other, {"1 other"}), (other, made, {"1 z-month"}),
        (made, again, set()),
    ]  # fmt: skip
    for old, new, labels in cases:
        corpus = new.corpus()
        for table in (corpus.table, corpus.table.astype(str)):
            corpus = dataclasses.replace(corpus, table=table)
            assert compare._updates_between(old, new, corpus) == labels


def test_a_release_in_the_folder_one_is_in_has_the_name_of_that_folder(made, monkeypatch):
    monkeypatch.chdir(made.folder)
    assert compare.as_candidate(release.read_release(".")).title == "1"


def test_names_that_differ_only_in_their_spelling_are_noted(made, tmp_path):
    names = ("Tasse", "tasse", "Caf\u00e9", "Cafe\u0301", "Vase")
    folder = classes(tmp_path / "month", names, each=3)
    [note] = [x for x in plan_update(made, folder).notes if "spellings" in x]
    assert "2 names in catalogue" in note and "Tasse and tasse" in note and "Vase" not in note


@pytest.mark.long
def test_what_a_later_release_says_of_the_earlier_ones(root, tmp_path):
    """Why the same model has another score now, and how much is lost since the first update."""
    classes(tmp_path / "kept", ("mug", "shirt", "lamp"))
    made = first(root, tmp_path, "evaluation.subset=null", retain=[tmp_path / "kept"])
    assert "A_ZS was" not in made.path(release.CARD_FILE).read_text()
    plan = plan_second(made, root)
    later = compute_second(plan, tmp_path)
    metrics = pd.read_parquet(later.path(release.SCORES_FILE)).set_index(["task", "role"])["score"]
    card, page = (later.path(x).read_text() for x in (release.CARD_FILE, release.REPORT_FILE))
    kept = (
        f"A_ZS was {metrics[0, 'eval']:.1f} before the first update and is "
        f"{metrics[2, 'eval']:.1f} after 2"
    )
    for words in (kept, "The card of z-month can give another A_KA", "new since then: "):
        assert words in card and words in page
    assert kept in sentences.describe_release_retention(later)


@pytest.mark.parametrize("change", options.one_in(3, ["more", "none", "gone"]))
def test_retention_is_compared_on_the_same_images_only(root, tmp_path, change):
    """A subset has as many images when more have arrived, or some are gone, but other ones."""
    classes(tmp_path / "kept", ("mug", "shirt"))
    made = first(root, tmp_path, retain=[tmp_path / "kept"])
    more = [classes(tmp_path / "kept", ("mug", "shirt"), prefix="x-")] * (change == "more")
    if change == "gone":
        test = months.pictures_in(made.ledger(), set="kept", split="test")[0]
        (tmp_path / "kept" / test.source).unlink()
    plan = plan_second(made, root, retain=more, skip_gone=True)
    later = compute_second(plan, tmp_path)
    metrics = pd.read_parquet(later.path(release.SCORES_FILE)).query("role == 'eval'")
    assert {*metrics["images"]} == {2}
    said = [later.path(release.CARD_FILE).read_text(), sentences.describe_release_retention(later)]
    assert ["A_ZS was" in words for words in said] == [change == "none"] * 2


def test_what_was_right_before_the_first_update_is_counted():
    metrics = pd.DataFrame(
        [("kept", "eval", 75.0, 8, 3, task, "full") for task in (0, 1)]
        + [("kept", "eval", 50.0, 8, 3, 2, "full"), ("kept", "eval", 0.0, 4, 3, 2, "subset")],
        columns=["dataset", "role", "score", "images", "classes", "task", "scope"],
    )
    before = np.array([True] * 6 + [False] * 2)
    hits = {"0/kept": before, "2/kept": np.array([False] * 3 + [True] * 4 + [False])}
    words = sentences.describe_retention(metrics, hits, 2)
    assert "A_ZS was 75.0 before the first update and is 50.0 after 2 (−25.0)" in words
    assert "50.0% of what was right then is wrong now" in words
    assert sentences.describe_retention(metrics, hits, 1) == ""  # the last change says it
    late = pd.concat([metrics, metrics[-2:-1].assign(dataset="late")])
    words = sentences.describe_retention(late, hits, 2, {"late"})  # the last A_ZS counts both
    assert words.startswith("The mean of 1 unchanged retention set (kept) was 75.0 before")
    other = metrics.assign(images=range(4))
    assert sentences.describe_retention(other, hits, 2) == ""  # other pictures


def test_an_update_without_test_pictures_is_not_judged(made, tmp_path):
    folder = tree(tmp_path / "month", {f"{n}.png": picture(3000 + n) for n in range(9)})
    rows = [(f"{n}.png", ("ring", "vase", "mug")[n % 3], "train") for n in range(9)]

    def write(rows):
        frame = pd.DataFrame(rows, columns=["filepath", "label", "split"])
        frame.to_csv(folder / "t.csv", index=False)

    write(rows)
    plan = plan_update(made, folder)
    later = compute_second(plan, tmp_path)
    words = "no test images, so what this update taught is not scored"
    assert any(words in note for note in plan.notes)
    card, page = (later.path(x).read_text() for x in (release.CARD_FILE, release.REPORT_FILE))
    assert words in card and words in page
    assert "<h1>month: update 2 cost" not in page and "taught, and" not in page
    assert "what it taught is not scored</h1>" in page
    write([(*rows[0][:2], "test"), *rows[1:]])
    notes = plan_update(made, folder).notes
    assert "not scored, since there are no test images so far: 1 of 3 names: vase" in notes


def test_a_plan_says_where_the_peak_comes_from(made, root, tmp_path):
    peak = made.config.schedule.peak
    own = "the recipe's, not tuned for these images; see cmpt tune"

    def said(plan):
        return next(note for note in plan.notes if note.startswith("peak"))

    assert said(plan_second(made, root)) == f"peak learning rate: {peak:g}, {own}"
    given = plan_second(made, root, "schedule.peak=0.001")
    assert said(given) == "peak learning rate: 0.001, given"
    later = compute_second(given, tmp_path)
    last = plan_update(later, root / "x-month")
    assert said(last) == "peak learning rate: 0.001, kept from y-month"
    assert "| y-month | " in (card := later.path(release.CARD_FILE).read_text())
    assert "| 0.001 | given |" in card and f"| {peak:g} | the recipe's |" in card


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def test_the_command_says_what_to_do_about_a_peak_and_repeats_nothing(made, root, tmp_path):
    out = tmp_path / "releases" / "2"
    month = ("update", made.folder, "--data", root / "y-month", "-o", out)
    last = made.record.updates[-1]
    as_long = f"training.task_steps=[{last.steps}]"
    done = invoke(*month, as_long, "--dry-run")
    assert done.stdout.startswith(f"from {made.folder}: {release.describe(made)}\n"), done.output
    assert done.stdout.endswith("nothing was computed\n")
    assert f"at the speed of {last.name}, whose" in done.stdout
    # another speed, or another part of the time in evaluations
    for other in (
        (as_long, "--threads", 2), (as_long, "training.batch=32"), (as_long, "--device", "cuda"),
        ONE_STEP,
    ):  # fmt: skip
        said = invoke(*month, *other, "--dry-run").stdout
        assert "of training" in said, other
        is_elsewhere = "cuda" in other and not torch.cuda.is_available()
        assert ("finds no GPU on this machine" in said) == is_elsewhere
    done = invoke(*month)
    assert f"written: {out}" in done.stdout, done.output
    assert f"cmpt tune {out} --data FOLDER_OF_NEXT_MONTH" in done.stdout
    done = invoke(*month)
    assert f"already there: {out}" in done.stdout and "written" not in done.stdout
    done = invoke(*month, "schedule.peak=0.001", "--dry-run")
    assert "cmpt tune" not in done.stdout


def test_a_ruined_model_is_called_so_in_output_card_and_report(made, root, tmp_path):
    """At such a peak, the model ends up guessing."""
    out = tmp_path / "releases" / "2"
    month = ("update", made.folder, "--data", root / "y-month", "-o", out)
    done = invoke(*month, "training.task_steps=[12]", "schedule.peak=3")
    assert done.exit_code == 0
    words = "The model may be ruined or untrained: its last losses are 2."
    for said in (done.stdout, *((out / x).read_text() for x in ("README.md", "report.html"))):
        assert said.count(words) == 1
    done = invoke(*month[:-1], out.with_name("3"), *ONE_STEP)  # too few to tell
    assert done.exit_code == 0 and words not in done.stdout


def test_a_sign_of_ruin_is_the_loss_of_guessing_or_half_of_a_zs_lost_at_once(tmp_path):
    log = tmp_path / "log.jsonl"

    def said(*losses, scores=(60.0, 50.0, 40.0, 19.0), images=(8,) * 4):
        lines = [{"task": 0, "step": n, "loss": loss} for n, loss in enumerate(losses)]
        log.write_text("\n".join(map(json.dumps, [*lines, {"done": 1}])))
        rows = [("kept", "eval", x, images[n], n, "subset") for n, x in enumerate(scores)]
        rows += [("kept", "eval", 60.0, 9, 0, "full"), ("kept", "eval", 19.0, 9, 3, "full")]
        names = ["dataset", "role", "score", "images", "task", "scope"]
        return sentences.describe_ruin(pd.DataFrame(rows, columns=names), log, batch=64)

    guess = math.log(64)
    assert said(*[9.0] * 20, *[guess - 0.7] * 10, scores=(60.0, 31.0, 20.0)) == ""  # two names
    assert "its last losses are 4.16, and those of guessing 4.16; compare" in said(
        1.0, *[guess] * 10, scores=(60.0, 59.0)
    )
    assert said(*[guess] * 9, scores=(60.0, 59.0)) == ""  # too few to tell
    assert "untrained: A_ZS fell from 40.0 to 19.0 in update 3; compare" in said(1.0)
    assert said(1.0, images=(8, 8, 8, 7)) == ""  # other images


def test_a_release_is_found_and_written_in_the_home_folder(made, root, monkeypatch):
    """Shells leave a ~ as it is in `--out=~/2`, and in quotes."""
    monkeypatch.setenv("HOME", str(made.folder.parent))
    parent = f"~/{made.folder.name}"
    done = invoke("update", parent, "--data", root / "y-month", "--out=~/2")
    assert f"written: {made.folder.parent / '2'}" in done.stdout, done.exception
    assert candidates.find_release(parent).folder == made.folder


@pytest.mark.defect
def test_a_dry_run_refuses_a_gpu_that_is_not_there(made, root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    month = ("update", made.folder, "--data", root / "y-month", "-o", tmp_path / "2")
    error = invoke(*month, "--device", "cuda:2", "--dry-run").exception
    assert isinstance(error, CmpError) and "'cuda:2'" in str(error)


def test_the_options_of_the_command_are_those_of_the_update(root, tmp_path):
    kept = classes(tmp_path / "kept", ("red fox",))
    begin = ("--start", months.START, "--data", root / "z-month", "--pool", root / "pool")
    own = ("--retain", kept, "--name", "January", "--prompt", "my {}", "--dry-run")
    done = invoke("update", *begin, *months.SMALL, "-o", tmp_path / "1", *own)
    assert 'prompt: "my {}" for pool, kept, catalogue' in done.stdout, done.output
    assert "update 1, January: " in done.stdout and "no pool is replayed" not in done.stdout


def test_months_in_one_folder_are_not_taken_for_classes(tmp_path):
    """Nor a folder that holds the retention set."""
    pictures = tmp_path / "pictures"
    for month in ("2026-01", "2026-02"):
        classes(pictures / month, ("red fox", "oak"), each=3)
    with pytest.raises(CmpError) as error:
        plan_update(months.START, pictures)
    for words in ("2026-01/oak/0.png", "2026-02/", f"{pictures}/2026-01", "cmpt data init"):
        assert words in str(error.value)
    shop = classes(tmp_path / "shop" / "kept", each=3).parent
    with pytest.raises(CmpError, match=r"--data: .*shop contains .*kept, which was given by --ret"):
        plan_update(months.START, shop, retain=[shop / "kept"])
    classes(tmp_path / "split" / "train", each=3)
    classes(tmp_path / "split" / "test", each=3, prefix="")
    sets = arrivals.read_sets(tmp_path / "split", "adapt", "{}")
    assert sets[0][0].reader.kind == "folder"


def test_a_release_that_is_not_there_is_called_one(made, root, tmp_path, monkeypatch):
    wrong = made.folder.with_name("2026-01")
    found = str(invoke("update", wrong, "--data", root / "y-month", "-o", tmp_path / "2").exception)
    assert f"{wrong}: must be the folder of a release, with its stream.json" in found
    with pytest.raises(CmpError, match="there is no such release"):
        plan_update(wrong, root / "y-month")
    with pytest.raises(CmpError, match=r"'smal' is not an open_clip model; .*small"):
        plan_update("smal", root / "y-month")


def test_a_month_is_checked_as_it_would_be_read(tmp_path):
    """Faults name the folder, since there is neither a manifest nor a set yet."""
    month = classes(tmp_path / "2026-01", ("red fox", "oak"), each=6)
    done = invoke("data", "check", month)
    assert done.exit_code == 0 and "1 of 1 datasets can be used" in done.stdout, done.output
    assert "a first `cmpt update --data` reads the folder as" in done.stdout
    assert "B/32" not in done.stdout  # no score is known
    tree(month, {"oak/Thumbs.db": b"x", "desktop.ini": b"x", "oak/.DS_Store": b"x"})
    assert invoke("data", "check", month).stdout == done.stdout  # what systems add is no fault
    tree(month, {"oak/bad.png": b"none", "oak/notes.pdf": b"x", "loose.png": picture()})
    done = invoke("data", "check", month)
    assert done.exit_code == 1 and "reads the folder as 13 images of 2 classes\n" in done.stdout
    with pytest.raises(CmpError) as error:
        plan_update(months.START, month)
    for words in (done.stdout, str(error.value)):
        words = " ".join(words.split())
        assert "oak/bad.png" in words and "2026-01" in words and "catalogue: " not in words
        assert "put `faults: skip` and `name: catalogue` into it" in words  # or it is another set
        assert "oak/notes.pdf" in words and "loose.png" in words  # all of them at once
        assert "cmpt data init" in words


def test_a_card_lists_the_data(made):
    card = made.path(release.CARD_FILE).read_text()
    assert "| pool | pool | {} | not given |" in card
    assert "| catalogue | adapt | {} | not given |" in card
    assert "20% of an update's images are held out for tests and 10% for tuning" in card
    tests = len(months.pictures_in(made.ledger(), set="catalogue", split="test"))
    assert tests > 0 and f"| catalogue | {tests} |" in card and "GM, which tuning maximises" in card
    assert f"`{release.LEDGER_FILE}` of the release has all" in card


def test_a_picture_is_one_picture(made, root, tmp_path):
    one = tree(tmp_path / "one", {"person__beard/1.png": picture(4000)})
    plan = plan_update(made, one)
    assert "1 new image: 1 to train on" in plan.notes[0] and "1 new name (" in plan.notes[1]
    assert plan.report.new_names == ("person beard",)
    words = "1 new image, 5 earlier ones, 2 of the pool; a new image appears"
    often = f"10 steps at batch 8: {words} 10.0 times, since an update has at least 10 steps"
    assert often in plan.notes
    plan = plan_update(made, one, ["training.task_steps=[1]"])
    assert f"1 step at batch 8: {words} 1.0 times" in plan.notes
    small = "the update is small, so a batch has 1 new image instead of 2; this is the number for"
    assert f"{small} 10 steps or more" in plan.notes


def test_a_release_is_a_folder_for_the_hub_already(made, tmp_path):
    done = invoke("export", made.folder, "--to", "hf", "-o", tmp_path / "hub")
    assert "a release is such a folder already" in str(done.exception)


@pytest.mark.parametrize("size", [5, 13, 200, pytest.param(20_000, marks=pytest.mark.long)])
def test_months_of_any_size(made, root, tmp_path, size):
    """A small month takes fewer of its pictures per batch, a first one as well."""
    files = {f"{'ab'[n % 2]}/{n}.png": picture(1000 + n) for n in range(size)}
    folder = tree(tmp_path / "month", files)
    others = {"pool": root / "pool", "retain": [classes(tmp_path / "kept")]}  # five have no test
    plan = plan_update(months.START, folder, ["training.batch=64"], **others)
    assert plan.pools.counts[1] <= plan.report.new["train"]
    assert plan.steps >= 10 and 2 <= sum(plan.pools.counts) <= 64
    shown = plan.steps * plan.pools.counts[1] / plan.report.new["train"]
    assert 2 <= shown <= 2 + max(10, plan.pools.counts[1]) / plan.report.new["train"]
    plan = plan_update(made, folder)
    assert plan.number == 2 and sum(plan.pools.counts) == 8


def test_a_held_out_picture_stays_held_out(made, root, tmp_path):
    """Also under another name, in another file with the same pixels, and in another class."""
    old = made.ledger()
    tests = months.pictures_in(old, split="test")
    trained = months.pictures_in(old, set="catalogue", split="train")[0]
    folder = tree(tmp_path / "again", {f"fresh/{n}.png": picture(5000 + n) for n in range(6)})
    for number, held in enumerate(tests[:2]):
        Image.open(root / "z-month" / held.source).save(folder / "fresh" / f"copy-{number}.bmp")
    shutil.copy(root / "z-month" / trained.source, folder / "fresh" / "known.png")
    plan = plan_update(made, folder)
    splits = {x.source: x.split for x in months.pictures_in(plan.ledger)[len(old.pictures) :]}
    assert splits["fresh/copy-0.bmp"] == splits["fresh/copy-1.bmp"] == "test"
    assert splits["fresh/known.png"] == "train"
    assert plan.report.held_out == 2 and any("held out before" in x for x in plan.notes)


def test_a_picture_with_two_names_is_reported(made, root, tmp_path):
    """Of an earlier month or of this one, trained on or held out."""
    old = months.pictures_in(made.ledger(), set="catalogue")
    chosen = [next(x for x in old if x.split == split) for split in ("train", "test")]
    folder = tree(tmp_path / "mixed", {f"fresh/{n}.png": picture(6000 + n) for n in range(6)})
    assert not any("two names" in x for x in plan_update(made, folder).notes)
    tree(folder, {"other/0.png": picture(6000)})
    for number, each in enumerate(chosen):
        shutil.copy(root / "z-month" / each.source, folder / "fresh" / f"oops-{number}.png")
    [note] = [x for x in plan_update(made, folder).notes if "two names" in x]
    known = f"{chosen[0].source} ({chosen[0].label})"
    assert f"3 new images with two names, such as fresh/oops-0.png (fresh) and {known};" in note


def test_pictures_that_look_like_held_out_ones_are_reported(made, root, tmp_path):
    """They stay in training: the same look is no proof."""
    held = months.pictures_in(made.ledger(), split="test")[0]
    folder = tree(tmp_path / "near", {f"fresh/{n}.png": picture(7000 + n) for n in range(9)})
    near = Image.open(root / "z-month" / held.source)
    near.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "fresh" / "train-larger.png")
    for number in range(20):  # one of these names falls into training
        shutil.copy(folder / "fresh" / "train-larger.png", folder / "fresh" / f"near-{number}.png")
        plan = plan_update(made, folder)
        if plan.report.similar:
            break
    assert plan.report.similar and plan.report.held_out == 0
    assert any("with a lookalike on the other side" in note for note in plan.notes)


@pytest.mark.defect
def test_of_planted_copies_with_another_pixel_those_within_two_bits_are_all_counted(
    made, root, tmp_path
):
    held = [x for x in months.pictures_in(made.ledger(), set="catalogue") if x.split == "test"]
    rows, distances = [("other.png", "new", "train")], []
    folder = tree(tmp_path / "near", {"other.png": picture(7000)})
    for number, each in enumerate(held):
        copy = Image.open(root / "z-month" / each.source).convert("RGB")
        copy.putpixel((number % copy.width, copy.height // 2), (255, 0, 255))
        copy.save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"copy {number % 2}", "train"))
        look = int(checks.hash_look(copy), 16)
        distances.append(min((look ^ x.look).bit_count() for x in held))
    frame = pd.DataFrame(rows, columns=["filepath", "label", "split"])
    frame.to_csv(folder / "near.csv", index=False)
    report = plan_update(made, folder).report
    near = [f"copy {number % 2}" for number, bits in enumerate(distances) if bits <= 2]
    assert report.similar == collections.Counter(near)
    assert len(near) > sum(bits == 0 for bits in distances) > 0


def test_look_hashes_are_compared_in_both_directions():
    rng = np.random.default_rng(0)
    some, others = rng.integers(1, 2**60, (2, 300))
    for place in range(60):  # three bits are too many
        others[place] = some[place]
        for bit in rng.choice(60, place % 4, replace=False):
            others[place] ^= 1 << int(bit)
    is_near = np.bitwise_count(some[:, None] ^ others) <= 2
    one, other = ledger.look_alike(some, others)
    assert (one == is_near.any(axis=1)).all() and (other == is_near.any(axis=0)).all()
    assert one.sum() == 45 and not ledger.look_alike(some, others[:0])[0].any()


def test_test_pictures_that_look_like_trained_ones_are_reported(made, root, tmp_path):
    """As where a shop's server saves last month's pictures anew."""
    trained = months.pictures_in(made.ledger(), set="catalogue", split="train")
    (tmp_path / "again/fresh").mkdir(parents=True)
    for number, each in enumerate(trained[:12]):
        near = Image.open(root / "z-month" / each.source).convert("RGB")
        near.resize((96, 80), Image.Resampling.BICUBIC).save(tmp_path / f"again/fresh/{number}.png")
    plan = plan_update(made, tmp_path / "again")
    held = {x.source for x in months.pictures_in(plan.ledger) if x.split != "train"}
    assert plan.report.similar and {*plan.report.similar_names} <= held


def test_a_pool_and_a_retention_set_have_the_splits_of_their_manifests(root, tmp_path):
    for name, role, splits in (
        ("pool", "pool", {"train": 0.5, "test": 0.5}), ("kept", "eval", {"test": 1.0}),
    ):  # fmt: skip
        folder = classes(tmp_path / name, [f"{name} {n}" for n in range(3)], each=20)
        write_manifest(folder / "manifest.yaml", name=name, role=role, splits=splits)
    places = {"pool": tmp_path / "pool", "retain": [tmp_path / "kept"]}
    plan = plan_update(months.START, root / "z-month", months.SMALL, **places)
    counts = collections.Counter((x.set, x.split) for x in months.pictures_in(plan.ledger))
    assert counts["kept", "test"] == 60 and 10 < counts["pool", "train"] < 50
    manifest = {"name": "kept", "splits": {"train": 0.5, "test": 0.5}}  # of another role
    write_manifest(tmp_path / "kept" / "manifest.yaml", role="adapt", **manifest)
    _, report = arrivals.arrive(ledger.Ledger(), str(tmp_path / "kept"), "eval")
    assert report.new["test"] > 40 and "train" not in report.new


def test_pictures_outside_a_manifest_s_folder_can_move(root, tmp_path):
    classes(tmp_path / "outside", ["cup", "pen"], each=20)
    folder = tmp_path / "month"
    folder.mkdir()
    reader = {"path": str(tmp_path / "outside")}
    write_manifest(folder / "manifest.yaml", name="mine", reader=reader, faults="skip")
    plan = plan_update(months.START, folder, months.SMALL, pool=root / "pool")
    (tmp_path / "outside").rename(tmp_path / "elsewhere")
    moved = ledger.move(plan.ledger, {str(tmp_path / "outside"): str(tmp_path / "elsewhere")})
    assert not arrivals.locate(moved)[2]
    with pytest.raises(CmpError, match=f"they came from .*{tmp_path / 'outside'}"):
        ledger.move(plan.ledger, {"/nowhere": "/else"})


@pytest.fixture(scope="module")
def own(root, tmp_path_factory):
    """A release with a prompt of its own, which replays a part of the pool."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(folder / "build"))
        return first(root, folder, "mixture.replay=0.1", prompt="my {}")


def test_a_folder_without_a_manifest_has_the_prompt_that_the_model_is_used_to(
    made, own, root, tmp_path
):
    """Or the one that the first update gives; later updates have it, too."""
    assert starts.usual_prompt("ViT-B-32") == "a photo of a {}"
    plan = plan_second(made, root, retain=[classes(tmp_path / "kept", ("red fox",))])
    assert {x.captions for x in months.pictures_in(plan.ledger, label="red fox")} == {("red fox",)}
    assert plan.corpus.datasets["kept"].prompt == plan.corpus.datasets["catalogue"].prompt == "{}"
    assert 'prompt: "{}" for pool, catalogue, kept' in plan.notes
    plan = plan_second(own, root)
    assert {x.captions[0].partition(" ")[0] for x in months.pictures_in(plan.ledger)} == {"my"}
    with pytest.raises(CmpError, match=r"--prompt: 'the \{\}', but this stream has 'my \{\}'"):
        plan_second(own, root, prompt="the {}")
    with pytest.raises(CmpError, match=r"--prompt: .* exactly one"):
        first(root, tmp_path / "none", prompt="a photo")


def test_what_a_manifest_skips_is_said(root, tmp_path):
    """Also of a pool and of a retention set."""
    given = {}
    for role in ("adapt", "pool", "eval"):
        folder = classes(tmp_path / role, [f"{role} {n}" for n in range(3)], each=20)
        tree(folder, {f"{role} 0/bad.png": b"none"})
        write_manifest(folder / "manifest.yaml", name=role, role=role, faults="skip")
        given[role] = folder
    plan = plan_update(
        months.START, given["adapt"], months.SMALL, pool=given["pool"], retain=[given["eval"]]
    )
    words = f"left out by `faults: skip`: 1 ({checks.UNKNOWN_FORMAT}: {{}} 0/bad.png)"
    for option, role in (("", "adapt"), ("--pool: ", "pool"), ("--retain: ", "eval")):
        assert option + words.format(role) in plan.notes


@pytest.mark.parametrize("start", [months.START, "ViT-B-32:random"])
def test_the_first_update_of_any_model_replays_the_whole_pool(root, start):
    plan = plan_update(start, root / "z-month", pool=root / "pool")
    pool = plan.corpus.table["dataset"] == "pool"
    assert plan.pools.pretraining.tolist() == np.flatnonzero(pool).tolist()


def test_a_stream_that_replays_a_part_of_the_pool_goes_on_with_that_part(own, root):
    plan = plan_second(own, root)
    assert plan.config.mixture.replay == 0.1 and len(plan.pools.pretraining) == 4


def test_a_plan_and_a_check_say_how_a_folder_was_read(tmp_path):
    month = tree(tmp_path / "m", {f"{n}.png": picture(n) for n in range(20)})
    rows = [f"{n}.png,a ring {n},9" for n in range(18)]
    (month / "t.csv").write_text("\n".join(["file,caption,price", *rows]))
    words = (
        "t.csv with the columns file (image), caption (caption), price; images in the folder that "
        "are not in the table: 2"
    )
    assert f"reads the folder as {words}\n" in invoke("data", "check", month).stdout
    pool = classes(tmp_path / "pool", ["a", "b"])
    notes = plan_update(months.START, month, pool=pool).notes
    assert f"no manifest: the folder is read as {words}" in notes


def test_a_month_without_a_manifest_joins_the_set_of_the_earlier_ones(own_root, tmp_path):
    """Which has one prompt, that of its first manifest. Another set may have another one."""
    about = {"name": "shoes", "title": "Shoes", "licence": "own", "role": "adapt"}
    reader = {"kind": "csv", "path": "months.csv", "label": "label", "split": "split"}
    about |= {"prompt": "a shoe, {}", "reader": reader}
    (own_root / "z-month" / "manifest.yaml").write_text(json.dumps(about))
    made = first(own_root, tmp_path)
    plan = plan_second(made, own_root)
    assert [x for x in plan.corpus.datasets if x != "pool"] == ["shoes"]
    assert plan.corpus.captions(len(plan.ledger.pictures) - 1)[0].startswith("a shoe, ")
    assert 'different prompts: "{}" for pool; "a shoe, {}" for shoes' in plan.notes
    assert "the set shoes: the images of all updates" in plan.notes
    manifest = own_root / "y-month" / "manifest.yaml"
    manifest.write_text(json.dumps(about | {"prompt": "{}"}))
    with pytest.raises(CmpError, match=r"shoes: prompt: '\{\}', but it was 'a shoe, \{\}'"):
        plan_second(made, own_root)
    manifest.write_text(json.dumps(about | {"name": "caps", "prompt": starts.USUAL_PROMPT}))
    notes = plan_second(made, own_root).notes
    assert any('tiny was pretrained with the prompt "{}"' in note for note in notes)
    manifest.write_text(json.dumps(about | {"name": "hats", "prompt": "a hat, {}"}))
    plan = plan_second(made, own_root)
    assert "the new images belong to hats" in plan.notes
    assert any('"a hat, {}" for hats' in note for note in plan.notes)
    apart = [note for note in plan.notes if "set of its own" in note]
    assert len(apart) == 1 and apart[0].startswith("hats is a set of its own, scored apart from sh")
    assert apart[0].endswith("with `name: shoes`")
    assert not any(
        "set of its own" in note for note in plan_update(made, own_root / "x-month").notes
    )


def test_the_id_of_an_update_counts_how_its_manifest_reads_images(root, tmp_path):
    """A key that has its default changes no id; nor does a task that follows from the images."""
    month = shutil.copytree(root / "z-month", tmp_path / "month")
    reader = {"kind": "csv", "path": "months.csv", "label": "label", "split": "split"}

    def update_id(reading=None, **other):
        about = {"name": "catalogue", "title": "T", "licence": "own", "role": "adapt"}
        about |= {"prompt": "{}", "reader": reader | (reading or {})} | other
        (month / "manifest.yaml").write_text(json.dumps(about))
        given = {"pool": root / "pool"}
        return plan_update(months.START, month, months.SMALL, **given).id

    usual = {"exif": "ignore", "transparency": "white", "draft": "double", "resize": "pillow"}
    unusual = {"exif": "apply", "transparency": "as-open-clip", "draft": "side", "resize": "torch"}
    ids = [update_id(), *(update_id({key: value}) for key, value in unusual.items())]
    ids.append(update_id(task="retrieval"))
    assert len({*ids}) == len(ids)
    assert update_id(usual, task="classification") == ids[0]
    rows = (month / "months.csv").read_text().splitlines()
    worded = [f"{row},{'caption' if not n else f'number {n}'}" for n, row in enumerate(rows)]
    (month / "months.csv").write_text("\n".join(worded))
    by_prompt = {update_id({"caption": "caption"}, prompt=p) for p in ("{}", "a shoe, {}")}
    assert len(by_prompt) == 2


def test_what_was_there_already_is_left_out(made, root, tmp_path):
    folder = shutil.copytree(root / "z-month", tmp_path / "more")
    lines = (folder / "months.csv").read_text() + "new.png,ring,train\n"
    (folder / "months.csv").write_text(lines)
    tree(folder, {"new.png": picture(9000)})
    report = plan_update(made, folder).report
    assert report.new == {"train": 1} and report.again == months.SIZES[0]
    assert report.new_names == ("ring",)


def test_pictures_that_are_gone_are_refused_or_skipped(own_root, tmp_path):
    made = first(own_root, tmp_path)
    known = months.pictures_in(made.ledger(), set="catalogue")
    (own_root / "z-month" / known[0].source).unlink()
    before = plan_second(made, own_root, skip_gone=True).id
    (own_root / "z-month" / known[3].source).write_bytes(picture(77))  # another picture now
    with pytest.raises(CmpError) as error:
        plan_second(made, own_root)
    assert "gone or changed: 2" in str(error.value) and "--gone skip" in str(error.value)
    assert known[0].source in str(error.value)
    command = ("update", made.folder, "--data", own_root / "y-month", "-o", tmp_path / "2")
    done = invoke(*command, "--gone", "skip", "--dry-run")
    assert "left out: 2 images missing from earlier updates" in done.stdout, done.output
    plan = plan_second(made, own_root, skip_gone=True)
    assert plan.id != before  # other images are left
    whole = made.ledger().pictures
    is_gone = whole["source"].isin([known[0].source, known[3].source])
    is_gone &= whole["set"] == "catalogue"
    assert len(plan.ledger.pictures) > len(whole)
    assert not {*whole.index[is_gone]} & {*plan.pools.buffer.tolist(), *plan.pools.update.tolist()}
    assert plan.ledger.pictures[: len(whole)][~is_gone].equals(whole[~is_gone])
    later = compute_second(plan, tmp_path)
    assert "The card of z-month" not in later.path(release.CARD_FILE).read_text()  # counts new ones


def test_updates_continue_when_a_whole_month_is_gone(own_root, tmp_path):
    made = first(own_root, tmp_path)
    shutil.rmtree(own_root / "z-month")
    plan = plan_second(made, own_root, skip_gone=True)
    assert plan.number == 2 and len(plan.pools.update) and not len(plan.pools.buffer)
    (own_root / "pool").rename(tmp_path / "pool")
    later = update.update(
        made, own_root / "y-month", tmp_path / "releases" / "2", skip_gone=True,
        moved={str(own_root / "pool"): str(tmp_path / "pool")}, progress=False,
    )  # fmt: skip
    assert later.record.id == plan.id
    plan = plan_update(later, own_root / "x-month")
    assert plan.gone == 0 and len(plan.pools.buffer)


@pytest.mark.filterwarnings("ignore:mixture.pretraining")
def test_updates_continue_when_one_picture_of_a_month_is_left(own_root, tmp_path):
    """Only what is still to be trained needs enough pictures for a batch."""
    made = first(own_root, tmp_path, pool=None)
    trained = months.pictures_in(made.ledger(), split="train")
    for gone in trained[1:]:
        (own_root / "z-month" / gone.source).unlink()
    plan = plan_second(made, own_root, skip_gone=True)
    assert len(plan.pools.buffer) == 1 and plan.pools.counts == (0, 1, 1)
    later = compute_second(plan, tmp_path)
    assert plan_update(later, own_root / "x-month").gone == 0
    (own_root / "z-month" / trained[0].source).unlink()
    one = tree(tmp_path / "one", {"mug/1.png": picture(4000)})
    with pytest.raises(CmpError, match="task 1 has 1 images to train on"):
        plan_update(made, one, skip_gone=True)


@pytest.mark.filterwarnings("ignore:mixture.pretraining")
def test_updates_continue_when_no_picture_of_the_pool_is_left(own_root, tmp_path):
    made = first(own_root, tmp_path)
    shutil.rmtree(own_root / "pool")
    with pytest.raises(CmpError, match="earlier updates that are gone or changed: 40"):
        plan_second(made, own_root)
    with pytest.warns(
        UserWarning, match="no image of the pool is left, so .* its share goes to the"
    ):
        plan = plan_second(made, own_root, skip_gone=True)
    assert any(note.startswith("no pool is replayed") for note in plan.notes)
    assert plan.pools.counts[0] == 0 and plan.config.mixture == made.config.mixture
    later = compute_second(plan, tmp_path)
    assert plan_update(later, own_root / "x-month").pools.counts[0] == 0


def test_a_retention_set_with_nothing_left_to_score_is_refused(own_root):
    shutil.copytree(own_root / "pool" / "a", own_root / "kept" / "a")
    with pytest.raises(CmpError, match=r"--retain: .*kept: none of its images is left to score"):
        months.plan_first(own_root, retain=[own_root / "kept"])


def test_retention_images_that_the_pool_has_too_are_counted_as_not_scored(own_root):
    """They were left out of A_ZS without a word."""
    shutil.copytree(own_root / "pool", own_root / "kept")
    classes(own_root / "kept", ("cup", "pen"), 4)

    def notes():
        plan = months.plan_first(own_root, retain=[own_root / "kept"])
        return [note for note in plan.notes if "not scored: " in note]

    [note] = notes()
    assert note.startswith("--retain: kept: not scored: 40 of 48 images, such as a/0.png: each")
    assert "in a training split, the pool or an earlier folder; take these out" in note
    for name in "abc":
        shutil.rmtree(own_root / "kept" / name)
    assert notes() == []


@pytest.mark.parametrize("is_first", [True, False])
def test_a_month_with_nothing_to_train_on_is_refused(made, root, tmp_path, is_first):
    month, kept = (classes(tmp_path / name, ("mug",)) for name in ("month", "kept"))
    with pytest.raises(CmpError, match=r"--data: .*month: all its new images are held out.*mug/"):
        plan_update(months.START if is_first else made, month, retain=[kept])


def test_a_warmup_that_an_earlier_month_was_too_short_for_is_taken(root, tmp_path):
    """But a month itself, also among all months at once, needs enough steps."""
    settings = ["schedule.meta=rsqrt", "training.task_steps=[10]"]
    made = first(root, tmp_path, *settings)
    asked = ["schedule.warmup_steps=15"]
    plan = plan_second(made, root, *asked, "training.task_steps=[20]")
    assert plan.fitted.steps == (10, 20)
    later = compute_second(plan, tmp_path)
    assert plan_update(later, root / "x-month", ["training.task_steps=[30]"])
    with pytest.raises(CmpError, match=r"warmup 15 .* in a task of 14"):
        plan_update(later, root / "x-month", ["training.task_steps=[14]"])
    whole = config.override(plan.config.to_dict(), [f"data={root}", "training.task_steps=[10,20]"])
    with pytest.raises(CmpError, match=r"schedule: warmup 15 .* in a task of 10"):
        launch.resolve_run(config.parse(whole))


def test_a_link_that_leads_to_the_newest_month_is_followed(own_root):
    (own_root / "latest").symlink_to("z-month")
    plan = plan_update(months.START, own_root / "latest", months.SMALL, pool=own_root / "pool")
    assert plan.ledger.arrivals[-1].folder == str(own_root.resolve() / "z-month")
    assert plan.name == "z-month" and plan.id == months.plan_first(own_root).id


def test_moved_folders_are_found_and_checked(own_root, tmp_path):
    made = first(own_root, tmp_path)
    (own_root / "z-month").rename(tmp_path / "elsewhere")
    with pytest.raises(CmpError, match="--moved OLD=NEW"):
        plan_second(made, own_root)
    moved = {str(own_root / "z-month"): str(tmp_path / "elsewhere")}
    plan = plan_second(made, own_root, moved=moved)
    assert str(tmp_path / "elsewhere") in {x.folder for x in plan.ledger.arrivals}
    again = ledger.move(plan.ledger, moved)  # a later release knows the new place
    assert again.arrivals == plan.ledger.arrivals
    for place in ("/else", str(own_root)):  # a slip, where some images are in the new place
        with pytest.raises(CmpError, match="no images came from"):
            plan_second(made, own_root, moved={"/nowhere": place})
    with pytest.raises(CmpError, match="they came from no folder yet"):
        plan_update(months.START, own_root / "y-month", moved={"/a": "/b"})
    with pytest.raises(CmpError, match="--pool: is empty"):
        plan_update(months.START, own_root / "y-month", pool="")


@pytest.mark.parametrize(
    ("moved", "folders"),
    [
        ({"/a": "/b", "/b": "/c"}, ["/b/p", "/b/q/r", "/c/p"]),
        ({"/a/q": "/d", "/a": "/e"}, ["/e/p", "/d/r", "/b/p"]),
        ({"/": "/mnt"}, ["/mnt/a/p", "/mnt/a/q/r", "/mnt/b/p"]),
        ({"/a": "/"}, ["/p", "/q/r", "/b/p"]),
    ],
)
def test_each_image_moves_once_with_the_closest_folder(moved, folders):
    arrivals = [ledger.Arrival(1, "x", "adapt", path) for path in ("/a/p", "/a/q/r", "/b/p")]
    found = ledger.move(ledger.Ledger(tuple(arrivals)), moved).arrivals
    assert [arrival.folder for arrival in found] == folders


def test_a_folder_that_moved_twice_at_once_is_refused(made, root, tmp_path):
    moved = ("--moved", "/a=/b", "--moved", "/a=/c")
    done = invoke("update", made.folder, "--data", root / "y-month", "-o", tmp_path / "2", *moved)
    assert "--moved: '/a' is given twice" in str(done.exception)


REFUSED = {
    "stream.tasks=3": "one task",
    "training.steps=3": "training.passes",
    "training.budget=1": "training.passes",
    "model.name=small": "which cannot change",
    "method.name=lora": "which cannot change",
    "merging.policy=none": "which cannot change",
    "schedule.meta=free": "the number of updates",
    "mixture.last=[0.5,0.25,0.25]": "the number of updates",
    "seeds.data=3": "which cannot change",
    "evaluation.split=validation": "which cannot change",
    "data=elsewhere": "--data",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_an_update_cannot_have_is_refused_by_name(made, root, tmp_path, setting):
    with pytest.raises(CmpError) as error:
        plan_second(made, root, setting)
    assert setting.partition("=")[0] in str(error.value) and REFUSED[setting] in str(error.value)


@pytest.fixture(scope="module")
def all_merged(root, tmp_path_factory):
    """A release whose next merge needs what it remembers of all models so far."""
    folder = tmp_path_factory.mktemp("merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(folder / "build"))
        policy = "merging={policy: zero-all, shares: power, power: 2}"
        return first(root, folder, policy).folder


@pytest.mark.parametrize(
    ("key", "others"),
    [("rule=magmax", ["shares=equal", "power=1"]), ("shares=log", ["power=1"]), ("power=3", []),
     ("reverse=true", []), ("zero=true", [])],
)  # fmt: skip
def test_a_stream_that_merges_all_models_keeps_the_way_it_does(all_merged, root, key, others):
    settings = [f"merging.{each}" for each in (key, *others)]
    with pytest.raises(CmpError, match=f"merging.{key.partition('=')[0]}: .* which cannot change"):
        plan_update(all_merged, root / "y-month", settings)


def test_a_running_average_of_two_may_go_on_by_another_rule(made, root):
    plan = plan_second(made, root, "merging.rule=slerp")
    assert plan.config.merging.rule == "slerp"


@pytest.mark.parametrize("version", ["9.1.0", None])
def test_a_release_of_a_later_version_says_what_to_install(made, root, version):
    """It may have keys that this version does not know."""
    path = made.folder / release.RECORD_FILE
    record = json.loads(path.read_text())["record"] | {"schema": release.SCHEMA + 1, "new": 1}
    record["provenance"]["cmp"] = version
    path.write_text(json.dumps({"sha256": json_digest(record), "record": record}))
    with pytest.raises(CmpError) as error:
        plan_second(made, root)
    words = "a newer version of cmp", f"install {'cmp 9.1.0' if version else 'the latest cmp'}"
    assert all(each in str(error.value) for each in (str(path), "schema: 2", *words))
    assert "cannot be read" not in str(error.value)


def damage(path):
    """Change a bit near the end of a file, and return its content before."""
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    return content


def test_a_damaged_release_is_refused_before_anything_is_computed(made, root, tmp_path):
    needed = (release.WEIGHTS_FILE, release.MATRIX_FILE, release.LEDGER_FILE, *made.slimmable())
    for name in (*needed, release.RECORD_FILE):
        path = made.folder / name
        content = damage(path)
        with pytest.raises(CmpError) as error:
            update.check_folder(plan_second(made, root), tmp_path / "2")
        assert path.name in str(error.value)
        if name in needed:
            path.unlink()
            with pytest.raises(CmpError, match=rf"{path.name}: is missing; .*copy the release"):
                update.check_folder(plan_second(made, root), tmp_path / "2")
        path.write_bytes(content)
    update.check_folder(plan_second(made, root), tmp_path / "2")


@pytest.mark.defect
@pytest.mark.parametrize("name", [release.WEIGHTS_FILE, release.CONFIG_FILE])
def test_a_damaged_release_is_neither_used_nor_called_intact(made, tmp_path, name):
    damage(made.folder / name)
    out = tmp_path / "bad.safetensors"
    for command in (
        ["export", made.folder, "-o", out],
        ["eval", f"local-dir:{made.folder}"],
        ["compare", f"local-dir:{made.folder}", "small:annealed"],
    ):
        said = invoke(*command)
        assert isinstance(said.exception, CmpError), said.output
        assert f"{name}: damaged" in str(said.exception)
    with pytest.raises(CmpError, match=f"{name}: damaged"):
        compare.as_candidate(made)
    assert not out.exists()
    said = invoke("release", "show", made.folder)
    assert said.exit_code == 1 and f"{name}: damaged" in said.stdout


@pytest.mark.defect
@pytest.mark.parametrize("name", [release.REPORT_FILE, release.LEDGER_FILE])
def test_a_release_without_a_file_is_shown_with_what_the_next_update_needs(made, name):
    """A report is deleted to delete the pictures in it for good."""
    (made.folder / name).unlink()
    (made.folder / release.CONFIG_FILE).write_text("{}")
    said = invoke("release", "show", made.folder)
    assert said.exit_code == 1 and "all files but 2 are intact" in said.stdout, said.output
    assert f"{name}: is missing" in said.stdout
    assert f"{release.CONFIG_FILE}: damaged" in said.stdout
    assert ("images are there" in said.stdout) == (name == release.REPORT_FILE)


@pytest.mark.defect
def test_a_release_says_which_pictures_open_clip_sees_otherwise(root, tmp_path):
    data = shutil.copytree(root / "z-month", tmp_path / "z-month")
    for n in (0, 5):
        Image.new("RGBA", (40, 40), (9, 8, n, 7)).save(data / f"{n}.png")
    out = tmp_path / "releases" / "1"
    settings = ("--start", months.START, "--data", data, "--pool", root / "pool", *months.SMALL)
    said = invoke("update", *settings, "-o", out)
    words = "transparent images: 2; they are put over white here"
    assert said.exit_code == 0 and words in " ".join(said.output.split()), said.output
    for name in (release.CARD_FILE, release.REPORT_FILE):
        assert words in (out / name).read_text()
    for folder in (out, f"local-dir:{out}"):
        said = invoke("export", folder, "-o", tmp_path / "model.safetensors")
        assert said.exit_code == 0 and f"note: catalogue: {words}" in said.output, said.output


def test_what_the_next_update_needs_is_shown_until_the_release_is_slimmed(own_root, tmp_path):
    made = first(own_root, tmp_path)

    def shown():
        return invoke("release", "show", made.folder).stdout

    needed = len(months.pictures_in(made.ledger(), set="catalogue"))
    words = f"{own_root / 'z-month'}: {{}} of {needed} images are there"
    assert words.format(needed) in shown() and "all files are intact" in shown()
    (own_root / "z-month" / made.ledger().pictures["source"].iloc[-1]).unlink()
    assert words.format(needed - 1) in shown() and "--moved OLD=NEW" in shown()
    table = own_root / "z-month" / "months.csv"
    table.write_text(table.read_text().replace("filepath", "place", 1))
    reason = f"  {own_root / 'z-month'}: cannot look for its images: reader.image: no column"
    assert reason in shown() and words.format(0) not in shown()
    shutil.rmtree(own_root / "z-month")
    assert words.format(0) in shown()
    error = invoke("release", "slim", made.folder).exception
    assert "no release beside it goes on from it" in str(error)
    assert "all files are intact" in shown()
    done = invoke("release", "slim", made.folder, "--newest")
    assert "unless you repeat its own update with another -o" in done.stdout, done.output
    assert "slimmed, so no update can start from it" in shown() and "intact" in shown()


def test_a_release_that_another_goes_on_from_is_slimmed_at_once(made, later):
    assert invoke("release", "slim", made.folder).exit_code == 0
    (made.folder / release.RECORD_FILE).write_text("{}")  # a damaged one says nothing
    assert "add --newest" in str(invoke("release", "slim", later.folder).exception)


def test_the_last_state_of_a_stream_is_not_slimmed(made, later, root, tmp_path):
    def refused():
        return str(invoke("release", "slim", made.folder).exception)

    (later.folder / release.START_FILE).rename(tmp_path / "start")
    assert "no release beside it goes on from it and has its own state" in refused()
    (tmp_path / "start").rename(later.folder / release.START_FILE)

    def stop(task, step, result, model):
        signal.raise_signal(signal.SIGINT)

    for parent in (later, made):
        out = made.folder.with_name(f"after {parent.folder.name}")
        with pytest.raises(Interrupted):
            plan = plan_update(parent, root / "x-month", ONE_STEP)
            update.compute_update(plan, out, Observer(step=stop))
    work = update.working_folder(out)
    assert f"the unfinished update in {work} may start from it" in refused()
    shutil.rmtree(work)
    assert invoke("release", "slim", made.folder).exit_code == 0  # the other goes on from `later`


def test_a_finished_month_is_found_again_after_the_one_before_is_slimmed(made, later, root):
    release.slim(made.folder)
    month = ("update", made.folder, "--data", root / "y-month", "-o")
    done = invoke(*month, later.folder)
    assert done.exit_code == 0 and f"already there: {later.folder}" in done.stdout, done.output
    error = invoke(*month, made.folder.with_name("3")).exception
    assert "`cmpt release slim` removed it" in str(error)


@pytest.mark.parametrize("name", [release.WEIGHTS_FILE, release.CONFIG_FILE, "state"])
def test_a_repeated_command_does_not_vouch_for_a_damaged_release(made, later, root, name):
    """A reader may repeat it because the copy of the release broke."""
    path = later.folder / (later.record.state if name == "state" else name)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    month = ("update", made.folder, "--data", root / "y-month", "-o", later.folder)
    error = str(invoke(*month).exception)
    assert f"{path}: damaged" in error and f"delete {later.folder}" in error
    if name == "state":  # no update could go on from either
        slimmed = invoke("release", "slim", made.folder)
        assert "no release beside it goes on from it" in str(slimmed.exception)


def test_a_release_whose_state_is_lost_is_not_called_slimmed(made, root, tmp_path):
    (made.folder / made.record.state).unlink()
    said = invoke("release", "show", made.folder)
    assert said.exit_code == 1 and "all files but 1 are intact" in said.stdout, said.output
    assert "is missing; slimmed, or not copied whole: copy the release again" in said.stdout


def test_a_release_is_never_changed(made, root, tmp_path):
    again = first(root, tmp_path, "evaluation.subset=null")
    assert again.record == made.record  # the same command finds it
    plan = plan_second(made, root)
    with pytest.raises(CmpError, match="never changed"):
        update.compute_update(plan, made.folder)
    (tmp_path / "full").mkdir()
    with pytest.raises(CmpError, match="already exists"):
        update.compute_update(plan, tmp_path / "full")


def test_opening_a_release_reads_each_file_once(made, root, monkeypatch):
    read = []

    def counted(path, *how):
        read.append(path)
        return open(path, *how)

    monkeypatch.setattr(files, "open", counted, raising=False)
    plan = plan_second(made, root)
    plan.parent.state()
    plan.parent.path(release.START_FILE)
    again = release.read_release(made.folder)
    again.path(release.START_FILE)
    assert again.record.state in {str(path.relative_to(made.folder)) for path in read}
    assert len(read) == len({*read})
    (made.folder / release.START_FILE).write_bytes(b"other")
    with pytest.raises(CmpError, match="damaged"):
        again.path(release.START_FILE)


def test_no_release_is_written_into_another(made, root):
    with pytest.raises(CmpError, match="2: is inside the release"):
        update.check_folder(plan_second(made, root), made.folder / "2")


def test_a_full_disk_is_said_before_anything_is_computed(root, tmp_path, monkeypatch):
    plan = months.plan_first(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    out = tmp_path / "releases" / "1"
    with pytest.raises(CmpError, match=r"1: the update needs about .* GB free; make room"):
        update.compute_update(plan, out)
    assert not out.parent.exists()
    (saved := tmp_path / "saved").write_bytes(bytes(1000))  # by the same update, which was stopped
    monkeypatch.setattr(update, "checkpoint_files", lambda folder: [saved])
    weights = models.create_on_meta(plan.config.model.name).state_dict().values()
    free = 12 * sum(x.nbytes for x in weights) - 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    said = update.check_room(plan, out)
    assert re.fullmatch(r"about [\d.e-]+ GB until the release .*, of [\d.e-]+ GB free", said)


@pytest.mark.defect
def test_a_dry_run_says_how_much_disk_space_is_needed(root, tmp_path, monkeypatch):
    given = ("--start", months.START, "--data", root / "z-month", "--pool", root / "pool")
    command = ("update", *given, *months.SMALL, "-o", tmp_path / "1", "--dry-run")
    done = invoke(*command)
    assert "\ndisk: about " in done.stdout and "nothing was computed" in done.stdout, done.output
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    done = invoke(*command)
    assert "the update needs about" in str(done.exception) and "memory: " in done.stdout


def test_two_at_once_are_one_too_many(root, tmp_path):
    plan = months.plan_first(root)
    out = tmp_path / "releases" / "1"
    place = update.working_folder(out)
    computing = CheckpointManager(plan.id, folder=place)
    with computing, pytest.raises(CmpError, match="another process"):
        update.compute_update(plan, out)


def test_of_two_that_began_at_once_one_trains(root, tmp_path, monkeypatch):
    """The other passes the first check while the release is not there, and then gets the lock."""
    plan, out, check = months.plan_first(root, *ONE_STEP), tmp_path / "1", update.check_room
    made = []

    def write_meanwhile(*given):
        monkeypatch.setattr(update, "check_room", check)
        made.append(update.compute_update(plan, out))
        monkeypatch.setattr(update, "train_update", lambda *_: pytest.fail("trained again"))
        return check(*given)

    monkeypatch.setattr(update, "check_room", write_meanwhile)
    assert update.compute_update(plan, out).record == made[0].record
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


def test_what_another_version_computed_is_not_called_another_update_only(
    made, root, tmp_path, monkeypatch
):
    plan, out = plan_second(made, root), tmp_path / "stopped"
    write_checkpoint(made.state(), update.working_folder(out))
    monkeypatch.setattr(update, "__version__", "99.0")
    for folder in (out, made.folder):
        words = rf"\(or the same, by cmp {__version__}, while this is cmp 99\.0: install cmp"
        with pytest.raises(CmpError, match=words):
            update.check_folder(plan, folder)


def test_another_update_that_was_stopped_is_not_overwritten(made, root, tmp_path):
    settings, whole = [*months.SMALL, "evaluation.subset=null"], made
    plan = plan_update(months.START, root / "z-month", settings, pool=root / "pool")
    out = tmp_path / "stopped" / "1"

    def stop(task, step, result, model):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="the same command continues"):
        update.compute_update(plan, out, Observer(step=stop))
    other = plan_update(months.START, root / "y-month", settings, pool=root / "pool")
    (update.working_folder(out) / "diverged.json").write_text("{}")  # steps are worth keeping
    with pytest.raises(CmpError, match="other images or settings was stopped here"):
        update.compute_update(other, out)
    given = ("--data", root / "z-month", "--pool", root / "pool", "-o", out)
    done = invoke("update", "--start", months.START, *settings, *given)
    assert f"from {months.START}: a first update" in done.stdout, done.output
    made = update.compute_update(plan, out)
    log = logs.read_log(made.path(release.LOG_FILE))
    assert log["step"].dropna().tolist() == list(range(plan.steps))
    states = [each.path(each.record.state) for each in (made, whole)]
    assert months.differences(*states) == []
    assert made.record.files[release.WEIGHTS_FILE] == whole.record.files[release.WEIGHTS_FILE]
    assert "loss " in invoke("release", "show", made.folder).output


def test_an_update_that_diverged_may_be_repeated_at_a_lower_peak_as_its_error_says(root, tmp_path):
    settings, out = [*months.SMALL, "training.task_steps=[3]"], tmp_path / "diverged" / "1"
    plan = plan_update(months.START, root / "z-month", settings, pool=root / "pool")
    with pytest.raises(Diverged, match=r"lower schedule.peak.*diverged\.json"):
        update.compute_update(plan.with_peak(1e30), out)
    work = update.working_folder(out)
    assert latest_progress(work) and (work / "diverged.json").exists()
    update.check_folder(plan.with_peak(0.001), out)  # as for --dry-run, which deletes nothing
    assert latest_progress(work) and (work / "diverged.json").exists()
    made = update.compute_update(plan.with_peak(0.001), out)
    assert made.record.id == plan.with_peak(0.001).id and not work.exists()
    assert logs.read_log(made.path(release.LOG_FILE))["step"].dropna().tolist() == [0, 1, 2]


def test_the_bar_of_an_update_that_goes_on_ends_full(root, made, tmp_path, monkeypatch):
    plan, out, bars = plan_second(made, root), tmp_path / "next", []

    def stop(task, step, result, model):
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        update.compute_update(plan, out, Observer(step=stop))

    class Bar(tqdm):
        def __init__(self, **settings):
            super().__init__(**settings)
            bars.append(self)

    monkeypatch.setattr(update, "tqdm", Bar)
    update.update(made, root / "y-month", out)
    assert [(bar.n, bar.total) for bar in bars] == [(plan.steps, plan.steps)]
    log = logs.read_log(out / release.LOG_FILE)
    assert log["step"].dropna().tolist() == list(range(plan.steps))  # those before the stop, too


def killed(monkeypatch, place, name, call):
    """Make a call that is killed where it calls a function of a module or a class."""

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(place, name, die)
        call()


def test_a_kill_between_training_and_writing_changes_no_score(made, root, tmp_path, monkeypatch):
    call = functools.partial(first, root, tmp_path / "killed", "evaluation.subset=null")
    killed(monkeypatch, update, "write_release", call)
    tables = [pd.read_parquet(x.path(release.MATRIX_FILE)) for x in (call(), made)]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.long
def test_a_kill_between_training_and_keeping_leaves_a_peak_its_scores(
    made, root, tmp_path, monkeypatch
):
    places = {"folder": tmp_path / "tune", "peaks": (0.001,)}
    call = functools.partial(tuning.tune, made.folder, root / "x-month", **places)
    killed(monkeypatch, tuning, "write_kept", call)
    table = call()
    assert {"peak", "A_KA"} <= {*table} and table["A_KA"].notna().all()


@pytest.mark.long
def test_after_a_kill_behind_the_release_the_same_command_deletes_the_checkpoints(
    root, tmp_path, monkeypatch
):
    call = functools.partial(first, root, tmp_path)
    killed(monkeypatch, CheckpointManager, "remove", call)
    [left] = tmp_path.rglob(".*.update")
    assert list(left.iterdir())
    call()
    assert not left.exists()


def test_the_same_command_deletes_what_a_kill_at_the_end_of_a_release_left(made, root):
    left = made.folder.parent / f"{PARTIAL_PREFIX}left"
    (left / "previous").mkdir(parents=True)
    plan = months.plan_first(root, "evaluation.subset=null")
    assert update.compute_update(plan, made.folder).record == made.record
    assert not left.exists()


@pytest.mark.defect
def test_a_log_that_is_written_further_does_not_damage_the_release(root, tmp_path, monkeypatch):
    """After a kill right behind the release, which is then moved, the same command goes on."""
    write = update.write_release

    def write_and_die(*given):
        write(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(update, "write_release", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        first(root, tmp_path)
    moved = (tmp_path / "releases" / "1").rename(tmp_path / "moved")
    [left] = tmp_path.rglob(f".*.update/{release.LOG_FILE}")
    with left.open("a") as log:
        log.write("{}\n")
    assert release.read_release(moved).path(release.LOG_FILE)


@pytest.mark.defect
def test_after_a_kill_behind_a_tried_peak_the_same_command_deletes_the_checkpoints(
    made, root, tmp_path, monkeypatch
):
    tried = {"folder": tmp_path / "tune", "peaks": (0.001,)}
    tune = functools.partial(tuning.tune, made, root / "y-month", **tried)
    monkeypatch.setattr(tuning, "MOST_PEAKS", 1)
    killed(monkeypatch, CheckpointManager, "remove", tune)
    assert [*(tmp_path / "tune/checkpoints").glob("*/*")]
    tune()
    assert not (tmp_path / "tune/checkpoints").exists()
    assert len([*(tmp_path / "tune").glob("*.json")]) == 1


def test_tuning_that_was_stopped_goes_on(made, root, tmp_path, monkeypatch):
    def stop(task, step, result, model):
        signal.raise_signal(signal.SIGINT)

    tried, resumed = {"folder": tmp_path / ".tuned.tune", "peaks": (0.001,)}, []
    with pytest.raises(Interrupted, match="the same command continues"):
        tuning.tune(
            made.folder, root / "y-month", observer=lambda plan: Observer(step=stop), **tried
        )
    monkeypatch.setattr(tuning, "MOST_PEAKS", 1)
    monkeypatch.setattr(
        "cmp.cli.computing.progress_observer", lambda bar: Observer(resumed=resumed.append)
    )
    given = ("--data", root / "y-month", "--peaks", "0.001", "-o", tmp_path / "tuned.yaml")
    done = invoke("tune", made.folder, *given)
    assert done.exit_code == 0 and resumed == [1], done.output


def test_tuning_needs_room_and_names_what_others_left(made, root, tmp_path, monkeypatch):
    left = tmp_path / "tune" / "checkpoints" / "other" / "task.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(2_000_000))
    tune = functools.partial(tuning.tune, made, root / "y-month", folder=tmp_path / "tune")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        with pytest.raises(CmpError, match=r"tune: the update needs about .* make room"):
            tune()
    monkeypatch.setattr(tuning, "_scores_of", lambda *_: {"A_KA": 50.0})
    with pytest.warns(UserWarning, match=r"tune/checkpoints: has 0\.002 GB .* or delete this"):
        tune()


@pytest.mark.defect
@pytest.mark.parametrize("out", [".", "/", "file/r", "made"])
def test_a_dry_run_refuses_a_release_that_could_not_be_written(root, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "made").mkdir()
    given = ("--start", months.START, "--data", root / "z-month", "--pool", root / "pool")
    error = invoke("update", *given, *months.SMALL, "-o", out, "--dry-run").exception
    assert isinstance(error, CmpError) and str(error).startswith(f"{Path(out)}: ")
    assert not invoke("update", *given, *months.SMALL, "-o", "a/b", "--dry-run").exception
    assert not (tmp_path / "a").exists()


@pytest.mark.defect
def test_the_folder_of_a_choice_is_not_made(made, root, tmp_path):
    out = tmp_path / "reslts/tuned.yaml"
    error = invoke("tune", made.folder, "--data", root / "y-month", "-o", out).exception
    assert isinstance(error, CmpError) and f"the folder {out.parent} does not exist" in str(error)
    assert not out.parent.exists()


def test_tuning_goes_beyond_an_edge_and_does_not_compute_twice(made, root, tmp_path, monkeypatch):
    computed = []

    def scores(plan, *_):
        """A peak of GM at 0.02, beyond the three that are tried first."""
        assert plan.config.evaluation.split == "validation"
        computed.append(plan.config.schedule.peak)
        gap = abs(np.log(plan.config.schedule.peak / 0.02))
        return {"A_KA": 50 - gap, "A_ZS": 50.0, "GM": 50 - gap}

    monkeypatch.setattr(tuning, "_scores_of", scores)
    doubled = (0.0008, 0.0024, 0.0072, 0.0072)
    for peaks in ((), doubled):
        computed.clear()
        table = tuning.tune(made.folder, root / "y-month", folder=tmp_path / "tune", peaks=peaks)
    assert table["peak"].tolist() == [0.0008, 0.0024, 0.0072, 0.0216, 0.0648]
    assert table.loc[table["is_best"], "peak"].tolist() == [0.0216]
    assert len(computed) == 5
    assert tuning.write_choice(table, tmp_path / "choice.yaml") == 0.0216
    settings = {"mixture": {"update": 0.5}, "schedule": {"name": "cosine", "peak": 0.1}}
    tuning.write_choice(table, tmp_path / "choice.yaml", settings)
    chosen = {"mixture": {"update": 0.5}, "schedule": {"name": "cosine", "peak": 0.0216}}
    assert read_yaml(tmp_path / "choice.yaml") == chosen


def test_a_plan_at_another_peak_is_the_one_that_is_planned_with_it(made, root):
    """So that `cmpt tune` plans once, and what it has computed is found again."""
    plan = plan_second(made, root).with_peak(0.003)
    planned = plan_second(made, root, "schedule.peak=0.003")
    assert (plan.id, plan.config, plan.fitted) == (planned.id, planned.config, planned.fitted)
    assert plan.notes == planned.notes


def test_tuning_says_what_its_choice_rests_on_and_what_comes_next(
    made, root, tmp_path, monkeypatch
):
    plan = plan_second(made, root).on_validation()
    [scored] = evaluation.make_test_sets(plan.corpus, "validation", None)
    seen = []

    def tune(*given, observer, **others):
        seen.append(others)
        observer(plan)
        return pd.DataFrame({"peak": [0.001], "A_KA": [50.0], "is_best": [True]})

    monkeypatch.setattr(tuning, "tune", tune)
    machine = ("--threads", 2, "--device", "cpu", "--micro-batch", 4, "--compile")
    given = (made.folder, "--data", root / "y-month", "--gone", "skip", *machine)
    done = invoke("tune", *given, "-o", tmp_path / "own choice.yaml")
    count = len(scored.rows)
    words = (
        f"A_KA rests on {count} images, where one is worth {100 / count:.1f} points; differences"
    )
    assert count > 1 and words in done.stdout, done.output
    assert f"with --settings '{tmp_path}/own choice.yaml'" in done.stdout
    begin = ("--start", months.START, "--data", root / "z-month", "--pool", root / "pool")
    begin += ("--retain", root / "pool", "--prompt", "my{}", "--moved", "a=b")
    done = invoke("tune", "schedule.peak=0.1", *begin, "-o", tmp_path / "own.yaml")
    assert done.exit_code == 0, done.output
    pool = str(root / "pool")
    assert read_yaml(tmp_path / "own.yaml") == {"schedule": {"peak": 0.001}}
    own = {"pool": pool, "retain": [Path(pool)], "prompt": "my{}", "moved": {"a": "b"}}
    without = {"pool": None, "retain": [], "prompt": "", "moved": {}}
    for others, pictures in zip(seen, (without | {"skip_gone": True}, own), strict=True):
        assert others == others | pictures
    (tmp_path / "team.yaml").write_text("{mixture: {update: 0.5}, training: {passes: 3}}")
    given = ("training.passes=4", "--settings", tmp_path / "team.yaml", *begin)
    done = invoke("tune", *given, "-o", tmp_path / "own.yaml")
    chosen = {"mixture": {"update": 0.5}, "training": {"passes": 4}, "schedule": {"peak": 0.001}}
    assert read_yaml(tmp_path / "own.yaml") == chosen
    assert "team.yaml" not in done.stdout  # the choice has its settings


@pytest.mark.defect
@pytest.mark.parametrize("kind", ["gate", "link"])
def test_tuning_replaces_only_a_file_of_its_own(made, root, tmp_path, monkeypatch, kind):
    """Known before hours of computing."""
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("was begun"))
    out = tmp_path / "gate.yaml"
    if kind == "gate":
        out.write_text("A_ZS: {drop: 2}\n")
    else:
        tuning.write_choice(pd.DataFrame({"peak": [0.1], "is_best": [True]}), tmp_path / "x.yaml")
        out.symlink_to(tmp_path / "x.yaml")
    before = out.read_bytes()
    error = invoke("tune", made.folder, "--data", root / "y-month", "-o", out).exception
    assert isinstance(error, CmpError) and str(error).startswith(f"{out}: already exists")
    assert out.read_bytes() == before


def test_an_update_of_which_nothing_could_be_scored_is_refused(tmp_path):
    tree(tmp_path, {f"train/{name}/{n}.png": picture(n) for name in ("cup", "pen") for n in (0, 1)})
    with pytest.raises(CmpError, match=r"in the split 'test', so nothing .*--retain"):
        plan_update(months.START, tmp_path, months.SMALL)
