"""Updates one at a time: the same bits as a stream at once, and what a ledger keeps apart."""

import json
import shutil
import signal

import months
import numpy as np
import pandas as pd
import pytest
from pictures import classes, picture, tree
from PIL import Image
from typer.testing import CliRunner

from cmp import cli, models
from cmp.errors import CmpError, Interrupted
from cmp.files import file_digest
from cmp.releases import compare, release, tuning, update
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer

QUICK = ("EMA", "infinite", "class-balanced")
"""Settings that every test run compares; `make test-long` compares the others."""
SMALL = ["training.batch=8", "evaluation.full=false", "evaluation.subset=2"]


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))


@pytest.fixture
def root(tmp_path):
    months.write_pictures(tmp_path / "data", 3)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "setting",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in months.SETTINGS],
)
def test_one_at_a_time_ends_in_the_bits_of_all_at_once(root, tmp_path, setting):
    assert months.compare_setting(root, tmp_path / "made", 3, months.SETTINGS[setting]) == []


def first(root, tmp_path, *settings, **pictures):
    """A release of the first month."""
    pictures = {"pool": root / "pool"} | pictures
    plan = update.plan_update(months.START, root / "z-month", [*SMALL, *settings], **pictures)
    return update.compute_update(plan, tmp_path / "releases" / "1")


def test_a_release_holds_what_serves_judges_and_goes_on(root, tmp_path):
    made = first(root, tmp_path)
    names = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*.*")}
    assert names - {"stream.json"} == {*made.record.files}
    assert all(file_digest(made.folder / n) == d for n, d in made.record.files.items())
    again = release.read_release(made.folder)
    assert again.record == made.record and again.config == made.config
    [done] = made.record.updates
    assert done.name == "z-month" and done.id == made.record.id and done.steps >= 10
    assert [x.name for x in made.folder.parent.iterdir()] == ["1"]  # nothing is left beside it


def test_a_release_stands_for_its_folder_and_has_its_data(root, tmp_path):
    made = first(root, tmp_path)
    plan = update.plan_update(made, root / "y-month")
    assert plan.parent and plan.parent.record == made.record
    corpus, count = made.corpus(), len(made.ledger().pictures)
    columns = ["split", "label", "update"]
    known = plan.corpus.table[columns].astype(str)[:count]
    assert len(corpus.table) == count
    assert corpus.table[columns].astype(str).equals(known)
    found = compare.compare(made, str(made.folder), corpus, subset=2)
    assert found.is_same and (found.old, found.new) == ("1", str(made.folder))


def test_what_arrived_between_two_releases_is_new_to_an_index(root, tmp_path):
    made = first(root, tmp_path)
    plan = update.plan_update(made, root / "y-month")
    later = update.compute_update(plan, tmp_path / "releases" / "2")
    corpus = later.corpus()
    found = compare.compare(made, later, corpus).index
    arrived = corpus.table["update"] == "2 y-month"
    assert found.equals(compare.compare(made, later, corpus, arrived=arrived.to_numpy()).index)
    assert not found.equals(compare.compare(made, later, corpus, arrived=["catalogue"]).index)


def test_the_command_compares_two_releases_on_the_pictures_so_far(root, tmp_path, monkeypatch):
    """A set and an update that only the new release has, without a word of where they are."""
    made = first(root, tmp_path)
    later = update.compute_update(
        update.plan_update(made, root / "y-month"), tmp_path / "releases" / "2"
    )
    (tmp_path / "gate.yaml").write_text("sets: {catalogue: {drop: 100, gain: 100}}")
    seen = []
    monkeypatch.setattr("cmp.cli.comparing.print_comparison", seen.append)
    arguments = ["compare", *map(str, (made.folder, later.folder))]
    done = CliRunner().invoke(cli.app, [*arguments, "--gate", str(tmp_path / "gate.yaml")])
    assert done.exit_code == 1 and "1 of 2 limits kept" in done.stdout, done.output
    assert [*seen[0].sets.index] == ["catalogue"] and (seen[0].old, seen[0].new) == ("1", "2")
    assert seen[0].index.equals(compare.compare(made, later, later.corpus()).index)


@pytest.mark.parametrize("size", [5, 13, 200])
def test_months_of_any_size(root, tmp_path, size):
    """A small month takes fewer of its pictures per batch, a first one as well."""
    folder = tmp_path / "month"
    tree(folder, {f"{'ab'[n % 2]}/{n}.png": picture(1000 + n) for n in range(size)})
    plan = update.plan_update(months.START, folder, ["training.batch=64"], pool=root / "pool")
    assert plan.pools.counts[1] <= plan.report.new["train"]
    assert plan.steps >= 10 and 2 <= sum(plan.pools.counts) <= 64
    shown = plan.steps * plan.pools.counts[1] / plan.report.new["train"]
    assert 2 <= shown <= 2 + max(10, plan.pools.counts[1]) / plan.report.new["train"]
    made = first(root, tmp_path)
    plan = update.plan_update(made.folder, folder)
    assert plan.number == 2 and sum(plan.pools.counts) == 8


