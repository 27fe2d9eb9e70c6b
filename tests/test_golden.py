"""A change that alters results cannot pass unseen: it needs a new `NUMERICS`."""

import pytest

from cmp import NUMERICS, training
from cmp.runs import identity
from tests import golden, options

COMMAND = "run `python -m tests.golden`"
RUNS = golden.run_cases()
MANY = 45
"""Runs of a study from which on its ids are computed in the long suite."""
LEFT_OUT: dict[str, int] = {}
"""Published runs by study whose bases do not ship."""


def test_the_golden_results_are_of_these_numerics():
    assert golden.read()["numerics"] == NUMERICS, COMMAND


def test_no_default_changes_within_these_numerics():
    """A default is no part of a run's id, so another one would give new results old names."""
    assert golden.unequal(golden.defaults(), golden.read()["defaults"]) == {}


def test_every_row_and_every_rule_has_a_golden_result():
    rows = {" ".join(row) for row in options.SETTINGS}
    assert rows | golden.DEFAULT_RUNS.keys() == golden.read()["runs"].keys(), COMMAND
    assert golden.RULE_CASES.keys() == golden.read()["rules"].keys(), COMMAND


@pytest.mark.parametrize("name", options.one_in(6, RUNS, lambda name: name.partition("=")[0]))
def test_runs_give_what_they_gave(name):
    known, found = golden.read()["runs"][name], golden.compute_run(RUNS[name])
    changed = golden.run_changes(RUNS[name].config, known, found, golden.differences(known))
    assert changed == {}, f"results changed: raise NUMERICS and {COMMAND}"


def test_runs_have_the_ids_that_they_had():
    """Also those that only the long suite computes."""
    known = {name: run["id"] for name, run in golden.read()["runs"].items()}
    found = {
        name: identity.run_id_of(case.config, golden.corpus(case.whole))
        for name, case in RUNS.items()
    }
    assert found == known, COMMAND


@pytest.mark.parametrize("name", golden.RULE_CASES)
def test_rules_give_what_they_gave(name):
    known, found = golden.read()["rules"][name], golden.compute_rule(*golden.RULE_CASES[name])
    dtype = golden.RULE_CASES[name][1]
    changed = golden.rule_changes(dtype, known, found, golden.differences(known))
    assert changed == {}, f"results changed: raise NUMERICS and {COMMAND}"


def of_study(chapter):
    """The golden ids of a study's published runs."""
    ids = golden.read()["published"].items()
    return {name: each for name, each in ids if name.startswith(f"{chapter}: ")}


def is_large(chapter):
    return sum(map(len, of_study(chapter).values())) >= MANY


@pytest.mark.parametrize(
    "chapter",
    [pytest.param(x, marks=[pytest.mark.long] * is_large(x)) for x in golden.chapters()],
)
def test_published_runs_keep_their_ids(chapter):
    known = of_study(chapter)
    assert golden.published(chapter) == known, COMMAND
    if not known:
        pytest.skip("its published results are of another NUMERICS")
    found, left_out = golden.recomputed(chapter)
    assert left_out in (0, LEFT_OUT.get(chapter, 0))
    # a study whose runs are still being computed has published its first replicates, and not yet
    # those of a new setting
    first = {name: ids[: len(known[name])] for name, ids in found.items() if name in known}
    filled = {
        name: [run_id or one for run_id, one in zip(ids, known[name], strict=True)]
        for name, ids in first.items()
    }
    assert filled == known


def test_weight_decay_on_biases_and_norms_is_seen_on_any_processor(monkeypatch):
    def decay_everything(state):
        config = state.config.optimizer
        parameters = training.trainable_parameters(state.model).values()
        betas = (config.beta1, config.beta2)
        return training.ADAMW(
            parameters, lr=0.0, betas=betas, eps=config.eps, weight_decay=config.weight_decay
        )

    case = RUNS[golden.STRONG_DECAY]
    right = golden.compute_run(case)
    monkeypatch.setattr(training, "create_optimizer", decay_everything)
    wrong = golden.compute_run.__wrapped__(case)
    assert "losses" in golden.run_changes(case.config, right, wrong, "another processor")
