"""The first screen: what is stored is what published runs scored, and what is drawn is stored."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

import cmp
from cmp.parsing import read_yaml
from cmp.project import project_folder
from cmp.runs import store
from lab import explorers, first_screen
from lab.evidence import results

SHEET = read_yaml(first_screen.SHEET)


@pytest.fixture
def table():
    return first_screen.stored_table()


def names_of(table, stop):
    [found] = [each for each in table["stops"] if each["name"] == stop]
    return np.array(found["names"])


def test_the_stored_scores_are_those_of_the_published_runs(table):
    """Of every stop that is a published setting, after every update, on the same subset."""
    metrics = results.published_metrics(SHEET["study"])
    ways = store.trajectory(metrics[metrics["replicate"] == 0])
    compared = 0
    for sheet, stop in zip(SHEET["stops"], table["stops"], strict=True):
        assert (stop["name"], stop["stop"], stop["label"]) == (
            sheet["name"], sheet["stop"], sheet["label"],
        )  # fmt: skip
        if "setting" not in sheet:
            continue
        way = ways[(ways["setting"] == sheet["setting"]) & (ways["scope"] == "subset")]
        assert len(way) == len(stop["scores"])
        for key in ("A_KA", "A_ZS"):
            stored = [moment[key] for moment in stop["scores"]]
            # another machine rounds otherwise, so its runs end a little elsewhere
            assert stored == pytest.approx(way.sort_values("task")[key].to_numpy(), abs=2.5)
        compared += 1
    assert compared >= 2


def test_the_pictures_are_chosen_as_the_rule_says(table):
    truths = [image["truth"] for image in table["images"]]
    assert len(truths) == len(set(truths)) == first_screen.SHOWN
    corpus = cmp.load_data("embedded")
    for image in table["images"]:
        about = corpus.table.loc[image["row"]]
        assert str(about["label"]) == image["truth"] and about["dataset"] in first_screen.KINDS
    for stop in table["stops"]:
        names = np.array(stop["names"])
        assert names.shape == (len(truths), len(stop["scores"]))
        assert [*names[:, 0]] == truths  # before the updates, all are named right
    assert not (names_of(table, first_screen.FORGETS)[:, -1] == truths).any()
    assert f"The old pictures are {len(truths)} of the " in table["rule"]
    kept = (names_of(table, first_screen.KEEPS)[:, -1] == truths).sum()
    assert kept > len(truths) / 2  # or the picture would tell another story than its words


def test_the_new_pictures_are_one_of_each_kind_that_is_named_wrong_at_first(table):
    corpus, images = cmp.load_data("embedded"), table["new_images"]
    kinds = [corpus.table.loc[image["row"], "dataset"] for image in images]
    roles = {name: dataset.role for name, dataset in corpus.datasets.items()}
    assert sorted(kinds) == sorted(name for name, role in roles.items() if role == "adapt")
    for stop in table["stops"]:
        names = np.array(stop["new_names"])
        assert names.shape == (len(images), len(stop["scores"]))
        for image, first in zip(images, names[:, 0], strict=True):
            assert image["truth"] == str(corpus.table.loc[image["row"], "label"]) != first
    learned = {
        stop["name"]: sum(
            names[-1] == image["truth"]
            for names, image in zip(stop["new_names"], images, strict=True)
        )
        for stop in table["stops"]
    }
    # what gentle training costs can be seen
    assert learned["gentle"] < learned[first_screen.KEEPS]


def test_new_pictures_are_chosen_by_the_order_of_the_data(table):
    corpus, rows = cmp.load_data("embedded"), [image["row"] for image in table["new_images"]]
    later = [row + 1 for row in rows]  # of the same kind, but not the first
    names = pd.DataFrame({"truth": "a", 0: "b", 1: "a"}, index=[*later, *rows])
    names.loc[rows[0], 0] = "a"  # has its right name
    assert first_screen.new_images(names, corpus) == [later[0], *rows[1:]]


def test_the_picture_is_drawn_from_what_is_stored(table):
    drawn = first_screen.picture()
    assert drawn == first_screen.PICTURE.read_text(encoding="utf-8"), "run: cmpt site --picture"
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(text.startswith("after 5 updates") for text in texts) == 2
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) == 24
    assert "<script" not in drawn and "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", drawn)
    assert "prefers-reduced-motion" in drawn
    readme = (project_folder() / "README.md").read_text(encoding="utf-8")
    assert f"({first_screen.PICTURE.relative_to(project_folder())})" in readme


def test_the_table_is_small_and_holds_nothing_else_than_json(table):
    text = json.dumps(table, allow_nan=False)
    assert len(text) < 200_000
    assert table["script"] == "scrubber"
    assert table["stops"][table["begins"]]["name"] == SHEET["begins"]


def test_the_explorer_begins_where_it_is_told():
    explorer = first_screen.first_explorer(stop=3)
    assert isinstance(explorer, explorers.Explorer)
    assert explorer._start["state"] == {"stop": 3}
    assert "<svg" in explorer.still["text/html"]
