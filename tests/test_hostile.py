"""Files, names and records that were made to do harm, or do it by accident."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tarfile
import time
from types import SimpleNamespace

import months
import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import classes, fileset, picture, tar, tree
from typer.testing import CliRunner

from cmp import cli, models, parsing, starts
from cmp.cli import shared
from cmp.cli.updates import _score_line
from cmp.errors import CmpError, Diverged
from cmp.files import atomic_folder, check_digest, file_digest
from cmp.parsing import parse_yaml
from cmp.readers import collection, folders, infer, tables, tars
from cmp.releases import (
    candidates,
    compare,
    exports,
    gate,
    hugging_face,
    release,
    templates,
    tuning,
    update,
    update_plan,
)
from cmp.runs import checkpoints, logs
from cmp.runs.identity import json_digest
from cmp.runs.runner import Observer, execute
from lab.evidence import planner

ONE_STEP = ["training.task_steps=[1]"]


pytestmark = pytest.mark.usefixtures("build")


@pytest.fixture(scope="module")
def releases(root, tmp_path_factory):
    """Releases of the two first months, which no test changes."""
    folder = tmp_path_factory.mktemp("releases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(folder / "build"))
        settings = [*months.SMALL, *ONE_STEP]
        plan = update_plan.plan_update(months.START, root / "z-month", settings, pool=root / "pool")
        made = update.compute_update(plan, folder / "1")
        plan = update_plan.plan_update(made, root / "y-month", ONE_STEP)
        update.compute_update(plan, folder / "2")
    return folder


@pytest.fixture
def plan_from(releases):
    """Plan an update of one step after a release, by its number or folder."""

    def plan(parent, data, **given):
        return update_plan.plan_update(releases / parent, data, ONE_STEP, **given)

    return plan


@pytest.fixture
def plan(plan_from, root):
    """An update after the second release."""
    return plan_from("2", root / "x-month")


def invoke(*arguments):
    """Call the command line, and return its error, if any."""
    return CliRunner().invoke(cli.app, [*map(str, arguments)]).exception


def craft(source, target, change):
    """Copy a release, and change its record so that its own hash is right."""
    shutil.copytree(source, target)
    path = target / release.RECORD_FILE
    tree = json.loads(path.read_text())
    change(tree["record"])
    tree["sha256"] = json_digest(tree["record"])
    path.write_text(json.dumps(tree))
    return target


def test_an_update_goes_on_from_a_release_of_links(releases, plan_from, root, tmp_path):
    """As a hub's cache has them, relative to each link."""
    parent = tmp_path / "snapshots" / "2"
    for path in (path for path in (releases / "2").rglob("*") if path.is_file()):
        link = parent / path.relative_to(releases / "2")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
    made = update.compute_update(plan_from(parent, root / "x-month"), tmp_path / "deep" / "r" / "3")
    assert made.path(release.START_FILE).read_bytes() and made.has_state
    (made.folder / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        release.write_record(made.folder, made.record)


@pytest.mark.parametrize("name", [release.WEIGHTS_FILE, release.START_FILE])
def test_weights_of_a_release_are_checked_where_they_are_named_as_a_file(releases, tmp_path, name):
    path = shutil.copytree(releases / "2", tmp_path / "r") / name
    before = candidates.find_candidate(f"tiny:{path}").network.state_dict()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the last bits of a number
    path.write_bytes(content)
    with pytest.raises(CmpError, match=rf"{name}: damaged: its hash .* stream\.json; get the rel"):
        candidates.find_candidate(f"tiny:{path}")
    away = path.rename(tmp_path / "own.safetensors")  # without the record that says otherwise
    after = candidates.find_candidate(f"tiny:{away}").network.state_dict()
    assert [*after] == [*before]
    record, path = tmp_path / "r" / release.RECORD_FILE, away.rename(path)
    record.write_text("{}")
    with pytest.raises(CmpError, match=r"stream\.json: cannot be read"):
        candidates.find_candidate(f"tiny:{path}")
    record.write_text('["oak+++leaf"]')  # a stream of the reference
    candidates.find_candidate(f"tiny:{path}")


def test_a_record_of_a_gigabyte_is_not_read(releases, tmp_path):
    folder = shutil.copytree(releases / "1", tmp_path / "r")
    os.truncate(folder / release.RECORD_FILE, 2**30)
    for read in (release.read_release, lambda x: starts.check_recorded(x / release.WEIGHTS_FILE)):
        with pytest.raises(CmpError, match=r"stream\.json: cannot be read \(not a .* at most 16,"):
            read(folder)


def test_the_state_of_a_release_is_no_other_file(releases, tmp_path):
    """`slim` would delete the weights that are served."""
    served = {"state": release.WEIGHTS_FILE}
    folder = craft(releases / "2", tmp_path / "r", lambda record: record.update(served))
    with pytest.raises(CmpError, match=r"state: .* is not the file of a state"):
        release.slim(folder)
    assert (folder / release.WEIGHTS_FILE).exists()


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("form", ["{0}", "../{1}", "state/../../{1}"])
def test_a_record_names_no_file_outside_the_release(releases, tmp_path, form, is_listed):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    name = form.format(victim, victim.name)

    def change(record):
        files = record["files"] | ({name: "0" * 64} if is_listed else {})
        record |= {"state": name, "files": files}

    folder = craft(releases / "2", tmp_path / "r", change)
    with pytest.raises(CmpError, match=r"stream\.json: cannot be read \((state|files): '.*from"):
        release.slim(folder)
    assert victim.read_text() == "mine"


def test_slim_deletes_nothing_behind_a_link(releases, tmp_path):
    shutil.copytree(releases / "2", tmp_path / "r")
    mine = (tmp_path / "r" / "state").rename(tmp_path / "mine")
    (tmp_path / "r" / "state").symlink_to(mine)
    before = sorted(mine.iterdir())
    with pytest.raises(CmpError, match="state: is a link to another folder"):
        release.slim(tmp_path / "r")
    assert sorted(mine.iterdir()) == before


def test_a_folder_that_appears_while_an_update_trains_is_kept(plan, tmp_path):
    out = tmp_path / "r"

    def write_notes(*_):
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(CmpError, match="already exists; move it away"):
        update.compute_update(plan, out, Observer(step=write_notes))
    assert (out / "notes.txt").read_text() == "mine"
    out.rename(tmp_path / "notes")
    steps = []
    update.compute_update(plan, out, Observer(step=lambda *given: steps.append(given)))
    assert not steps and release.is_release(out)  # what was trained was not lost


def test_a_link_to_nothing_and_boards_inside_are_refused_before_training(plan, tmp_path):
    def train(*_):
        raise AssertionError

    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(CmpError, match="link: already exists"):
        update.compute_update(plan, link, Observer(step=train))
    for inside in ("r", "r/board", "x/../r/board"):
        boards = {"tensorboard": str(tmp_path / inside)}
        with pytest.raises(CmpError, match=r"--tensorboard: .* is inside"):
            update.compute_update(plan, tmp_path / "r", Observer(step=train), boards=boards)
    assert not (tmp_path / "r").exists()


def test_a_folder_is_not_replaced_where_that_is_asked(tmp_path):
    """Not even one that appears while the new one is written."""
    out = tmp_path / "new"
    with pytest.raises(CmpError, match="new: already exists"), atomic_folder(out, replace=False):
        tree(out, {"mine": b""})
    with pytest.raises(CmpError, match="new: already exists"), atomic_folder(out, replace=False):
        pytest.fail("was begun")
    assert [*tmp_path.rglob("*")] == [out, out / "mine"]


@pytest.mark.parametrize("change", ["none", "weights", "no record", "own record", "pipe"])
def test_an_export_replaces_only_what_an_export_wrote(tmp_path, change):
    """A model that others saved has the same names, and may be saved over an export."""
    out, record = tmp_path / "model", tmp_path / "model" / exports.EXPORT_FILE

    def export():
        with exports.export_folder(out, hugging_face.FILES) as partial:
            (partial / "model.safetensors").write_text("exported")
        return file_digest(out / "model.safetensors")

    first = export()
    if change == "none":
        (out / ".DS_Store").write_text("written by a Mac that looked at it")
        assert export() == first
        return
    lost = exports.EXPORT_FILE if change in ("own record", "pipe") else "model.safetensors"
    if change == "pipe":  # which would never end
        record.unlink()
        os.mkfifo(record)
        with pytest.raises(CmpError, match="is not from it"):
            export()
        return
    if change == "weights":
        (out / lost).write_text("trained for a week")
    elif change == "no record":  # as `save_pretrained` writes a folder
        record.unlink()
    else:
        record.write_text("[1]")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CmpError, match=rf"model: '{lost}' has changed since `cmpt export`"):
        export()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_replaces_only_files_of_an_export(tmp_path):
    out, thesis = tmp_path / "model", tmp_path / "model/config.json/thesis.txt"
    tree(thesis.parent, {thesis.name: b"mine"})

    def export(write=lambda: None):
        with exports.export_folder(out, hugging_face.FILES):
            write()

    with pytest.raises(
        CmpError, match=r"model: 'config\.json' has changed since .* or is not from it"
    ):
        export()
    assert thesis.read_text() == "mine"
    shutil.rmtree(out)
    out.mkdir()
    (out / "config.json").symlink_to(tree(tmp_path, {"paper.txt": b"mine"}) / "paper.txt")
    with pytest.raises(CmpError, match=r"'config\.json' .* is not from it"):
        export()
    (out / "config.json").unlink()
    thesis = out / "thesis.txt"  # which appears while the export is written
    with pytest.raises(CmpError, match=r"'thesis\.txt' .* is not from it"):
        export(lambda: thesis.write_text("mine"))
    assert thesis.read_text() == "mine"


