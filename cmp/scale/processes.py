"""Compute one run in several processes, as started by torchrun; a single process skips all this.

Every process has the whole network and takes its slice of a batch. The network is not wrapped:
features are gathered, every process computes the loss of its own samples (`cmp.scale.losses`), and
gradients are summed, so that the result equals that of one process.
"""

import contextlib
import datetime
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from cmp.errors import CmpError, first_line
from cmp.files import make_folder
from cmp.project import build_folder

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that are sent together."""
HOST_TIMEOUT = datetime.timedelta(hours=12)
"""How long processes wait for each other on the host, as when the first one reads data or saves."""
STEP_TIMEOUT = datetime.timedelta(minutes=10)
"""How long processes wait for features and gradients of a step, where a long wait means that
another process is lost."""
_host_group: dist.ProcessGroup | None = None
"""The group for waits on the host. None for the default group, as without `init_distributed`."""


@contextlib.contextmanager
def init_distributed(device: str = "cpu") -> Iterator[str]:
    """Connect the processes that torchrun or srun started, if they did.

    Args:
        device: "cpu", or "cuda" for one GPU per process.

    Yields:
        The device of this process.

    Raises:
        CmpError: Several processes cannot share this device, or do not share the build folder.
    """
    _follow_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device == "cuda":
        number, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if cards == 1 and {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"} & {*os.environ}:
            number = 0  # each task sees only its own card
        if number >= cards:
            raise CmpError(
                f"--device cuda: no GPU for process {number}, as this machine has {cards}; start "
                "fewer processes"
            )
        device = f"cuda:{number}"
        torch.cuda.set_device(device)  # before anything can start on the first GPU
    elif device != "cpu":
        raise CmpError(
            f"--device: {device!r}: several processes need cuda, with one GPU each, or cpu"
        )
    global _host_group
    # gloo sends messages between processes without waiting for a GPU
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    with _explain_absence():
        dist.init_process_group(backend, timeout=STEP_TIMEOUT)
        _host_group = cast(Any, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    _check_build_folder()
    yield device
    _host_group = None
    dist.destroy_process_group()  # after an error, the others may never get here


@contextlib.contextmanager
def _explain_absence() -> Iterator[None]:
    """Turn the errors of gloo and NCCL about a lost process into a `CmpError`."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error).partition(". ")[0]
        raise CmpError(
            f"another process of this run has ended or cannot be reached ({reason:.200}); restart "
            "all processes to continue the run from its last checkpoint"
        ) from error


def _follow_slurm() -> None:
    """Set torchrun's variables from those of `srun`, if torchrun did not set them."""
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    names["WORLD_SIZE"] = "SLURM_STEP_NUM_TASKS"  # a batch script's own commands also have NTASKS
    if "RANK" in os.environ or not all(name in os.environ for name in names.values()):
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1 and missing:
        raise CmpError(
            f"srun: {missing[0]} is not set; run `export MASTER_PORT=29500 MASTER_ADDR=$(scontrol "
            "show hostnames | head -n 1)` before srun"
        )
    os.environ.update({name: os.environ[other] for name, other in names.items()})
    os.environ["LOCAL_WORLD_SIZE"] = str(srun_tasks())


def _check_build_folder() -> None:
    """Check that all machines see the first one's build folder, where it leaves checkpoints and
    results."""
    if local_world_size() == world_size():
        return
    folder = build_folder().absolute()
    name = broadcast("" if rank() else f"seen-by-all-{uuid.uuid4().hex}")
    if not rank():
        make_folder(folder)
        (folder / name).touch()
    barrier()
    [is_missing] = all_reduce_max(not (folder / name).exists())
    if not rank():
        (folder / name).unlink()
    if is_missing:
        raise CmpError(
            f"{folder}: not all machines of this run see this folder; set CMP_BUILD to a folder on "
            "a disk that they share"
        )


def srun_tasks() -> int:
    """Return how many processes `srun` started on this machine, or 1 without `srun`."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2),3
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    tasks = [int(count) for count, machines in runs for _ in range(int(machines or 1))]
    return tasks[int(os.environ.get("SLURM_NODEID", 0))]


def world_size() -> int:
    """Return how many processes compute this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """Return how many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def rank() -> int:
    """Return this process's number; process 0 saves and reports for all."""
    return dist.get_rank() if world_size() > 1 else 0


