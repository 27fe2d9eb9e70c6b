"""Streams: nothing lost, nothing twice, blocks as equal as can be, orders of the seed alone."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cmp import cli, config, registry, streams
from cmp.config import Stream
from cmp.errors import CmpError
from cmp.files import DIGESTS, listed_file
from cmp.readers import class_statistics, class_tables
from cmp.runs import identity

MEASURED = registry.option_names("order", partial=False, updates=False)
"""Orders that need statistics of every class, or of none."""


def class_entries(corpus):
    """Every adaptation class as "DATASET+++class", sorted."""
    return sorted(set(streams.class_names(corpus, streams.adaptation_rows(corpus))))


def table(classes=60, datasets=3, seed=0):
    """Traits of some classes, with many equal ones, as a table has them."""
    random = np.random.default_rng(seed)
    names = sorted(f"d{index % datasets}+++{index:03}" for index in range(classes))
    columns = {
        "accuracy": random.integers(0, 3, classes).astype(float),
        "loss": random.integers(0, 5, classes).astype(float),
        "alignment": random.integers(0, 4, classes) / 4,
        "frequency": random.integers(0, 3, classes),
        "year": np.array([2000.0 + int(name[1]) // 2 for name in names]),
        "position": random.permutation(classes),
        "embedding": list(random.standard_normal((classes, 8)).astype(np.float32)),
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="entry"))


@given(st.integers(1, 300), st.integers(1, 60))
def test_cut(classes, tasks):
    order = [f"d+++{index}" for index in range(classes)]
    if tasks > classes:
        with pytest.raises(CmpError, match=r"stream\.tasks"):
            streams.cut_into_tasks(order, tasks)
        return
    blocks = streams.cut_into_tasks(order, tasks)
    assert [entry for block in blocks for entry in block] == order
    sizes = [len(block) for block in blocks]
    assert len(sizes) == tasks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.data())
def test_cut_by_images(images, data):
    tasks = data.draw(st.integers(1, len(images)))
    order = [f"d+++{index}" for index in range(len(images))]
    blocks = streams.cut_into_tasks(order, tasks, np.array(images))
    assert [entry for block in blocks for entry in block] == order
    assert len(blocks) == tasks
    assert min(len(block) for block in blocks) >= 1
    share, largest = sum(images) / tasks, max(images)
    if largest <= share / 2:  # then no block has to be made of one class alone
        starts = np.cumsum([0, *map(len, blocks)])
        sums = [sum(images[a:b]) for a, b in itertools.pairwise(starts)]
        assert all(abs(total - share) <= largest for total in sums)


def test_entries_are_the_adaptation_classes(corpus):
    entries = class_entries(corpus)
    assert len(entries) == sum(corpus.datasets[d].counts.classes for d in corpus.by_role("adapt"))
    assert "new-digits+++seven" in entries


@pytest.mark.parametrize("order", registry.option_names("order"))
def test_an_order_is_a_permutation_and_follows_its_seed_alone(order):
    classes, option = table(), registry.get_option("order", order)
    one, again, other = (option.value(classes, seed) for seed in (0, 0, 1))
    assert sorted(one) == list(range(len(classes)))
    assert (one == again).all()
    assert (one == other).all() == (not option.facts["seeded"])


@pytest.mark.parametrize(
    ("order", "column", "sign"),
    [
        ("easy-accuracy", "accuracy", -1),
        ("easy-loss", "loss", 1),
        ("easy-alignment", "alignment", -1),
        ("frequency", "frequency", 1),
        ("time", "year", 1),
        ("listed", "position", 1),
    ],
)
def test_an_order_goes_by_its_column(order, column, sign):
    classes = table()
    positions = registry.get_option("order", order).value(classes, 3)
    assert (np.diff(sign * classes[column].to_numpy()[positions]) >= 0).all()


def test_dataset_is_one_after_the_other_by_year():
    classes = table(datasets=4)  # d0 and d1 of 2000, d2 and d3 of 2001
    firsts = set()
    for seed in range(8):
        names = [classes.index[place][:2] for place in streams.dataset_order(classes, seed)]
        runs_of = [
            name for place, name in enumerate(names) if place == 0 or names[place - 1] != name
        ]
        assert sorted(runs_of) == ["d0", "d1", "d2", "d3"]
        assert set(runs_of[:2]) == {"d0", "d1"}
        firsts.add(runs_of[0])
    assert firsts == {"d0", "d1"}


def test_classes_without_a_year_come_last():
    classes = table()
    classes.loc[classes.index[:7], "year"] = np.nan
    assert set(streams.time_order(classes, 0)[-7:]) == set(range(7))
    classes.loc[classes.index.str.startswith("d0"), "year"] = np.nan
    assert all(
        classes.index[place].startswith("d0") for place in streams.dataset_order(classes, 0)[-20:]
    )


def test_a_trait_that_is_not_there_is_refused():
    with pytest.raises(CmpError, match=r"stream\.traits: no 'loss' in this table, only accuracy"):
        streams.easy_loss_order(table()[["accuracy"]], 0)
    classes = table()
    classes.loc["d0+++003", "accuracy"] = np.nan
    with pytest.raises(CmpError, match=r"'d0\+\+\+003' has no 'accuracy'"):
        streams.easy_accuracy_order(classes, 0)


def greedy_reference(points, start):
    """A path with all cosines at hand: (positions, sum of cosines)."""
    cosine = points.astype(np.float64) @ points.astype(np.float64).T
    path, left = [start], set(range(len(points))) - {start}
    while left:
        current = path[-1]
        path.append(max(left, key=lambda other: (cosine[current, other], -other)))
        left.remove(path[-1])
    return path, sum(cosine[a, b] for a, b in itertools.pairwise(path))


def rounded(x):
    """Unit vectors times the scale, as whole numbers."""
    return np.rint(streams.PATH_SCALE * x / np.linalg.norm(x, axis=1, keepdims=True))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 50), st.integers(1, 12))
def test_the_path_is_the_greedy_one(count, width, seed, nearest):
    x = np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)
    x[(x == 0).all(axis=1)] = 1.0  # equal points and equal distances abound
    points = rounded(x)
    near = streams._neighbours(points, min(nearest, count - 1))
    for start in {0, count // 2, count - 1}:
        path, total = streams._walk(points, near, start)
        expected, of_all = greedy_reference(points, start)
        assert path.tolist() == expected
        assert total == of_all


def test_the_best_of_the_starts_is_kept():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    points = rounded(x)
    starts = np.random.default_rng(5).permutation(50)[: streams.PATH_STARTS]
    path = streams.nearest_path(x, np.random.default_rng(5))
    sums = {int(start): greedy_reference(points, int(start)) for start in starts}
    assert path.tolist() == max(sums.values(), key=lambda pair: pair[1])[0]


def test_a_path_is_the_same_in_another_arithmetic():
    """Sums of whole numbers are exact, so no order of summing them can make a difference."""
    x = np.random.default_rng(1).standard_normal((300, 512)).astype(np.float32)
    points = rounded(x)
    assert np.abs(points).max() <= streams.PATH_SCALE + 1
    exact = points.astype(np.int64) @ points.astype(np.int64).T
    assert exact.max() < 2**24
    assert (points @ points.T == exact).all()


LARGE = """
import re, resource, time
from pathlib import Path
import numpy as np
from cmp.streams import nearest_path
x = np.random.default_rng(0).standard_normal((18381, 512)).astype(np.float32)
started = time.process_time()
path = nearest_path(x, np.random.default_rng(1))
assert sorted(path) == list(range(18381))
seconds, status = time.process_time() - started, Path("/proc/self/status")
if status.exists():  # what getrusage says holds the memory of the process that started this one
    print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
