"""What chapters compute from stored runs: a perfect learner, and rates of a technique."""

import pandas as pd
import pytest

from lab import analyses
from lab.evidence import claims, studies


def test_a_perfect_learner_ends_alike_in_all_orders():
    [claim] = [each for each in claims.load_claims().claims if each.name == analyses.ORDER_CLAIM]
    run = studies.load_study(claim.study).configs("cpu", 1)["dataset", 0]
    known = analyses._ideal_accumulation(run)
    assert known.is_monotonic_increasing
    assert known.iloc[-1] == pytest.approx(100)
    assert len(known) == run.stream.tasks


def test_images_that_one_of_two_models_names_rightly():
    truth = list("aaaaaa")
    one = pd.DataFrame({"truth": truth, 0: list("aaabba")}, index=range(10, 16))
    other = pd.DataFrame({"truth": truth, 0: list("abbaba")}, index=range(10, 16))
    assert analyses.named_by_one(one, other, 0) == [11, 12, 13]
    assert analyses.named_by_one(one, other, 0, count=1) == [11, 13]
    assert analyses.named_by_one(one, one, 0) == []


def test_the_table_of_domains_needs_no_project_around_the_kernel(tmp_path, monkeypatch):
    table = analyses.domain_table()
    monkeypatch.chdir(tmp_path)  # such as a build folder outside the checkout
    pd.testing.assert_frame_equal(analyses.domain_table(), table)