def test_a_page_is_not_written_into_a_release(releases, tmp_path):
    made = shutil.copytree(releases / "2", tmp_path / "2")
    for name in ("report.html", "state/page.html"):
        error = invoke("compare", releases / "1", made, "--subset", 2, "--report", made / name)
        assert isinstance(error, CmpError) and "is inside the release" in str(error)
    weights = made / "open_clip_model.safetensors"
    before = weights.read_bytes()
    for command in ("merge interpolation", f"export {made}"):
        given = [weights] * 2 if command.startswith("merge") else []
        error = invoke(*command.split(), *given, "-o", weights)
        assert isinstance(error, CmpError) and "is inside the release" in str(error)
    (tmp_path / "link").symlink_to(made / "state")
    error = invoke("export", releases / "1", "-o", tmp_path / "link" / "new.safetensors")
    assert isinstance(error, CmpError) and f"inside the release {made}" in str(error)
    assert weights.read_bytes() == before
    assert release.read_release(made).path(release.REPORT_FILE)


def month(folder, rows, **manifest):
    """A folder with a table of (seed of a picture, label, split), and a manifest if it is given."""
    frame = pd.DataFrame(
        [(f"{folder.name}{n}.png", *row[1:]) for n, row in enumerate(rows)],
        columns=["filepath", "label", "split"],
    )
    tree(folder, {f"{folder.name}{n}.png": picture(row[0]) for n, row in enumerate(rows)})
    frame.to_csv(folder / "t.csv", index=False)
    if manifest:
        reader = {"kind": "csv", "path": "t.csv", "label": "label", "split": "split"}
        about = {"title": "x", "prompt": "{}", "licence": "own", "reader": reader} | manifest
        (folder / "manifest.yaml").write_text(json.dumps(about))
    return folder


