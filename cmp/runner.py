"""Who is told of a run's progress."""

import contextlib
import dataclasses
import functools
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from torch import Tensor, nn

from cmp import (
    NUMERICS,
    __version__,
    budgets,
    checkpoints,
    distributed,
    mixtures,
    models,
    schedules,
)
from cmp.budgets import Budget
from cmp.checkpoints import SCHEMA, CheckpointManager, Progress, RunState, StopRequest
from cmp.config import MAX_COUNT, Mixture, RunConfig
from cmp.data import Corpus
from cmp.errors import CmpError, Diverged, Interrupted
from cmp.evaluation import Scores, evaluate
from cmp.files import SHORT_ID
from cmp.merging.policies import Memory, apply_policy, update_step_average
from cmp.merging.rules import Weights
from cmp.methods import adapters
from cmp.training import (
    DEFAULT_EXECUTION,
    ExecutionConfig,
    TrainState,
    check_weights_finite,
    create_optimizer,
    make_train_state,
    train_task,
)


@dataclass(frozen=True)
class Observer:
    """What is told of a run's progress; every hook may be left out.

    step: (task, step, loss, model) after each step; the model must not be changed. task: (number of
    tasks done, scores) after each evaluation, with 0 for the one before the stream; of the subset,
    if there is one, so that they can be compared. resumed: (number of steps done before), first of
    all, when a run goes on from a checkpoint.
    """

    step: Callable[[int, int, Tensor, nn.Module], None] = lambda task, step, loss, model: None
    task: Callable[[int, Scores], None] = lambda done, scores: None
    resumed: Callable[[int], None] = lambda steps: None


NO_OBSERVER = Observer()

CPU_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tile")


def check_device(device: str) -> None:
    """`CmpError` if torch cannot compute there, such as on "cuda" without a card."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CmpError(f"device {device!r}: cannot be used here ({reason}); choose cpu") from error


def machine_record(device: str = "cpu") -> dict[str, Any]:
    """This process: two that agree in all of this give the same bits on a CPU."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cmp": __version__,
        "numerics": NUMERICS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_name": found.get("cpu_name", ""),
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if found.get(flag)),
        "cpu_caches": f"{found.get('l1d_cache_size')} {found.get('l2_cache_size')}",
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
    }


