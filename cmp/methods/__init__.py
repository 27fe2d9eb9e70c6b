"""Update methods: what trains, and what is added to the loss (design rule 3).

A method is a module of this package with a `METHOD`, and a name in `config.Method`: "locked-image"
is `locked_image.py`. Everything else finds it by its name.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmp import models
from cmp.config import RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.mixtures import Batch, Pools


@dataclass(frozen=True)
class Learner:
    """A network as one run trains it. tokens: [texts of the corpus, L].

    state: what a method carries from step to step and from task to task beside weights and
    moments, by name. It is saved and restored with them, so its tensors are the method's own,
    never views of a weight.
    """

    config: RunConfig
    corpus: Corpus
    model: nn.Module
    tokens: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """An update method; a hook that is left out does nothing.

    prepare: (learner) once, before anything is restored: what trains, what is added to the network,
    what `state` begins as; draws only by `cmp.seeds`. losses: (learner, batch, image, text) after
    each forward pass, unit features [B, E]: terms by name that are added to the contrastive loss.
    end_task: (learner, pools, task) after the task's last step.
    """

    prepare: Callable[[Learner], None] = lambda learner: None
    losses: Callable[[Learner, Batch, Tensor, Tensor], dict[str, Tensor]] = (
        lambda learner, batch, image, text: {}
    )
    end_task: Callable[[Learner, Pools, int], None] = lambda learner, pools, task: None


def of(config: RunConfig) -> Method:
    """The method that a config names."""
    return importlib.import_module(f"cmp.methods.{config.method.name.replace('-', '_')}").METHOD


def learner(
    config: RunConfig,
    corpus: Corpus,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Learner:
    """A network ready for the first step of a run.

    model: trained in place; the weights that `config.model` names where left out, see `models.load`
    for what it raises. device: where the network lives. `CmpError` if the model takes images of
    another size than the data's.
    """
    model = (model or models.load(config.model, config.seeds.init)).to(device)
    if (side := model.visual.image_size) not in (corpus.images.shape[-1], corpus.images.shape[-2:]):
        raise CmpError(
            f"model.name: {config.model.name!r} takes images of {side} pixels, the data have "
            f"{corpus.images.shape[-1]}"
        )
    found = Learner(config, corpus, model, models.tokens(config.model.name, corpus.texts))
    of(config).prepare(found)
    return found