def some_rows(seed, label="ring"):
    return [(seed + n, label, ("train", "test")[n % 2]) for n in range(4)]


def test_a_set_has_one_role(plan_from, root, tmp_path):
    named = [month(tmp_path / f"{n}", some_rows(900 + 10 * n), name=name, role=role)
             for n, (name, role) in enumerate(
                 [("catalogue", "eval"), ("catalogue", "pool"), ("pool", "eval")])]  # fmt: skip
    given = {"retain": [named[0]]}, {"pool": named[1]}, {"retain": [named[2]]}
    for pictures in given:
        [option] = pictures
        with pytest.raises(CmpError, match=rf"--{option}: .*: name: '.*' is .* given by .*manif"):
            plan_from("2", root / "x-month", **pictures)
    with pytest.raises(CmpError, match=r"--data: .*'catalogue' is .* by --retain; write a manif"):
        update_plan.plan_update(months.START, root / "x-month", months.SMALL, **given[0])


def test_images_that_were_trained_on_are_never_scored(plan_from, root, tmp_path):
    """Not even if they are gone, or their pool is replaced, and they come back for tests."""
    own, kept = month(tmp_path / "own", some_rows(500)), month(tmp_path / "kept", some_rows(600))
    second = update.compute_update(plan_from("1", own, retain=[kept]), tmp_path / "2").folder
    for name in ("own0.png", "own1.png"):
        (own / name).unlink()
    shutil.rmtree(kept)
    plan = plan_from(second, root / "y-month", skip_gone=True)
    third = update.compute_update(plan, tmp_path / "3").folder
    rows = [(500, "ring", "test"), (601, "ring", "test"), *some_rows(700)]
    plan = plan_from(third, month(tmp_path / "again", rows))
    arrived = plan.ledger.pictures.set_index("source")["split"].filter(like="again").to_dict()
    assert (arrived["again0.png"], arrived["again1.png"]) == ("train", "test")

    old = sorted((root / "pool").rglob("*.png"))[0]
    back = month(tmp_path / "back", some_rows(800))
    shutil.copy(old, back / "back1.png")
    other = month(tmp_path / "other", some_rows(850))
    plan = plan_from(third, back, pool=other)
    assert [x.split for x in months.pictures_in(plan.ledger, source="back1.png")] == ["train"]