else:
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.long
def test_a_path_through_the_whole_reference_fits_into_a_gigabyte_and_a_minute():
    answer = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=300
    )
    seconds, kilobytes = map(float, answer.stdout.split())
    assert seconds < 60
    assert kilobytes < 1e6


@pytest.mark.parametrize("order", [*MEASURED, "listed"])
@pytest.mark.parametrize("equal", ["classes", "images"])
def test_every_stream_of_the_benchmark_holds_every_image_once(corpus, order, equal):
    name = "by-hand" if order == "listed" else "embedded"
    stream = Stream(order=order, equal=equal, tasks=7, traits=name)
    blocks = streams.task_classes(corpus, stream, 1)
    rows = streams.task_rows(corpus, stream, 1)
    arranged = streams.class_order(corpus, stream, 1)
    assert [entry for block in blocks for entry in block] == arranged
    assert len(set(arranged)) == len(arranged)
    everything = np.concatenate(rows)
    assert len(set(everything)) == len(everything)
    for block, task in zip(blocks, rows, strict=True):
        assert set(streams.class_names(corpus, task)) == set(block)
        assert (np.diff(task) > 0).all()
    if order == "listed":
        assert {entry.partition("+++")[0] for entry in arranged} == {"new-flags"}
    else:
        assert sorted(arranged) == class_entries(corpus)
        assert sorted(everything) == streams.adaptation_rows(corpus).tolist()
    back = streams.class_order(corpus, Stream(order=order, reverse=True, traits=name), 1)
    assert back == arranged[::-1]


