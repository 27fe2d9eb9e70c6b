"""Pass on the numbers of a run's log to TensorBoard and Weights & Biases. Both are optional."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cmp.errors import CmpError
from cmp.files import SHORT_ID

BOARDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""The module of each board, which may not be installed."""


class Board(NamedTuple):
    """Something that shows the numbers of a run.

    Attributes:
        add: (numbers by name, step), where step is how many steps of the stream precede them.
        close: Finishes writing.
    """

    add: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


def open_board(name: str, place: str, run_id: str, config: Mapping[str, Any]) -> Board:
    """Open a board.

    Args:
        name: One of `BOARDS`.
        place: A folder for TensorBoard, or a project of Weights & Biases. There, a run that resumes
            continues the same entry; with WANDB_MODE=offline, everything stays in the folder
            `wandb` until `wandb sync` uploads it.
        run_id: The run's id.
        config: The run's config.

    Raises:
        CmpError: The package is not installed.
    """
    try:
        module = importlib.import_module(BOARDS[name])
    except ImportError as error:
        raise CmpError(f"--{name}: not installed; run `pip install {name}`") from error
    if name == "wandb":
        short = run_id[:SHORT_ID]
        entry = module.init(
            project=place, id=short, name=short, config=dict(config), resume="allow"
        )
        return Board(entry.log, entry.finish)
    writer = module.SummaryWriter(place)

    def add(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return Board(add, writer.close)