@pytest.mark.parametrize(("third", "shown"), [("3 1 a", "3 1 a"), ("3 b", "b")])
def test_updates_have_different_names_whatever_they_are_called(third, shown):
    updates = ["1 a", "2 a", third]
    corpus = SimpleNamespace(table=pd.DataFrame({"update": pd.Categorical(updates)}))
    assert [*compare.shown_updates(corpus).values()] == ["1 a", "2 a", shown]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("0x5", "0x5"), ("0b1", "0b1"),
        ("1_000", "1_000"), ("no", "no"), ("On", "On"), ("2026-01-15", "2026-01-15"), ("=", "="),
        ("~", None), ("", None), ("True", True), ("false", False), ("-5", -5), ("0", 0),
        ("1e-3", 1e-3), ("+.5", 0.5), ("5.", 5.0), ("-.inf", -math.inf),
        (r'"\ud83d\ude00"', "\U0001f600"), (r'"\ud83d"', "\ud83d"),
    ],
)  # fmt: skip
def test_plain_words_of_yaml_are_what_json_would_read(text, value):
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_numbers_of_yaml_take_no_time():
    long = "1" + ":1" * 200_000
    started = time.process_time()
    assert parse_yaml(f"a: {long}") == {"a": long}
    with pytest.raises(ValueError, match="aliases and tags are not allowed"):
        parse_yaml(f"a: !!int {long}")
    assert time.process_time() - started < 5


def test_a_gate_names_an_update_by_a_number_or_a_day(tmp_path):
    path = tmp_path / "gate.yaml"
    path.write_text("updates: {010: {drop: 1}, 2026-01-15: {drop: 2}}")
    assert {*gate.read_gate(path).updates} == {"010", "2026-01-15"}


def test_a_log_of_another_update_stops_nothing(plan, tmp_path):
    """A killed process may leave it without a checkpoint, and of a longer stream."""
    work = update.working_folder(tmp_path / "r")
    work.mkdir()
    lines = b'{"task":0,"step":0,"loss":7.5}\n{"done":9}\n{"task":8,"step":0,"loss":1.5}\n'
    (work / release.LOG_FILE).write_bytes(lines)
    made = update.compute_update(plan, tmp_path / "r")
    log = logs.read_log(made.path(release.LOG_FILE))
    assert set(log["task"].dropna()) == {2} and 7.5 not in set(log["loss"])


def test_a_peak_that_diverges_has_no_score_and_is_tried_once(releases, root, tmp_path, monkeypatch):
    tried, train = [], tuning.train_update

    def train_update(plan, *given):
        peak = plan.config.schedule.peak
        tried.append(peak)
        if peak > limit:
            raise Diverged("the loss is not finite", {})
        return train(plan, *given)

    monkeypatch.setattr(tuning, "train_update", train_update)
    limit, rows = 0.005, []
    given = releases / "1", root / "x-month", ONE_STEP
    places = {"folder": tmp_path / "t", "peaks": [0.001, 0.004, 0.016]}
    table = tuning.tune(*given, on_row=rows.append, **places)
    assert table["A_KA"].isna().tolist() == [False] * (len(table) - 1) + [True]
    assert max(table["peak"]) == 0.016 and table["is_best"].sum() == 1
    assert _score_line(rows[2]) == "peak 0.016: training diverged"
    assert tuning.write_choice(table, tmp_path / "t.yaml") < limit
    count = len(tried)
    pd.testing.assert_frame_equal(tuning.tune(*given, **places), table)
    assert len(tried) == count
    limit = 0.0
    with pytest.raises(CmpError, match=r"diverged at each peak \(0\.002\); give lower --peaks"):
        tuning.tune(*given, folder=tmp_path / "u", peaks=[0.002])