def test_equal_images_are_about_equal(corpus):
    stream = Stream(order="dataset", equal="images", tasks=8)
    sizes = [len(rows) for rows in streams.task_rows(corpus, stream, 0)]
    assert max(sizes) - min(sizes) <= 200  # two classes of digits
    classes = [len(rows) for rows in streams.task_rows(corpus, Stream(order="dataset"), 0)]
    assert max(classes) > 5 * min(classes)


def test_class_counts(corpus):
    tasks = streams.task_classes(corpus, Stream(tasks=5), 0)
    counts = class_statistics.class_counts(tasks)
    assert counts.sum(axis=1).tolist() == [len(task) for task in tasks]
    assert counts["new-digits"].sum() == 10
    assert counts.index.tolist() == [1, 2, 3, 4, 5]


def test_two_seeds_differ_in_every_task(corpus):
    for order in MEASURED:
        one, two = (streams.task_rows(corpus, Stream(order=order), seed) for seed in (0, 1))
        differing = [set(a) != set(b) for a, b in zip(one, two, strict=True)]
        free = order not in ("easy-loss", "easy-alignment")  # which have no equals to choose from
        assert all(differing) if order == "random" else any(differing) == free, order
        again = streams.task_rows(corpus, Stream(order=order), 0)
        for a, b in zip(one, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_order_depends_on_no_other_seed_than_the_streams():
    corpus, ids = forked.small_corpus(), []
    for key in ("init", "data", "augment"):
        run_config = forked.small_config("stream.order=easy-accuracy", f"seeds.{key}=3")
        ids.append(tuple(streams.class_order(corpus, run_config.stream, run_config.seeds.stream)))
    other = forked.small_config("stream.order=easy-accuracy", "seeds.stream=3")
    assert len(set(ids)) == 1
    assert ids[0] != tuple(streams.class_order(corpus, other.stream, other.seeds.stream))


def test_another_order_is_another_run(corpus, tmp_path, monkeypatch):
    """Of what a table says, the order alone decides the id: what it leads to, not its bytes."""
    run_config = config.parse({"stream": {"order": "easy-loss"}})
    shipped = identity.run_id_of(run_config, corpus)
    measured = streams.class_statistics("embedded")
    monkeypatch.setattr(
        streams, "class_statistics", lambda name: measured.assign(loss=measured["loss"] * 2)
    )
    streams._class_order.cache_clear()
    assert identity.run_id_of(run_config, corpus) == shipped
    monkeypatch.setattr(
        streams, "class_statistics", lambda name: measured.assign(loss=-measured["loss"])
    )
    streams._class_order.cache_clear()
    assert identity.run_id_of(run_config, corpus) != shipped
    streams._class_order.cache_clear()


# --- stream files and tables of traits


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_references_stream_files_are_read(tmp_path):
    entries = [f"SET{index % 41}+++class {index}" for index in range(18_381)]
    path = write(tmp_path / "s.json", entries)
    order = class_statistics.read_stream_file(path)
    blocks = streams.cut_into_tasks(order, 20)
    assert order == entries
    assert [*map(len, blocks)] == [920] + [919] * 19


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "cannot be read as a stream"),
        ({"a": 1}, "must be a JSON list"),
        ([], "must be a JSON list"),
        (["A+++b", "A"], r"entry 2: 'A' is not \"DATASET"),
        (["A+++b", 3], "entry 2: 3 is no"),
        (["A+++b", "+++c"], "entry 2: '[+]{3}c' is no"),
        (["A+++b", "A+++c", "A+++b"], "entry 3: 'A[+]{3}b' is the same as entry 1"),
    ],
)
def test_what_is_no_stream_is_refused(tmp_path, content, words):
    path = write(tmp_path / "s.json", content)
    with pytest.raises(CmpError, match=words):
        class_statistics.read_stream_file(path)
    with pytest.raises(CmpError, match=r"none\.json: cannot be read"):
        class_statistics.read_stream_file(tmp_path / "none.json")


