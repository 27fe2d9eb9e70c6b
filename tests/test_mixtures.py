"""Batches: the ratios are met, every sample has its turn, any step stands alone; and what they are
drawn from: buffers that never hold the future, pools that are what was asked for."""

import dataclasses
import itertools
import math
import re
from collections import Counter

import forked
import numpy as np
import options
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

from cmp import buffers, config, mixtures, registry
from cmp.buffers import choose_lowest, rank_within_groups
from cmp.config import Mixture
from cmp.errors import CmpError
from cmp.mixtures import (
    ROLE_OF_POOL,
    MixtureSampler,
    Pools,
    batch_counts,
    batch_rows,
    empty_shares,
    is_kept_concept,
    largest_batch,
    replay_pool,
    sample,
    sample_evenly,
)
from cmp.readers import class_statistics, class_tables
from cmp.runs.runner import Observer, execute
from cmp.seeds import numpy_generator
from lab import analyses


@st.composite
def shares(draw):
    weights = draw(st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any))
    p, d, b = (weight / sum(weights) for weight in weights)
    return Mixture(p, d, b)


@given(shares(), st.integers(2, 600))
def test_parts_fill_the_batch_and_follow_the_ratios(mixture, batch):
    sizes = batch_counts(mixture, batch, empty_buffer=False)
    ratios = (mixture.pretraining, mixture.update, mixture.buffer)
    assert sum(sizes) == batch
    for size, ratio in zip(sizes, ratios, strict=True):
        assert size == 0 if ratio == 0 else abs(size - batch * ratio) < 1 + 1e-6


@given(shares(), st.integers(2, 600))
def test_an_empty_buffer_leaves_its_samples_to_the_others(mixture, batch):
    full, empty = (batch_counts(mixture, batch, flag) for flag in (False, True))
    assert sum(empty) == batch
    assert empty[2] == 0
    gained = [new - old for new, old in zip(empty[:2], full[:2], strict=True)]
    assert min(gained) >= 0
    if mixture.pretraining > 0 and mixture.update > 0:
        assert abs(gained[0] - gained[1]) <= 1
    else:
        assert max(gained) == full[2]


