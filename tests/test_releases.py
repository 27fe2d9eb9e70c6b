"""Releases where folders, names, settings and devices are unusual."""

import dataclasses
import errno
import hashlib
import os
import re
import shutil
from types import SimpleNamespace

import months
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import classes, picture, tar, tree

import cmp
from cmp import mixtures
from cmp.errors import CmpError
from cmp.readers import checks, infer
from cmp.releases import (
    arrivals,
    card,
    compare,
    gate,
    ledger,
    release,
    sentences,
    templates,
    tuning,
    update,
    update_plan,
)
from cmp.runs import runner

pytestmark = pytest.mark.usefixtures("build")


@pytest.fixture(scope="module")
def first(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return update.compute_update(months.plan_first(root), folder / "releases" / "1")


def test_the_last_state_is_in_the_release_where_a_thread_writes_it(
    first, root, tmp_path, monkeypatch
):
    """As on a GPU."""
    begin = runner.Run.__post_init__

    def write_in_background(run):
        begin(run)
        if run.manager:
            run.manager.in_background = True

    monkeypatch.setattr(runner.Run, "__post_init__", write_in_background)
    plan = update_plan.plan_update(first, root / "y-month")
    made = update.compute_update(plan, tmp_path / "2")
    progress = made.progress()
    assert (progress.task, progress.step) == (2, 0)


def test_tars_of_the_same_name_are_told_apart(tmp_path):
    for folder, seeds in (("a", range(8)), ("b", range(8, 16))):
        members = []
        for place, seed in enumerate(seeds):
            members += [(f"{place:05}.png", picture(seed)), (f"{place:05}.cls", b"an oak")]
        tar(tmp_path / "month" / folder / "00000.tar", members)
    arrived, report = arrivals.arrive(ledger.Ledger(), str(tmp_path / "month"), "adapt")
    located, parts, gone = arrivals.locate(arrived)
    assert sum(report.new.values()) == 16 and gone == 0
    assert parts[0].table["digest"].nunique() == 16
    assert located.pictures.equals(arrived.pictures)


def test_a_ledger_is_stored_and_hashed_as_before(tmp_path):
    """Its hash is part of the ids of releases, and its file has a hash in their records."""
    row = (0, "catalogue", "é/1.png", "test", 'a "b"', ("x, y", "z"), 1, 2**59, 3)
    tree = {"root": ".", "name": "catalogue", "title": "T", "role": "adapt", "licence": "own"}
    tree["reader"] = {"kind": "folder"}
    arrived = ledger.Arrival(1, "may", "adapt", "/may", (tree,))
    pictures = pd.DataFrame([row], columns=[*ledger.COLUMNS])
    line = rb'[0, "catalogue", "\u00e9/1.png", "test", "a \"b\"", ["x, y", "z"], '
    line += b"1, 576460752303423488, 3]\n"
    kept = ledger.Ledger((arrived,), pictures)
    assert kept.digest() == hashlib.sha256(line).hexdigest()
    release.write_ledger(kept, tmp_path / "new.parquet")
    table = pa.Table.from_pylist([dict(zip(ledger.COLUMNS, row, strict=True))])
    pq.write_table(table, tmp_path / "by rows.parquet")
    assert (tmp_path / "new.parquet").read_bytes() == (tmp_path / "by rows.parquet").read_bytes()


@pytest.mark.parametrize("skip_gone", [False, True])
def test_an_image_on_a_disk_that_fails_is_not_gone(tmp_path, monkeypatch, skip_gone):
    """Otherwise `--gone skip` would leave out a whole folder for ever."""
    month = classes(tmp_path / "month")
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "other"))  # where nothing is checked yet
    check, failing = checks._check_image, arrived.pictures["digest"][3]

    def fail_once(read, position):
        def read_or_fail(position):
            content = read(position)
            if int(hashlib.sha256(content).hexdigest()[:15], 16) == failing:
                raise OSError(errno.EIO, "Input/output error")
            return content

        return check(read_or_fail, position)

    with monkeypatch.context() as patch:
        patch.setattr(checks, "_check_image", fail_once)
        with pytest.raises(CmpError, match=r"cannot be read .*Input/output error.*; try again"):
            arrivals.locate(arrived, skip_gone)
    located, _, gone = arrivals.locate(arrived, skip_gone)
    assert located.pictures.equals(arrived.pictures) and gone == 0


