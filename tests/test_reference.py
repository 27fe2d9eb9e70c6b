"""Chapter A3's small models of the published code: its known figures come out."""

import pandas as pd
import pytest

from cmp.experiments import paper


def test_subsets_shrink_to_what_was_read_off_the_code():
    """Spec 2.3: ImageNet 2000, CIFAR-10 300, SVHN 300 from the second evaluation on."""
    assert paper.subset_sizes(50_000, 1000, 3, in_place=True) == [5000, 2000, 2000]
    assert paper.subset_sizes(10_000, 10, 3, in_place=True) == [1000, 300, 300]
    assert paper.subset_sizes(26_032, 10, 3, in_place=True)[1:] == [300, 300]
    assert paper.subset_sizes(26_032, 10, 3, in_place=False) == [2603] * 3
    assert paper.subset_sizes(100, 10, 2, in_place=True) == [100, 100]
    assert paper.standard_error(300) == pytest.approx(2.6, abs=0.05)


def test_a_perfect_model_scores_half_where_targets_are_one_off():
    """Spec 2.2."""
    assert set(paper.perfect_recall().values()) == {100.0}
    assert paper.perfect_recall(shift=1)["image to text"] == 100
    assert paper.perfect_recall(shift=1)["R@5"] == pytest.approx(50, abs=3)


def test_ewc_has_fourteen_steps_or_thirteen_hundred():
    """Spec 1.2."""
    assert paper.ewc_steps()["steps a task"].tolist() == [14, 1303, 1420]


def test_the_other_order_of_weights_is_the_other_model():
    found = paper.slerp_shares(0.9)
    assert found.loc["slerp"].tolist() == pytest.approx(
        found.loc["slerp, other order"].tolist()[::-1]
    )
    assert found.loc["slerp", "of the first"] > 0.9


def test_task_vectors_double_at_scale_one_and_only_there():
    """Spec 4: from one task to the next."""
    found = paper.task_arithmetic_lengths(1.0, 6)
    assert found == [1, 3, 7, 15, 31, 63]
    assert paper.task_arithmetic_lengths(0.5, 3) == [0.5, 1.0, 1.5]


def test_restarted_the_first_row_is_all_there_is():
    run = pd.DataFrame({"task": [0, 1], "A_KA": [10.0, 30.0], "A_ZS": [60.0, 50.0]})
    found = paper.if_restarted(run)
    assert found["A_KA"].tolist() == [10, 30]
    assert found["A_KA, restarted"].tolist() == [10, 10]
    assert found["A_ZS, restarted"].tolist() == [60, 60]