def test_parts_of_the_reference():
    """512 by .33/.34/.33: 169/175/168, and 253/259 in the first task (order P, D, B)."""
    mixture = Mixture(0.33, 0.34, 0.33)
    assert batch_counts(mixture, 512, empty_buffer=False) == (169, 175, 168)
    assert batch_counts(mixture, 512, empty_buffer=True) == (253, 259, 0)


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 5))
def test_every_sample_has_its_turn(size, count, task):
    pool = np.arange(100, 100 + size)
    steps = -(-3 * size // count)
    drawn = np.concatenate([sample(pool, count, "x", 0, task, step) for step in range(steps)])
    passes = [drawn[epoch * size : (epoch + 1) * size].tolist() for epoch in range(3)]
    assert all(sorted(each) == pool.tolist() for each in passes)
    if size > 10:  # each in an order of its own
        assert passes[0] != passes[1] != passes[2] != passes[0]


@given(st.integers(0, 30), st.integers(0, 1000))
def test_a_step_needs_no_other_step(step, seed):
    pool = np.arange(37)
    alone = sample(pool, 8, "x", seed, 2, step)
    for before in range(step):
        sample(pool, 8, "x", seed, 2, before)
    np.testing.assert_array_equal(alone, sample(pool, 8, "x", seed, 2, step))


def test_seeds_tasks_and_pools_differ():
    pool = np.arange(1000)
    draws = {
        tuple(sample(pool, 8, name, seed, task, 0))
        for name in ("update", "buffer")
        for seed in range(3)
        for task in range(3)
    }
    assert len(draws) == 18


@given(shares(), st.integers(2, 300), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_the_largest_batch_takes_no_sample_twice(mixture, batch, sizes):
    pools = Pools(*(1000 * i + np.arange(size) for i, size in enumerate(sizes)))
    largest = largest_batch(pools, mixture, batch)
    assert largest <= batch
    if largest:
        counts = batch_counts(mixture, largest, empty_buffer=sizes[2] == 0)
        rows = batch_rows(dataclasses.replace(pools, counts=counts), 0, 0, 0)
        assert len(set(rows)) == len(rows) == largest
        assert not empty_shares(mixture, largest, sizes[2] == 0)
    if largest < batch:
        taken = batch_counts(mixture, largest + 1, empty_buffer=sizes[2] == 0)
        is_too_large = any(part > size for part, size in zip(taken, sizes, strict=True))
        assert is_too_large or empty_shares(mixture, largest + 1, sizes[2] == 0)


# --- a batch sampler for a training loop of one's own


def make_sampler(sizes=(90, 60, 30), shares=(0.25, 0.25, 0.5), batch=16, steps=20, **options):
    return MixtureSampler(*(range(size) for size in sizes), shares, batch, steps, **options)


@given(
    st.lists(st.integers(1, 60), min_size=3, max_size=3), shares(), st.integers(2, 40),
    st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_a_sampler_keeps_the_shares_and_repeats_nothing_within_a_pass(
    sizes, mixture, batch, empty, task
):
    sizes = (*sizes[:2], 0) if empty else tuple(sizes)
    ratios = (mixture.pretraining, mixture.update, mixture.buffer)
    if empty and ratios[2] == 1:
        return
    if empty_shares(mixture, batch, empty):
        with pytest.raises(CmpError, match=r"MixtureSampler: batch: .* has no sample of mixture\."):
            make_sampler(sizes, ratios, batch)
        return
    sampler = make_sampler(sizes, ratios, batch, 12, task=task)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12
    bounds = np.cumsum([0, *sizes])
    counts = batch_counts(mixture, batch, empty_buffer=empty)
    for number, (low, high, count) in enumerate(zip(bounds, bounds[1:], counts, strict=False)):
        chosen = [[index for index in indices if low <= index < high] for indices in batches]
        assert {len(indices) for indices in chosen} == {count}, number
        together = list(itertools.chain(*chosen))
        for start in range(0, len(together) - sizes[number] + 1, max(sizes[number], 1)):
            assert sorted(together[start : start + sizes[number]]) == list(range(low, high))
    assert {len(indices) for indices in batches} == {batch}
    assert list(sampler) == batches


def test_other_seeds_and_tasks_of_a_sampler_differ():
    options = [{}, {"task": 1}, {"task": 2}, {"seed": 1}, {"seed": 1, "task": 1}]
    draws = {tuple(itertools.chain(*make_sampler(**each))) for each in options}
    assert len(draws) == len(options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_works_in_a_data_loader_over_concatenated_data(workers):
    parts = range(90), range(1000, 1060), range(2000, 2030)
    sampler = MixtureSampler(*parts, shares=(0.25, 0.25, 0.5), batch=16, steps=5, seed=3)
    loader = DataLoader(ConcatDataset(parts), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 5
    batches = [batch.tolist() for batch in loader]
    for numbers in batches:
        assert Counter(number // 1000 for number in numbers) == {0: 4, 1: 4, 2: 8}
    assert [sorted(batch.tolist()) for batch in loader] == [sorted(batch) for batch in batches]


def test_a_sampler_refuses_what_it_cannot_do():
    with pytest.raises(CmpError, match=r"shares \(0\.5, 0\.5, 0\.5\): .* sum to one"):
        make_sampler(shares=(0.5, 0.5, 0.5))
    with pytest.raises(CmpError, match=r"mixture\.pretraining: .* 4 samples from an empty pool"):
        list(make_sampler(sizes=(0, 60, 30)))


# --- shares that vanish


def refused_batch(settings, corpus):
    """The batch that a refusal of a run names."""
    words = r"training\.batch: \d+ has no sample of mixture\..* use a batch of (\d+)"
    with pytest.raises(CmpError, match=words) as refused:
        mixtures.task_pools(forked.small_config(*settings), corpus)
    return int(re.search(words, str(refused.value))[1])


@pytest.mark.defect
@pytest.mark.parametrize(
    ("shares", "batch", "smallest"),
    [
        ((0.99, 0.01, 0.0), 64, 100),
        ((0.5, 0.48, 0.02), 32, 50),
        ((1 / 3, 1 / 3, 1 / 3), 2, 3),
        ((1 - 1e-6, 1e-6, 0.0), 64, 1_000_000),
    ],
)
def test_a_share_that_gets_no_sample_is_refused_with_the_smallest_batch(shares, batch, smallest):
    keys = ("pretraining", "update", "buffer")
    settings = [f"mixture.{key}={share!r}" for key, share in zip(keys, shares, strict=True)]
    corpus = forked.small_corpus()
    assert refused_batch([*settings, f"training.batch={batch}"], corpus) == smallest
    with pytest.raises(
        CmpError, match=rf"MixtureSampler: batch: {batch} .* batch of {smallest}, or set"
    ):
        make_sampler(shares=shares, batch=batch)
    make_sampler(shares=shares, batch=smallest)
    smaller = range(2, min(smallest, 1000))
    assert all(empty_shares(Mixture(*shares), size, False) for size in smaller)


@pytest.mark.defect
def test_a_share_that_vanishes_on_the_way_is_refused_with_the_smallest_batch_of_all_tasks():
    tiny = ["mixture.last=[0.5,0.5,5e-324]", "training.batch=12"]
    with pytest.raises(CmpError, match=r"mixture\.buffer 4\.9\S*e-324; .*, or set the share"):
        mixtures.task_pools(forked.small_config(*tiny), forked.small_corpus())
    last = ["mixture.last=[0.9,0.05,0.05]", "training.batch=12"]
    smallest = refused_batch(last, forked.small_corpus())
    assert smallest == 20
    mixtures.task_pools(forked.small_config(last[0], "training.batch=20"), forked.small_corpus())


@pytest.mark.defect
def test_the_share_of_a_buffer_counts_where_there_is_one():
    shares = ["mixture.pretraining=0.5", "mixture.update=0.49", "mixture.buffer=0.01"]
    settings = [*shares, "training.batch=8"]
    mixtures.task_pools(forked.small_config(*settings, "stream.tasks=1"), forked.small_corpus())
    assert refused_batch(settings, forked.small_corpus()) == 100


SLOW = ["mixture.pretraining=.9", "mixture.update=.1", "mixture.buffer=0"]


@pytest.mark.parametrize(
    ("tasks", "settings", "fix"),
    [
        (522, ["mixture.pretraining=.05", "mixture.update=.9", "mixture.buffer=.05"], "use fewer"),
        (100, [*SLOW, "mixture.last=[0.0, 0.1, 0.9]"], r"mixture\.last .* to at least 0\.016"),
    ],
)
def test_what_a_refused_batch_suggests_is_not_refused_in_turn(corpus, tasks, settings, fix):
    tree = config.override({}, [f"stream.tasks={tasks}", *settings])
    with pytest.raises(CmpError, match=fix):
        mixtures.task_pools(config.parse(tree), corpus)


# --- choosing by keys


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 45), st.integers(0, 40))
def test_the_lowest_of_all_are_the_lowest_of_a_part(values, count, part):
    keys = [np.arange(len(values))[::-1], np.array(values)]
    chosen = choose_lowest(keys, count)
    expected = sorted(range(len(values)), key=lambda place: (values[place], -place))[:count]
    assert chosen.tolist() == sorted(expected)
    within = choose_lowest([key[:part] for key in keys], count)
    assert {place for place in chosen if place < part} <= set(within)
    assert choose_lowest(keys, None).tolist() == list(range(len(values)))


@given(st.lists(st.integers(0, 4), max_size=40))
def test_ranks_count_within_groups(groups):
    priority = np.random.default_rng(0).permutation(len(groups))
    ranks = rank_within_groups(np.array(groups, int), priority)
    for place, group in enumerate(groups):
        before = [p for p, g in zip(priority, groups, strict=True) if g == group]
        assert ranks[place] == sum(p < priority[place] for p in before)


# --- buffers


@pytest.mark.usefixtures("own_options")
def test_a_buffer_may_return_lists():
    @registry.register("buffer", "mine")
    def keep(history, capacity, seed):
        return list(range(0, len(history.rows), 2)), (history.task[::2] % 2).tolist()

    run_config, corpus = forked.small_config("mixture.policy=mine"), forked.small_corpus()
    for pools in mixtures.task_pools(run_config, corpus):
        if len(pools.buffer):
            assert {*pools.buffer} <= {*itertools.chain(*pools.members)}
        assert len(batch_rows(pools, 0, 0, 0)) == run_config.training.batch


@st.composite
def histories(draw):
    """Some updates of some classes each; a class arrives in one update, as in a stream."""
    sizes = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=5))
    total = sum(map(sum, sizes))
    labels = np.repeat(range(sum(map(len, sizes))), list(itertools.chain(*sizes)))
    rows = np.random.default_rng(draw(st.integers(0, 9))).permutation(total)
    label_of = np.empty(total, int)
    label_of[rows] = labels
    updates = np.split(rows, np.cumsum([sum(counts) for counts in sizes]))[:-1] if sizes else []
    return [np.sort(update) for update in updates], label_of


def buffer_rows(policy, updates, labels, capacity, seed=0):
    """The corpus positions that a buffer keeps, and their groups."""
    history = buffers.buffer_history(updates, labels)
    kept, groups = registry.get_option("buffer", policy).value(history, capacity, seed)
    return history.rows[kept], groups


def allowed_capacity(policy, capacity):
    """A capacity that a buffer takes: none, one that it must have, or the one given."""
    rule = registry.get_option("buffer", policy).facts["capacity"]
    return {"none": None, "required": capacity or 5, "optional": capacity}[rule]


@pytest.mark.parametrize("policy", registry.option_names("buffer"))
@given(histories(), st.none() | st.integers(1, 60), st.integers(0, 3))
def test_a_buffer_holds_the_past_and_takes_nothing_back(policy, history, capacity, seed):
    (updates, labels), before = history, set()
    capacity = allowed_capacity(policy, capacity)
    for count in range(len(updates) + 1):
        rows, groups = buffer_rows(policy, updates[:count], labels, capacity, seed)
        arrived = set().union(*map(set, updates[:count]))
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert set(rows) <= before | (set(updates[count - 1]) if count else set())
        assert len(rows) == (len(arrived) if capacity is None else min(capacity, len(arrived)))
        again, _ = buffer_rows(policy, updates[:count], labels, capacity, seed)
        assert (rows == again).all()
        assert groups is None or len(groups) == len(rows)
        before = set(rows)


@given(histories(), st.integers(1, 60))
def test_only_balanced_buffers_draw_from_groups(history, capacity):
    for policy in ("unlimited", "reservoir", "class-balanced", "task-balanced"):
        _, groups = buffer_rows(policy, *history, allowed_capacity(policy, capacity))
        assert (groups is None) == (policy in ("unlimited", "reservoir"))


@given(histories(), st.integers(1, 60))
def test_balanced_buffers_hold_as_many_of_each_group(history, capacity):
    updates, labels = history
    task_of = {row: task for task, update in enumerate(updates) for row in update}
    for policy, group_of in (("class-balanced", labels), ("task-balanced", task_of)):
        rows, groups = buffer_rows(policy, updates, labels, capacity)
        assert [group_of[row] for row in rows] == groups.tolist()
        kept, arrived = Counter(groups.tolist()), Counter(group_of[row] for row in task_of)
        quota = max(kept.values(), default=0)
        assert all(kept[group] >= min(quota - 1, count) for group, count in arrived.items())


def test_a_reservoir_is_uniform():
    """Each of 120 images is kept equally often over 3,000 seeds: chi-square, p = 0.001; and so is
    each pair of images of the same and of different updates."""
    updates = [np.arange(0, 10), np.arange(10, 70), np.arange(70, 120)]
    labels, seeds, size = np.arange(120), 3000, 30
    kept = np.zeros((seeds, 120))
    for seed in range(seeds):
        kept[seed, buffer_rows("reservoir", updates, labels, size, seed)[0]] = 1
    expected = seeds * size / 120
    # counts of a fixed total without replacement spread less than Poisson, by 1 - size/120
    chi_square = ((kept.sum(axis=0) - expected) ** 2 / (expected * (1 - size / 120))).sum()
    assert 75.5 < chi_square < 173.6  # 0.1% and 99.9% of chi-square with 119 degrees
    pairs, both = [(0, 5), (3, 60), (15, 100), (80, 81)], size * (size - 1) / (120 * 119)
    for one, other in pairs:
        together = (kept[:, one] * kept[:, other]).mean()
        assert abs(together - both) < 4 * np.sqrt(both / seeds)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 30))