def test_a_month_that_cannot_be_listed_is_not_gone(tmp_path, monkeypatch):
    """Nor is it called so: JPEGs that are there were named as gone."""
    month, scan = classes(tmp_path / "month"), os.scandir
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")

    def fail(path="."):
        if str(path).startswith(str(month)):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        refuse_to_look(arrived, month, "cannot be read .*Input/output error")
    assert arrivals.locate(arrived)[2] == 0
    assert arrivals.count_present(arrived) == {str(month): (18, 18, "")}


def refuse_to_look(arrived, month, words):
    """See that nothing is left out of a month whose images cannot be looked for."""
    reason = rf"^{month}: cannot look for its images: {words}"
    for skip_gone in (False, True):
        with pytest.raises(CmpError, match=f"{reason}.*; nothing was left out$"):
            arrivals.locate(arrived, skip_gone)
    [(_, there, why)] = arrivals.count_present(arrived).values()
    assert there == 0 and re.match(reason, why)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("filepath,", "file,"), "reader.image: no column 'filepath'; did you mean 'file'"),
        (("cat,", "caf\u00e9,"), "t.csv: cannot be read"), (("filepath", "\n"), "reader.*column"),
    ],
)  # fmt: skip
def test_the_images_of_a_table_that_is_broken_are_not_gone(tmp_path, change, words):
    month = tree(tmp_path / "month", {f"i/{n}.png": picture(n) for n in range(4)})
    text = "filepath,label\n" + "".join(f"i/{n}.png,cat, \n" for n in range(4)).replace(" ", "")
    (month / "t.csv").write_text(text)
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    (month / "t.csv").write_text(text.replace(*change), encoding="latin-1")
    refuse_to_look(arrived, month, f".*{words}")
    assert (
        arrivals.locate(arrived.without(arrived.pictures["arrival"] == 0))[2] == 0
    )  # a pool that was replaced is not read
    (month / "t.csv").unlink()  # on purpose, like images in a folder
    assert arrivals.locate(arrived, True)[2] == 4
    (month / "t.csv").write_text(text)
    shutil.rmtree(month / "i")
    assert arrivals.locate(arrived, True)[2] == 4


def test_images_in_folders_that_are_no_classes_any_more_are_not_gone(tmp_path):
    month = classes(tmp_path / "month")
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    for name in ("train", "test"):
        (month / name).mkdir()
    refuse_to_look(arrived, month, "oak/0.png is there, .*; undo what has changed, such as new fol")
    for name in ("train", "test"):
        (month / name).rmdir()
    (month / "oak").rename(tmp_path / "oak")
    (month / "oak").symlink_to(tmp_path / "oak")
    refuse_to_look(arrived, month, "oak/0.png is there, .* links to folders")
    (month / "oak").unlink()
    with pytest.raises(CmpError, match=r"gone or changed: 6, .*\(a renamed class folder counts as"):
        arrivals.locate(arrived)


def test_a_folder_with_new_capitals_counts_as_renamed_on_a_disk_that_ignores_case(
    tmp_path, monkeypatch
):
    month = classes(tmp_path / "month")
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    (month / "oak").rename(month / "Oak")
    monkeypatch.setattr(arrivals, "exists", lambda path: True)
    with pytest.raises(CmpError, match=r"gone or changed: 6, .*\(a renamed class folder counts as"):
        arrivals.locate(arrived)
    assert arrivals.locate(arrived, True)[2] == 6


def test_a_copy_of_a_test_image_in_an_old_month_s_training_folder_changes_nothing(tmp_path):
    """It was taken for gone, and `--gone skip` would leave out the image for ever."""
    month = classes(tmp_path / "month", ["cat", "dog"], 3, "train/")
    tree(month, {"test/cat/0.png": picture(70), "test/dog/1.png": picture(71)})
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    shutil.copy(month / "test/cat/0.png", month / "train/cat/again.png")
    located, [part], gone = arrivals.locate(arrived)
    assert located.pictures.equals(arrived.pictures) and gone == 0
    [row] = part.table[part.table["source"] == "test/cat/0.png"].to_dict("records")
    assert row["split"] == "test" and part.read(row["position"]) == picture(70)
    (month / "test/cat/0.png").write_bytes(b"no image")
    with pytest.raises(CmpError, match=r"gone or changed: 1, such as .*test/cat/0"):
        arrivals.locate(arrived)