def test_a_stream_is_imported_and_an_unknown_class_is_refused(build, tmp_path, corpus):
    good = ["new-flags+++canada", "new-digits+++seven", "new-flags+++chad"]
    for name, order in (("good", good), ("bad", [*good, "new-digits+++sevem"])):
        path = write(tmp_path / f"{name}.json", order)
        answer = CliRunner().invoke(cli.app, ["stream", "import", str(path), name])
        assert answer.exit_code == 0, answer.output
        assert f"{len(order)} classes of 2 datasets; written: " in answer.output
        again = CliRunner().invoke(cli.app, ["stream", "import", str(path), name])
        assert "; replaced: " in again.output
    assert streams.class_order(corpus, Stream(order="listed", traits="good"), 5) == good
    with pytest.raises(
        CmpError, match=r"no class 'new-digits\+\+\+sevem'.*'new-digits\+\+\+seven'"
    ):
        streams.class_order(corpus, Stream(order="listed", traits="bad"), 5)
    with pytest.raises(CmpError, match=r"'good' lacks|no 'loss' in this table"):
        streams.class_order(corpus, Stream(order="easy-loss", traits="good"), 0)
    with pytest.raises(
        CmpError, match=r"stream\.tasks: 4 tasks need as many classes, but there are 3"
    ):
        streams.task_rows(corpus, Stream(order="listed", traits="good", tasks=4), 0)
    with pytest.raises(
        CmpError, match=r"no table nowhere-classes\.parquet; the tables are bad, emb"
    ):
        streams.class_order(corpus, Stream(order="time", traits="nowhere"), 0)


def test_a_damaged_table_of_traits_is_refused(build):
    folder = build / "traits"
    folder.mkdir(parents=True)
    with listed_file(folder / "broken-classes.parquet") as partial:
        partial.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CmpError, match=r"broken-classes\.parquet: cannot be read"):
        streams.class_statistics("broken")
    twice = pd.DataFrame({"entry": ["a+++b", "a+++b"], "position": [0, 1]})
    class_statistics.write_statistics(twice, "twice")
    with pytest.raises(CmpError, match=r"'a\+\+\+b' is listed twice"):
        streams.class_statistics("twice")
    words = pd.DataFrame({"entry": ["a+++b"], "loss": ["much"]})
    class_statistics.write_statistics(words, "words")
    with pytest.raises(CmpError, match="loss: must be one column of float"):
        streams.class_statistics("words")
    with pytest.raises(CmpError, match=r"not a valid name.*letters, digits, - and _"):
        streams.class_statistics("../secret")


@pytest.mark.defect
@pytest.mark.parametrize("change", ["a bit", "the list", "no list"])
@pytest.mark.parametrize("made", [False, True])
def test_a_table_of_traits_that_is_not_what_was_written_is_refused(
    build, tmp_path, monkeypatch, corpus, made, change
):
    shutil.copytree(class_tables.STATISTICS, tmp_path / "shipped")
    monkeypatch.setattr(class_tables, "STATISTICS", tmp_path / "shipped")
    name = "made" if made else "embedded"
    if made:
        class_statistics.write_statistics(streams.class_statistics("embedded").reset_index(), name)
    path, pool = class_tables.statistics_path(name), tmp_path / "shipped/embedded-pool.parquet"
    assert len(streams.class_statistics(name))
    for file in [path] if made else [path, pool]:
        if change == "a bit":
            content = bytearray(file.read_bytes())
            content[1000] ^= 4
            file.write_bytes(content)
        elif change == "the list":
            file.with_name(DIGESTS).write_text("")
        else:
            file.with_name(DIGESTS).unlink(missing_ok=True)
    class_tables._class_statistics.cache_clear()  # the list is not looked at for each use
    words = "cmpt stream make" if made else "reinstall this package"
    with pytest.raises(CmpError, match=rf"{path.name}: .*{words}"):
        streams.class_statistics(name)
    if not made:
        rows = corpus.rows("train", dataset="pool-shapes")[:3]
        with pytest.raises(CmpError, match=rf"{pool.name}: .*reinstall this package"):
            class_tables.pool_statistics(corpus, rows)