def test_every_group_has_its_turn_and_within_it_every_image(seed, task, count):
    sizes = [1, 2, 5, 3]
    groups = np.repeat([7, 3, 9, 4], sizes)
    pool = 100 + np.arange(len(groups))
    steps, members = -(-4 * 5 // count), Pools(pool[:0], pool[:0], pool, groups).members
    drawn = [sample_evenly(members, count, seed, task, step) for step in range(steps)]
    together = np.concatenate(drawn)
    assert len(together) == steps * count
    group_of = dict(zip(pool, groups, strict=True))
    for turn in range(len(together) // 4):
        assert sorted(group_of[row] for row in together[4 * turn : 4 * turn + 4]) == [3, 4, 7, 9]
    for group, size in zip([7, 3, 9, 4], sizes, strict=True):
        own = [row for row in together if group_of[row] == group]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size
    alone = sample_evenly(members, count, seed, task, steps - 1)
    assert (alone == drawn[-1]).all()


def test_a_group_is_shuffled_once_per_pass_and_not_per_sample(monkeypatch):
    shuffles = []

    def generator(name, *counters):
        shuffles.append((name, *counters))
        return numpy_generator(name, *counters)

    monkeypatch.setattr(mixtures, "numpy_generator", generator)
    groups = np.repeat([5, 2], [30, 10])
    pools = Pools(np.arange(0), np.arange(100, 104), np.arange(40), groups, counts=(0, 2, 8))
    seed = 987  # of no other test: permutations are kept
    for step in range(5):
        batch_rows(pools, seed, 3, step)
    member = [shuffle for shuffle in shuffles if shuffle[0] == "data/member"]
    assert len(member) == len(set(member)) == 3  # 20 samples of each group: two passes of one


@pytest.mark.parametrize("capacity", ["null", "30"])
@pytest.mark.parametrize("policy", registry.option_names("buffer"))
def test_no_buffer_of_a_run_holds_the_present_or_the_future(policy, capacity):
    rule = registry.get_option("buffer", policy).facts["capacity"]
    capacity = {"none": "null", "required": "30"}.get(rule, capacity)
    run_config = forked.small_config(f"mixture.policy={policy}", f"mixture.capacity={capacity}")
    pools = mixtures.task_pools(run_config, forked.small_corpus())
    for task, pool in enumerate(pools):
        earlier = set().union(*[set(before.update) for before in pools[:task]])
        assert set(pool.buffer) <= earlier
        size = len(earlier) if capacity == "null" else min(int(capacity), len(earlier))
        assert len(pool.buffer) == size
        counts = batch_counts(run_config.mixture, 12, len(pool.buffer) == 0)
        for step in range(3):
            batch = batch_rows(dataclasses.replace(pool, counts=counts), 0, task, step)
            assert set(batch[4 + 2 * (task == 0) :]) <= earlier | set(pool.pretraining)


# --- replay of a pool


@given(st.floats(0.001, 1.0), st.integers(0, 5))
def test_a_part_of_the_pool_is_kept(share, seed):
    corpus = forked.small_corpus()
    for pool, role in ROLE_OF_POOL.items():
        split = "fresh" if pool == "fresh" else "train"
        whole = np.concatenate([corpus.rows(split, dataset=d) for d in corpus.by_role(role)])
        for select in options.choices()["mixture.select"]:
            kept = replay_pool(corpus, Mixture(pool=pool, replay=share, select=select), seed)
            most = max(1, round(share * len(whole)))
            if select == "concepts":
                labels = corpus.table["label"].array[whole]
                most = min(most, is_kept_concept(labels, seed).sum())
            assert len(kept) == len(set(kept)) == most
            assert set(kept) <= set(whole)
            assert (np.diff(kept) > 0).all()


def test_half_of_the_concepts_are_replayed_and_every_pool_is_split_alike(corpus):
    labels = {}
    for pool in ROLE_OF_POOL:
        rows = replay_pool(corpus, Mixture(pool=pool, replay=1.0, select="concepts"), 3)
        labels[pool] = set(corpus.table["label"].array[rows])
        whole = replay_pool(corpus, Mixture(pool=pool, replay=1.0), 3)
        assert 0.45 < len(rows) / len(whole) < 0.55
    known = sorted(set(corpus.table["label"]))
    kept = {name for name, is_kept in zip(known, is_kept_concept(known, 3), strict=True) if is_kept}
    assert all(names <= kept for names in labels.values())
    assert not labels["pretraining"] & labels["substitute"] - kept
    other = replay_pool(corpus, Mixture(replay=1.0, select="concepts"), 4)
    assert set(corpus.table["label"].array[other]) != labels["pretraining"]


def test_a_pool_of_one_class_name_that_is_left_out_is_refused(corpus):
    mixture = Mixture(pretraining=1.0, update=0.0, buffer=0.0, replay=1.0, select="concepts")
    one = corpus.table.assign(label="one name")
    seed = next(seed for seed in range(20) if not is_kept_concept(["one name"], seed)[0])
    with pytest.raises(CmpError, match="'concepts': no class name of the pool is in the half"):
        replay_pool(dataclasses.replace(corpus, table=one), mixture, seed)


def test_a_random_part_depends_on_the_seed_and_the_best_aligned_hardly_does():
    corpus = forked.small_corpus()
    parts_of = {
        select: [set(replay_pool(corpus, Mixture(select=select), seed)) for seed in (3, 4)]
        for select in options.choices()["mixture.select"]
    }
    assert parts_of["random"][0] != parts_of["random"][1]
    assert parts_of["clustered"][0] != parts_of["clustered"][1]
    assert parts_of["aligned"][0] == parts_of["aligned"][1]


def test_selections_choose_by_their_traits(corpus):
    whole = replay_pool(corpus, Mixture(replay=1.0), 0)
    statistics = class_tables.pool_statistics(corpus, whole).set_index(whole)
    best = replay_pool(corpus, Mixture(select="aligned"), 0)
    rest = np.setdiff1d(whole, best)
    assert statistics["alignment"][best].min() >= statistics["alignment"][rest].max()
    even = statistics["cluster"][replay_pool(corpus, Mixture(select="clustered"), 0)].value_counts()
    chance = statistics["cluster"][replay_pool(corpus, Mixture(), 0)].value_counts()
    assert even.max() - even.min() <= 1 < chance.max() - chance.min()


def test_a_pool_that_is_not_there_is_refused():
    whole = forked.small_corpus()
    datasets = {n: d for n, d in whole.datasets.items() if d.role != "substitute"}
    without = dataclasses.replace(whole, datasets=datasets)
    run_config = forked.small_config("mixture.pool=substitute")
    with pytest.raises(
        CmpError, match=r"mixture\.pool: 'substitute': these data have no such pool"
    ):
        mixtures.task_pools(run_config, without)


@pytest.fixture
def without_pool():
    """Data in which no set has the role pool."""
    whole = forked.small_corpus()
    datasets = {n: d for n, d in whole.datasets.items() if d.role != "pool"}
    return dataclasses.replace(whole, datasets=datasets)


def run_losses(run_config, corpus):
    losses = []
    observer = Observer(lambda task, step, result, model: losses.append(result.loss.item()))
    execute(run_config, corpus, observer)
    return losses


def test_without_a_pool_update_and_buffer_take_its_share(without_pool):
    run_config = forked.small_config("evaluation.full=false")
    with pytest.warns(UserWarning, match=r"no dataset has the role pool.*; its share goes to"):
        losses = run_losses(run_config, without_pool)
    shares = ("mixture.pretraining=0", "mixture.update=0.5", "mixture.buffer=0.5")
    half = forked.small_config("evaluation.full=false", *shares)
    assert losses == run_losses(half, without_pool)
    uneven = forked.small_config(
        "mixture.pretraining=0.5", "mixture.update=0.1", "mixture.buffer=0.4"
    )
    with pytest.warns(UserWarning, match="its share goes to"):
        fitted = mixtures.fit_mixture(uneven, without_pool)
        report = class_statistics.stream_report(uneven, without_pool)
        assert analyses.sample_counts(uneven, without_pool).sum() == 3 * 4 * 4
    assert fitted.mixture.shares == pytest.approx((0, 0.2, 0.8))
    assert (
        report["passes"].tolist()
        == class_statistics.stream_report(fitted, without_pool)["passes"].tolist()
    )
    assert mixtures.fit_mixture(half, without_pool) is half
    assert mixtures.fit_mixture(run_config, forked.small_corpus()) is run_config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("mixture.pool=fresh",), "'fresh': these data have no such pool"),
        (("mixture.pretraining=1", "mixture.update=0", "mixture.buffer=0"), "no such pool"),
        (("mixture.last=[0.1, 0.5, 0.4]",), "'pretraining': these data have no such pool"),
        (("method.name=distillation",), "without a dataset of role pool.*'distillation' needs"),
    ],
)
@pytest.mark.filterwarnings("ignore:mixture.pretraining")
def test_what_needs_a_pool_is_refused_without_one(without_pool, settings, words):
    with pytest.raises(CmpError, match=words):
        mixtures.task_pools(forked.small_config(*settings), without_pool)