def test_a_small_update_trains_on_no_image_that_a_table_holds_out(tmp_path):
    """Another set with an image of the same name, whose split no file gives, changes nothing."""
    month = tree(tmp_path / "month", {"a/cat/1.png": picture(1), "b/cat/1.png": picture(2)})
    (month / "a" / "t.csv").write_text("filepath,label,split\ncat/1.png,cat,test\n")
    about = "name: {0}\ntitle: T\nrole: adapt\nlicence: own\nreader: {{kind: {1}}}\n"
    table = "csv, path: t.csv, label: label, split: split"
    (month / "a" / "m.yaml").write_text(about.format("a", table))
    (month / "b" / "m.yaml").write_text(about.format("b", "folder") + "splits: {test: 1.0}\n")
    arrived, report = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    assert arrived.pictures["source"].to_list() == ["cat/1.png"] * 2
    assert arrived.pictures.set_index("set")["split"].to_dict() == {"a": "test", "b": "train"}
    assert report.new == {"test": 1, "train": 1}


@pytest.mark.parametrize("held", ["test", "validation"])
def test_the_same_pixels_have_one_split_in_an_arrival(tmp_path, held):
    """Also where nothing would be trained on, and images without a split are trained on then."""
    for place in range(12):  # the split of an image without one is chosen by its name
        names = [f"{place}{name}" for name in ("a.png", "b.bmp", "c.png")]
        contents = [picture(1), picture(1, kind="BMP"), picture(2)]
        month = tree(tmp_path / f"{place}", dict(zip(names, contents, strict=True)))
        rows = [f"{name},cat,{held if name == names[0] else ''}\n" for name in names]
        for number, order in enumerate((rows, rows[::-1])):
            (month / "t.csv").write_text("".join(["filepath,label,split\n", *order]))
            arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt", str(number))
            splits = arrived.pictures.set_index("source")["split"].to_dict()
            assert len(splits) == 3 and splits[names[0]] == splits[names[1]]
            assert "train" in splits.values()


def test_names_of_files_that_recur_test_other_images_each_month(tmp_path):
    """Each new image is an observation of its own, and one that was saved again is not."""
    found = ledger.Ledger()
    for month in range(4):
        files = {
            f"{name}/{number}.png": picture(1000 * month + 10 * place + number)
            for place, name in enumerate(("mug", "lamp", "sofa"))
            for number in range(4)
        }
        if month == 3:  # a held-out image is sent again, as another file
            held = months.pictures_in(found, split="test")[0]
            seed = 1000 * held.arrival + 10 * ("mug", "lamp", "sofa").index(held.label)
            seed += int(held.source.partition("/")[2][0])
            files[f"{held.label}/again.bmp"] = picture(seed, kind="BMP")
        folder = tree(tmp_path / f"month-{month}", files)
        found, report = arrivals.arrive(found, str(folder), "adapt")
        untested = {"mug", "lamp", "sofa"} - {
            x.label for x in months.pictures_in(found, split="test")
        }
        assert {*report.untested_names} == untested and report.copies == (month == 3)
        alone, _ = arrivals.arrive(ledger.Ledger(), str(folder), "adapt")
        splits = [x.split for x in months.pictures_in(found, arrival=month)]
        assert (splits == alone.pictures["split"].to_list()) == (month == 0)
    located, parts, _ = arrivals.locate(found)
    corpus = arrivals.corpus_of(located, parts)
    tested = corpus.table[corpus.table["split"] == "test"]
    assert {*tested["label"]} == {"mug", "lamp", "sofa"}
    assert tested["group"].nunique() == len(tested) - 1


def captions(folder, seeds):
    """Pictures with a text beside each."""
    files = {f"{seed}.png": picture(seed) for seed in seeds}
    return tree(folder, files | {f"{seed}.txt": b"the number %d" % seed for seed in seeds})


