"""Nothing that is held out reaches training: not by image, by pixels, by concept, or by batch."""

import hashlib

import numpy as np
import options
import pandas as pd
import pytest

from benchmark import icons
from benchmark.pretraining import PRETRAINING
from cmp import config, mixtures
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests
from cmp.evaluation import list_questions
from lab.evidence import results


@pytest.fixture(scope="module")
def everything():
    """A row an image: dataset, role, split, source, group, and a hash of its pixels."""
    tables = []
    for dataset in embedded_manifests().values():
        opened = packed.read_packed(dataset)
        pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in opened.images]
        about = {"dataset": dataset.name, "role": dataset.role, "pixels": pixels}
        tables.append(opened.table.assign(**about))
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("column", ["source", "pixels"])
def test_no_image_is_both_trained_on_and_held_out(everything, column):
    trained = set(everything.loc[everything["split"] == "train", column])
    held_out = set(everything.loc[everything["split"] != "train", column])
    assert not trained & held_out


def test_validation_and_test_share_no_image(everything):
    validation = set(everything.loc[everything["split"] == "validation", "pixels"])
    test = set(everything.loc[everything["split"] == "test", "pixels"])
    assert not validation & test


def test_new_and_unseen_concepts_are_not_in_the_pool(everything):
    pool = set(everything.loc[everything["role"] == "pool", "group"])
    new = set(everything.loc[everything["role"] == "adapt", "group"])
    unseen = set(everything.loc[everything["dataset"].str.startswith("unseen"), "group"])
    assert not pool & new
    assert not pool & unseen
    assert not new & unseen


def test_no_style_of_the_test_side_is_trained_on(everything):
    trained = everything.loc[everything["split"] == "train", "source"].str.split("/").str[0]
    assert not set(trained) & {*icons.TEST_STYLES, "fluent-contrast", "circle-flags"}


def test_new_icon_heads_are_no_heads_of_the_pool(everything):
    pool = set(everything.loc[everything["dataset"] == "pool-icons-heads", "label"])
    pool |= set(everything.loc[everything["dataset"] == "pool-icons", "label"])
    assert not pool & set(everything.loc[everything["dataset"] == "new-icons", "label"])


@pytest.mark.parametrize("tree", [PRETRAINING, config.PROFILES["quick"]])
def test_batches_hold_train_images_only_and_pretraining_those_of_the_pool(corpus, tree):
    run_config = config.parse(tree)
    pools = mixtures.task_pools(run_config, corpus)
    allowed = np.zeros(len(corpus.table), bool)
    allowed[corpus.rows("train")] = True
    roles = corpus.table["dataset"].map(lambda name: corpus.datasets[name].role)
    if tree is PRETRAINING:
        allowed &= (roles == "pool").to_numpy()
    for task, pool in enumerate(pools):
        for part in (pool.pretraining, pool.update, pool.buffer):
            assert allowed[part].all()
        assert (roles.iloc[pool.pretraining] == "pool").all()
        batch = mixtures.make_batch(run_config, corpus, pool, task, 3)
        assert len(batch.images) == run_config.training.batch


def test_no_batch_image_equals_a_held_out_image(corpus):
    """By pixels, through the same call that training makes."""
    held_out = np.concatenate([corpus.rows("validation"), corpus.rows("test")])
    known = {corpus.images[row].numpy().tobytes() for row in held_out}
    run_config = config.parse(config.PROFILES["quick"])
    for task, pool in enumerate(mixtures.task_pools(run_config, corpus)):
        for step in range(5):
            batch = mixtures.make_batch(run_config, corpus, pool, task, step)
            assert not known & {image.numpy().tobytes() for image in batch.images}


def test_fresh_images_are_of_the_pool_and_in_no_batch_of_a_base(corpus):
    fresh = corpus.rows("fresh")
    owners = corpus.table["dataset"].iloc[fresh]
    assert set(owners) == set(corpus.by_role("pool"))
    pool = np.flatnonzero(corpus.table["dataset"].isin(corpus.by_role("pool")))
    assert 0.18 < len(fresh) / len(pool) < 0.22
    whole = mixtures.replay_pool(corpus, config.Mixture(replay=1.0), 0)
    assert set(whole) | set(fresh) == set(pool)
    assert set(mixtures.replay_pool(corpus, config.Mixture(replay=1.0, pool="fresh"), 0)) == set(
        fresh
    )
    assert not set(whole) & set(fresh)


POOL_SIZES = {"pretraining": 0.11366, "fresh": 0.473, "substitute": 0.20316}
"""Parts of the three pools that hold equally many images."""


@pytest.mark.parametrize("pool", POOL_SIZES)
@pytest.mark.parametrize("seed", options.one_in(6, [*range(20), 1000, 1001]))
def test_no_batch_holds_a_name_that_replay_lacks(corpus, pool, seed):
    """Of all images that are replayed; and the three pools are of one size for every seed."""
    mixture = config.Mixture(pool=pool, select="concepts", replay=POOL_SIZES[pool])
    rows = mixtures.replay_pool(corpus, mixture, seed)
    assert len(rows) == 540
    replayed = set(corpus.table["label"].array[rows])
    labels = corpus.table["label"].array[list_questions(corpus)["row"]]
    groups = results.name_groups(corpus, seed)
    lacking, kept = (set(labels[groups[name]]) for name in ("lacking", "kept"))
    assert not replayed & lacking
    assert not lacking & kept
    if pool != "substitute":
        assert len(replayed & kept) / len(kept) > 0.25
    new = {name for each in corpus.by_role("adapt") for name in corpus.classes[each]}
    assert not new & (lacking | kept)
    assert min(len(lacking), len(kept)) > 350


def test_the_replay_only_control_is_nested_in_the_mixture(corpus):
    """It draws from the pool what the mixture draws, in the same order, and nothing else."""
    tree = {"mixture": {"replay": 0.5, "select": "concepts"}, "stream": {"tasks": 3}}
    whole = config.parse(tree)
    alone = {"pretraining": 1.0, "update": 0.0, "buffer": 0.0}
    control = config.parse(tree | {"mixture": tree["mixture"] | alone, "training": {"batch": 22}})
    for task in (1, 2):
        drawn = []
        for one in (whole, control):
            pools = mixtures.task_pools(one, corpus)[task]
            rows = mixtures.batch_rows(pools, 0, task, 5)
            drawn.append(rows[-22:])
        assert (drawn[0] == drawn[1]).all()
