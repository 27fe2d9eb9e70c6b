"""Mixtures: the pure functions are right, and a control that moves draws them again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmp import mixtures, plot_inputs, widgets
from cmp.config import Mixture
from cmp.errors import CmpError
from cmp.widgets.mixture import STILLS, exposure, normalised

pytestmark = pytest.mark.usefixtures("clean_drawing")
WEIGHTS = st.floats(0, 1).map(lambda weight: round(weight, 2))


def parts_of(explorer):
    """({description: control}, sentence, picture)."""
    box, sentence, picture = explorer.children
    return {control.description: control for control in box.children}, sentence, picture


@given(WEIGHTS, WEIGHTS, WEIGHTS)
def test_normalised_shares_sum_to_one_in_proportion(p, d, b):
    mixture = normalised(p, d, b, replay=0.2)
    shares = (mixture.pretraining, mixture.update, mixture.buffer)
    assert sum(shares) == pytest.approx(1)
    assert mixture.replay == 0.2
    for weight, share in zip((p, d, b), shares, strict=True):
        assert share == pytest.approx(weight / (p + d + b) if p + d + b else 1 / 3)


@given(
    st.tuples(WEIGHTS, WEIGHTS, WEIGHTS),
    st.integers(2, 512),
    st.integers(1, 20),
    st.integers(1, 200),
    st.integers(1, 10_000),
    st.floats(1, 5_000),
)
@settings(max_examples=60, deadline=None)
def test_exposure_adds_up_to_everything_seen(weights, batch, tasks, steps, pool, task_size):
    mixture = normalised(*weights)
    parts, passes = exposure(mixture, batch, tasks, steps, pool, task_size)
    seen = passes[list(plot_inputs.POOLS)].mul(passes["images"], axis=0).sum()
    assert seen.sum() == pytest.approx(batch * steps * tasks)
    first, later = (mixtures.parts(mixture, batch, empty) for empty in (True, False))
    for name, one, other in zip(plot_inputs.POOLS, first, later, strict=True):
        assert seen[name] == pytest.approx(steps * (one + other * (tasks - 1)))
    assert parts.to_numpy().tolist() == [list(first), list(later)][: min(tasks, 2)]
    assert (passes["buffer"].iloc[1:].diff().dropna() <= 1e-12).all()  # early images come back most


def test_exposure_by_hand():
    """Thirds of 6 (3, 3, 0 then 2, 2, 2), 3 tasks x 10 steps, 20 images a task, 10 in the pool."""
    _, passes = exposure(Mixture(), 6, 3, 10, pool_size=10, task_size=20)
    assert passes["pretraining pool"].tolist() == [7, 0, 0, 0]
    assert passes["update"].tolist() == [0, 1.5, 1, 1]
    assert passes["buffer"].tolist() == [0, 1.5, 0.5, 0]
    with pytest.raises(CmpError, match="positive"):
        exposure(Mixture(), 6, 3, 10, 0, 20)


def test_mixture_explorer_draws_what_its_controls_say(monkeypatch):
    drawn = []
    original = plot_inputs.batch_mixture
    monkeypatch.setattr(
        plot_inputs, "batch_mixture", lambda a, b: drawn.append((a, b)) or original(a, b)
    )
    controls, sentence, picture = parts_of(widgets.mixture_explorer(pool=1000, arriving=800))
    before = bytes(picture.value)
    controls["Pool P: weight / sum"].value = 0.0
    parts, passes = exposure(Mixture(0, 0.5, 0.5), 64, 8, 40, 100, 100.0)
    assert drawn[-1][0].equals(parts)
    assert drawn[-1][1].equals(passes)
    assert bytes(picture.value) != before
    assert "P 0.00, D 0.50, B 0.50" in sentence.value
    for weight in ("Update D", "Buffer B"):
        controls[f"{weight}: weight / sum"].value = 0.0
    assert "P 0.33, D 0.33, B 0.33" in sentence.value


def test_mixture_still():
    left, _ = widgets.mixture_still().axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(STILLS)