@pytest.mark.defect
def test_a_stream_of_captions_is_not_said_to_have_names(tmp_path):
    data, pool = captions(tmp_path / "1", range(30)), captions(tmp_path / "2", range(30, 40))
    plan = update_plan.plan_update("tiny:random", data, months.SMALL, pool=pool)
    assert not [note for note in plan.notes if " name" in note]
    assert [note for note in plan.notes if "R@5 of" in note and "by chance" in note]
    names, prompt = card.example_names(plan.corpus)
    assert names == [f"the number {n}" for n in (0, 1, 10, 11)] and prompt == "{}"


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_a_stream_keeps_its_task_when_its_first_folder_is_gone(tmp_path, kind, is_empty):
    arrived = ledger.Ledger()
    for number in (1, 2):
        month = tmp_path / f"{number}"
        if kind == "retrieval":
            captions(month, range(8 * number, 8 * number + 8))
        else:
            classes(month, prefix=f"{number}")
        arrived, _ = arrivals.arrive(arrived, str(month), "adapt")

    def task():
        located, parts, gone = arrivals.locate(arrived, skip_gone=True)
        return arrivals.corpus_of(located, parts).datasets["catalogue"].task, gone > 0

    assert task() == (kind, False)
    shutil.rmtree(tmp_path / "1")
    if is_empty:
        (tmp_path / "1").mkdir()
    assert task() == (kind, True)
    shutil.rmtree(tmp_path / "2")
    assert task() == (kind, True)


@pytest.mark.parametrize("role", ["adapt", "eval"])
def test_what_cannot_be_used_joins_the_set_if_its_manifest_says_so(tmp_path, role):
    """A manifest of `cmpt data init` made it a set of its own; and nothing said what it skips."""
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(classes(tmp_path / "jan")), role)
    month = tree(classes(tmp_path / "feb", prefix="x"), {"xoak/0.png": b"x", "xoak/1.png": b"x"})
    with pytest.raises(CmpError, match=r"known format \(.*\): xoak/0\.png") as error:
        arrivals.arrive(arrived, str(month), role)
    name = {"adapt": "catalogue", "eval": "feb"}[role]
    assert f"put `faults: skip` and `name: {name}` into it" in str(error.value)
    path, text, _ = infer.infer_manifest(month, role)
    text = text.replace("faults: refuse", "faults: skip").replace("name: feb", f"name: {name}")
    path.write_text(text)
    arrived, report = arrivals.arrive(arrived, str(month), role)
    sets = {"adapt": ["catalogue"], "eval": ["jan", "feb"]}[role]
    assert [*ledger.set_names(arrived, role)] == sets and report.skipped == 2
    assert sentences.describe_skipped(report) == (
        f"left out by `faults: skip`: 2 ({checks.UNKNOWN_FORMAT}: xoak/0.png, xoak/1.png)"
    )


def test_each_retention_folder_is_a_set_of_its_own(tmp_path):
    """A_ZS is the mean over sets; all folders were one set, with one classifier."""
    arrived, names = ledger.Ledger(), []
    places = "birds", "My shoes", "a/test", "b/test", "pool"
    for number, place in enumerate(places):
        folder = classes(tmp_path / place, prefix=f"{number}")
        arrived, _ = arrivals.arrive(arrived, str(folder), "eval")
        names.append(arrived.arrivals[-1].sets[0]["name"])
    assert names == ["birds", "my-shoes", "test", "test-2", "pool-2"]
    arrived, _ = arrivals.arrive(arrived, str(classes(tmp_path / "new", prefix="x")), "adapt")
    assert [*ledger.set_names(arrived, "adapt")] == ["catalogue"]


def test_a_retention_folder_that_is_given_again_stays_in_its_set(tmp_path):
    """Also in a stream from before each folder was a set, when all were called `kept`."""
    folder, new = classes(tmp_path / "birds"), classes(tmp_path / "shoes", prefix="x")
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(folder), "eval")
    [first] = arrived.arrivals
    first = dataclasses.replace(first, sets=({**first.sets[0], "name": "kept"},))
    pictures = arrived.pictures.assign(set="kept")
    arrived, _ = arrivals.arrive(ledger.Ledger((first,), pictures), str(new), "eval")
    arrived, report = arrivals.arrive(arrived, str(classes(folder, prefix="more ")), "eval")
    assert [*ledger.set_names(arrived, "eval")] == ["kept", "shoes"]
    assert arrived.arrivals[-1].sets[0]["name"] == "kept"
    assert report.again == 18 and sum(report.new.values()) == 18