def test_a_comparison_finds_images_that_moved_or_are_gone(root, releases, plan_from, tmp_path):
    """Also those of a folder with an equals sign."""
    own = month(tmp_path / "month=02", some_rows(400))
    made = update.compute_update(plan_from("1", own), tmp_path / "2").folder
    moved = own.rename(tmp_path / "new=place")
    usual = "compare", releases / "1", made, "--subset", 2
    assert "--moved OLD=NEW" in str(invoke(*usual))
    assert not invoke(*usual, "--moved", f"{own}={moved}")
    assert not invoke(*usual, "--gone", "skip")
    assert not invoke(
        "update", made, "--data", root / "y-month", "-o", tmp_path / "3", "--dry-run",
        "--moved", f"{own}={moved}", *ONE_STEP,
    )  # fmt: skip
    error = invoke("compare", "tiny", "tiny", "--gone", "skip")
    assert isinstance(error, CmpError) and "work only if OLD or NEW is a release" in str(error)


def test_a_table_may_have_any_name_in_utf_8(plan_from, tmp_path):
    own = month(tmp_path / "m", some_rows(310))
    path = own / "t.csv"
    for name in ("\U0001f4f7", "a\x7f\n\u2028b"):
        path = path.rename(own / f"{name}.csv")
        assert plan_from("1", own).report.new
    path = path.rename(own / "x\udcff.csv")
    with pytest.raises(CmpError, match=r"--data: .* has a name that is not UTF-8"):
        plan_from("1", own)
    path.rename(own / "t.csv")
    with pytest.raises(CmpError, match=r"--name: .* is not UTF-8"):
        plan_from("1", own, name="x\udcff")
    with pytest.raises(CmpError, match=r"--data: .* is not UTF-8"):
        plan_from("1", own.rename(tmp_path / "m\udcff"))
    error = invoke("data", "check", tmp_path / "m\udcff")
    assert isinstance(error, CmpError) and "is not UTF-8" in str(error)


def test_a_release_whose_name_could_not_be_stored_is_refused_before_training(plan, tmp_path):
    with pytest.raises(CmpError, match=r"--out: .* is not UTF-8"):
        update.check_folder(plan, tmp_path / "m\udcff" / "r")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"updates": []}, "updates: "), ({"arrivals": [{"x": 1}]}, r"0\.x: unknown key"),
        ({"sets": [{"root": "."}]}, "name is missing"),
        ({"sets": [{"root": ".", "name": "x"}]}, "title: "),
        ({"root": 5}, "must be the path"), ({"root": None}, "must be the path"),
        ({"root": ["x"]}, "must be the path"), ({"root": "a\0b"}, "must be the path"),
        ({"folder": "a\0b"}, "must be the path"), ({"name": "a\nb"}, "one line"),
        ({"steps": -5}, "greater than or equal to 0"), ({"prompt": "{} {}"}, "exactly one"),
    ],
)  # fmt: skip
def test_a_record_with_other_keys_is_refused(releases, tmp_path, change, words):
    def replace(record):
        arrival, done = record["arrivals"][0], record["updates"][0]
        parts = arrival, done, record, arrival["sets"][0]
        next(part for part in parts if {*change} <= part.keys()).update(change)

    folder = craft(releases / "2", tmp_path / "r", replace)
    with pytest.raises(CmpError, match=rf"stream\.json: cannot be read \(.*{words}.*get the rel"):
        release.read_release(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"x": 1}, {"arrival": 9}, {"split": "evil"}, {"set": "other"}, {"label": 5}, None,
        {"captions": "abc"}, {"captions": [1, 2]}, {"captions": None}, {"label": None},
        {"digest": "x"}, {"digest": None}, {"look": 0.5}, {"source": "a\0b"},
    ],
)  # fmt: skip
def test_a_ledger_with_other_rows_is_refused(releases, tmp_path, change):
    def replace(record):
        path = tmp_path / "r" / release.LEDGER_FILE
        rows = pq.read_table(path).to_pylist()
        path.unlink()
        if change:
            pq.write_table(pa.Table.from_pylist([row | change for row in rows]), path)
        else:
            path.write_bytes(b"no table")
        record["files"][release.LEDGER_FILE] = file_digest(path)

    folder = craft(releases / "2", tmp_path / "r", replace)
    with pytest.raises(CmpError, match=r"pictures\.parquet: cannot be read .*get the release"):
        release.read_release(folder).ledger()


def test_a_state_of_another_network_is_refused(releases, plan, tmp_path):
    """A checkpoint of an update, and the state of its parent; the hashes are right."""
    progress = release.read_release(releases / "2").state().progress
    progress = dataclasses.replace(progress, run=plan.id)
    made = checkpoints.RunState(progress, {"weights/x": torch.zeros(1)})
    checkpoints.write_checkpoint(made, update.working_folder(tmp_path / "r"))
    with pytest.raises(CmpError, match=r"does not fit.*; delete"):
        update.compute_update(plan, tmp_path / "r")
    with pytest.raises(CmpError, match=r"does not fit.*; delete"):
        execute(plan.config, plan.corpus, fitted=plan.fitted, start=made)