def local_slice(count: int) -> slice:
    """Return the slice of `count` samples that this process takes. If the split is uneven, the
    first processes take one more.

    Raises:
        CmpError: There are fewer samples than processes.
    """
    shares = _shares(count)
    if not shares[-1]:
        raise CmpError(
            f"a batch of {count} samples is too small for {world_size()} processes; use a larger "
            f"training.batch, or at most {count} processes"
        )
    start = sum(shares[: rank()])
    return slice(start, start + shares[rank()])


def _shares(count: int) -> list[int]:
    """Return how many of `count` samples each process takes."""
    share, more = divmod(count, world_size())
    return [share + (number < more) for number in range(world_size())]


def all_gather(x: Tensor, count: int | None = None) -> Tensor:
    """Return the rows of all processes in the order of their slices.

    Args:
        x: The rows of this process, [N, ...].
        count: The total number of rows, if each process has its `local_slice` of them. By
            default, all have as many as this one.

    Returns:
        [count, ...].
    """
    if world_size() == 1:
        return x
    shares = [len(x)] * world_size() if count is None else _shares(count)
    x = torch.cat([x, x.new_zeros(max(shares) - len(x), *x.shape[1:])])  # all send as many
    parts = [torch.empty_like(x) for _ in shares]
    with _explain_absence():
        dist.all_gather(parts, x)
    return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])


def share_rows(items: Any, compute: Callable[[Any], Tensor]) -> Tensor:
    """Compute one row per item with all processes together, and return all rows, [items, E], on
    each.

    Args:
        items: A nonempty sequence or array.
        compute: Returns the rows of n of the items, [n, E].
    """
    if world_size() == 1:
        return compute(items)
    count = len(items)
    size = -(-count // world_size())
    start = min(rank() * size, count - 1)  # if there are too few items, repeat the last one
    own = compute(items[start : start + size])
    barrier()  # some items take longer, and a gather waits no longer than a step may
    return all_gather(F.pad(own, (0, 0, 0, size - len(own))))[:count]


@contextlib.contextmanager
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sum gradients over all processes during the last backward pass of a step.

    Gradients are sent in buckets, which are the same in every process. A bucket is sent once it and
    all before it are ready, and those that this pass does not complete are sent at the end, so that
    the order does not depend on which gradient is there first. The sums are bitwise equal on every
    process.

    Args:
        parameters: The parameters; gradients of the trainable ones are summed.
    """
    if world_size() == 1:
        yield
        return
    buckets = fill_buckets([p for p in parameters if p.requires_grad])
    place = {p: number for number, bucket in enumerate(buckets) for p in bucket}
    missing = [set(bucket) for bucket in buckets]
    sent: list[tuple[dist.Work, Tensor]] = []

    def send() -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in buckets[len(sent)]]
        flat = torch.cat([grad.flatten() for grad in grads])
        with _explain_absence():
            sent.append((cast(dist.Work, dist.all_reduce(flat, async_op=True)), flat))

    def add(parameter: nn.Parameter) -> None:
        missing[place[parameter]].discard(parameter)
        while len(sent) < len(buckets) and not missing[len(sent)]:
            send()

    hooks = [p.register_post_accumulate_grad_hook(add) for p in place]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while len(sent) < len(buckets):
        send()
    for (work, flat), bucket in zip(sent, buckets, strict=True):
        with _explain_absence():
            work.wait()
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if p.grad is not None:
                p.grad.copy_(part.view_as(p))


def fill_buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in buckets of about `BUCKET_BYTES`, the last parameters first, as a
    backward pass reaches them."""
    buckets: list[list[nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in reversed(parameters):
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def all_reduce_max(*numbers: int) -> list[int]:
    """Return the maximum of each number over all processes, for example of a signal that only some
    received."""
    largest = torch.tensor(numbers, dtype=torch.int64)
    if world_size() > 1:
        with _explain_absence():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group)
    return largest.tolist()


def broadcast(text: str) -> str:
    """Return the text of process 0 on every process; the others pass ""."""
    content = text.encode()
    [length] = all_reduce_max(len(content))
    return bytes(all_reduce_max(*content.ljust(length, b"\0"))).decode()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Make other processes wait for the first, which leaves its results in the build folder."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def barrier() -> None:
    """Wait until all processes have reached this point."""
    if world_size() > 1:
        with _explain_absence():
            dist.barrier(group=_host_group)
