"""A run: tasks in order, evaluated after each. Pretraining and joint training are runs too."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from cmp import budgets, methods, mixtures, models, schedules, training
from cmp.budgets import Budget
from cmp.config import MOST, Mixture, RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import CmpError, Diverged, Interrupted
from cmp.evaluation import evaluate
from cmp.merging import policies
from cmp.merging.policies import Memory
from cmp.merging.rules import Weights
from cmp.methods import Learner, adapters
from cmp.paths import SHORT
from cmp.runs import checkpoints, provenance
from cmp.runs.checkpoints import SCHEMA, Keeper, Progress, RunState
from cmp.runs.observers import SILENT, Observer
from cmp.runs.signals import StopRequest
from cmp.steps import distributed
from cmp.steps.execution import WHOLE, Execution


@dataclass(frozen=True)
class Result:
    """metrics: a row a (task, dataset): tasks done, `scope` ("subset" or "full"), and the columns
    of `evaluation.Scores.datasets`; model: the network after the last task; seconds: of computing;
    provenance: where that was, see `cmp.runs.provenance.here`, with `began` if it began elsewhere
    and `budget` if it had one, see `cmp.budgets.spent`.
    """

    metrics: pd.DataFrame
    model: nn.Module
    seconds: float
    provenance: dict[str, Any]


def joint(config: RunConfig) -> RunConfig:
    """The upper bound of a run: all its classes in one task of as many steps, one schedule."""
    steps = config.stream.tasks * config.training.steps
    if steps > MOST:
        raise CmpError(f"training.steps: {steps} in the one task of joint training; at most {MOST}")
    return dataclasses.replace(
        config,
        stream=dataclasses.replace(config.stream, tasks=1),
        mixture=Mixture(1 / 3, 2 / 3, 0.0, config.mixture.replay),
        training=dataclasses.replace(config.training, steps=steps),
    )


def evaluations(config: RunConfig) -> list[tuple[int | None, int]]:
    """(images a dataset, how often): after each task, and where asked for on the full test at both
    ends of the stream, which `None` stands for."""
    asked = config.evaluation
    often = [(asked.subset, config.stream.tasks + 1)]
    return often + [(None, 2)] * (asked.full and asked.subset is not None)


def run(
    config: RunConfig,
    corpus: Corpus,
    observer: Observer = SILENT,
    model: nn.Module | None = None,
    device: str = "cpu",
    keeper: Keeper | None = None,
    execution: Execution = WHOLE,
) -> Result:
    """Take a model through the stream of `config`.

    model: starting weights, trained in place; those that `config.model` names where left out.
    device: where the network lives, "cpu" or "cuda"; it decides no more than the last bits.
    keeper: keeps checkpoints; the run goes on from the last one. execution: how a step is computed;
    nor does it. Of several processes all call this, and the first alone has a keeper and scores.
    Raises `Interrupted` on SIGINT and SIGTERM, after a whole step and a save, and `Diverged`, with
    the last good state kept and a report beside it.
    """
    asked, config, budget = config, budgets.applied(config), budgets.of(config)
    pools = mixtures.task_pools(config, corpus)
    learner = methods.learner(config, corpus, model, device, execution)
    with StopRequest() as stop:
        machine = provenance.here(device) | execution.record()
        sitting = _Sitting(learner, observer, keeper, stop, machine, asked, budget)
        optimizer = methods.optimizer(learner)
        begun, first = sitting.begin(optimizer)
        for task in range(begun, len(pools)):
            if task > begun and not config.optimizer.carry:
                optimizer = methods.optimizer(learner)
            hook = functools.partial(sitting.after_step, task, optimizer)
            with sitting.reporting():
                training.train_task(learner, pools[task], task, hook, optimizer, first)
            first = 0
            sitting.end_task(task + 1, optimizer)
    return sitting.result()


def ends(config: RunConfig, corpus: Corpus) -> list[Weights]:
    """The weights before the stream and after the last step of each task, on the CPU: of a run that
    is computed for this alone, and not stored."""
    found: list[Weights] = [models.load(config.model, config.seeds.init).state_dict()]
    steps = budgets.applied(config).training.steps

    def step(task: int, number: int, loss: Tensor, model: nn.Module) -> None:
        if number == steps - 1:
            found.append({name: x.cpu().clone() for name, x in adapters.plain(model).items()})

    run(config, corpus, Observer(step))
    return found


@dataclass
class _Sitting:
    """A run as far as this process has taken it. asked: its config before its budget, which the
    learner's steps are of, was applied."""

    learner: Learner
    observer: Observer
    keeper: Keeper | None
    stop: StopRequest
    machine: dict[str, Any]
    asked: RunConfig
    budget: Budget | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    trunk: dict[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.config, self.model = self.learner.config, self.learner.model
        self.device = self.model.logit_scale.device
        if self.config.merging.policy != "none":
            self.memory = {"zero": self.weights()}

    def weights(self) -> Weights:
        """A copy of the network's weights on the CPU, adapters folded in."""
        return {name: x.cpu() for name, x in adapters.plain(self.model).items()}

    def begin(self, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Take up the last checkpoint; without one, evaluate the weights that the run starts from.
        Returns the task and step that come next.

        A run that goes on elsewhere than it began is warned of and keeps both in its provenance.
        """
        state = checkpoints.left(self.keeper, self.device)
        if state is None:
            self.evaluate(0)
            self.save(0, 0)
            self.heed(0, 0)
            return 0, 0
        progress = state.progress
        checkpoints.restore(state.tensors, self.model, optimizer)
        self.trunk = checkpoints.below(state.tensors, "trunk/")
        carried = checkpoints.below(state.tensors, "method/")
        self.learner.state.update({n: x.to(self.device, copy=True) for n, x in carried.items()})
        memory = checkpoints.below(state.tensors, "merging/")
        names = {name.partition("/")[0] for name in memory}
        self.memory = {name: checkpoints.below(memory, f"{name}/") for name in names}
        self.rows, self.before = list(progress.metrics), progress.seconds
        if found := provenance.differences(progress.machine, self.machine):
            message = f"the run began elsewhere, its last bits may differ: {found}"
            warnings.warn(message, stacklevel=2)
            self.machine = self.machine | {"began": progress.machine}
        self.observer.resumed(progress.task * self.config.training.steps + progress.step)
        return progress.task, progress.step

    def evaluate(self, done: int) -> None:
        """Score the model after `done` tasks: the subset, and the full test at both ends."""
        if distributed.rank():
            return
        ends, told = done in (0, self.config.stream.tasks), None
        for size, count in evaluations(self.config):
            if count == 2 and not ends:
                continue
            with adapters.folded(self.model):
                scores = evaluate(
                    self.model, self.config.model.name, self.learner.corpus,
                    self.config.evaluation.split, size, self.config.training.precision,
                )  # fmt: skip
            scope = "full" if size is None else "subset"
            table = scores.datasets.reset_index().assign(task=done, scope=scope)
            self.rows += table.to_dict("records")
            told = told or scores
        self.observer.task(done, told)

    def after_step(self, task: int, optimizer: torch.optim.Optimizer, step: int, loss: Tensor):
        """Tell the observer; keep what a branch leaves; save where a checkpoint is due or a stop
        was asked for."""
        policies.after_step(self.config.merging, self.memory, self.model.state_dict)
        self.observer.step(task, step, loss, self.model)
        done = step + 1
        if self.budget:
            self.budget.check(done)
        if done == schedules.branch(self.config.schedule, self.config.training.steps):
            kept = checkpoints.tensors(self.model, optimizer)
            self.trunk = {name: x.detach().clone() for name, x in kept.items()}
        due = self.keeper and done % self.keeper.every == 0 and done < self.config.training.steps
        if due:
            self.save(task, done, optimizer)
        self.heed(task, done, None if due else optimizer)

    def end_task(self, done: int, optimizer: torch.optim.Optimizer) -> None:
        """Deploy and score what is deployed after `done` tasks; then, if another task follows, take
        up the weights that it starts from; save."""
        start = {}
        if self.config.merging.policy != "none":
            self.memory, start, deployed = policies.after_task(
                self.config.merging, self.memory, self.weights(), done, self.config.seeds.data
            )
            adapters.take(self.model, deployed)
        self.evaluate(done)
        if done < self.config.stream.tasks:
            if self.trunk:
                checkpoints.restore(self.trunk, self.model, optimizer)
            elif start:
                adapters.take(self.model, start)
        self.trunk = {}
        self.save(done, 0, optimizer if self.config.optimizer.carry else None)
        self.heed(done, 0)

    def save(self, task: int, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint, if anyone keeps them."""
        if step:  # else the task's end has seen to that
            training.check_weights(self.model, task, step)
        if not self.keeper:
            return
        tree, seconds = self.asked.to_dict(), self.seconds()
        machine = self.machine.get("began", self.machine)
        progress = Progress(
            SCHEMA, self.keeper.run_id, tree, task, step, self.rows, seconds, machine
        )
        kept = checkpoints.tensors(self.model, optimizer)
        kept |= {f"trunk/{name}": x for name, x in self.trunk.items()}
        kept |= {f"method/{name}": x for name, x in self.learner.state.items()}
        for of, weights in self.memory.items():
            kept |= {f"merging/{of}/{name}": x for name, x in weights.items()}
        self.keeper.save(RunState(progress, kept))

    def heed(self, task: int, step: int, unsaved: torch.optim.Optimizer | None = None) -> None:
        """Stop if that was asked of any process. unsaved: the optimizer, where that is to be saved
        before."""
        signal = distributed.agreed(self.stop.signal or 0, self.device)
        if not signal:
            return
        if unsaved:
            self.save(task, step, unsaved)
        distributed.wait()  # until the first process has saved
        run_id = self.keeper and self.keeper.run_id[:SHORT]
        kept = f"all is saved; `cmp resume {run_id}` goes on" if run_id else "nothing is kept"
        where = f"stopped after {task} tasks and {step} steps"
        raise Interrupted(f"{where}; {kept}", signal)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Where a step diverges, write down what is known of it beside the last good state."""
        try:
            yield
        except Diverged as error:
            if not self.keeper:
                raise
            path = self.keeper.report(error.report)
            raise Diverged(f"{error}; {path} says more", error.report) from error

    def seconds(self) -> float:
        """Computing time so far, of all sittings."""
        return self.before + time.perf_counter() - self.started

    def result(self) -> Result:
        """The finished run, its network of open_clip's own layers."""
        model, machine = adapters.remove(self.model), self.machine
        if self.budget:
            machine = machine | {"budget": budgets.spent(self.budget, self.config.stream.tasks)}
        return Result(pd.DataFrame(self.rows), model, self.seconds(), machine)