EVIL = "<img src=x>\n\n# Forged\n\n| A_KA | 99 | \x1b[31m [x](y) \\<b> `a` \u2028"


def test_a_card_shows_the_texts_of_users_as_they_are(plan_from, tmp_path):
    rows = [(200, EVIL, "train"), (201, EVIL, "train"), *some_rows(202)]
    plan = plan_from("1", month(tmp_path / "m", rows), name="u <script> | a")
    text = update.compute_update(plan, tmp_path / "r").path(release.CARD_FILE).read_text()
    text = text.partition("## Scores")[2]
    assert "# Forged" not in text.splitlines() and "\x1b" not in text
    for mark in ("<img", "<script", "[x]", "<b>"):
        places = [place for place in range(len(text)) if text.startswith(mark, place)]
        assert places
        for place in places:
            slashes = len(text[:place]) - len(text[:place].rstrip("\\"))
            assert slashes % 2 == 1, text[place - 20 : place + 20]
    table = templates.markdown_table(pd.DataFrame({"set": [EVIL, "a"]}))
    assert len(table.splitlines()) == 4 and templates.code_span("w[1]\n`b") == "w[1] 'b"


def test_names_of_updates_and_prompts_are_one_line(releases, plan_from, tmp_path):
    own = month(tmp_path / "m", some_rows(260))
    with pytest.raises(CmpError, match=r"--name: .* must be one line"):
        plan_from("1", own, name="a\n# b")
    with pytest.raises(CmpError, match=r"--prompt: .* must be one line"):
        update_plan.plan_update(months.START, own, months.SMALL, prompt="a {}\x1b[2J")

    def rename(record):
        record["updates"][0]["name"] = "a\x1b[2J"

    with pytest.raises(CmpError, match=r"updates\.0\.name: .* must be one line"):
        release.read_release(craft(releases / "2", tmp_path / "r", rename))


def test_a_terminal_is_not_steered_by_names(capsys):
    steering = "\x1b]0;owned\x07\x1b[2Jx\x9b1m\u202e"
    shared.print_table(("a",), [(steering,)], steering)
    cli.complain(CmpError(steering))
    shown = "".join(capsys.readouterr())
    assert not {*steering} - {*"]0;owned[2Jx1m"} & {*shown} and shown.count("owned") == 3


def test_a_plan_is_what_its_model_is_called(monkeypatch):
    given = "small", 2, None, 0.01, None, "core", "balance", None, False, None, None
    plan = planner.make_plan(planner.PlanRequest(*given))
    for line in ("\x85", "\u2028"):
        words = f"a{line}training: {{steps: 1}}"
        monkeypatch.setattr(planner, "plan_summary", lambda plan, words=words: words)
        assert parse_yaml(planner.plan_as_yaml(plan)) == plan.tree


