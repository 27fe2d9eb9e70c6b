"""Runs of several processes: `torchrun ranks.py FOLDER` computes them and writes what the first
process finds; `tests/test_parts.py` compares it with what one process finds. `torchrun ranks.py
FOLDER killed`, which comes first, begins a run in which the last process is killed."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from cmp import config, mixtures
from cmp.bench import networks  # noqa: F401, open_clip gets its models
from cmp.embedded import packed
from cmp.errors import Interrupted
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer, execute
from cmp.scale import processes
from cmp.scale.execution import ExecutionConfig
from cmp.training import create_optimizer, make_train_state, train_step

SMALL = (
    "model.name=tiny-vit", "model.start=random",
    "training.precision=fp32", "optimizer.eps=1e-4", "stream.tasks=2",
    "training.steps=3", "training.batch=12", "schedule.peak=2e-4",
    "evaluation.subset=2", "evaluation.full=false",
)  # fmt: skip
"""eps: what is zero but for rounding, such as the gradient of a key's bias, stays small. The model
takes no maximum of its features, where rounding would decide between two that are nearly equal."""

UNEVEN = "training.batch=13"
"""A batch that neither two nor three processes can share evenly."""
RUNS = {
    "full": ((), ExecutionConfig()),
    "parts": ((), ExecutionConfig(micro_batch=4)),
    "ewc": (("method.name=ewc", "method.batches=1"), ExecutionConfig()),
    "lora": (("method.name=lora", UNEVEN), ExecutionConfig(micro_batch=5)),
    "ema": (("merging.policy=ema", UNEVEN), ExecutionConfig()),
    "ema of lora": (("merging.policy=ema", "method.name=lora"), ExecutionConfig(micro_batch=3)),
    "locked-image": (("method.name=locked-image", UNEVEN), ExecutionConfig(micro_batch=3)),
    "locked-text": (("method.name=locked-text",), ExecutionConfig()),
    "sigmoid": (("model.name=nano-sigmoid", UNEVEN), ExecutionConfig(micro_batch=3)),
}


def add_sigmoid_model(folder: Path) -> str:
    """Make open_clip know a small model with a sigmoid loss, from a file in a folder; its name."""
    tree = open_clip.get_model_config("bench-nano") | {"init_logit_bias": -10.0}
    path = folder / "nano-sigmoid.json"
    path.write_text(json.dumps(tree))
    open_clip.add_model_config(path)
    return path.stem


def small(*settings: str):
    """A run of two tasks of three steps from random weights."""
    return config.parse(config.override({}, [*SMALL, *settings]))


def noted(
    run_config,
    execution=ExecutionConfig(),  # noqa: B008
    manager=None,
    stop_at=None,
    number=signal.SIGTERM,
):
    """(losses, final weights, metrics) of a run; stop_at: the step at which the last process gets
    a signal of this number."""
    losses = []

    def step(task, step, result, model):
        losses.append(result.loss.item())
        if len(losses) == stop_at and processes.rank() == processes.world_size() - 1:
            os.kill(os.getpid(), number)

    result = execute(
        run_config, packed.load_embedded(), Observer(step), execution=execution, manager=manager
    )
    return losses, result.model.state_dict(), result.metrics


def first_gradients(run_config, execution) -> dict[str, torch.Tensor]:
    """The gradients of a run's first step, as its optimiser gets them, by name."""
    state = make_train_state(run_config, packed.load_embedded(), execution=execution)
    pools, found = mixtures.task_pools(run_config, state.corpus)[0], {}

    def keep(*_):
        parameters = state.model.named_parameters()
        found.update({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    state.method.begin_task(state, 0)
    optimizer = create_optimizer(state)
    optimizer.register_step_pre_hook(keep)
    own = execution.own_samples(sum(pools.counts))
    train_step(state, optimizer, next(state.batches(pools, 0, [0], own)), 0, 0, 0.0)
    return found


def main(folder: Path) -> None:
    """All of `RUNS`, one that is stopped and goes on, and one that was killed and goes on."""
    torch.set_num_threads(1)
    with processes.init_distributed():
        add_sigmoid_model(Path(tempfile.mkdtemp(dir=folder)))
        for name, (settings, execution) in RUNS.items():
            gradients = first_gradients(small(*settings), execution)
            losses, weights, metrics = noted(small(*settings), execution)
            scores = torch.tensor(metrics["score"].tolist())
            assert torch.equal(scores, processes.all_gather(scores[None])[0])  # on all the same
            if processes.rank():
                continue
            save_file(weights, folder / f"{name}.safetensors")
            save_file(gradients, folder / f"{name}-gradients.safetensors")
            (folder / f"{name}.json").write_text(json.dumps([losses, metrics["score"].tolist()]))
        for name, weights in {"resumed": stop_and_go_on(), "after": go_on()}.items():
            if processes.rank() == 0:
                save_file(weights, folder / f"{name}.safetensors")


def manager_of(run_id: str, **options) -> CheckpointManager | None:
    """What saves a run, in the first process."""
    return None if processes.rank() else CheckpointManager(run_id, **options).__enter__()


def stop_and_go_on() -> dict:
    """The final weights of the first of `RUNS`, stopped by a signal to one process."""
    manager = manager_of("ab" * 32)
    try:
        noted(small(), manager=manager, stop_at=4)
    except Interrupted as stop:
        assert stop.signal == signal.SIGTERM
        assert "everything is saved; the same command" in str(stop)
    losses, weights, _ = noted(small(), manager=manager)
    assert len(losses) == 2, "it went on where it was"
    return weights


def be_killed() -> None:
    """Begin the first of `RUNS`, saved after each step; the last process is killed in it."""
    torch.set_num_threads(1)
    with processes.init_distributed():
        manager = manager_of("cd" * 32, interval=0)
        noted(small(), manager=manager, stop_at=4, number=signal.SIGKILL)


def go_on() -> dict:
    """The final weights of the run that was killed."""
    losses, weights, _ = noted(small(), manager=manager_of("cd" * 32))
    assert 0 < len(losses) < 6, "it went on from a checkpoint"
    return weights


if __name__ == "__main__":
    if sys.argv[2:] == ["killed"]:
        be_killed()
    else:
        main(Path(sys.argv[1]))
