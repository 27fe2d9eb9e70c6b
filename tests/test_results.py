"""Published results: the same bytes in any order, and runs that anyone can compute again."""

import dataclasses
import json
import random
import shutil

import flips
import numpy as np
import pandas as pd
import pytest
from forked import SETTINGS, small_config, small_corpus
from typer.testing import CliRunner

import cmp
from cmp import NUMERICS, cli, config
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.evaluation import list_questions
from cmp.files import DIGESTS, SHORT_ID, listed_file
from cmp.mixtures import is_kept_concept
from cmp.runs import identity, launch, lookup, store, verify
from cmp.scale import devices
from lab import analyses
from lab.evidence import results, studies

invoke = CliRunner().invoke
GRID = {
    "question": "Why?",
    "replicates": 2,
    "live": [],
    "settings": {"z": {}, "a": {"schedule.peak": 0.0005}, "same as z": {}},
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A build folder in which the four runs of the grid are stored."""
    place = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        small_corpus()
        prepare(patch, place)
        for run_config in studies.load_study("77").configs("quick").values():
            launch.run_one(run_config)
    return place


def prepare(patch, place):
    """Chapter 77 in a folder of its own, with small runs on the small corpus."""
    tree = config.override({"evaluation": {"full": False}}, [*SETTINGS, "model.start=random"])
    patch.setitem(config.PROFILES, "quick", tree)
    patch.setattr(packed, "load_embedded", lambda *roles: small_corpus())
    patch.setattr(studies, "STUDIES", place)
    patch.setattr(results, "RESULTS", place / "results")
    patch.setenv("CMP_BUILD", str(place / "build"))
    (place / "77.yaml").write_text(json.dumps(GRID))


@pytest.fixture
def place(computed, tmp_path, monkeypatch):
    """A copy of that folder."""
    shutil.copytree(computed, tmp_path / "place")
    prepare(monkeypatch, tmp_path / "place")
    return tmp_path / "place"


def publish():
    return results.publish_study(studies.load_study("77"), "quick")


def stored_runs():
    return [store.load_run(run_id) for run_id in store.stored_ids()]


def test_what_is_published_is_what_was_collected(place):
    publish()
    frame = results.published_metrics("77")
    assert list(frame["setting"].unique()) == ["z", "a", "same as z"]  # in the order of the grid
    keys = ["setting", "replicate", "task", "scope", "dataset"]
    expected = analyses.collect_metrics(studies.load_study("77").configs("quick")).set_index(keys)[
        "score"
    ]
    assert frame.set_index(keys)["score"].sort_index().equals(expected.sort_index())


def test_scores_of_the_validation_split_are_published_apart_from_all_others(place):
    one = {"replicates": 1, "settings": {"z": {}}}
    grid = GRID | one | {"common": {"evaluation.split": "validation"}}
    (place / "77.yaml").write_text(json.dumps(grid))
    for run_config in studies.load_study("77").configs("quick").values():
        launch.run_one(run_config)
    publish()
    frame = results.published_metrics("77")
    assert {json.loads(text)["evaluation"]["split"] for text in frame["config"]} == {"validation"}
    grid["settings"] = one["settings"] | {"test": {"evaluation.split": "test"}}
    (place / "77.yaml").write_text(json.dumps(grid))
    with pytest.raises(CmpError, match="in a study of their own"):
        publish()


def test_the_file_is_the_same_whatever_order_runs_came_in(place):
    content = publish().read_bytes()
    again = stored_runs()[::-1]
    assert len(again) == 4
    shutil.rmtree(place / "build" / "runs")
    for run in again:  # stored the other way round, their rows too
        store.save_run(dataclasses.replace(run, metrics=run.metrics[::-1]))
    assert publish().read_bytes() == content
    backwards = GRID | {"settings": dict(reversed(GRID["settings"].items()))}
    (place / "77.yaml").write_text(json.dumps(backwards))
    assert publish().read_bytes() == content


@pytest.mark.parametrize("lost", [1, 4])
def test_published_runs_that_are_not_in_the_store_are_taken_over(place, lost):
    content = publish().read_bytes()
    for run in stored_runs()[:lost]:
        shutil.rmtree(store.run_folder(run.id))
    assert publish().read_bytes() == content


def test_replicates_are_published_once_all_settings_have_them(place):
    whole = publish().read_bytes()
    grid = studies.load_study("77").configs("quick")
    shutil.rmtree(place / "results")
    last = store.load_run(identity.run_id_of(grid["a", 1]))
    shutil.rmtree(store.run_folder(last.id))
    publish()
    assert set(results.published_metrics("77")["replicate"]) == {0}
    for key in (("a", 0), ("z", 0)):  # on another machine these are published only
        shutil.rmtree(store.run_folder(identity.run_id_of(grid[key])))
    store.save_run(last)
    assert publish().read_bytes() == whole


def test_what_was_published_elsewhere_need_not_be_computed_here(place):
    before = {run.id: run for run in stored_runs()}
    publish()
    study = studies.load_study("77")
    assert results.restore_runs(study, study.profile) == 0  # all are here
    shutil.rmtree(place / "build" / "runs")
    assert results.restore_runs(study, study.profile, dry_run=True) == len(before)
    assert not (place / "build" / "runs").exists()
    assert results.restore_runs(study, study.profile) == len(before)
    assert set(store.stored_ids()) == {run_id[:SHORT_ID] for run_id in before}
    for run in stored_runs():
        assert verify.compare_runs(before[run.id], run).answer == "bitwise equal"
        assert run.identity == before[run.id].identity
    configs = list(studies.load_study("77").configs("quick").values())
    assert studies.missing_runs(configs) == []
    (place / "results" / "77.parquet").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"77\.parquet.*; its runs are computed again"):
        assert results.restore_runs(study, study.profile) == 0
    (place / "results" / "77.parquet").unlink()
    assert results.restore_runs(study, study.profile) == 0  # not published, which is no fault


@pytest.mark.defect
def test_only_published_runs_of_the_wanted_size_are_restored(place):
    """What a reader computes in quick is published on its own; the larger runs are left there."""
    live = GRID | {"live": list(GRID["settings"])}
    (place / "77.yaml").write_text(json.dumps(live))
    small = {run.id for run in stored_runs()}
    larger = {identity.run_id_of(run) for run in studies.load_study("77").configs("cpu").values()}
    publish()
    words = "published runs would be restored"
    shutil.copytree(place / "build/runs", place / "kept")
    shutil.rmtree(place / "build/runs")
    assert larger.isdisjoint(small)
    for profile in ("quick", "gpu"):
        assert results.restore_runs(studies.load_study("77"), profile) == 0
    said = invoke(cli.app, ["study", "77", "--profile", "quick", "--dry-run"])
    assert said.exit_code == 0 and words not in said.output
    shutil.copytree(place / "kept", place / "build/runs")
    results.publish_study(studies.load_study("quick-77"), "quick")
    shutil.rmtree(place / "build/runs")
    said = invoke(cli.app, ["study", "77", "--profile", "quick", "--dry-run"])
    assert said.exit_code == 0 and f"{len(small)} {words}" in said.output
    for name in ("77", "quick-77"):
        assert results.restore_runs(studies.load_study(name), "quick") == len(small)
        assert {run.id for run in stored_runs()} == small
        shutil.rmtree(place / "build/runs")


def test_missing_runs_are_counted_and_nothing_is_written(place):
    for run in stored_runs()[:3]:
        shutil.rmtree(store.run_folder(run.id))
    with pytest.raises(CmpError, match=r"study 77: 3 runs are missing"):
        publish()
    assert not (place / "results").exists()


def test_damaged_results_are_replaced_where_every_run_is_stored(place):
    path = publish()
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(CmpError, match=r"77\.parquet: damaged.*cmpt study 77 --publish"):
        results.published_metrics("77")
    assert publish().read_bytes() == content


@pytest.mark.numbers
def test_names_in_the_pool_and_names_left_out_are_scored_apart(corpus):
    """By another hand, from the hits of a published run."""
    run = next(run for run in results.published_runs("methods") if run.config.seeds.data == 3)
    metrics = results._metrics_with_hits(run)
    questions = list_questions(corpus).reset_index(drop=True)
    names = corpus.table["label"].astype(str).to_numpy()[questions["row"]]
    new = {name for each in corpus.by_role("adapt") for name in corpus.classes[each]}
    is_kept = is_kept_concept(names, 3)
    parts = {"kept": is_kept, "lacking": ~is_kept}
    found = metrics[metrics["scope"].isin(parts)]
    assert len(found) == 2 * 2 * questions.query("role == 'eval'")["dataset"].nunique()
    for row in found.itertuples():
        asked = questions[parts[row.scope] & ~np.isin(names, [*new])]
        asked = asked[asked["dataset"] == row.dataset]
        place = asked.index - questions.index[questions["dataset"] == row.dataset][0]
        hits = run.hits[f"{row.task}/{row.dataset}"][place]
        assert row.score == pytest.approx(100 * np.average(hits, weights=asked["weight"]))


@pytest.mark.defect
def test_a_damaged_list_of_hashes_is_named_with_the_fix(place):
    damaged = publish().with_name(DIGESTS)
    damaged.write_bytes(b"\xff\xfe" + damaged.read_bytes()[2:-3] + b"END")
    with pytest.raises(CmpError, match=f"{damaged}: .*restore or delete it"):
        publish()


@pytest.mark.long
def test_no_bit_of_a_stored_file_flips_silently(tmp_path, monkeypatch):
    files = flips.write_all(tmp_path, monkeypatch)
    outcomes = flips.flip_bits(files, len(files), random.Random(0))
    assert len(outcomes) == len(files)
    assert flips.faults(outcomes) == []
    found = {flips.REFUSED, flips.SEEN, flips.MADE}
    assert all(found & counts.keys() for counts in outcomes.values())


def test_results_of_another_numerics_are_stale(place, monkeypatch):
    publish()
    stale = NUMERICS
    monkeypatch.setattr(cmp, "NUMERICS", stale + 1)
    words = f"NUMERICS {stale}, not {stale + 1}; run `cmpt study 77 --publish`"
    with pytest.raises(CmpError, match=words):
        results.published_metrics("77")
    with pytest.raises(CmpError, match="4 runs are missing"):  # no stale run is taken over
        publish()
    verdict = results.verify_published(results.published_runs("77")[0])
    assert (verdict.answer, "stale" in verdict.sentence) == ("different", True)


def test_a_file_that_grows_too_large_is_refused(place, monkeypatch):
    path = publish()
    content = path.read_bytes()
    assert len(content) < results.MAX_BYTES == 2_000_000
    monkeypatch.setattr(results, "MAX_BYTES", len(content) - 1)
    with pytest.raises(CmpError, match=r"77\.parquet: 0\.0 MB, more than 0\.0.*: reduce the grid"):
        publish()
    assert path.read_bytes() == content
    assert {file.name for file in path.parent.iterdir()} == {path.name, DIGESTS}


def test_published_runs_are_those_of_the_store(place):
    publish()
    found = {run.id: run for run in results.published_runs("77")}
    assert found.keys() == {run.id for run in stored_runs()}
    for run in stored_runs():
        there = found[run.id]
        assert (there.config, there.provenance) == (run.config, run.provenance)
        assert there.weights == run.weights
        keys = ["task", "scope", "dataset"]
        frames = [each.metrics.sort_values(keys, ignore_index=True) for each in (run, there)]
        pd.testing.assert_frame_equal(*frames, check_exact=True, check_like=True)


def test_samples_are_drawn_anew_for_every_seed(place):
    publish()
    everything = sorted(run.id for run in results.published_runs("77"))
    assert sorted(run.id for run in results.sample_published(9, 0)) == everything
    assert [run.id for run in results.sample_published(2, 3)] == [
        run.id for run in results.sample_published(2, 3)
    ]
    assert len({results.sample_published(1, seed)[0].id for seed in range(30)}) == len(everything)


def test_a_published_run_is_verified_to_the_bit_by_the_shell(place):
    publish()
    shutil.rmtree(place / "build")  # as one has it who has just cloned the repository
    result = invoke(cli.app, ["results", "verify", "--sample", "1"])
    assert result.exit_code == 0, result.output
    [run] = results.sample_published(1, 0)
    assert results.find_run(run.id[:8]).id == run.id, "published, and not stored"
    assert f"{run.id[:SHORT_ID]}: bitwise equal: " in result.output
    assert f"{len(run.metrics)} scores and the final weights are equal" in result.output


def tamper(path, change):
    """Change every row of the published run that is drawn first."""
    [run] = results.sample_published(1, 0)
    frame = pd.read_parquet(path)
    mine = frame.index[frame["run"] == run.id]
    change(frame, mine)
    rewrite(frame, path)
    return run


def rewrite(frame, path):
    """Publish other rows, as if they had been computed."""
    with listed_file(path) as partial:
        frame.to_parquet(partial, index=False)


def raise_a_score(frame, mine):
    row = frame.loc[mine].query("dataset == 'shapes' and task == 2").index
    frame.loc[row, "score"] = np.nextafter(frame.loc[row, "score"], 200)


def replace_weights(frame, mine):
    frame.loc[mine, "weights"] = "0" * 64


def raise_a_rate(frame, mine):
    tree = json.loads(frame.loc[mine[0], "config"])
    tree["schedule"]["peak"] *= 2
    frame.loc[mine, "config"] = json.dumps(tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (raise_a_score, "scores differ, first shapes (subset) after 2 tasks: stored"),
        (replace_weights, "the scores are equal, but the final weights are not"),
        (raise_a_rate, "it is stale"),
    ],
)
def test_what_was_tampered_with_is_found_and_named(place, change, words):
    run = tamper(publish(), change)
    result = invoke(cli.app, ["results", "verify"])
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert f"{run.id[:SHORT_ID]}: different: " in text
    assert words in text


@pytest.mark.parametrize("key", ["numerics", "threads"])
def test_results_whose_provenance_lacks_a_number_cannot_be_read(place, key):
    def drop(frame, mine):
        about = json.loads(frame.loc[mine[0], "provenance"])
        del about[key]
        frame.loc[mine, "provenance"] = json.dumps(about)

    tamper(publish(), drop)
    with pytest.raises(CmpError, match=rf"77\.parquet: cannot be read \('{key}'\)"):
        results.published_runs("77")


def test_long_texts_of_results_are_held_once_and_must_be_texts(place):
    path = publish()
    published = results.published_metrics("77")
    assert published["config"].nunique() == len(published["config"].cat.categories)
    rewrite(pd.read_parquet(path).assign(config=1), path)
    with pytest.raises(CmpError, match="config: must be one column of Categorical"):
        results.published_metrics("77")


def compared():
    """How the published runs compare with those in the store, by id."""
    runs = results.published_runs("77")
    return {run.id: verify.compare_runs(run, store.load_run(run.id)) for run in runs}


def test_what_is_published_is_what_is_stored(place):
    publish()
    assert [verdict.answer for verdict in compared().values()] == ["bitwise equal"] * 4


def test_a_run_that_differs_names_its_first_score(place):
    other, *_ = stored_runs()
    path = publish()
    frame = pd.read_parquet(path)
    row = (frame["run"] == other.id) & (frame["dataset"] == "shapes") & (frame["task"] == 2)
    frame.loc[row, "score"] += 30
    rewrite(frame, path)
    verdict = compared()[other.id]
    assert verdict.answer == "different"
    assert "first shapes (subset) after 2 tasks: stored" in verdict.sentence
    assert [verdict.answer for verdict in compared().values()].count("bitwise equal") == 3


def test_on_another_machine_the_tolerance_decides(place):
    path = publish()
    frame = pd.read_parquet(path)
    elsewhere = frame["provenance"].map(lambda text: json.dumps(json.loads(text) | {"torch": "0"}))
    frame = frame.assign(provenance=elsewhere)
    one = frame["run"] == frame["run"].iloc[0]
    frame.loc[one, "images"] = 5000
    frame.loc[one & (frame["role"] == "eval"), "score"] += 1.0
    rewrite(frame, path)
    verdict = compared()[frame["run"].iloc[0]]
    assert verdict.answer == "within tolerance"
    assert "differ by at most 1.00 points" in verdict.sentence
    assert "; 4.0 are allowed there if torch" in verdict.sentence
    frame.loc[one & (frame["role"] == "eval"), "score"] += 4.0
    rewrite(frame, path)
    assert compared()[frame["run"].iloc[0]].answer == "different"


def test_few_questions_may_differ_by_more(place):
    """As the standard error of a mean does."""
    path = publish()
    frame = pd.read_parquet(path)
    elsewhere = frame["provenance"].map(lambda text: json.dumps(json.loads(text) | {"torch": "0"}))
    frame = frame.assign(provenance=elsewhere)
    one = frame["run"] == frame["run"].iloc[0]
    frame.loc[one & (frame["role"] == "eval"), "score"] += 5.0
    sets = frame[one & (frame["role"] == "eval") & (frame["task"] == 0)]["dataset"].nunique()
    for questions, answer in ((2000, "different"), (500, "within tolerance")):
        frame.loc[one, "images"] = questions // sets
        rewrite(frame, path)
        assert compared()[frame["run"].iloc[0]].answer == answer


def test_with_nothing_published_there_is_nothing_to_verify(place):
    assert "nothing is published" in str(invoke(cli.app, ["results", "verify"]).exception)


def test_the_small_config_is_the_grids(place):
    """What the tests of this file rest on."""
    assert studies.load_study("77").configs("quick")["z", 0] == small_config("model.start=random")


def test_what_the_book_publishes_is_of_its_studies_and_of_these_numerics():
    for path in results.RESULTS.glob("*.parquet"):
        settings = results.published_metrics(path.stem)["setting"]  # of others it is refused
        assert {*settings} <= {*studies.load_study(path.stem).settings}


def test_a_run_is_verified_on_the_device_that_it_was_computed_on(place, monkeypatch):
    run, asked = stored_runs()[0], []

    def execute(*_, device, execution):
        asked.append((device, execution.micro_batch, execution.checkpoint_activations))
        raise CmpError("enough")

    monkeypatch.setattr(devices, "check_device", lambda device: None)
    monkeypatch.setattr(verify, "execute", execute)
    invoke(cli.app, ["results", "verify", run.id])
    monkeypatch.setattr(lookup, "find_run", lambda name: on_card)
    on_card = dataclasses.replace(run, provenance=run.provenance | {"device": "NVIDIA H100"})
    invoke(cli.app, ["results", "verify", run.id])
    parts = ("--micro-batch", "8", "--checkpoint-activations")
    invoke(cli.app, ["results", "verify", run.id, "--device", "cpu", *parts])
    assert asked == [("cpu", None, False), ("cuda", None, False), ("cpu", 8, True)]
