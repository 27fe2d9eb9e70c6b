"""Bases: a small pretraining from end to end, and what the shipped cards promise."""

import functools
import json
import shutil
import signal

import forked
import pytest
import torch
from tqdm import tqdm
from typer.testing import CliRunner

from benchmark import pretraining
from cmp import budgets, cli, config, evaluation, models
from cmp.config import Model
from cmp.embedded import models as embedded_models
from cmp.embedded.packed import load_embedded
from cmp.errors import CmpError, Interrupted
from cmp.files import DIGESTS, check_digest, file_digest
from cmp.project import project_folder
from cmp.readers.manifest import STATISTICS
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import NO_OBSERVER, Observer, execute

SHIPPED = embedded_models.base_folders()[:2]
"""Where the bases that ship lie: in the package and in the project."""
CARDS = {
    path.stem: json.loads(path.read_text())
    for folder in SHIPPED
    for path in sorted(folder.glob("*.json"))
}
SHORT = ("training.steps=8", "training.batch=16")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    run_config = pretraining.pretraining_config("small", 7, *SHORT)
    return folder, pretraining.pretrain(run_config, forked.small_corpus(), folder, Observer())


def test_pretraining_writes_both_checkpoints_with_cards(pretrained):
    folder, cards = pretrained
    weights = {}
    for start in ("annealed", "unannealed"):
        path = folder / f"small-s7-{start}.safetensors"
        weights[start] = models.load_file(path)
        assert pretraining.read_card(path) == json.loads(json.dumps(cards[start]))
        kinds = {x.dtype for x in weights[start].values()}
        assert kinds == {torch.int8, torch.float16, torch.float32}
    assert cards["annealed"]["steps"] == 8
    assert cards["unannealed"]["steps"] == 6
    assert any(
        not torch.equal(x, weights["unannealed"][name]) for name, x in weights["annealed"].items()
    )
    assert "small-s7-annealed" in (folder / "README.md").read_text()


@pytest.mark.defect
@pytest.mark.parametrize("change", ["a bit", "the list"])
def test_a_card_that_is_not_what_was_written_is_refused(tmp_path, change):
    shutil.copytree(embedded_models.WEIGHTS, tmp_path / "weights")
    weights = tmp_path / "weights/small-s0-annealed.safetensors"
    assert pretraining.read_card(weights)["weights"] == weights.name
    path = weights.with_suffix(".json")
    if change == "a bit":
        path.write_bytes(path.read_bytes().replace(b'"seconds": ', b'"seconds": 1', 1))
    else:
        path.with_name(DIGESTS).write_text("")
    with pytest.raises(CmpError, match=rf"{path.name}: damaged.*cmpt pretrain"):
        pretraining.read_card(weights)
    assert "cannot be read" in pretraining.bases_overview(weights.parent)


@pytest.mark.defect
@pytest.mark.parametrize("folder", [*SHIPPED, STATISTICS], ids=["package", "project", "tables"])
def test_every_file_that_ships_is_in_the_list_beside_it(folder):
    """Bases, their cards, and tables of classes and images."""
    bases, tables = ([*folder.glob(f"*.{kind}")] for kind in ("safetensors", "parquet"))
    assert bases or tables
    for path in [*bases, *(base.with_suffix(".json") for base in bases), *tables]:
        check_digest(path, "list it")