def machine_differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Where two processes differ, such as "threads 1 and 2"; empty if nowhere.

    The version of `cmp` is left out: what its code does to results is what `NUMERICS` counts.
    """
    keys = (machine_record().keys() | {"execution"}) - {"cmp"}
    pairs = {key: (one.get(key), other.get(key)) for key in sorted(keys)}
    return ", ".join(f"{key} {a} and {b}" for key, (a, b) in pairs.items() if a != b)


@dataclass(frozen=True)
class RunResult:
    """metrics: a row a (task, dataset): tasks done, `scope` ("subset" or "full"), and the columns
    of `evaluation.Scores.datasets`; model: the network after the last task; seconds: of computing;
    provenance: where that was, see `cmp.runs.provenance.here`, with `began` if it began elsewhere
    and `budget` if it had one, see `cmp.budgets.spent`.
    """

    metrics: pd.DataFrame
    model: nn.Module
    seconds: float
    provenance: dict[str, Any]


def joint_training(config: RunConfig) -> RunConfig:
    """The upper bound of a run: all its classes in one task of as many steps, one schedule."""
    steps = config.stream.tasks * config.training.steps
    if steps > MAX_COUNT:
        raise CmpError(
            f"training.steps: {steps} in the one task of joint training; at most {MAX_COUNT}"
        )
    return dataclasses.replace(
        config,
        stream=dataclasses.replace(config.stream, tasks=1),
        mixture=Mixture(1 / 3, 2 / 3, 0.0, config.mixture.replay),
        training=dataclasses.replace(config.training, steps=steps),
    )


def evaluation_sizes(config: RunConfig) -> list[tuple[int | None, int]]:
    """(images a dataset, how often): after each task, and where asked for on the full test at both
    ends of the stream, which `None` stands for."""
    asked = config.evaluation
    often = [(asked.subset, config.stream.tasks + 1)]
    return often + [(None, 2)] * (asked.full and asked.subset is not None)


def execute(
    config: RunConfig,
    corpus: Corpus,
    observer: Observer = NO_OBSERVER,
    model: nn.Module | None = None,
    device: str = "cpu",
    keeper: CheckpointManager | None = None,
    execution: ExecutionConfig = DEFAULT_EXECUTION,
) -> RunResult:
    """Take a model through the stream of `config`.

    model: starting weights, trained in place; those that `config.model` names where left out.
    device: where the network lives, "cpu" or "cuda"; it decides no more than the last bits.
    keeper: keeps checkpoints; the run goes on from the last one. execution: how a step is computed;
    nor does it. Of several processes all call this, and the first alone has a keeper and scores.
    Raises `Interrupted` on SIGINT and SIGTERM, after a whole step and a save, and `Diverged`, with
    the last good state kept and a report beside it.
    """
    asked, config, budget = config, budgets.apply_budget(config), budgets.task_budget(config)
    pools = mixtures.task_pools(config, corpus)
    learner = make_train_state(config, corpus, model, device, execution)
    with StopRequest() as stop:
        machine = machine_record(device) | execution.record()
        sitting = Run(learner, observer, keeper, stop, machine, asked, budget)
        optimizer = create_optimizer(learner)
        begun, first = sitting.begin(optimizer)
        for task in range(begun, len(pools)):
            if task > begun and not config.optimizer.carry:
                optimizer = create_optimizer(learner)
            hook = functools.partial(sitting.after_step, task, optimizer)
            with sitting.reporting():
                train_task(learner, pools[task], task, hook, optimizer, first)
            first = 0
            sitting.end_task(task + 1, optimizer)
    return sitting.result()


def task_end_weights(config: RunConfig, corpus: Corpus) -> list[Weights]:
    """The weights before the stream and after the last step of each task, on the CPU: of a run that
    is computed for this alone, and not stored."""
    found: list[Weights] = [models.load_model(config.model, config.seeds.init).state_dict()]
    steps = budgets.apply_budget(config).training.steps

    def step(task: int, number: int, loss: Tensor, model: nn.Module) -> None:
        if number == steps - 1:
            found.append(
                {name: x.cpu().clone() for name, x in adapters.merged_state_dict(model).items()}
            )

    execute(config, corpus, Observer(step))
    return found


@dataclass
class Run:
    """A run as far as this process has taken it. asked: its config before its budget, which the
    learner's steps are of, was applied."""

    learner: TrainState
    observer: Observer
    keeper: CheckpointManager | None
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
        return {name: x.cpu() for name, x in adapters.merged_state_dict(self.model).items()}

    def begin(self, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Take up the last checkpoint; without one, evaluate the weights that the run starts from.
        Returns the task and step that come next.

        A run that goes on elsewhere than it began is warned of and keeps both in its provenance.
        """
        state = checkpoints.latest(self.keeper, self.device)
        if state is None:
            self.evaluate(0)
            self.save(0, 0)
            self.heed(0, 0)
            return 0, 0
        progress = state.progress
        checkpoints.restore(state.tensors, self.model, optimizer)
        self.trunk = checkpoints.strip_prefix(state.tensors, "trunk/")
        carried = checkpoints.strip_prefix(state.tensors, "method/")
        self.learner.state.update({n: x.to(self.device, copy=True) for n, x in carried.items()})
        memory = checkpoints.strip_prefix(state.tensors, "merging/")
        names = {name.partition("/")[0] for name in memory}
        self.memory = {name: checkpoints.strip_prefix(memory, f"{name}/") for name in names}
        self.rows, self.before = list(progress.metrics), progress.seconds
        if found := machine_differences(progress.machine, self.machine):
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
        for size, count in evaluation_sizes(self.config):
            if count == 2 and not ends:
                continue
            with adapters.merged(self.model):
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
        update_step_average(self.config.merging, self.memory, self.model.state_dict)
        self.observer.step(task, step, loss, self.model)
        done = step + 1
        if self.budget:
            self.budget.check(done)
        if done == schedules.branch_step(self.config.schedule, self.config.training.steps):
            kept = checkpoints.state_tensors(self.model, optimizer)
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
            self.memory, start, deployed = apply_policy(
                self.config.merging, self.memory, self.weights(), done, self.config.seeds.data
            )
            adapters.load_merged(self.model, deployed)
        self.evaluate(done)
        if done < self.config.stream.tasks:
            if self.trunk:
                checkpoints.restore(self.trunk, self.model, optimizer)
            elif start:
                adapters.load_merged(self.model, start)
        self.trunk = {}
        self.save(done, 0, optimizer if self.config.optimizer.carry else None)
        self.heed(done, 0)

    def save(self, task: int, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a checkpoint, if anyone keeps them."""
        if step:  # else the task's end has seen to that
            check_weights_finite(self.model, task, step)
        if not self.keeper:
            return
        tree, seconds = self.asked.to_dict(), self.seconds()
        machine = self.machine.get("began", self.machine)
        progress = Progress(
            SCHEMA, self.keeper.run_id, tree, task, step, self.rows, seconds, machine
        )
        kept = checkpoints.state_tensors(self.model, optimizer)
        kept |= {f"trunk/{name}": x for name, x in self.trunk.items()}
        kept |= {f"method/{name}": x for name, x in self.learner.state.items()}
        for of, weights in self.memory.items():
            kept |= {f"merging/{of}/{name}": x for name, x in weights.items()}
        self.keeper.save(RunState(progress, kept))

    def heed(self, task: int, step: int, unsaved: torch.optim.Optimizer | None = None) -> None:
        """Stop if that was asked of any process. unsaved: the optimizer, where that is to be saved
        before."""
        signal = distributed.all_reduce_max(self.stop.signal or 0, self.device)
        if not signal:
            return
        if unsaved:
            self.save(task, step, unsaved)
        distributed.barrier()  # until the first process has saved
        run_id = self.keeper and self.keeper.run_id[:SHORT_ID]
        kept = f"all is saved; `cmpt resume {run_id}` goes on" if run_id else "nothing is kept"
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

    def result(self) -> RunResult:
        """The finished run, its network of open_clip's own layers."""
        model, machine = adapters.merge_and_unload(self.model), self.machine
        if self.budget:
            machine = machine | {
                "budget": budgets.budget_spent(self.budget, self.config.stream.tasks)
            }
        return RunResult(pd.DataFrame(self.rows), model, self.seconds(), machine)
