"""Execute a run: train on tasks in order, evaluate after each, and save checkpoints.

Pretraining and joint training are runs, too.
"""

import functools
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cmp import budgets, mixtures, training
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.errors import Diverged, Interrupted
from cmp.evaluation import Scores, evaluate
from cmp.merging.policies import Memory, TaskEnd, apply_policy, update_step_average
from cmp.merging.rules import Weights
from cmp.methods import adapters
from cmp.models import Network
from cmp.runs import checkpoints
from cmp.runs.checkpoints import SCHEMA, CheckpointManager, Progress, RunState, StopRequest
from cmp.runs.machine import machine_differences, machine_record
from cmp.scale import processes
from cmp.scale.execution import ExecutionConfig
from cmp.schedules import branch_step
from cmp.training import StepResult, TrainState, make_train_state, train_task


@dataclass(frozen=True)
class Observer:
    """Callbacks for a run's progress, all optional.

    Attributes:
        step: (task, step, result, model), called after each step. It must not change the model, and
            reading numbers from the result makes the host wait for a GPU.
        task: (tasks done, scores), called after each evaluation, with 0 before the stream. The
            scores are those of the subset if there is one, so that they can be compared.
        resumed: (steps done), called first if a run resumes from a checkpoint.
        saving: Called before each checkpoint. What it writes is there if the run resumes from this
            checkpoint after a kill.
    """

    step: Callable[[int, int, StepResult, nn.Module], object] = lambda *step: None
    task: Callable[[int, Scores], object] = lambda done, scores: None
    resumed: Callable[[int], object] = lambda steps: None
    saving: Callable[[], object] = lambda: None


NO_OBSERVER = Observer()