@pytest.mark.parametrize("kind", ["pipe", "endless link", "link out"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_only_a_file_of_the_folder_is_looked_at_as_a_table(tmp_path, kind, ending, monkeypatch):
    def read(path, **_):
        raise AssertionError(path)  # it would never end

    monkeypatch.setattr(infer, "read_csv", read)
    monkeypatch.setattr(infer, "read_jsonl", read)
    monkeypatch.setattr(infer.pq, "read_schema", read)
    root, path = classes(tmp_path / "p"), tmp_path / "p" / f"t.{ending}"
    (tmp_path / "t").write_text("filepath,label")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "endless link" else tmp_path / "t")
    text, _, [sentence] = infer.describe_folder(root, "adapt")
    assert '"kind": "folder"' in text and sentence.startswith(f"{path}: not used: ")


def test_very_deep_folders_are_listed_in_order(tmp_path, monkeypatch):
    here = tmp_path / "p"
    tree(here, {"a.png": b"", "b/c.png": b"", "b.png": b"", ".x/y.png": b"", "b/a/z.png": b""})
    assert [*folders.walk_files(here)] == ["a.png", "b/a/z.png", "b/c.png", "b.png"]
    monkeypatch.chdir(here)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    try:
        assert len([*folders.walk_files(here)]) == 4
    finally:  # what deletes the folder later may not go so deep
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")


def test_a_tar_ends(tmp_path, monkeypatch):
    tar(tmp_path / "t.tar", [("0.png", picture(1)), ("0.cls", b"ring"), ("1.png", picture(2))])
    content = bytearray((tmp_path / "t.tar").read_bytes())
    place = content.index(b"1.png")
    content[place + 124 : place + 136] = b"\xff" + (-1024 % 2**88).to_bytes(11, "big")
    content[place + 148 : place + 156] = b"        "
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(CmpError, match=r"t\.tar: cannot be read .*1\.png: its size is below zero"):
        list(tars.tar_members(tmp_path / "t.tar", []))
    for error, words in ((MemoryError(), "MemoryError"), (RecursionError("too deep"), "too deep")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(tarfile.TarFile, "next", fail)
        with pytest.raises(CmpError, match=rf"t\.tar: cannot be read .*{words}"):
            list(tars.tar_members(tmp_path / "t.tar", []))


def test_a_table_that_is_small_on_disk_and_large_in_memory_is_refused(tmp_path, monkeypatch):
    images = [{"bytes": picture(n), "path": "x"} for n in range(4)]
    table = pa.table({"image": images, "label": ["a", "b"] * 2, "other": [b"0" * 9000] * 4})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, write_statistics=False)
    reader = {"path": "t.parquet", "image": "image", "label": "label"}
    dataset = fileset("parquet", name="x", reader=reader)
    size = sum(map(len, (picture(n) for n in range(4))))
    # a column that is not read does not count
    monkeypatch.setattr(parsing, "MAX_GROUP_BYTES", size + 1000)
    assert len(collection.read_index(dataset, tmp_path).table) == 4
    monkeypatch.setattr(parsing, "MAX_GROUP_BYTES", size - 1)
    with pytest.raises(CmpError, match=r"t\.parquet: cannot be read .*image: .* in memory.*split "):
        collection.read_index(dataset, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(tables, "MAX_ROWS", 3)
    with pytest.raises(CmpError, match=r"t\.parquet: has 4 rows, but at most 3"):
        collection.read_index(dataset, tmp_path)


def read_limited(dataset, root, answer):
    """Read a dataset in a process that may use ten seconds of processor time."""
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    began, words = time.process_time(), ""
    try:
        collection.read_index(dataset, root)
    except CmpError as error:
        words = str(error)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    answer.send((words, time.process_time() - began, (peaks[1] - peaks[0]) * 1024))


@pytest.mark.parametrize(
    ("column", "rows", "value", "words"),
    [
        ("image", 5_000_000, "a/b.png", "has 5,000,000 rows, .* at most 1,000,000 .*; split it"),
        ("image", 900_000, "a/b.png", "900,000 rows have the image 'a/b.png', .* at most 1,000 "),
        ("caption", 100, "x" * 10**7, "caption: 1,000,000,000 bytes in memory, .*; split the"),
        ("image", 15, bytes(10**8), "image: 100,.* bytes in memory, .*; split the file"),
        ("image", 9, bytes(5 * 10**7), "image: 450,000,000 bytes in memory, .*; split the file"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="a peak of memory is in kilobytes")
def test_a_table_made_to_be_large_is_refused_at_once(tmp_path, column, rows, value, words):
    once = {"image": "a.png", "caption": "x", column: value}
    table = {
        name: pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [each])
        for name, each in once.items()
    }
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(table), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 50_000
    dataset = fileset("parquet", name="x", reader={"path": "t.parquet"} | {x: x for x in once})
    mine, answer = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=read_limited, args=(dataset, tmp_path, answer)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    said, seconds, taken = mine.recv()
    assert re.search(rf"t\.parquet: .*{words}", said)
    assert seconds < 2 and taken < 300e6


@pytest.mark.parametrize(
    "form", ["label", "category", "captions", "nested categories", "images", "categories of images"]
)
def test_a_value_that_a_table_holds_once_counts_in_each_row(tmp_path, monkeypatch, form):
    """A page may contain a value once for a million rows."""
    classes(tmp_path)
    [label, caption, image] = [f"oak {'x' * 9000}"], ["a tree"], ["oak/0.png"]
    if "images" in form:
        [label, image] = ["oak"], [picture(1, (64, 64))]
    once = {"label": label, "caption": caption, "image": image}
    table = pa.table({key: pa.array(x * 99).dictionary_encode() for key, x in once.items()})
    if "categor" not in form:  # each row has the value, and only its page has it once
        table = table.cast(pa.schema([(x.name, x.type.value_type) for x in table.schema]))
    if form in ("captions", "nested categories"):
        lists = pa.ListArray.from_arrays(range(100), table["label"].combine_chunks())
        table = table.set_column(1, "caption", lists).set_column(0, "label", pa.array(["oak"] * 99))
    pq.write_table(table, tmp_path / "t.parquet")
    monkeypatch.setattr(parsing, "SMALL_COLUMN", 200_000)
    monkeypatch.setattr(parsing, "MAX_GROWTH", 10)
    dataset = fileset(
        "parquet", name="x", reader={"path": "t.parquet"} | {key: key for key in once}
    )
    assert (tmp_path / "t.parquet").stat().st_size < 20_000
    with pytest.raises(CmpError, match=r"t\.parquet: cannot be read .*at most 200,000"):
        collection.read_index(dataset, tmp_path)


def test_the_tables_of_a_release_are_not_larger_in_memory_than_allowed(releases, monkeypatch):
    made = release.read_release(releases / "2")
    before = made.ledger()
    largest = max(x.nbytes for x in pq.read_table(made.path(release.LEDGER_FILE)).columns)
    monkeypatch.setattr(parsing, "MAX_GROUP_BYTES", 2 * largest)
    assert made.ledger().digest() == before.digest()
    monkeypatch.setattr(parsing, "MAX_GROUP_BYTES", largest // 2)
    with pytest.raises(CmpError, match=r"pictures\.parquet: cannot be read .* in memory"):
        made.ledger()


@pytest.mark.parametrize("config", ["{", "[]", '{"model_cfg": 5}', None])
def test_a_model_whose_config_cannot_be_read_is_named(root, tmp_path, config):
    folder = tmp_path / "model"
    folder.mkdir()
    if config:
        (folder / "open_clip_config.json").write_text(config)
    with pytest.raises(CmpError, match=r"^model\.name: local-dir:.*; check the name"):
        update_plan.plan_update(f"local-dir:{folder}", root / "x-month")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            {"tokenizer_kwargs": {"clean": "lower", "trust_remote_code": True}},
            "'trust_remote_code'",
        ),
        ({"tokenizer_kwargs": ["trust_remote_code"]}, ""),
        ([{"tokenizer_kwargs": {"trust_remote_code": True}}], ""),
        ({"layers": 1e9}, "more than 999 layers"),
    ],
)
def test_the_config_of_a_foreign_model_runs_no_code(tmp_path, monkeypatch, text, words):
    about = json.dumps({"model_cfg": {"text_cfg": text}})
    (tmp_path / "open_clip_config.json").write_text(about)
    monkeypatch.setattr(starts, "_downloaded_config", lambda name: json.loads(about))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: pytest.fail("was read"))
    for name in (f"local-dir:{tmp_path}", "hf-hub:someone/clip"):
        with pytest.raises(CmpError, match=f"its config cannot be read .*{words}"):
            models.tokenizer(name)