def test_a_held_out_picture_stays_held_out(root, tmp_path):
    """Also under another name, in another file with the same pixels, and in another class."""
    made = first(root, tmp_path)
    old = made.ledger()
    tests = [x for x in old.pictures if x.split == "test"]
    trained = next(x for x in old.pictures if x.split == "train" and x.set == "catalogue")
    folder = tmp_path / "again"
    for number, held in enumerate(tests[:2]):
        target = folder / "fresh" / f"copy-{number}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(root / "z-month" / held.source).save(target)
    shutil.copy(root / "z-month" / trained.source, folder / "fresh" / "known.png")
    tree(folder, {f"fresh/{n}.png": picture(5000 + n) for n in range(6)})
    plan = update.plan_update(made.folder, folder)
    splits = {x.source: x.split for x in plan.ledger.pictures[len(old.pictures) :]}
    assert splits["fresh/copy-0.bmp"] == splits["fresh/copy-1.bmp"] == "test"
    assert splits["fresh/known.png"] == "train"
    assert plan.report.held_out == 2 and any("held out before" in x for x in plan.notes)


def test_pictures_that_look_like_held_out_ones_are_reported(root, tmp_path):
    """They stay in training: the same look is no proof."""
    made = first(root, tmp_path)
    held = next(x for x in made.ledger().pictures if x.split == "test")
    folder = tmp_path / "near"
    tree(folder, {f"fresh/{n}.png": picture(7000 + n) for n in range(9)})
    near = Image.open(root / "z-month" / held.source)
    near.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "fresh" / "train-larger.png")
    for number in range(20):  # one of these names falls into training
        shutil.copy(folder / "fresh" / "train-larger.png", folder / "fresh" / f"near-{number}.png")
        if update.plan_update(made.folder, folder).report.similar:
            break
    plan = update.plan_update(made.folder, folder)
    assert plan.report.similar and plan.report.held_out == 0
    assert any("look like a held-out picture" in note for note in plan.notes)


def test_a_folder_without_a_manifest_has_the_prompt_that_the_model_is_used_to(root, tmp_path):
    """Or the one that the first update gives; later updates have it, too."""
    assert models.usual_prompt("ViT-B-32") == "a photo of a {}"
    made = first(root, tmp_path)
    (tmp_path / "kept").mkdir()
    classes(tmp_path / "kept", ("red fox",))
    plan = update.plan_update(made.folder, root / "y-month", retain=[tmp_path / "kept"])
    assert {x.captions for x in plan.ledger.pictures if x.label == "red fox"} == {("red fox",)}
    assert plan.corpus.datasets["kept"].prompt == plan.corpus.datasets["catalogue"].prompt == "{}"
    assert 'prompt: "{}" for pool, catalogue, kept' in plan.notes
    own = first(root, tmp_path / "own", prompt="my {}")
    assert own.record.id != made.record.id
    plan = update.plan_update(own.folder, root / "y-month")
    assert {x.captions[0].partition(" ")[0] for x in plan.ledger.pictures} == {"my"}
    with pytest.raises(CmpError, match="--prompt: 'the {}', and 'my {}' so far"):
        update.plan_update(own.folder, root / "y-month", prompt="the {}")
    with pytest.raises(CmpError, match="--prompt: .* exactly one"):
        first(root, tmp_path / "none", prompt="a photo")


def test_a_month_without_a_manifest_joins_the_set_of_the_earlier_ones(root, tmp_path):
    """Which has one prompt, that of its first manifest. Another set may have another one."""
    about = {"name": "shoes", "title": "Shoes", "licence": "own", "role": "adapt"}
    reader = {"kind": "csv", "path": "months.csv", "label": "label", "split": "split"}
    about |= {"prompt": "a shoe, {}", "reader": reader}
    (root / "z-month" / "manifest.yaml").write_text(json.dumps(about))
    made = first(root, tmp_path)
    plan = update.plan_update(made.folder, root / "y-month")
    assert [x for x in plan.corpus.datasets if x != "pool"] == ["shoes"]
    assert plan.corpus.captions(len(plan.ledger.pictures) - 1)[0].startswith("a shoe, ")
    assert 'different prompts: "{}" for pool; "a shoe, {}" for shoes' in plan.notes
    assert "the set shoes will have the pictures of all updates so far" in plan.notes
    manifest = root / "y-month" / "manifest.yaml"
    manifest.write_text(json.dumps(about | {"prompt": "{}"}))
    with pytest.raises(CmpError, match="shoes: prompt: '{}', and 'a shoe, {}' before"):
        update.plan_update(made.folder, root / "y-month")
    manifest.write_text(json.dumps(about | {"name": "hats", "prompt": "a hat, {}"}))
    plan = update.plan_update(made.folder, root / "y-month")
    assert "the new pictures belong to hats" in plan.notes
    assert any('"a hat, {}" for hats' in note for note in plan.notes)


