"""Chapter A3's small models of the published code: its known figures come out."""

import pytest

from tests import chapter_code


@pytest.fixture(scope="module")
def chapter():
    return chapter_code.definitions("A3")


def test_subsets_shrink_to_what_was_read_off_the_code(chapter):
    """From the second evaluation on, ImageNet has 2000 images, and CIFAR-10 and SVHN 300."""
    subset_sizes = chapter["subset_sizes"]
    assert subset_sizes(50_000, 1000, 3, in_place=True) == [5000, 2000, 2000]
    assert subset_sizes(10_000, 10, 3, in_place=True) == [1000, 300, 300]
    assert subset_sizes(26_032, 10, 3, in_place=True)[1:] == [300, 300]
    assert subset_sizes(26_032, 10, 3, in_place=False) == [2603] * 3
    assert subset_sizes(100, 10, 2, in_place=True) == [100, 100]


def test_a_perfect_model_scores_half_where_targets_are_one_off(chapter):
    assert set(chapter["perfect_recall"](0).values()) == {100.0}
    assert chapter["perfect_recall"](1)["image to text"] == 100
    assert chapter["perfect_recall"](1)["R@5"] == pytest.approx(50, abs=3)


def test_ewc_has_fourteen_steps_or_thirteen_hundred(chapter):
    """Spec 1.2."""
    paper = chapter["paper"]
    row = paper.TABLE4["EWC"]
    assert (paper.rule_steps(row), paper.budget_charged_once(row).steps) == (14, 1303)
    assert paper.rule_steps(paper.TABLE4["full"]) == 1420


def test_task_vectors_double_at_scale_one_and_only_there(chapter):
    """Spec 4: from one task to the next."""
    assert chapter["distances"](1.0, 6) == [1, 3, 7, 15, 31, 63]
    assert chapter["distances"](0.5, 3) == [0.5, 1.0, 1.5]
