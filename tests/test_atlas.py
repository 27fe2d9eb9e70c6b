"""The atlas and the scrubber of forgetting show all that is there, by the rule that they state."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import synthetic
from PIL import Image

import cmp
from cmp.project import build_folder
from lab import atlas, figures, scrubber
from lab.evidence import claims, verdicts

CLAIMS = claims.load_claims()
META = {"schedule.name": "rsqrt", "schedule.meta": "rsqrt", "schedule.peak": 1.6e-3}
STUDIES = {
    "front": {"plain, peak 0.0004": {"schedule.peak": 0.0004}, "check": {}},
    "rates": {"meta-rsqrt": META, "constant twin": {"schedule.name": "rsqrt"}},
    "tuning": {"EMA": {"merging.policy": "ema", "evaluation.split": "validation"}},
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Made-up results of three studies, one of which explores."""
    folder = tmp_path_factory.mktemp("book")
    with pytest.MonkeyPatch.context() as patch:
        synthetic.place(patch, folder)
        for name, settings in STUDIES.items():
            synthetic.write_study(name, settings, replicates=3, explores=name == "tuning")
            synthetic.publish(name, dict.fromkeys(settings, (45, 50)))
    return folder


@pytest.fixture
def published(book, monkeypatch, tmp_path):
    """That book is read; no run is stored."""
    synthetic.place(monkeypatch, book)
    monkeypatch.setattr(claims, "load_claims", lambda *_: CLAIMS)
    monkeypatch.setattr(claims, "FAMILIES", claims.FAMILIES[:1])
    data = build_folder().resolve() / "data"
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to(data)


def test_every_published_run_is_in_the_atlas_where_it_ended(published):
    table = json.loads(json.dumps(atlas.atlas_table(), allow_nan=False))
    names = [(row["study"], row["name"]) for row in table["settings"]]
    words = {"front": "01 · front", "rates": "04 · rates", "tuning": "tuning (explores)"}
    assert names == [(words[study], name) for study in STUDIES for name in STUDIES[study]]
    ends = {(names[place], replicate): scores for place, replicate, *scores in table["runs"]}
    assert len(ends) == len(table["runs"]) == 3 * len(names)
    for study, settings in STUDIES.items():
        expected = verdicts.published_scores(study)[1][["A_KA", "A_ZS"]].round(2)
        for (name, replicate), row in expected.iterrows():
            assert ends[(words[study], name), replicate] == row.to_list(), settings


def test_settings_know_their_properties_claims_and_fronts(published):
    table = atlas.atlas_table()
    rows = {row["name"]: row for row in table["settings"]}
    meta, front, tuned = rows["meta-rsqrt"], rows["plain, peak 0.0004"], rows["EMA"]
    assert meta["claims"] == ["a meta schedule retains more", "a meta schedule beats its twin"]
    assert front["fronts"] == ["plain"] and not {"claims", "fronts"} & rows["check"].keys()
    assert meta["changes"] == META | {"seeds.init": 2}
    assert (meta["schedule"], meta["merging"]) == ("rsqrt, meta rsqrt", "none")
    assert (tuned["merging"], tuned["split"], tuned["mixture"]) == ("ema", "validation", "33/33/33")
    assert table["verdicts"].keys() == {claim.name for claim in CLAIMS.claims}
    readings = {about["reading"] for about in table["verdicts"].values()}
    assert readings == {verdicts.NOT_COMPUTED}


def test_the_readers_own_runs_are_in_the_notebook_alone(published):
    own = cmp.run("quick", stream={"tasks": 1}, steps=2, batch=8, progress=False)
    assert not any(row.get("own") for row in atlas.atlas_table()["settings"])
    table = atlas.atlas_table(own=True)
    row, [place, replicate, *ends] = table["settings"][-1], table["runs"][-1]
    assert row["own"] and row["name"] == f"run {own.id[:12]}, scored on the subset"
    assert (place, replicate) == (len(table["settings"]) - 1, 0)
    scores = own.metrics.query("task == 1").groupby("role")["score"].mean()
    assert ends == scores[["adapt", "eval"]].round(2).to_list()
    assert row["updates"] == 1 and row["changes"]["training.steps"] == 2


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


@pytest.mark.long
def test_most_of_the_runs_with_the_highest_retention_merge_as_the_still_s_title_says(monkeypatch):
    drawn, draw = [], figures.plot_ends
    monkeypatch.setattr(figures, "plot_ends", lambda ends: drawn.append(ends) or draw(ends))
    atlas.atlas_explorer()
    [ends] = drawn
    ends["band"] = ends["A_KA"] // 4
    for _, rows in ends[ends["A_KA"].between(44, 60)].groupby("band"):
        best = rows.nlargest(len(rows) // 10, "A_ZS")
        assert len(best) > 5 and best["merges"].mean() > 0.5
