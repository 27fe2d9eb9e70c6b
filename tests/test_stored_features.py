"""Image features that are encoded once and read by every step."""

import forked
import numpy as np
import pytest
import torch
from options import small
from test_resume import BOUNDARY, FIRST, MIDDLE, assert_resumes
from torch.nn.functional import cross_entropy

from cmp import bench, budgets, mixtures, models, schedules, stored_features
from cmp.data import Batch
from cmp.errors import CmpError
from cmp.evaluation import ENCODE_BLOCK
from cmp.runs.runner import execute
from cmp.scale.execution import ExecutionConfig
from cmp.training import encode_batch, make_train_state, train_task

pytestmark = pytest.mark.numbers
STORED = ("method.name=locked-image", "method.views=1", "training.precision=fp32")


def trained(*settings, execution=None):
    """The state after all tasks."""
    state = make_train_state(small(*settings), forked.small_corpus(), execution=execution)
    for task, pools in enumerate(mixtures.task_pools(state.config, state.corpus)):
        train_task(state, pools, task)
    return state


def weights_of(state):
    return models.weights_digest(state.model)


def test_a_plain_loop_over_the_same_features_ends_in_the_same_bits():
    state = make_train_state(small(*STORED), forked.small_corpus())
    config, model = state.config, state.model
    trains = [x for name, x in model.named_parameters() if not name.startswith("visual.")]
    groups = [
        {
            "params": [x for x in trains if x.ndim > 1],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [x for x in trains if x.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    for task, pools in enumerate(mixtures.task_pools(config, state.corpus)):
        for step in range(config.training.steps):
            batch = mixtures.make_batch(config, state.corpus, pools, task, step)
            image = stored_features.encode_view(config, state.corpus, model, batch.rows, 0)
            distinct, place = batch.texts.unique(return_inverse=True)
            text = models.encode_text(model, state.tokens[distinct])[place]
            logits = model.logit_scale.exp() * image @ text.T
            own = torch.arange(len(image))
            loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trains, config.optimizer.clip)
            for group in optimizer.param_groups:
                group["lr"] = schedules.task_rates(config.schedule, config.steps, task)[step]
            optimizer.step()
            model.logit_scale.data.clamp_(0, models.MAX_LOGIT_SCALE)
    assert models.weights_digest(model) == weights_of(trained(*STORED))


def test_the_first_view_is_what_a_step_sees_without_augmentation():
    """To the bit, if a block of the same size is encoded."""
    seen = []
    for changes in (["method.views=1"], ["training.augment=false"], []):
        state = make_train_state(small(STORED[0], STORED[2], *changes), forked.small_corpus())
        [pools, *_] = mixtures.task_pools(state.config, state.corpus)
        state.store_features(pools, 0)
        [batch] = state.batches(pools, 0, [0])
        seen.append(encode_batch(state, batch, 0, 0))
    stored, fresh, augmented = seen
    with torch.no_grad():
        whole = models.encode_image(
            state.model, fresh.pixels[torch.arange(ENCODE_BLOCK) % len(batch.rows)]
        )
    assert torch.equal(stored.image, whole[: len(batch.rows)])
    assert (fresh.image - augmented.image).abs().max() > 0.01


def test_a_table_that_grows_task_by_task_is_that_of_all_images_at_once():
    state = trained(STORED[0], STORED[2], "method.views=3")
    grown = state.stored_features
    rows = np.flatnonzero(grown.places >= 0)
    run = (state.config, state.corpus, state.model)
    whole = stored_features.store_features(*run, rows[::-1], 3)
    assert torch.equal(grown.table[:, grown.places[rows]], whole.table[:, whole.places[rows]])
    views = whole.table[:, whole.places[rows]]
    assert not torch.equal(views[1], views[0]) and not torch.equal(views[1], views[2])


def test_parts_of_a_batch_read_the_views_of_the_whole():
    state = make_train_state(small(STORED[0], "method.views=3"), forked.small_corpus())
    [pools, *_] = mixtures.task_pools(state.config, state.corpus)
    state.store_features(pools, 0)
    [batch] = state.batches(pools, 0, [1])
    whole, part = encode_batch(state, batch, 0, 1).image, slice(1, 3)
    own = Batch(batch.rows[part], batch.images, batch.texts[part])
    assert torch.equal(encode_batch(state, own, 0, 1, (1, len(batch.rows))).image, whole[part])
    parts = trained(STORED[0], "method.views=3", execution=ExecutionConfig(micro_batch=2))
    assert parts.stored_features is not None


def test_merging_leaves_the_locked_tower_as_it_was_to_the_bit():
    run_config = small(*STORED, "merging.policy=ema", "merging.weight=0.3")
    before = models.load_model(run_config.model, run_config.seeds.init)
    after = execute(run_config, forked.small_corpus()).model
    assert models.weights_digest(after.visual) == models.weights_digest(before.visual)
    assert models.weights_digest(after) != models.weights_digest(before)


def test_a_tower_that_locks_later_trains_before_and_not_after():
    state = make_train_state(small(*STORED, "method.lock_from=1"), forked.small_corpus())
    towers = [models.weights_digest(state.model.visual)]
    for task, pools in enumerate(mixtures.task_pools(state.config, state.corpus)):
        train_task(state, pools, task)
        towers.append(models.weights_digest(state.model.visual))
    assert towers[0] != towers[1] and len(set(towers[1:])) == 1


def test_features_of_another_tower_are_encoded_again():
    state = trained(*STORED)
    [pools, *_] = mixtures.task_pools(state.config, state.corpus)
    before = state.stored_features
    with torch.no_grad():
        next(state.model.visual.parameters()).mul_(1.01)
    run = (state.config, state.corpus, state.model)
    after = stored_features.store_features(*run, pools.update, 1, before)
    assert after.tower != before.tower
    assert not torch.equal(after.read(pools.update, pools.update * 0),
                           before.read(pools.update, pools.update * 0))  # fmt: skip


def test_a_step_on_stored_features_costs_the_text_tower_alone():
    costs = [budgets.method_cost(small(*x)).step for x in ((), STORED[:1], STORED)]
    assert costs[0] > costs[1] > costs[2]


def test_a_budget_pays_for_encoding_each_view_of_each_image_once(monkeypatch):
    monkeypatch.setattr(budgets, "load_data", lambda _: forked.small_corpus())
    run_config = small("training.steps=100", "training.budget=1", STORED[0], "method.views=3")
    budget, full = budgets.task_budget(run_config), budgets.full_cost(run_config)
    cost = budgets.method_cost(run_config)
    pools = mixtures.task_pools(run_config, forked.small_corpus())
    images = len(set(np.concatenate([each.rows for each in pools]).tolist()))
    image = (full.step - cost.step) / 3 / run_config.training.batch  # backward costs twice forward
    encoding = 3 * images * image / 2 * (cost.memory / full.memory)
    assert budget.end == pytest.approx(encoding, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method.views=2"], "views: not used by 'full', only by locked-image"),
        ([*STORED, "method.unlock=1"], "unlock trains blocks of the image tower"),
        (["method.name=locked-image", "method.lock_from=1"], "lock_from needs stored views"),
        (["method.name=lora", "method.image_rate=0.1"], "image_rate: not used by 'lora'"),
    ],
)
def test_settings_that_contradict_stored_features_are_refused(settings, words):
    with pytest.raises(CmpError, match=words):
        small(*settings)


def test_a_run_that_goes_on_encodes_again_to_the_same_bits(tmp_path):
    """Also where the tower locks only after the first task."""
    run_config = small(*STORED, "method.lock_from=1", "merging.policy=ema")
    assert_resumes(run_config, tmp_path, (FIRST, MIDDLE, BOUNDARY))


def test_the_benchmark_compares_a_step_on_stored_features_with_a_full_one():
    report = bench.run_benchmark("features", ["tiny-vit"], 2, 4)
    assert {row["step"].rpartition(", ")[2] for row in report.rows} == {
        "all weights", "stored features", "encoding"
    }  # fmt: skip
