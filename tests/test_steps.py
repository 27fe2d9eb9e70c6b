"""How many files of the package one reads to follow what happens over and over."""

import sys
from pathlib import Path

import pytest
import torch

import cmp
from cmp import merging, mixtures, registry
from cmp.training import create_optimizer, make_train_state, train_step
from tests import forked, options

PACKAGE = Path(cmp.__file__).parent
DEFAULT = options.small()


def files_entered(call):
    """The files of the package whose functions a call enters; it is called once before."""
    call()
    files = set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


@pytest.fixture(scope="module")
def state():
    return make_train_state(DEFAULT, forked.small_corpus())


def test_drawing_a_batch_enters_four_files(state):
    for task, pools in enumerate(mixtures.task_pools(DEFAULT, state.corpus)):
        files = files_entered(lambda t=task, p=pools: state.loader.batch(p, t, 0))
        assert "mixtures.py" in files
        assert len(files) <= 4, files


def test_a_step_enters_six_files(state):
    pools = mixtures.task_pools(DEFAULT, state.corpus)[1]
    batch, optimizer = state.loader.batch(pools, 1, 0), create_optimizer(state)
    files = files_entered(lambda: train_step(state, optimizer, batch, 1, 0, 1e-4))
    assert "training.py" in files
    assert len(files) <= 6, files


@pytest.mark.parametrize("rule", registry.option_names("merge_rule"))
def test_a_merge_enters_three_files(rule):
    """A rule that draws at random also enters the file of named seeds."""
    facts = registry.get_option("merge_rule", rule).facts
    models = [{"a.0.weight": torch.randn(8, 8)} for _ in range(facts["count"] or 3)]
    base = {"a.0.weight": torch.randn(8, 8)} if facts["base"] else None
    files = files_entered(lambda: merging.apply.merge(rule, models, base))
    assert "merging/apply.py" in files
    assert len(files) <= 3 + facts["draws"], files