@given(shares(), shares(), st.integers(2, 30))
def test_a_mixture_changes_along_a_line(first, last, tasks):
    mixture = dataclasses.replace(first, last=last.shares)
    assert mixture.at(0, tasks).shares == pytest.approx(first.shares)
    assert mixture.at(tasks - 1, tasks).shares == pytest.approx(last.shares)
    way = np.array([mixture.at(task, tasks).shares for task in range(tasks)])
    assert np.diff(way, n=2, axis=0) == pytest.approx(0, abs=1e-12)
    assert first.at(tasks - 1, tasks) is first


def test_a_run_follows_a_mixture_that_changes(corpus):
    changes = ["mixture.pretraining=0.0", "mixture.update=1.0", "mixture.buffer=0.0"]
    tree = config.override(config.profile("quick"), [*changes, "mixture.last=[0.5,0.25,0.25]"])
    run = config.parse(tree)
    pools = mixtures.task_pools(run, corpus)
    batches = [mixtures.make_batch(run, corpus, pool, task, 0) for task, pool in enumerate(pools)]
    assert [batch.replayed for batch in batches] == [0, 8, 16, 24, 32]
    assert np.isin(batches[0].rows, pools[0].update).all()


SHARES = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(lambda parts: parts[1] > 0)


@given(SHARES, st.integers(8, 600), st.tuples(*[st.integers(0, 3000)] * 3), st.floats(0.5, 9))
def test_small_updates_fill_no_batch(parts, batch, sizes, passes):
    """A batch asks no pool for more than it holds, and shows an image of the update about as often
    as it was asked to."""
    total = sum(parts)
    mixture = Mixture(*(part / total for part in parts))
    held_p, held_d, held_b = sizes[0], sizes[1] + 1, sizes[2]
    usual = mixtures.batch_counts(mixture, batch, empty_buffer=held_b == 0)
    p, d, b = mixtures.counts_for_passes(mixture, batch, (held_p, held_d, held_b), passes)
    assert 0 <= p <= held_p and 0 <= b <= held_b and 0 < d <= held_d
    assert p + d + b <= batch
    assert (p == 0) or mixture.pretraining > 0
    assert (b == 0) or mixture.buffer > 0
    is_enough = all(n <= held for n, held in zip(usual, (held_p, held_d, held_b), strict=True))
    if is_enough and passes * held_d >= mixtures.MIN_STEPS * usual[1]:
        assert (p, d, b) == usual
    steps = max(mixtures.MIN_STEPS, math.ceil(passes * held_d / d))
    shown = steps * d / held_d
    assert shown >= passes - 1e-9
    if p + b:  # the update alone fills a batch that nothing else can
        assert shown <= passes + max(mixtures.MIN_STEPS, d) / held_d


