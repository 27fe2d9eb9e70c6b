"""What every choice of a config promises, by table and not by name."""

import copy
import importlib
import inspect
import json
from types import SimpleNamespace

import forked
import options
import pytest
import torch
from typer.testing import CliRunner

from cmp import cli, config, mixtures, models, parsing, registry
from cmp.errors import CmpError
from cmp.runs.runner import Observer, execute
from cmp.training import make_train_state, train_task

PLAIN = {
    "model.start",
    "stream.reverse",
    "stream.equal",
    "training.augment",
    "training.precision",
    "optimizer.carry",
    "evaluation.full",
    "evaluation.split",
    "method.fold",
    "merging.reverse",
    "merging.shares",
    "mixture.select",
    "merging.zero",
}
"""Choices that no table stands behind."""


def test_names_are_those_of_the_tables():
    choices = options.choices()
    assert choices.keys() == {*options.TABLES, *PLAIN}
    for key, table in options.TABLES.items():
        assert set(choices[key]) == set(table), key


def test_every_choice_says_what_it_is():
    values = [
        value
        for table in options.TABLES.values()
        if isinstance(table, dict)
        for value in table.values()
    ]
    for kind in registry.KINDS:
        for name in registry.option_names(kind):
            values.append(describer(kind, name))
    for value in values:
        assert value is None or inspect.getdoc(value), value


def describer(kind, name):
    """What has the description of an option: its function, or of a method its module."""
    option = registry.get_option(kind, name)
    if kind == "method" and not option.sources:
        return importlib.import_module(f"cmp.methods.{name.replace('-', '_')}")
    return option.value


@pytest.mark.parametrize("settings", options.SETTINGS, ids=" ".join)
def test_every_choice_can_be_made_from_a_shell(settings):
    usual = [f"schedule.name={config.Schedule().name}", "stream.tasks=2"]  # which fit all of them
    made = dict(config.flat_keys(config.read_config("quick", [*usual, *settings]).to_dict()))
    for key, _, value in (setting.partition("=") for setting in settings):
        assert json.loads(json.dumps(made[key])) == parsing.parse_yaml(f"it: {value}")["it"]


def test_a_choice_that_does_not_fit_a_run_is_refused_by_its_dry_run():
    peaks = ["schedule.meta=free", "schedule.peaks=[1.0, 0.5]", "--dry-run"]
    result = CliRunner().invoke(cli.app, ["run", "quick", *peaks])
    assert "schedule.peaks: 2 peaks for 5 tasks" in str(result.exception)


@pytest.mark.parametrize("name", options.choices()["method.name"])
def test_a_method_trains_what_it_says_and_nothing_else(name):
    run_config = options.small(f"method.name={name}", "stream.tasks=1")
    state = make_train_state(run_config, forked.small_corpus(), models.create_model("tiny", 0))
    before = copy.deepcopy(state.model.state_dict())
    train_task(state, mixtures.task_pools(run_config, state.corpus)[0], 0)
    trainable = {key for key, x in state.model.named_parameters() if x.requires_grad}
    moved = {k for k, x in state.model.state_dict().items() if not torch.equal(x, before[k])}
    assert moved == trainable != set()


def test_locked_towers_are_the_ones_that_stay():
    trains = {}
    for name in ("full", "locked-image", "locked-text"):
        run_config = options.small(f"method.name={name}")
        model = make_train_state(
            run_config, forked.small_corpus(), models.create_model("tiny", 0)
        ).model
        trains[name] = {key for key, x in model.named_parameters() if x.requires_grad}
    image = {key for key in trains["full"] if key.startswith("visual.")}
    assert trains["locked-text"] == image
    assert trains["locked-image"] == trains["full"] - image
    assert "logit_scale" in trains["locked-image"]


@pytest.mark.numbers
def test_a_run_with_ema_deploys_and_trains_on_from_the_average():
    run_config = options.small(
        "merging.policy=ema", "merging.weight=0.25", "training.precision=fp32"
    )  # fmt: skip
    ends, deployed = [], []
    corpus, last = forked.small_corpus(), run_config.training.steps - 1

    def step(task, number, result, model):
        if number == last:
            ends.append(copy.deepcopy(model.state_dict()))

    result = execute(run_config, corpus, Observer(step))
    zero = models.load_model(run_config.model, 0).state_dict()
    for end in ends:
        previous = deployed[-1] if deployed else zero
        deployed.append({name: 0.25 * x + 0.75 * previous[name] for name, x in end.items()})
    for name, x in result.model.state_dict().items():
        torch.testing.assert_close(x, deployed[-1][name])


class Large(torch.nn.Module):
    """As much of a network as is looked at."""

    visual = SimpleNamespace(image_size=(224, 224), preprocess_cfg={})


def test_a_model_of_other_images_is_refused():
    run_config = options.small("model.name=ViT-B-32", "model.start=random")
    with pytest.raises(CmpError, match=r"takes images of 224 pixels, but the data have 32"):
        make_train_state(run_config, forked.small_corpus(), Large())