def advance_bar(bar: Any) -> Observer:
    """Return an observer that advances a progress bar by the steps of a run, including those before
    it resumed."""
    return Observer(
        step=lambda task, step, result, model: bar.update(),
        resumed=lambda steps: bar.update(steps),
    )


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        metrics: One row per (task, scope, dataset): tasks done, `scope` ("subset" or "full") and
            the columns of `Scores.datasets`.
        model: The network after the last task, with split attention. `cmp.models.export_weights`
            writes it with open_clip's own layers.
        seconds: The computing time.
        provenance: The machine of the run, see `cmp.runs.machine.machine_record`, with `began`, its
            first machine, if it moved to another one, and `budget` if it had one.
        hits: For evaluations of scope "full", by "TASK/DATASET": whether each question was answered
            correctly, bool, in the order of that dataset's rows in `Scores.hits`. The `row` and
            `weight` there, which are the same for every model, give the image and its weight.
    """

    metrics: pd.DataFrame
    model: Network
    seconds: float
    provenance: dict[str, Any]
    hits: dict[str, np.ndarray] = field(default_factory=dict)


def evaluation_sizes(config: RunConfig, done: int) -> list[int | None]:
    """Return the sizes of the evaluations after a number of tasks.

    Args:
        config: The run's config.
        done: The number of completed tasks; 0 before the stream.

    Returns:
        Images per dataset, None for all: first the size used at every evaluation, then, if
        requested, the full test before and after the stream.
    """
    section, ends = config.evaluation, (0, config.stream.tasks)
    full = section.full and section.subset is not None and done in ends
    return [section.subset, None] if full else [section.subset]


def execute(
    config: RunConfig,
    corpus: Corpus,
    observer: Observer = NO_OBSERVER,
    model: Network | None = None,
    device: str = "cpu",
    manager: CheckpointManager | None = None,
    execution: ExecutionConfig | None = None,
    fitted: RunConfig | None = None,
    start: RunState | None = None,
) -> RunResult:
    """Train a model on the stream of a config.

    With several processes, all of them call this and evaluate. Only the first has a checkpoint
    manager and calls its observer with scores.

    Args:
        config: The run's config.
        corpus: The run's data.
        observer: Receives the progress.
        model: The network with its starting weights, trained in place and then returned. If None,
            the one that `config.model` names.
        device: The device of the network, "cpu" or "cuda". It affects only the last bits.
        manager: Saves checkpoints. The run resumes from the last one.
        execution: How steps are computed. This affects only the last bits.
        fitted: The config that is actually run; if None, that of `cmp.budgets.settle`.
        start: The state at the end of an earlier task, to start from if the run has no checkpoint.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the state is saved after a full step.
        Diverged: Training diverged; the last good state is kept, with a report beside it.
    """
    fitted = fitted or budgets.settle(config, corpus)
    pools = mixtures.task_pools(fitted, corpus, start.progress.task if start else 0)
    execution = execution or ExecutionConfig()
    state = make_train_state(fitted, corpus, model, device, execution)
    with StopRequest() as stop:
        machine = machine_record(device) | execution.record()
        if corpus.noted:
            machine["pictures"] = corpus.noted
        run = Run(config, state, observer, manager, stop, machine)
        resumed = checkpoints.latest(manager)
        saved = resumed or start
        for task_pools in pools[saved.progress.task if saved else 0 :]:
            execution.own_samples(sum(task_pools.counts))  # can every batch be split?
        first_task, first_step = run.resume(saved) if saved else (0, 0)
        if not saved:
            run.begin()
        if resumed and first_task < len(pools):
            run.stop_if_asked(first_task, first_step)
        for task in range(first_task, len(pools)):
            after_step = functools.partial(run.after_step, task)
            try:
                train_task(state, pools[task], task, after_step, first=first_step)
            except Diverged as error:
                if not manager:
                    raise
                path = manager.report(error.report)  # beside the last good state
                raise Diverged(f"{error}; see {path} for details", error.report) from error
            first_step = 0
            run.end_task(task + 1)
    return run.result()


@dataclass
class Run:
    """The progress of a run in this process.

    Attributes:
        config: The config as given.
        state: The network and its run.
        observer: Receives the progress.
        manager: Saves checkpoints.
        stop: Records a signal that asks to stop.
        machine: The machine of the run.
        rows: The rows of the metrics so far.
        hits: As in `RunResult`, so far.
        trunk: The state at which a branch of the schedule began.
        deployed: The network after the last task, if a next task would start from other weights.
        memory: What the merge policy remembers.
        seconds_before: The computing time of earlier processes.
        started: The time at which this process started.
    """

    config: RunConfig
    state: TrainState
    observer: Observer
    manager: CheckpointManager | None
    stop: StopRequest
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    hits: dict[str, np.ndarray] = field(default_factory=dict)
    trunk: dict[str, Tensor] = field(default_factory=dict)
    deployed: dict[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.fitted.merging.policy != "none":
            self.memory = {"zero": self.weights()}

    @property
    def fitted(self) -> RunConfig:
        """The config that is actually run, see `cmp.budgets.settle`."""
        return self.state.config

    @property
    def model(self) -> Network:
        """The network."""
        return self.state.model

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.model.logit_scale.device

    def weights(self) -> Weights:
        """Return a copy of the network's weights on the CPU, with adapters merged in."""
        return adapters.merged_state_dict(self.model, "cpu")

    def begin(self) -> None:
        """Evaluate and save the starting weights."""
        self.evaluate(0)
        self.save(0, 0)
        self.stop_if_asked(0, 0)

    def resume(self, saved: RunState) -> tuple[int, int]:
        """Restore a state, and return the next task and step.

        If the run resumes under other conditions, such as on another machine or with other threads,
        warn. If it ever did, also record where it began.
        """
        progress = saved.progress
        checkpoints.restore(saved.tensors, self.model, self.state.optimizer)
        self.trunk = saved.part("trunk")
        if progress.task == self.fitted.stream.tasks:  # otherwise left by a shorter run
            self.deployed = saved.part("deployed")
        for name, x in saved.part("method").items():
            self.state.method_state[name] = x.to(self.device, copy=True)
        self.memory = {}
        for key, x in saved.part("merging").items():
            entry, _, name = key.rpartition("/")  # only an entry may have a slash in its name
            self.memory.setdefault(entry, {})[name] = x
        self.hits = {name: x.numpy() for name, x in saved.part("hits").items()}
        self.rows, self.seconds_before = list(progress.metrics), progress.seconds
        differences = machine_differences(progress.machine, self.machine)
        if differences:
            message = "the run continues under other conditions, so its last bits may differ"
            warnings.warn(f"{message}: {differences}", stacklevel=2)
        if differences or progress.machine.get("moved"):
            self.machine = self.machine | {"began": progress.machine}
        self.observer.resumed(sum(self.fitted.steps[: progress.task]) + progress.step)
        return progress.task, progress.step

    def evaluate(self, done: int) -> None:
        """Score the model after a number of tasks: on the subset, and on the full test before and
        after the stream."""
        scored: list[Scores] = []
        for size in evaluation_sizes(self.fitted, done):
            with adapters.merged(self.model), self.state.execution.outside_steps():
                scores = evaluate(
                    self.model, self.fitted.model.name, self.state.corpus,
                    self.fitted.evaluation.split, size, self.fitted.training.precision,
                    processes.share_rows,
                )  # fmt: skip
            scope = "full" if size is None else "subset"
            table = scores.datasets.reset_index().assign(task=done, scope=scope)
            self.rows += table.to_dict("records")
            if size is None:
                for name, hits in scores.hits.groupby("dataset")["hit"]:
                    self.hits[f"{done}/{name}"] = hits.to_numpy(bool)
            scored.append(scores)
        if processes.rank() == 0:
            self.observer.task(done, scored[0])

    def after_step(self, task: int, step: int, result: StepResult) -> None:
        """Call the observer, keep the state at a branch, save if due, and stop if requested.

        The first process decides whether a checkpoint is due, and all of them check the weights.

        Raises:
            Interrupted: The run stops with its state saved.
            Diverged: The weights to save are not finite.
        """
        steps = self.fitted.steps[task]
        update_step_average(self.fitted.merging, self.memory, self.model.state_dict, step, steps)
        self.observer.step(task, step, result, self.model)
        done = step + 1
        if done == branch_step(self.fitted.schedule, steps):
            tensors = checkpoints.state_tensors(self.model, self.state.optimizer)
            self.trunk = {name: x.detach().clone() for name, x in tensors.items()}
        is_due = self.manager and self.manager.is_due(done, steps)
        signal, is_due = processes.all_reduce_max(self.stop.signal or 0, bool(is_due))
        if signal or is_due:
            self.save(task, done, self.state.optimizer)
            processes.barrier()  # the first one saves, which may take longer than a step
        self.stop_if_asked(task, done, signal)

    def end_task(self, done: int) -> None:
        """Score the deployed weights, load those that the next task starts from, and save."""
        start: Weights = {}
        scored = start  # the same, unless the merge policy deploys other weights
        merging, seed = self.fitted.merging, self.fitted.seeds.data
        if merging.policy != "none":
            end = TaskEnd(merging, self.memory, self.weights(), done, seed, self.device)
            self.memory, start, scored = apply_policy(end)
            adapters.load_merged(self.model, scored)
        self.evaluate(done)
        is_last = done == self.fitted.stream.tasks
        deployed = self.weights() if self.manager and not is_last else {}
        if is_last and (self.trunk or start is not scored):
            self.deployed = {name: x.clone() for name, x in self.model.state_dict().items()}
        if self.trunk:
            checkpoints.restore(self.trunk, self.model, self.state.optimizer)
        elif start:
            adapters.load_merged(self.model, start)
        self.trunk = {}
        self.save(done, 0, self.state.optimizer if self.fitted.carries_moments else None)
        if self.manager and deployed:
            self.manager.keep_model(done, deployed, json.dumps(self.model.visual.preprocess_cfg))
        if not is_last:
            self.stop_if_asked(done, 0)

    def save(self, task: int, step: int, optimizer: Optimizer | None = None) -> None:
        """Write a checkpoint, if there is a manager."""
        if step:  # at the end of a task, `train_task` has checked the weights
            training.check_weights_finite(self.state, task, step)
        if not self.manager:
            return
        self.observer.saving()
        machine = self.machine
        if began := machine.get("began"):  # a later process may be on the first machine again
            machine = began | {"moved": True}
        progress = Progress(
            SCHEMA, self.manager.run_id, self.config.to_dict(), task, step, self.rows,
            self.seconds(), machine, self.config.option_record(),
        )  # fmt: skip
        parts = {
            "trunk": self.trunk,
            "deployed": self.deployed,
            "method": self.state.method_state,
            "hits": {name: torch.from_numpy(x) for name, x in self.hits.items()},
        }
        parts |= {f"merging/{entry}": weights for entry, weights in self.memory.items()}
        tensors = checkpoints.state_tensors(self.model, optimizer) | checkpoints.join_parts(parts)
        self.manager.save(RunState(progress, tensors))

    def stop_if_asked(self, task: int, step: int, signal: int | None = None) -> None:
        """Stop, with the state saved, if any process was asked to.

        Args:
            task: Completed tasks.
            step: Completed steps of the next task.
            signal: The signal that a process received, or 0; if None, the processes are asked.

        Raises:
            Interrupted: The run stops.
        """
        if signal is None:
            [signal] = processes.all_reduce_max(self.stop.signal or 0)
        if not signal:
            return
        if self.manager:
            self.manager.finish()
        [is_saved] = processes.all_reduce_max(self.manager is not None)
        processes.barrier()  # wait until the first process has saved
        outcome = "everything is saved; the same command continues"
        outcome = outcome if is_saved else "nothing is kept"
        raise Interrupted(f"stopped after {task} tasks and {step} steps; {outcome}", signal)

    def seconds(self) -> float:
        """Return the computing time so far, including that of earlier processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def result(self) -> RunResult:
        """Return the finished run."""
        if self.deployed:
            self.model.load_state_dict(self.deployed)
        for layer in self.model.modules():  # only steps use compiled towers
            layer._compiled_call_impl = None
        model = adapters.merge_and_unload(self.model)
        machine = self.machine
        if budget := budgets.task_budget(self.config):
            machine = machine | {"budget": budgets.budget_spent(budget, self.fitted.stream.tasks)}
        return RunResult(pd.DataFrame(self.rows), model, self.seconds(), machine, self.hits)