def test_what_was_there_already_is_left_out(root, tmp_path):
    made = first(root, tmp_path)
    with pytest.raises(CmpError, match="contains no new picture"):
        update.plan_update(made.folder, root / "z-month")
    folder = tmp_path / "more"
    shutil.copytree(root / "z-month", folder)
    lines = (folder / "months.csv").read_text() + "new.png,ring,train\n"
    (folder / "months.csv").write_text(lines)
    tree(folder, {"new.png": picture(9000)})
    report = update.plan_update(made.folder, folder).report
    assert report.new == {"train": 1} and report.again == months.SIZES[0]
    assert report.new_names == ("ring",)


def test_pictures_that_are_gone_are_refused_or_skipped(root, tmp_path):
    made = first(root, tmp_path)
    known = [x for x in made.ledger().pictures if x.set == "catalogue"]
    (root / "z-month" / known[0].source).unlink()
    (root / "z-month" / known[3].source).write_bytes(picture(77))  # another picture now
    with pytest.raises(CmpError) as error:
        update.plan_update(made.folder, root / "y-month")
    assert "2 pictures from earlier" in str(error.value) and "--gone skip" in str(error.value)
    assert known[0].source in str(error.value)
    plan = update.plan_update(made.folder, root / "y-month", skip_gone=True)
    whole = made.ledger().pictures
    gone = [n for n, x in enumerate(whole) if x.source in (known[0].source, known[3].source)]
    gone = [n for n in gone if whole[n].set == "catalogue"]
    assert len(plan.ledger.pictures) > len(whole)
    assert not set(gone) & {*plan.pools.buffer.tolist(), *plan.pools.update.tolist()}
    others = [n for n, x in enumerate(whole) if n not in gone]
    assert [plan.ledger.pictures[n] for n in others] == [whole[n] for n in others]
    update.compute_update(plan, tmp_path / "releases" / "2")


def test_moved_folders_are_found_and_checked(root, tmp_path):
    made = first(root, tmp_path)
    (root / "z-month").rename(tmp_path / "elsewhere")
    with pytest.raises(CmpError, match="--moved OLD=NEW"):
        update.plan_update(made.folder, root / "y-month")
    moved = {str(root / "z-month"): str(tmp_path / "elsewhere")}
    plan = update.plan_update(made.folder, root / "y-month", moved=moved)
    assert str(tmp_path / "elsewhere") in {x.folder for x in plan.ledger.arrivals}
    with pytest.raises(CmpError, match="no pictures came from"):
        update.plan_update(made.folder, root / "y-month", moved={"/nowhere": "/else"})


REFUSED = {
    "stream.tasks=3": "one task",
    "training.steps=3": "training.passes",
    "training.budget=1": "training.passes",
    "model.name=small": "a stream keeps it",
    "method.name=lora": "a stream keeps it",
    "merging.policy=none": "a stream keeps it",
    "schedule.meta=free": "how many updates",
    "mixture.last=[0.5,0.25,0.25]": "how many updates",
    "seeds.data=3": "a stream keeps it",
    "data=elsewhere": "--data",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_an_update_cannot_have_is_refused_by_name(root, tmp_path, setting):
    made = first(root, tmp_path)
    with pytest.raises(CmpError) as error:
        update.plan_update(made.folder, root / "y-month", [setting])
    assert setting.partition("=")[0] in str(error.value) and REFUSED[setting] in str(error.value)


def test_a_damaged_release_is_refused_before_anything_is_computed(root, tmp_path):
    made = first(root, tmp_path)
    for name in (made.record.state, release.LEDGER_FILE, release.RECORD_FILE):
        path = made.folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        with pytest.raises(CmpError) as error:
            update.plan_update(made.folder, root / "y-month")
        assert path.name in str(error.value)
        path.write_bytes(content)
    update.plan_update(made.folder, root / "y-month")


def test_a_slim_release_serves_and_ends_the_stream(root, tmp_path):
    made = first(root, tmp_path)
    assert release.slim(made.folder) > 0
    assert release.read_release(made.folder).ledger().pictures
    with pytest.raises(CmpError, match="slim"):
        update.plan_update(made.folder, root / "y-month")


def test_a_release_is_never_changed(root, tmp_path):
    made = first(root, tmp_path)
    assert first(root, tmp_path).record == made.record  # the same command finds it
    plan = update.plan_update(made.folder, root / "y-month")
    with pytest.raises(CmpError, match="never changed"):
        update.compute_update(plan, made.folder)
    (tmp_path / "full").mkdir()
    with pytest.raises(CmpError, match="already exists"):
        update.compute_update(plan, tmp_path / "full")


def test_two_at_once_are_one_too_many(root, tmp_path):
    plan = update.plan_update(months.START, root / "z-month", SMALL, pool=root / "pool")
    out = tmp_path / "releases" / "1"
    place = update.working_folder(out)
    computing = CheckpointManager(plan.id, folder=place)
    with computing, pytest.raises(CmpError, match="another process"):
        update.compute_update(plan, out)


def test_another_update_that_was_stopped_is_not_overwritten(root, tmp_path):
    plan = update.plan_update(months.START, root / "z-month", SMALL, pool=root / "pool")
    out = tmp_path / "releases" / "1"

    def stop(task, step, result, model):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="the same command continues"):
        update.compute_update(plan, out, Observer(step=stop))
    other = update.plan_update(months.START, root / "y-month", SMALL, pool=root / "pool")
    with pytest.raises(CmpError, match="other pictures or settings was stopped here"):
        update.compute_update(other, out)
    made = update.compute_update(plan, out)
    whole = first(root, tmp_path / "whole")
    states = [each.path(each.record.state) for each in (made, whole)]
    assert months.differences(*states) == []
    assert made.record.files[release.WEIGHTS_FILE] == whole.record.files[release.WEIGHTS_FILE]