@pytest.mark.parametrize("role", ["adapt", "eval"])
@pytest.mark.parametrize("is_caption_first", [False, True])
def test_classes_and_captions_are_not_joined_into_one_set(tmp_path, is_caption_first, role):
    labelled, captioned = classes(tmp_path / "a"), captions(tmp_path / "b", range(8))
    table = tree(tmp_path / "c", {f"{n}.png": picture(20 + n) for n in range(8)})
    rows = [f"{n}.png,oak,an oak of {n} years\n" for n in range(8)]
    (table / "t.csv").write_text("".join(["filepath,label,caption\n", *rows]))
    first, second = (captioned, labelled) if is_caption_first else (labelled, captioned)
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(first), role)
    tasks = "classification", "retrieval"
    words = [f"{second}: its images have no", *map(repr, tasks), f"`cmpt data init {second}`"]
    if role == "adapt":
        with pytest.raises(CmpError) as error:
            arrivals.arrive(arrived, str(second), role)
        assert all(word in str(error.value) for word in [ledger.OPTIONS[role], *words])
    arrivals.arrive(arrived, str(table), role)  # has both
    arrivals.arrive(arrived, str(second), "pool")  # is not scored
    manifest = f"name: own\ntitle: T\nrole: {role}\nlicence: own\nreader: "
    reader = "{kind: folder, path: .}" if is_caption_first else "{kind: pairs, path: .}"
    (second / "manifest.yaml").write_text(manifest + reader)
    arrivals.arrive(arrived, str(second), role)


def test_several_updates_do_not_arrive_at_once(tmp_path):
    month = tree(tmp_path / "month", {f"{n}.png": picture(n) for n in range(4)})
    lines = [f"{n}.png,cup,{1 + n % 2}" for n in range(4)]
    (month / "t.csv").write_text("\n".join(["filepath,label,update", *lines]))
    about = "name: mine\ntitle: T\nrole: adapt\nlicence: own\nreader: "
    reader = "{kind: csv, path: t.csv, label: label, update: update}\n"
    (month / "m.yaml").write_text(about + reader)
    with pytest.raises(CmpError, match=r"--data: .* contains several updates \(1, 2\); give one"):
        arrivals.arrive(ledger.Ledger(), str(month), "adapt")


def test_a_folder_that_brings_nothing_new_is_refused_or_left_out(tmp_path):
    kept, month = classes(tmp_path / "kept", each=8), tmp_path / "month"
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(kept), "eval")
    with pytest.raises(CmpError, match=r"--retain: .*kept contains no new image; leave it out"):
        arrivals.arrive(arrived, str(kept), "eval")
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(classes(tmp_path / "may")), "adapt")
    words = r"--data: .*may: all images have arrived before, in update 1 may; give a folder with"
    with pytest.raises(CmpError, match=words):
        arrivals.arrive(arrived, str(tmp_path / "may"), "adapt")
    about = "name: {0}\ntitle: T\nrole: adapt\nlicence: own\nreader: {{kind: folder, path: {0}}}\n"
    old, new = classes(month / "old", prefix="x"), classes(month / "new", prefix="y")
    (month / "old.yaml").write_text(about.format("old"))
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(month), "adapt")
    tree(new, {"oak/more.png": picture(99)})
    (month / "new.yaml").write_text(about.format("new"))
    arrived, _ = arrivals.arrive(arrived, str(month), "adapt")  # nothing of the set `old` is new
    _, parts, gone = arrivals.locate(arrived)
    assert [part.dataset.name for part in parts] == ["old", "new"] and gone == 0 and old.is_dir()


