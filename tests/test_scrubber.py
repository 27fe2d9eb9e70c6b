"""The scrubber of forgetting shows what is lost, by the rule that it states."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lab import scrubber


@pytest.fixture
def names(corpus):
    """Two of three images of each of two datasets lose their name, of one dataset only one."""
    datasets = corpus.table["dataset"].astype(str)
    rows = [datasets[datasets == name].index[:3] for name in ("icons", "shapes", "emoji-line")]
    index = np.concatenate(rows)
    table = pd.DataFrame({"truth": "x", 0: "x", 1: "x", 2: "x"}, index=index)
    table.loc[[*rows[0][1:], *rows[1][1:], rows[2][0]], 1] = "y"
    return table, rows


def test_where_nothing_is_lost_there_is_nothing_to_show(names, corpus):
    kept = pd.DataFrame("x", names[0].index, ["truth", 0, 1])
    table = scrubber.scrubber_table(kept, corpus)
    assert table["images"] == [] and table["sprite"] == "" and table["lost"] == 0


def test_shown_images_lose_their_name_and_come_from_each_dataset_in_turn(
    names, corpus, monkeypatch
):
    table, (icons, shapes, lines) = names
    everything = scrubber.shown_images(table, corpus).tolist()
    assert everything == sorted([*icons[1:], *shapes[1:], lines[0]])
    monkeypatch.setattr(scrubber, "SHOWN", 3)
    first = [icons[1], shapes[1], lines[0]]
    assert scrubber.shown_images(table, corpus).tolist() == sorted(first)


def test_the_scrubber_counts_all_and_shows_the_pictures_of_some(names, corpus):
    table, rows = names[0], scrubber.shown_images(names[0], corpus)
    found = scrubber.scrubber_table(table, corpus)
    assert (found["scored"], found["lost"], found["right"]) == (9, 5, [9, 4, 9])
    assert found["images"] == [{"truth": "x", "names": ["x", "y", "x"]}] * 5
    sprite = Image.open(io.BytesIO(base64.b64decode(found["sprite"].partition(",")[2])))
    side = corpus.images.shape[-1]
    for place, row in enumerate(rows):
        tile = np.asarray(sprite)[:, place * side : (place + 1) * side].transpose(2, 0, 1)
        assert (tile == np.asarray(corpus.images[row])).all()


def test_a_still_may_hold_the_table(names, corpus):
    still = scrubber.scrubber_explorer(names[0], corpus).still["text/html"]
    text = still.partition('<script type="application/json">')[2].partition("</script>")[0]
    assert json.loads(text) == scrubber.scrubber_table(names[0], corpus)