def test_the_matrix_has_a_row_for_each_update_so_far(root, tmp_path):
    made = first(root, tmp_path, "evaluation.subset=null")
    second = update.compute_update(
        update.plan_update(made.folder, root / "y-month"), tmp_path / "releases" / "2"
    )
    matrix = pd.read_parquet(second.path(release.MATRIX_FILE))
    assert matrix[["after", "update"]].to_numpy().tolist() == [[1, 1], [2, 1], [2, 2]]
    assert second.record.parent == made.record.id


def test_a_kill_between_training_and_writing_changes_no_score(root, tmp_path, monkeypatch):
    """Neither of a release nor of a peak that is tried."""
    whole = first(root, tmp_path / "whole")
    places = {"folder": tmp_path / "tune", "peaks": (0.001,)}
    for name in ("write_release", "keep_value"):
        module = update if name == "write_release" else tuning

        def die(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, name, die)
            if module is update:
                first(root, tmp_path)
            else:
                tuning.tune(whole.folder, root / "x-month", **places)
    table = tuning.tune(whole.folder, root / "x-month", **places)
    assert {"peak", "A_KA"} <= {*table} and table["A_KA"].notna().all()
    tables = [pd.read_parquet(x.path(release.MATRIX_FILE)) for x in (first(root, tmp_path), whole)]
    pd.testing.assert_frame_equal(*tables)


def test_tuning_goes_beyond_an_edge_and_does_not_compute_twice(root, tmp_path, monkeypatch):
    made, computed = first(root, tmp_path), []

    def scores(plan, *_):
        """A peak of GM at 0.02, beyond the three that are tried first."""
        computed.append(plan.config.schedule.peak)
        gap = abs(np.log(plan.config.schedule.peak / 0.02))
        return {"A_KA": 50 - gap, "A_ZS": 50.0, "GM": 50 - gap}

    monkeypatch.setattr(tuning, "_scores_of", scores)
    table = tuning.tune(made.folder, root / "y-month", folder=tmp_path / "tune")
    assert table["peak"].tolist() == [0.0008, 0.0024, 0.0072, 0.0216, 0.0648]
    assert table.loc[table["is_best"], "peak"].tolist() == [0.0216]
    assert len(computed) == 5
    assert tuning.write_choice(table, tmp_path / "choice.yaml") == 0.0216
    assert "0.0216" in (tmp_path / "choice.yaml").read_text()
    assert "c 0.0072" in tuning.draw_front(table)


def test_tuning_scores_the_validation_split_and_keeps_it(root, tmp_path):
    made = first(root, tmp_path)
    tried = {"folder": tmp_path / "tune", "peaks": (0.001, 0.003, 0.009)}
    rows = []
    table = tuning.tune(made.folder, root / "x-month", tell=rows.append, **tried)
    assert len(rows) == len(table) >= 3 and "A_KA" in table
    stored = sorted((tmp_path / "tune").glob("*.json"))
    assert len(stored) == len(table)
    times = [path.stat().st_mtime_ns for path in stored]
    again = tuning.tune(made.folder, root / "x-month", **tried)
    assert again.equals(table)
    assert [path.stat().st_mtime_ns for path in stored] == times
