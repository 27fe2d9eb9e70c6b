"""Streams of updates that the data name themselves: months of a table, or a folder a month."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pictures import classes, fileset, picture, tree
from typer.testing import CliRunner

from cmp import cli, config, mixtures, registry, streams
from cmp.config import Stream
from cmp.data import load_data
from cmp.errors import CmpError
from cmp.readers import collection, infer
from cmp.releases import compare
from cmp.runs.runner import execute

SIZES = {"2026-2": 12, "2026-9": 5, "2026-10": 20}
"""Training pictures by month; as texts, October would come before February."""
SMALL = (
    "stream.order=given", "stream.tasks=3", "training.steps=2", "training.batch=6",
    "model.name=tiny", "evaluation.subset=1", "evaluation.full=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def build(corpus, tmp_path, monkeypatch):
    """What was checked is kept in a build folder of the test's own; the benchmark, which is not
    there, has been read before."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))


@pytest.fixture
def months(tmp_path):
    """A table whose classes come again in every month, and its folder."""
    names = [month for month, size in SIZES.items() for _ in range(size)]
    rows = [(f"i/{n}.png", "ab"[n % 2], "train", month) for n, month in enumerate(names)]
    rows.append(("i/test.png", "a", "test", ""))  # what is scored needs no month
    root = tree(tmp_path / "p", {row[0]: picture(n) for n, row in enumerate(rows)})
    frame = pd.DataFrame(rows, columns=["filepath", "label", "split", "month"]).sample(frac=1)
    frame.to_csv(root / "t.csv", index=False)
    reader = {"path": "t.csv", "label": "label", "split": "split", "update": "month"}
    write(root, fileset("csv", reader=reader))
    return root


def write(root, manifest):
    about = json.loads(manifest.model_dump_json(exclude_unset=True))
    (root / "manifest.yaml").write_text(json.dumps(about))


def given(tasks, **other):
    return Stream(order="given", tasks=tasks, **other)


def test_the_months_of_a_table_are_its_tasks(months):
    corpus = load_data(str(months))
    rows = streams.task_rows(corpus, given(3), 0)
    assert [len(task) for task in rows] == list(SIZES.values())
    for task, month in zip(rows, SIZES, strict=True):
        assert set(corpus.table["update"].iloc[task]) == {month}
        assert set(corpus.table["split"].iloc[task]) == {"train"} and (np.diff(task) > 0).all()
    assert streams.task_classes(corpus, given(3), 0) == [["mine+++a", "mine+++b"]] * 3
    assert streams.class_order(corpus, given(3, reverse=True), 0) == list(SIZES)[::-1]
    for task, again in zip(
        rows[::-1], streams.task_rows(corpus, given(3, reverse=True), 5), strict=True
    ):
        np.testing.assert_array_equal(task, again)


@pytest.mark.defect
def test_updates_whose_numbers_are_the_same_have_one_order_wherever_they_are_found_first():
    """A set of texts has another order in each process."""
    names = [f"2026-{'0' * zeros}{number}" for number in (1, 2) for zeros in range(5, -1, -1)]
    for seed in range(3):
        found = np.random.default_rng(seed).permutation(names).tolist()
        table = pd.DataFrame({"update": pd.Categorical(found)})
        part = dataclasses.make_dataclass("Part", ["table"])(table)
        assert [x.table["update"].item() for x in collection.split_by_update([part])] == names
        assert [*compare.shown_updates(SimpleNamespace(table=table))] == names
        order = registry.get_option("order", "given").value(pd.DataFrame(index=found), 0)
        assert [found[place] for place in order] == names


