"""Update methods: what trains, and what is added to the loss (design rule 3).

A method is a module of this package with a `METHOD`, and a name in `config.Method`: "locked-image"
is `locked_image.py`. Everything else finds it by its name.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmp import config as configs
from cmp import models, steps
from cmp.config import RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.mixtures import Batch, Pools, parts
from cmp.seeds import torch_generator
from cmp.steps import Seen, loading
from cmp.steps.execution import WHOLE, Execution

Look = Callable[[int], tuple[Batch | None, Seen]]


@dataclass(frozen=True)
class Learner:
    """A network as one run trains it. tokens: [texts of the corpus, L].

    state: what a method carries from step to step and from task to task beside weights and
    moments, by name. It is saved and restored with them, so its tensors are the method's own,
    never views of a weight. aside: other networks that a method looks at, functions of the weights
    that the run starts from, and so not saved.
    """

    config: RunConfig
    corpus: Corpus
    model: nn.Module
    tokens: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    aside: dict[str, nn.Module] = field(default_factory=dict)
    execution: Execution = WHOLE

    @functools.cached_property
    def loader(self) -> loading.Loader:
        """Where its batches come from."""
        device = self.model.logit_scale.device
        return loading.Loader(self.config, self.corpus, loading.side(self.model), device)


@dataclass(frozen=True)
class Method:
    """An update method; a hook that is left out does nothing.

    prepare: (learner) once, before anything is restored: what trains, what is added to the network,
    what `state` begins as; draws only by `cmp.seeds`. begin_task: (learner, task) before the task's
    first step, from whatever weights it starts. losses: (learner, seen) after each forward pass:
    terms by name that are added to the contrastive loss; seen is `None` where a batch comes in
    parts. whole: (settings) -> why the method cannot do with that, if it cannot. optimizer:
    (settings) -> what is called with AdamW's arguments. step: (learner, optimizer) when gradients
    are ready. end_task: (learner, look) after the task's last step; look(step) shows any batch of
    the task to the network.
    """

    prepare: Callable[[Learner], None] = lambda learner: None
    begin_task: Callable[[Learner, int], None] = lambda learner, task: None
    losses: Callable[[Learner, Seen | None], dict[str, Tensor]] = lambda learner, seen: {}
    whole: Callable[[configs.Method], str] = lambda settings: ""
    optimizer: Callable[[configs.Method], Callable[..., torch.optim.Optimizer]] = lambda settings: (
        steps.ADAMW
    )
    step: Callable[[Learner, torch.optim.Optimizer], None] = lambda learner, optimizer: (
        optimizer.step()
    )
    end_task: Callable[[Learner, Look], None] = lambda learner, look: None


def of(config: RunConfig) -> Method:
    """The method that a config names."""
    return importlib.import_module(f"cmp.methods.{config.method.name.replace('-', '_')}").METHOD


def learner(
    config: RunConfig,
    corpus: Corpus,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    execution: Execution = WHOLE,
) -> Learner:
    """A network ready for the first step of a run.

    model: trained in place; the weights that `config.model` names where left out, see `models.load`
    for what it raises. device: where the network lives. `CmpError` if the model takes images of
    another size than the data's, or cannot be computed by this execution.
    """
    model = (model or models.load(config.model, config.seeds.init)).to(device)
    corpus.check_side(loading.side(model), config.model.name)
    if execution.in_parts and (why := of(config).whole(config.method)):
        raise CmpError(
            f"method.name: {config.method.name!r} {why}; leave out --micro-batch and compute in "
            "one process, or choose another method"
        )
    execution.prepare(model, config.model.name, config.training.batch)
    tokens = models.tokens(config.model.name, corpus.texts)
    found = Learner(config, corpus, model, tokens, execution=execution)
    of(config).prepare(found)
    return found


def look(learner: Learner, pools: Pools, task: int, step: int) -> tuple[Batch, Seen]:
    """The batch at (task, step), and what the network makes of it."""
    config = learner.config
    batch = learner.loader.batch(pools, task, step)
    replayed, _, _ = parts(config.mixture, len(batch.rows), len(pools.buffer) == 0)
    generator = torch_generator("augment", config.seeds.augment, task, step)
    precision = config.training.precision
    return batch, steps.see(learner.model, batch, learner.tokens, generator, precision, replayed)


def optimizer(learner: Learner) -> torch.optim.Optimizer:
    """A fresh optimizer over what trains: AdamW, or the method's own."""
    config = learner.config
    kind = of(config).optimizer(config.method)
    return steps.make_optimizer(learner.model, config.optimizer, kind)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_only(model: nn.Module, names: list[str]) -> None:
    """Freeze all but these parameters; raises as `check_thawed` does."""
    check_thawed(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def check_thawed(model: nn.Module, names: list[str]) -> None:
    """`CmpError` if there are no such parameters, or if one of them was frozen by someone else."""
    if not names:
        raise CmpError("method.name: this model has nothing that the method could train")
    if frozen := set(names) - trainable(model).keys():
        raise CmpError(
            f"method.name: {min(frozen)} lies in a tower that is frozen; call "
            "requires_grad_(True) on it, or choose a method that leaves it alone"
        )


def check_rank(rank: int, weights: dict[str, Tensor], advice: str) -> None:
    """`CmpError` if a weight, read as a matrix [out, rest], is narrower; it names the narrowest."""
    widths = {name: min(x.flatten(1).shape) for name, x in weights.items()}
    name = min(widths, key=widths.get)
    if rank > widths[name]:
        rows, columns = weights[name].flatten(1).shape
        raise CmpError(
            f"method.rank: {rank} is above the width of {name}, a matrix of {rows} x {columns}; "
            f"at most {widths[name]}{advice}"
        )