def test_only_files_of_a_tokenizer_are_read(tmp_path):
    text = {"hf_tokenizer_name": "words", "tokenizer_kwargs": {"clean": "lower"}}
    about = json.dumps({"model_cfg": {"text_cfg": text}})
    tree(tmp_path, {"open_clip_config.json": about.encode(), "tokenizer/vocab.json": b"{}",
                    "tokenizer.json": b"{}"})  # fmt: skip
    assert [*starts.tokenizer_digests(f"local-dir:{tmp_path}")] == ["tokenizer.json"]


def test_a_list_of_hashes_that_never_ends_is_not_read(tmp_path):
    (tmp_path / "a").write_text("x")
    os.mkfifo(tmp_path / "SHA256SUMS")
    with pytest.raises(CmpError, match=r"a: cannot be checked .*not a regular file.*; get it"):
        check_digest(tmp_path / "a", "get it again")


def test_a_file_whose_metadata_cannot_be_followed_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    model = models.create_model("small")
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, "mean": 0.5}
    models.export_weights(model, path)
    with pytest.raises(CmpError, match=r"x\.safetensors: metadata: preprocess_cfg: .*mean"):
        models.load_from_file("small", path)


def test_a_page_keeps_joined_letters_and_no_reversed_text_or_half_characters():
    """Words of Persian, a family and a flag are kept, which other characters join."""
    joined = "می\u200cخواهم \U0001f468\u200d\U0001f469 \U0001f3f4\U000e0067\U000e0062\U000e007f"
    assert templates.escape_html(f"{joined}\u202e\n\x1b<b>\udcff") == f"{joined} \n &lt;b&gt;"