def test_a_run_takes_months_of_unequal_sizes(months):
    write(
        months,
        collection.load_manifests(str(months))[0][0].model_copy(update={"beside": "embedded"}),
    )
    run_config = config.parse(config.override({}, [*SMALL, f"data={months}"]))
    corpus = load_data(run_config.data)
    pools = mixtures.task_pools(run_config, corpus)
    assert [len(pool.buffer) for pool in pools] == [0, 12, 17]
    metrics = execute(run_config, corpus).metrics
    assert set(metrics["task"]) == {0, 1, 2, 3} and set(metrics["role"]) >= {"adapt", "eval"}
    shown = CliRunner().invoke(cli.app, ["stream", "show", *SMALL, f"data={months}"])
    assert shown.exit_code == 0 and all(f" {n} " in shown.output for n in SIZES.values())


def test_a_folder_a_month_has_a_test_of_its_own(tmp_path):
    for month, written in (("first", 2), ("second", 11)):
        root = classes(tmp_path / "p" / month, each=8)
        write(root, fileset(name=month))
        (root / "manifest.yaml").write_text(
            (root / "manifest.yaml").read_text()[:-1] + f', "update": {written}}}'
        )
    corpus = load_data(str(tmp_path / "p"))
    tasks = streams.task_classes(corpus, given(2), 0)
    assert [{entry.partition("+++")[0] for entry in task} for task in tasks] == [
        {"first"},
        {"second"},
    ]
    assert all(len(corpus.rows("test", dataset=name)) for name in corpus.by_role("adapt"))


@pytest.mark.parametrize("written", ["2026-01", "'2026-01-31'", "3", "'3'", "spring"])
def test_an_update_in_a_manifest_is_what_was_written(tmp_path, written):
    root = classes(tmp_path / "p")
    _, text, _ = infer.infer_manifest(root)
    infer.write_manifest(root / "manifest.yaml", f"{text}update: {written}\n")
    [(dataset, where)] = collection.load_manifests(str(root))
    assert set(collection.read_index(dataset, where).table["update"]) == {written.strip("'")}


@pytest.mark.parametrize("written", ["1.5", "true", "[1]", "''"])
def test_what_names_no_update_is_refused(tmp_path, written):
    root = classes(tmp_path / "p")
    (root / "manifest.yaml").write_text(f"{infer.infer_manifest(root)[1]}update: {written}\n")
    with pytest.raises(CmpError, match=r"manifest\.yaml: update: "):
        collection.load_manifests(str(root))


def test_updates_that_do_not_fit_are_refused_with_what_to_do(months, corpus):
    mine = load_data(str(months))
    words = "stream.tasks: must be 3, for 2026-2 to 2026-10"
    with pytest.raises(CmpError, match=words):
        streams.task_rows(mine, given(2), 0)
    with pytest.raises(CmpError, match=r"needs data that name their updates, and \S+ names none"):
        streams.task_rows(corpus, given(2), 0)
    frame = pd.read_csv(months / "t.csv", dtype=str)
    frame.loc[frame["filepath"] == "i/7.png", "month"] = ""
    frame.to_csv(months / "t.csv", index=False)
    manifest = collection.load_manifests(str(months))[0][0]
    index = collection.check_images(collection.read_index(manifest, months))
    partly = collection.corpus_from_indexes([index])
    with pytest.raises(CmpError, match=r"mine/i/7\.png names none"):
        streams.task_rows(partly, given(3), 0)


def test_updates_count_in_a_sets_hash_where_there_are_any(tmp_path):
    root = classes(tmp_path / "p")
    plain, named, other = (
        collection.read_index(fileset(update=update), root).data_hash()
        for update in (None, "1", "2")
    )
    assert len({plain, named, other}) == 3


def test_an_order_of_updates_can_be_added(months, monkeypatch):
    monkeypatch.setitem(registry._options, "order", dict(registry.options_of("order")))
    registry.register("order", "shuffled-updates", updates=True)(
        lambda table, seed: np.random.default_rng(seed).permutation(len(table))
    )
    corpus, sizes = load_data(str(months)), set()
    for seed in range(8):
        stream = Stream(order="shuffled-updates", tasks=3)
        sizes.add(tuple(len(task) for task in streams.task_rows(corpus, stream, seed)))
    assert len(sizes) > 1 and all(sorted(each) == sorted(SIZES.values()) for each in sizes)
