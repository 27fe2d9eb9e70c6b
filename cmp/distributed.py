"""Several processes that compute one run, as torchrun starts them; alone, nothing happens.

Every process holds the whole network and takes its slice of a batch. Nothing wraps the network:
features are gathered, the loss is that of the whole batch on every process, and gradients are added
up, so that the result is what one process computes.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch import distributed as dist

from cmp.errors import CmpError

PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for one another: the first alone evaluates and saves."""


@contextlib.contextmanager
def init_distributed(device: str = "cpu") -> Iterator[str]:
    """Connect the processes that torchrun started, if it did.

    Args:
        device: "cpu", or "cuda" for a card per process.

    Yields:
        The device of this process.

    Raises:
        CmpError: Several processes cannot share this device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise CmpError(f"--device: {device!r}: several processes take cuda, a card each, or cpu")
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    yield device
    dist.destroy_process_group()  # after an error the others may never come here


def world_size() -> int:
    """Return how many processes compute this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """Return how many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def rank() -> int:
    """Return this process's number; process 0 evaluates, saves and reports for all."""
    return dist.get_rank() if world_size() > 1 else 0


def local_slice(count: int) -> slice:
    """Return which of `count` samples this process takes; raise `CmpError` for an uneven split."""
    if count % world_size():
        raise CmpError(
            f"training.batch: {count} cannot be split evenly between {world_size()} processes"
        )
    share = count // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def all_gather(x: Tensor) -> Tensor:
    """Return the rows of all processes in order of their slices, [N, E] -> [N * processes, E]."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce_gradients(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the sum over all processes, in place, in the same bits on each."""
    if world_size() == 1:
        return
    pairs = [(x, x.contiguous()) for x in tensors]
    for work in filter(None, [dist.all_reduce(dense, async_op=True) for _, dense in pairs]):
        work.wait()
    for x, dense in pairs:
        if dense is not x:
            x.copy_(dense)


def all_reduce_max(number: int, device: torch.device) -> int:
    """Return the largest number of all processes, such as of a signal that reached only some."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast(text: str, device: torch.device | str) -> str:
    """Return the text of process 0."""
    if world_size() == 1:
        return text
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor(len(content), device=device)
    dist.broadcast(length, 0)
    if rank():
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        dist.barrier()