def test_a_rerun_gives_the_same_bits(pretrained):
    folder, _ = pretrained
    run_config = pretraining.pretraining_config("small", 7, *SHORT)
    network = execute(run_config, forked.small_corpus()).model
    weights = embedded_models.quantize(network.state_dict())
    stored = models.load_file(folder / "small-s7-annealed.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(x, stored[name]) for name, x in weights.items())


def test_comparing_cards():
    card = {"scores": {"A_KA": {"value": 10.0}, "A_ZS": {"value": 40.0}}, "tolerance": 3.0}
    other = {"scores": {"A_KA": {"value": 10.0}, "A_ZS": {"value": 36.9}}}
    assert pretraining.compare_cards(card, card)[0]
    within, sentence = pretraining.compare_cards(other, card)
    assert not within
    assert "36.90 against 40.00" in sentence


def run_pretrain(monkeypatch, *arguments):
    """`cmpt pretrain small` in which both bases end at nearly nothing, without their training."""
    score = {"value": 1.0, "standard_error": 1.0}
    card = {"scores": {"A_KA": score, "A_ZS": score}, "tolerance": 3.0}
    starts = ("annealed", "unannealed")
    monkeypatch.setattr(pretraining, "pretrain", lambda *_: dict.fromkeys(starts, card))
    monkeypatch.setattr("cmp.embedded.packed.load_embedded", lambda: None)
    return CliRunner().invoke(cli.app, ["pretrain", "small", *arguments])


def test_the_command_judges_both_bases_and_ends_with_status_1(tmp_path, monkeypatch):
    result = run_pretrain(monkeypatch, "--out", str(tmp_path))
    assert result.output.count("does NOT reproduce") == 2 and result.exit_code == 1
    assert f"weights and cards: {tmp_path}" in result.output


def test_a_base_is_not_compared_with_itself_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk/models").mkdir(parents=True)
    (tmp_path / "build").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    for start in ("annealed", "unannealed"):
        (tmp_path / f"build/models/small-s99-{start}.safetensors").write_bytes(b"just written")
    result = run_pretrain(monkeypatch, "--seed", "99")
    assert result.exit_code == 0 and "shipped card" not in result.output, result.output


def test_an_unknown_model_or_setting_is_refused():
    with pytest.raises(CmpError, match="tiny-vit"):
        pretraining.pretraining_config("ViT-B-16", 0)
    with pytest.raises(CmpError, match=r"training\.step"):
        pretraining.pretraining_config("small", 0, "training.stepps=3")


def test_what_ships():
    assert embedded_models.base_seeds("small")[0] == 0
    assert embedded_models.base_seeds("tiny-vit") == [0]
    for start in ("unannealed", "cosine"):
        found = embedded_models.base_seeds("small", start)
        assert all(embedded_models.base_path("small", start, seed).exists() for seed in found)
        assert not embedded_models.base_path("small", start, 11).exists() and 11 not in found
    weights = [path for folder in SHIPPED for path in folder.glob("*.safetensors")]
    assert {path.stem for path in weights} == set(CARDS)
    assert sum(path.stat().st_size for path in weights) < 60e6
    overview = (project_folder() / "weights" / "README.md").read_text()
    assert overview == pretraining.bases_overview(*SHIPPED)


def test_bases_of_a_checkout_are_found_from_any_folder(tmp_path, monkeypatch):
    seeds = embedded_models.base_seeds("small")
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert embedded_models.base_seeds("small") == seeds != [0]


@pytest.mark.parametrize("name", CARDS)
def test_a_card_tells_of_this_config(name):
    found = config.parse(CARDS[name]["config"])
    changes = ["optimizer.carry=false"] * (found.optimizer.carry is False)  # an old default
    changes += ["schedule.name=cosine"] * name.endswith("-cosine")
    assert found == pretraining.pretraining_config(found.model.name, found.seeds.init, *changes)


@pytest.mark.parametrize("name", [name for name in CARDS if name.startswith("small-s")])
def test_the_default_bases_give_signal(name):
    """What the studies need of a base (annealed: fully; un-annealed: enough to start from)."""
    card = CARDS[name]
    assert max(score["standard_error"] for score in card["scores"].values()) <= 1.2
    if name.endswith("-annealed"):
        retention = [d for d in card["datasets"].values() if d["role"] == "eval"]
        assert all(d["score"] >= max(5 * d["chance"], d["chance"] + 10) for d in retention)
        assert card["scores"]["A_ZS"]["value"] >= 38


def test_the_attention_base_is_good_enough():
    assert CARDS["tiny-vit-s0-annealed"]["scores"]["A_ZS"]["value"] >= 28


@pytest.mark.parametrize(
    "name", ["small-s0-annealed", pytest.param("tiny-vit-s0-annealed", marks=pytest.mark.long)]
)
def test_a_shipped_base_scores_what_its_card_says(name):
    card = CARDS[name]
    model_name, _, start = name.rsplit("-", 2)[0], None, name.rsplit("-", 1)[1]
    corpus = load_embedded()
    scores = evaluation.evaluate(models.load_model(Model(model_name, start), 0), model_name, corpus)
    for key, expected in card["scores"].items():
        assert scores.aggregate(key)[0] == pytest.approx(expected["value"], abs=0.5)


@pytest.mark.defect
def test_a_pretraining_that_goes_on_publishes_no_other_run_s_weights(tmp_path, corpus, monkeypatch):
    """Both bases are those of an undisturbed run, whatever was made under their names meanwhile."""
    score = {"value": 1.0, "standard_error": 1.0}
    card = {"weights": "w", "steps": 1, "seconds": 1, "tolerance": 1.0}
    card["scores"] = {"A_KA": score, "A_ZS": score}
    monkeypatch.setattr(pretraining, "make_card", lambda *_: card)
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    folder, seen = tmp_path / "models", []

    def stop(task, step, *_):
        seen.append(step)
        if step == 6:  # the un-annealed base is that of six steps
            signal.raise_signal(signal.SIGINT)

    def pretrain(*settings, observer=NO_OBSERVER, folder=folder):
        settings = (*SHORT, "evaluation.subset=1", "evaluation.full=false", *settings)
        run_config = pretraining.pretraining_config("tiny-half", 7, *settings)
        pretraining.pretrain(run_config, corpus, folder, observer)
        return {path.name: file_digest(path) for path in folder.glob("*.safetensors")}

    whole = pretrain(folder=tmp_path / "whole")
    make = functools.partial(CheckpointManager, interval=0.0)
    monkeypatch.setattr(pretraining, "CheckpointManager", make)
    with pytest.raises(Interrupted, match="saved; the same command continues"):
        pretrain(observer=Observer(step=stop))
    other = pretrain("training.steps=4")
    assert other.keys() == whole.keys() and not {*other.values()} & {*whole.values()}
    assert pretrain() == whole and seen == [*range(7)]
    assert not [*(tmp_path / "build").glob("runs/*")]


@pytest.mark.defect
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ([], (8, 6)),
        (["training.budget=0.5"], (4, 3)),
        (["training.task_steps=[12]"], (12, 9)),
        (["stream.tasks=2"], (16, 14)),
    ],
)
def test_the_bases_are_those_of_the_steps_that_are_computed(
    tmp_path, corpus, monkeypatch, settings, steps
):
    """However their number is given; the bar counts as many."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    monkeypatch.setattr(pretraining, "make_card", lambda *given: given[3])
    monkeypatch.setattr(pretraining, "bases_overview", lambda folder: "")
    settings = [*SHORT, "evaluation.subset=1", "evaluation.full=false", *settings]
    run_config, seen = pretraining.pretraining_config("tiny-half", 7, *settings), []
    observer = Observer(step=lambda *done: seen.append(done))
    cards = pretraining.pretrain(run_config, corpus, tmp_path / "models", observer)
    assert (cards["annealed"], cards["unannealed"]) == steps
    assert len(seen) == budgets.total_steps(run_config) == steps[0]
    monkeypatch.setattr(pretraining, "pretrain", lambda *_: {})
    bars = []
    monkeypatch.setattr("tqdm.tqdm", lambda **about: bars.append(about) or tqdm(disable=True))
    done = CliRunner().invoke(cli.app, ["pretrain", "tiny-half", *settings])
    assert done.exit_code == 0 and [bar["total"] for bar in bars] == [steps[0]], done.output


def test_a_pretraining_whose_base_is_damaged_says_so_before_it_goes_on(
    tmp_path, corpus, monkeypatch
):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    make = functools.partial(CheckpointManager, interval=0.0)
    monkeypatch.setattr(pretraining, "CheckpointManager", make)
    settings = (*SHORT, "evaluation.subset=1", "evaluation.full=false")
    run_config, seen = pretraining.pretraining_config("tiny-half", 7, *settings), []

    def stop(task, step, *_):
        seen.append(step)
        if step == 6:
            raise Interrupted("here", 15)

    with pytest.raises(Interrupted):
        pretraining.pretrain(run_config, corpus, tmp_path / "models", Observer(step=stop))
    [base] = tmp_path.glob("runs/*/base-6-*")
    base.write_bytes(base.read_bytes()[:-1] + b"\1")
    for word in ("damaged", "are missing"):
        with pytest.raises(CmpError, match=rf"{word}.*cmpt results rm"):
            pretraining.pretrain(run_config, corpus, tmp_path / "models", Observer(step=stop))
        base.unlink(missing_ok=True)
    assert seen == [*range(7)]