def test_a_release_in_a_folder_called_like_a_model_is_the_release(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(first.folder, "small", target_is_directory=True)
    made = release.read_release("small")
    assert compare.as_candidate(made).name == first.config.model.name != "small"
    assert compare.as_candidate("small").name == "small"


def test_tuning_deletes_nothing_but_its_own(first, root, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_scores_of", lambda *given: {"A_KA": 1.0, "A_ZS": 1.0, "GM": 1.0})
    other = tree(tmp_path / "checkpoints" / "another-run", {"state": b"of somebody"}) / "state"
    table = cmp.tune(first, root / "y-month", folder=tmp_path, peaks=[0.001, 0.002])
    assert other.read_bytes() == b"of somebody" and len(table) > 2


def test_every_peak_that_is_given_is_tried(first, root, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_scores_of", lambda *given: {"A_KA": 1.0})
    peaks = [0.001 * place for place in range(1, 13)]
    table = cmp.tune(first, root / "y-month", folder=tmp_path, peaks=peaks)
    assert table["peak"].round(4).tolist() == np.round(peaks, 4).tolist()


def test_peaks_are_not_compared_without_validation_images(root, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_scores_of", lambda *given: {"A_KA": 1.0})
    month = tree(tmp_path / "month", {f"{n}.png": picture(n) for n in range(8)})
    lines = [f"{n}.png,{('cup', 'pen')[n % 2]},{('train', 'test')[n > 5]}" for n in range(8)]
    (month / "t.csv").write_text("\n".join(["filepath,label,split", *lines]))
    given = months.START, month, months.SMALL
    with pytest.raises(CmpError, match="no update has validation images to compare peaks on"):
        cmp.tune(*given, folder=tmp_path / "tune", pool=root / "pool")


def test_one_image_is_worth_most_in_the_smallest_set(monkeypatch):
    sizes = {"adapt": (4, 10), "eval": (20,)}
    sets = [
        SimpleNamespace(rows=range(size), dataset=SimpleNamespace(role=role))
        for role, own in sizes.items() for size in own
    ]  # fmt: skip
    monkeypatch.setattr(tuning, "make_test_sets", lambda *given: sets)
    said = tuning.describe_evidence(SimpleNamespace(config=cmp.RunConfig(), corpus=None))
    assert "A_KA rests on 14 images, where one is worth up to 12.5 points; A_ZS" in said
    assert "A_ZS rests on 20 images, where one is worth 5.0 points; differences" in said


def test_a_recipe_among_settings_is_taken(root):
    own = {"mixture": {"pretraining": 0.5, "update": 0.25, "buffer": 0.25}, "recipe": "default"}
    plan = update_plan.plan_update(months.START, root / "z-month", own, pool=root / "pool")
    assert plan.config.mixture.pretraining == 0.5 and plan.config.merging.policy == "ema"
    without = own | {"merging": {"policy": "none"}}
    plan = update_plan.plan_update(months.START, root / "z-month", without, pool=root / "pool")
    assert plan.config.merging.policy == "none"


@pytest.mark.parametrize("setting", ["merging.weight=0.3", "training.task_steps=[2]"])
def test_a_setting_that_rests_on_the_recipe_is_taken(first, root, setting):
    """A section is checked as a whole: alone, without the policy, a weight means nothing."""
    plan = update_plan.plan_update(first, root / "y-month", [setting])
    assert plan.config.merging.weight == (0.3 if "weight" in setting else 0.5)


def test_naming_the_policy_of_the_stream_again_changes_nothing(root, tmp_path):
    """The weight that the first update set once went back to its default."""
    plan = months.plan_first(root, "merging.policy=ema", "merging.weight=0.3")
    made = update.compute_update(plan, tmp_path / "1")
    plans = [
        update_plan.plan_update(made, root / "y-month", settings)
        for settings in ([], ["merging.policy=ema"])
    ]
    assert plans[1].config.merging.weight == 0.3
    assert plans[0].id == plans[1].id


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("schedule.meta=[1]", "schedule.meta"), ("schedule.meta=3", "schedule.meta"),
        ("training.task_steps=10", "training.task_steps"), ("training=5", "training"),
        ("seed=3", "seed: a stream keeps its seeds"), ("recipe=none", "recipe: 'none': unknown"),
    ],
)  # fmt: skip
def test_slips_in_settings_are_named(first, root, setting, words):
    with pytest.raises(CmpError, match=words):
        update_plan.plan_update(first, root / "y-month", [setting])


def test_a_home_folder_is_expanded(first, root, monkeypatch):
    monkeypatch.setenv("HOME", str(first.folder.parents[1]))
    plan = update_plan.plan_update("~/releases/1", root / "y-month")
    assert plan.parent and plan.parent.record == first.record


def test_embedded_pictures_are_a_pool_only_and_from_the_first_update_on(first, root):
    with pytest.raises(CmpError, match="--retain: give a folder"):
        months.plan_first(root, retain=["embedded"])
    with pytest.raises(CmpError, match=r"--pool: the embedded pool .* at the first update only"):
        update_plan.plan_update(first, root / "y-month", pool="embedded")


def test_a_pool_replaces_the_embedded_one(corpus, tmp_path):
    """Whose retention sets stay, and whose rows keep their places."""
    month, own = classes(tmp_path / "month", prefix="x"), classes(tmp_path / "own")
    arrived, _ = arrivals.arrive(ledger.Ledger(), ledger.EMBEDDED, "pool")
    arrived, _ = arrivals.arrive(arrived, str(month), "adapt")
    before = arrivals.corpus_of(*arrivals.locate(arrived)[:2])
    arrived, _ = update_plan._arrive_beside(arrived, str(own), "pool", "a photo of a {}")
    after = arrivals.corpus_of(*arrivals.locate(arrived)[:2])
    pool, _ = mixtures.choose_replay(after, cmp.RunConfig().mixture, 0)
    assert {*after.table["dataset"].iloc[pool]} == {"pool"}
    assert len(pool) == len(months.pictures_in(arrived, set="pool", split="train"))
    same = [name for name in before.datasets if before.datasets[name].role != "pool"]
    assert after.by_role("eval") == before.by_role("eval") != []
    start, kept = after.table.iloc[: len(before.table)], before.table["dataset"].isin(same)
    assert start["dataset"].tolist() == before.table["dataset"].tolist()
    assert start["split"][kept].tolist() == before.table["split"][kept].tolist()


def test_a_pool_that_is_given_again_is_kept_as_it_is(first, root, tmp_path):
    plan = update_plan.plan_update(first, root / "y-month", pool=root / "pool")
    assert plan.id == update_plan.plan_update(first, root / "y-month").id
    own, prompt = classes(tmp_path / "own"), "a photo of a {}"
    arrived, _ = arrivals.arrive(ledger.Ledger(), str(own), "pool")
    arrived, _ = arrivals.arrive(arrived, str(classes(tmp_path / "month", prefix="x")), "adapt")
    same, [said] = update_plan._arrive_beside(arrived, str(own), "pool", prompt)
    assert same is arrived and said.startswith(f"--pool: {own} is the pool of this stream already")
    (own / "oak" / "5.png").unlink()
    changed, said = update_plan._arrive_beside(arrived, str(own), "pool", prompt)
    assert len(changed.arrivals) == 3 and not said


def test_a_gate_is_a_path_in_any_form(tmp_path, monkeypatch):
    (tmp_path / "gate.yaml").write_text("A_ZS: {drop: 1}")
    seen = []
    monkeypatch.setattr(gate, "apply_gate", lambda limits, comparison: seen.append(limits) or [])
    for path in (tmp_path / "gate.yaml", str(tmp_path / "gate.yaml")):
        gate.check_gate(path, None)
    assert seen[0] == seen[1] == gate.Gate(A_ZS=gate.Limits(drop=1))


def test_numbers_are_written_the_same_everywhere():
    assert sentences.signed(-0.04) == sentences.signed(0.04) == "0.0"
    assert (sentences.signed(1.25), sentences.decimal(-3)) == ("+1.2", "−3.0")
    assert sentences.signed(float("nan")) == "–"
    assert sentences.interval_in_words(float("nan"), float("nan")) == "no interval"
    assert sentences.interval_in_words(-1, 2) == "−1.0 to 2.0"


def test_a_bar_in_a_name_does_not_break_a_table():
    table = templates.markdown_table(pd.DataFrame({"set": ["a|b"], "score": [1.0]}))
    assert table.splitlines()[-1] == r"| a\|b | 1.0 |"


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source, target = tree(tmp_path, {"state": b"weights"}) / "state", tmp_path / "new" / "state"
    release.link_or_copy(source, target)
    assert target.read_bytes() == b"weights" and source.stat().st_nlink == 1


def test_a_slim_release_serves_and_ends_the_stream(first, root, tmp_path):
    """What it shares with another release by a hard link stays there, and frees nothing."""
    made = update.compute_update(update_plan.plan_update(first, root / "y-month"), tmp_path / "2")
    start, state = (made.folder / name for name in (release.START_FILE, made.record.state))
    assert start.stat().st_nlink > 1 == state.stat().st_nlink
    size = state.stat().st_size
    assert release.slim(made.folder) == size
    assert not start.exists() and not state.exists() and first.path(release.START_FILE)
    assert len(release.read_release(made.folder).ledger().pictures)
    plan = update_plan.plan_update(made, root / "x-month")
    with pytest.raises(CmpError, match="slim"):
        update.compute_update(plan, tmp_path / "3")
