"""The shop's months, the figures of its releases, and its months as one stream."""

import months
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from cmp import models
from cmp.errors import CmpError
from cmp.files import file_digest
from cmp.releases import compare, release, update, update_plan
from lab import chapters, figures, shop


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return shop.write_months(tmp_path_factory.mktemp("shop"))


def styles(folder):
    return {path.stem for path in folder.glob("*/*.png")}


def test_the_months_differ_in_size_and_names_come_again_with_new_looks(folders):
    table = shop.list_months(folders)
    assert [*table.index] == [*shop.MONTHS] and table.loc["2026-03", "pictures"] == 13
    assert (table["new names"] > 0).all() and table["names again"].sum() > 100
    first, second = folders[:2]
    both = {path.name for path in first.iterdir()} & {path.name for path in second.iterdir()}
    for name in both - {"manifest.yaml"}:
        looks = [{path.stem for path in (folder / name).iterdir()} for folder in (first, second)]
        assert looks[0] <= {*shop.USUAL} and not looks[0] & looks[1]
    names = {path.parent.name for folder in folders for path in folder.glob("*/*.png")}
    assert {"umbrella", "red apple"} & names and "middle finger" not in names


def test_months_are_the_same_each_time_and_only_so_many(folders, tmp_path):
    again = shop.write_months(tmp_path, 2)
    for one, other in zip(folders, again, strict=False):
        assert [*shop.list_months([one]).iloc[0]] == [*shop.list_months([other]).iloc[0]]
        for path in other.glob("*/*.png"):
            assert path.read_bytes() == (one / path.relative_to(other)).read_bytes()
    with pytest.raises(CmpError, match="1 to 5 months"):
        shop.write_months(tmp_path, 6)


def test_returning_names_are_drawn_month_by_month(folders):
    images, names, when = shop.draw_returning(*folders[:2], count=3)
    assert images.shape == (6, 4, 32, 32) and names[:3] == names[3:]
    assert when == ["2026-01"] * 3 + ["2026-02"] * 3
    assert all((images[n] != images[n + 3]).any() for n in range(3))


@pytest.mark.usefixtures("clean_drawing")
def test_a_wall_has_a_text_above_and_below_each_picture():
    (axes,) = figures.plot_wall(
        np.zeros((9, 4, 8, 8), np.uint8), [*"abcdefghi"], [*"rstuvwxyz"]
    ).axes
    assert len(axes.images) == 9 and {x.get_text() for x in axes.texts} == {*"abcdefghirstuvwxyz"}
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert places["a"][1] < places["r"][1] < places["h"][1]  # the axis points down
    assert places["a"][0] == places["r"][0] == places["h"][0]


@pytest.mark.usefixtures("clean_drawing")
def test_the_matrix_of_months_has_a_row_per_update():
    rows = [(1, 40.0, 20, 1), (1, 50.0, 22, 2), (2, 30.0, 31, 2)]
    matrix = pd.DataFrame(rows, columns=["update", "score", "images", "after"])
    (axes,) = figures.plot_months(matrix, {1: "May", 2: "June"}).axes
    assert [x.get_text() for x in axes.texts] == ["40", "50", "30"]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["May\n(22)", "June\n(31)"]


@pytest.mark.usefixtures("clean_drawing")
def test_two_ways_are_drawn_over_the_same_months():
    table = pd.DataFrame({"A_KA": [10.0, 20, 30], "A_ZS": [50.0, 49, 48]}, index=range(3))
    for axes in figures.plot_two_ways({"a": table, "b": table}, {1: "01", 2: "02"}).axes:
        assert len(axes.lines) == 2
        assert [x.get_text() for x in axes.get_xticklabels()] == ["before", "01", "02"]


@pytest.fixture
def tiny_releases(tmp_path, monkeypatch):
    """Two months of a tiny model, the second at another peak, or at the same one."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    months.write_pictures(tmp_path / "data", 2)

    def make(*second):
        first = months.update_months(tmp_path / "data", tmp_path / "made", 1, ())
        plan = update_plan.plan_update(first, tmp_path / "data" / months.month_name(1), second)
        return first, update.compute_update(plan, tmp_path / "made" / "2")

    return make


@pytest.mark.long
def test_months_end_where_one_stream_ends(tiny_releases, tmp_path):
    _, last = tiny_releases()
    once = shop.run_as_stream(last)
    models.export_weights(once.model, tmp_path / "once.safetensors")
    served = last.record.files[release.WEIGHTS_FILE]
    assert file_digest(tmp_path / "once.safetensors") == served


@pytest.mark.long
def test_months_at_two_peaks_end_where_a_stream_of_both_ends(tiny_releases):
    """Up to the floor of a cosine, which is a part of the stream's own peak; AdamW may turn that
    into a step where a gradient is nearly zero."""
    _, last = tiny_releases("schedule.peak=0.0012")
    once = shop.run_as_stream(last).model.state_dict()
    served = models.load_from_file("tiny", last.path(release.WEIGHTS_FILE)).state_dict()
    apart = torch.cat([(once[name] - each).flatten() for name, each in served.items()]).abs()
    assert apart.mean() < 1e-5 and apart.median() < 1e-7


@pytest.mark.usefixtures("clean_drawing")
@pytest.mark.long
def test_files_are_described_and_flips_are_drawn(tiny_releases):
    first, last = tiny_releases("schedule.peak=0.1")
    assert len(shop.describe_files(last)) == len(last.record.files) + 1
    comparison = compare.compare(first, last, last.corpus())
    lost = comparison.flips.query("kind == 'lost' and asked == 'name'")
    (axes,) = figures.plot_flips(comparison).axes
    assert len(axes.images) == min(14, len(lost.drop_duplicates(["dataset", "concept"])))


def test_the_chapter_found_what_it_says():
    """Its text is written for these values: a careless update fails the gate on all three limits,
    the tuned one breaks none, and both ways to train end in one file."""
    [source] = chapters.select(["09"])
    notebook = nbformat.read(source.with_suffix(".ipynb"), 4)
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    texts = [x.get("text") or x.get("data", {}).get("text/plain", "") for x in outputs]
    [broken] = [text for text in texts if text.startswith("['A_ZS.drop: ")]
    assert "A_ZS.lost: " in broken and "last_update.gain: " in broken
    assert any("broken limits: []" in text for text in texts)
    assert any("the same file of weights: True" in text for text in texts)
    tables = [text for text in texts if "lost_share" in text and "A_ZS" in text]
    rows = [line.split() for text in tables for line in text.splitlines() if "A_KA" in line]
    (careless, tuned) = (float(row[4]) for row in rows)
    assert careless < 0 < tuned  # A_KA fell at the careless peak
    [index] = [text for text in texts if "new_first" in text]
    known, new = (
        dict(zip(index.split()[:5], map(float, line.split()[1:]), strict=True))
        for line in index.splitlines()[2:]
    )
    assert abs(known["as_is"] - known["reencoded"]) < 2  # "about as good"
    assert new["reencoded"] > new["as_is"] + 2  # "found better"