def test_a_sample_has_one_of_the_captions_of_its_image_and_each_gets_its_turn():
    corpus, run_config = forked.small_corpus(), forked.small_config()
    images = len(corpus.caption_starts) - 1
    three = dataclasses.replace(
        corpus, caption_starts=np.arange(images + 1) * 3, caption_ids=np.arange(images * 3)
    )
    pools = mixtures.task_pools(run_config, corpus)[1]
    places = set()
    for step in range(20):
        batch = mixtures.make_batch(run_config, three, pools, 1, step)
        assert (batch.texts.numpy() // 3 == batch.rows).all()
        places |= {*(batch.texts.numpy() % 3)}
    assert places == {0, 1, 2}


def test_passes_give_each_task_its_own_steps():
    corpus = forked.small_corpus()
    run_config = forked.small_config("training.passes=2.6", "stream.tasks=3")
    fitted = mixtures.fit_steps(run_config, corpus)
    pools = mixtures.task_pools(run_config, corpus)
    wanted = [max(10, math.ceil(2.6 * len(each.update) / each.counts[1])) for each in pools]
    assert list(fitted.steps) == wanted == list(mixtures.fit_steps(fitted, corpus).steps)
    frozen = forked.small_config(
        "training.passes=2.6", "stream.tasks=3", "training.task_steps=[5, 7]"
    )
    assert mixtures.fit_steps(frozen, corpus).steps == (5, 7, wanted[2])


NO_UPDATE = ["mixture.pretraining=0.5", "mixture.update=0", "mixture.buffer=0.5"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.passes=2", "training.budget=1"], "passes"),
        (["training.task_steps=[1, 2, 3]", "training.budget=1"], "task_steps"),
        (["training.passes=2", *NO_UPDATE], "so mixture.update must be above 0"),
        (["training.passes=0"], "training.passes"),
        (["mixture.policy=reservoir"], "policy 'reservoir' needs a capacity"),
        (["mixture.capacity=5"], "capacity 5: 'unlimited' has none"),
        (["mixture.last=[0.5, 0.5, 0.5]"], "sum of last must be 1, not 1.5"),
        (["method.name=distillation", "mixture.last=[0.0, 0.5, 0.5]"], "needs replayed images"),
    ],
)
def test_what_does_not_go_with_the_rest_is_refused(settings, words):
    with pytest.raises(CmpError) as error:
        forked.small_config("stream.tasks=3", *settings)
    assert words in str(error.value)
