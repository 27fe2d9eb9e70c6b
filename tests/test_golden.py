"""A change that alters results cannot pass unseen: it needs a new `NUMERICS`."""

import pytest

from cmp import NUMERICS
from cmp.runner import machine_differences, machine_record
from tests import golden

LOSS_TOLERANCE = 0.02
"""Relative: bf16 keeps 8 bits, and other processors sum in another order."""


@pytest.fixture(scope="module")
def computed():
    return golden.compute()


def test_the_golden_runs_are_of_these_numerics():
    assert golden.read()["numerics"] == NUMERICS, "run `python -m tests.golden`"


def test_no_default_changes_within_these_numerics():
    """A default is no part of a run's id, so another one would give new results old names."""
    known = golden.read()["defaults"]
    assert {key: golden.defaults().get(key) for key in known} == known


@pytest.mark.parametrize("name", golden.RUNS)
def test_results_are_those_of_this_numerics(computed, name):
    expected, found = golden.read()["runs"][name], computed["runs"][name]
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    if machine_differences(golden.read()["machine"], machine_record()) == "":
        assert found == expected, "results changed: raise NUMERICS and run `python -m tests.golden`"
