"""Seeds reach what they name and nothing else; jobs and processes do not matter."""

import numpy as np
import pytest
import torch

from cmp import config, mixtures, models
from cmp.data import NOISE, augment
from cmp.project import build_folder
from cmp.runs import identity, store
from cmp.runs.runner import execute
from cmp.seeds import digest, seed_layers, torch_generator
from lab.evidence import studies

SMALL = ["stream.tasks=2", "training.steps=2", "training.batch=12", "evaluation.subset=2"]


def small(*settings):
    return config.parse(config.override({"evaluation": {"full": False}}, [*SMALL, *settings]))


def batches(run_config, corpus):
    """The samples of each task's first step."""
    pools = mixtures.task_pools(run_config, corpus)
    return [
        mixtures.make_batch(run_config, corpus, pool, task, 0) for task, pool in enumerate(pools)
    ]


def test_the_data_seed_moves_every_task_of_one_stream(corpus):
    one, two = (batches(small(f"seeds.data={seed}"), corpus) for seed in (0, 1))
    for a, b in zip(one, two, strict=True):
        assert set(a.rows) != set(b.rows)
        assert a.texts.tolist() != b.texts.tolist()


@pytest.mark.numbers
def test_the_augmentation_seed_moves_every_task_and_no_sample(corpus):
    [one, two] = (batches(small(f"seeds.augment={seed}"), corpus) for seed in (0, 1))
    for task, (a, b) in enumerate(zip(one, two, strict=True)):
        np.testing.assert_array_equal(a.rows, b.rows)
        generators = [torch_generator("augment", seed, task, 0) for seed in (0, 1)]
        noise = [torch.rand(len(a.images), NOISE, generator=each) for each in generators]
        seen = [augment(a.images, each) for each in noise]
        assert not torch.equal(*seen)


def test_the_stream_seed_moves_the_tasks_and_no_weight(corpus):
    one, two = (small(f"seeds.stream={seed}") for seed in (0, 1))
    tasks = [
        [set(pool.update) for pool in mixtures.task_pools(run_config, corpus)]
        for run_config in (one, two)
    ]
    assert all(a != b for a, b in zip(*tasks, strict=True))
    starts = [
        models.weights_digest(models.load_model(run_config.model, run_config.seeds.init))
        for run_config in (one, two)
    ]
    assert starts[0] == starts[1]


def test_the_init_seed_moves_the_weights_and_no_sample(corpus):
    one, two = (small(f"seeds.init={seed}") for seed in (0, 1))
    starts = [
        models.weights_digest(models.load_model(run_config.model, run_config.seeds.init))
        for run_config in (one, two)
    ]
    assert starts[0] != starts[1]
    for a, b in zip(batches(one, corpus), batches(two, corpus), strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)


def test_gpus_that_are_not_used_keep_their_generators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("was seeded"))
    models.create_model("tiny", 1)
    with seed_layers(torch.device("cpu"), "layers", 1):
        drawn = torch.rand(3)
    generator = torch.Generator().manual_seed(int.from_bytes(digest("layers", 1)[:8], "big") >> 1)
    assert torch.equal(drawn, torch.rand(3, generator=generator))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_is_the_same_in_any_process(corpus, tmp_path, monkeypatch, jobs):
    configs = [small(f"seed={number}") for number in range(jobs)]
    digests = [models.weights_digest(execute(run_config, corpus).model) for run_config in configs]
    assert len({*digests}) == jobs
    (tmp_path / "data").symlink_to(build_folder() / "data")
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    studies.compute_runs(configs, jobs)
    ids = [identity.run_id_of(run_config, corpus) for run_config in configs]
    assert [store.load_run(run_id).weights for run_id in ids] == digests
