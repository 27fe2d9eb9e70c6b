"""Pass on the numbers of a run's log to TensorBoard and Weights & Biases. Both are optional."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cmp.errors import CmpError
from cmp.files import SHORT_ID


class Board(Protocol):
    """Something that shows the numbers of a run."""

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Show numbers by name.

        Args:
            numbers: The numbers.
            step: How many steps of the stream precede them.
        """
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class TensorBoard:
    """A folder for TensorBoard, which needs the package `tensorboard`."""

    def __init__(self, folder: str):
        """Prepare to write.

        Raises:
            CmpError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise CmpError("--tensorboard: not installed; run `pip install tensorboard`") from error
        self.writer = SummaryWriter(str(Path(folder)))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Add a scalar for each number."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending."""
        self.writer.close()


class WeightsAndBiases:
    """A project of Weights & Biases, which needs the package `wandb`.

    A run that resumes continues the same entry. With WANDB_MODE=offline, everything stays in the
    folder `wandb` until `wandb sync` uploads it.
    """

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any]):
        """Begin or continue an entry.

        Args:
            project: The project.
            run_id: The run's id.
            config: The run's config.

        Raises:
            CmpError: `wandb` is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise CmpError("--wandb: not installed; run `pip install wandb`") from error
        short = run_id[:SHORT_ID]
        self.run = wandb.init(
            project=project, id=short, name=short, config=dict(config), resume="allow"
        )

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Finish the entry."""
        self.run.finish()