def test_a_list_that_is_shorter_than_the_usual_stream_is_imported(build, tmp_path, corpus):
    order, name = class_entries(corpus)[:12], "ref-random_sequence_1"  # as the reference's files
    path = write(tmp_path / f"{name}.json", order)
    said = CliRunner().invoke(cli.app, ["stream", "import", str(path), name])
    assert said.exit_code == 0, said.exception
    assert "12 classes of 2 datasets" in said.output
    shown = said.output.partition("to see its updates: cmpt ")[2].split()
    assert "stream.tasks: 20 tasks" in str(CliRunner().invoke(cli.app, shown).exception)
    assert CliRunner().invoke(cli.app, [*shown, "stream.tasks=12"]).exit_code == 0
    assert streams.class_order(corpus, Stream(order="listed", traits=name), 0) == order


def test_a_table_that_would_never_be_read_is_not_written(build, tmp_path):
    path = write(tmp_path / "order.json", ["a+++b"])
    said = CliRunner().invoke(cli.app, ["stream", "import", str(path), "embedded"])
    assert "'embedded': the package has a table with this name" in str(said.exception)
    assert not (build / "traits").exists()


def test_a_pipe_is_no_stream(tmp_path):
    os.mkfifo(tmp_path / "order.json")
    with pytest.raises(CmpError, match="not a regular file"):
        class_statistics.read_stream_file(tmp_path / "order.json")


def test_a_shown_stream_says_what_arrives():
    arguments = ["stream", "show", "stream.order=dataset"]
    answer = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})
    assert answer.exit_code == 0, answer.output
    for words in ("order dataset", "passes", "1,509"):
        assert words in answer.output


def test_the_shipped_traits_are_of_every_class_and_pool_image(corpus):
    assert streams.class_statistics("embedded").index.tolist() == class_entries(corpus)
    for role in ("pool", "substitute"):
        datasets = corpus.table["dataset"].isin(corpus.by_role(role)).to_numpy()
        statistics = class_tables.pool_statistics(corpus, np.flatnonzero(datasets))
        assert statistics.notna().all().all()
        assert statistics["cluster"].nunique() > 32
    with pytest.raises(CmpError, match=r"mixture\.select: .*not for 'new-digits'.*'random'"):
        class_tables.pool_statistics(corpus, corpus.rows("train", dataset="new-digits")[:3])


@pytest.mark.defect
@pytest.mark.parametrize("equal", ["classes", "images"])
def test_too_many_tasks_are_answered_with_as_many_as_there_can_be(equal):
    corpus = forked.small_corpus()
    with pytest.raises(CmpError) as error:
        streams.task_classes(corpus, Stream(equal=equal, tasks=10_000), 0)
    most = int(re.search(r"stream\.tasks=(\d+)", str(error.value))[1])
    assert len(streams.task_classes(corpus, Stream(equal=equal, tasks=most), 0)) == most
    with pytest.raises(CmpError, match=rf"stream\.tasks={most}\b"):
        streams.task_classes(corpus, Stream(equal=equal, tasks=most + 1), 0)


@pytest.mark.parametrize("kept", [slice(100), np.zeros(60, int)], ids=["lost", "repeated"])
def test_an_order_that_loses_or_repeats_classes_is_refused(corpus, own_options, kept):
    @registry.register("order", "mine", statistics=True)
    def order(table, seed):
        return np.arange(len(table))[kept]

    with pytest.raises(CmpError, match=r"stream\.order: 'mine' returned \d+ positions for 522"):
        streams.task_rows(corpus, Stream("mine", tasks=4), 0)


@pytest.mark.parametrize("order", ["random", "given", "similarity", "easy-loss", "dataset"])
def test_data_without_adaptation_classes_are_refused_in_every_order(corpus, order):
    others = {name: x for name, x in corpus.datasets.items() if x.role != "adapt"}
    with pytest.raises(CmpError, match=r"stream\.order: no classes arrive; .*role: adapt"):
        streams.task_rows(dataclasses.replace(corpus, datasets=others), Stream(order, tasks=2), 0)
