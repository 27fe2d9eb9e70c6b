"""How many files of the package one reads to follow what happens over and over."""

import sys
from pathlib import Path

import pytest
import torch

import cmp
from cmp import config, execution, merging, mixtures, models, registry
from cmp.errors import CmpError
from cmp.training import ExecutionConfig, create_optimizer, make_train_state, train_step
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


@pytest.mark.parametrize("name", ["small", "tiny-vit"])
def test_compiled_towers_train_alike_and_keep_their_names(corpus, monkeypatch, name):
    """With a compiler that traces alone, to the bit; of texts of all lengths, through adapters."""
    monkeypatch.setattr(execution, "BACKEND", "eager")
    settings = [f"model.name={name}", "training.batch=12", "training.precision=fp32"]
    run_config = config.parse(config.override({}, [*settings, "method.name=lora"]))
    pools, found = mixtures.task_pools(run_config, corpus), []
    for how in (ExecutionConfig(), ExecutionConfig(compile_towers=True)):
        state = make_train_state(run_config, corpus, execution=how)
        optimizer, losses = create_optimizer(state), []
        state.model.train()
        for step in range(3):
            batch = state.loader.batch(pools[0], 0, step)
            losses.append(train_step(state, optimizer, batch, 0, step, 1e-3).loss.item())
        found.append((losses, list(state.model.state_dict()), models.weights_digest(state.model)))
    assert found[0] == found[1]
    assert ExecutionConfig(compile_towers=True).record() == {"execution": "compiled"}


def test_on_a_cpu_nothing_is_compiled(corpus):
    with pytest.raises(CmpError, match="--compile: on a CPU"):
        make_train_state(DEFAULT, corpus, execution=ExecutionConfig(compile_towers=True))


def test_a_tower_that_cannot_be_compiled_whole_stays_as_it_is(corpus, monkeypatch):
    monkeypatch.setattr(execution, "BACKEND", "eager")
    run_config = config.parse(config.override({}, ["training.batch=12"]))
    model = models.load_model(run_config.model, 0)
    forward = type(model.visual).forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(type(model.visual), "forward", broken)
    with pytest.warns(UserWarning, match="--compile: the image tower stays as it is"):
        state = make_train_state(
            run_config, corpus, model, execution=ExecutionConfig(compile_towers=True)
        )
    batch = state.loader.batch(mixtures.task_pools(run_config, corpus)[0], 0, 0)
    assert train_step(state, create_optimizer(state), batch, 0, 0, 1e-3).loss.isfinite()
