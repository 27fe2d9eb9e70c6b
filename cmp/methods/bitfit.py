"""BitFit: biases alone train, those of norms too, in both towers (spec 3)."""

from cmp.methods import train_only
from cmp.training import TrainState, UpdateMethod


def prepare(learner: TrainState) -> None:
    """Freeze all but what is called a bias."""
    names = [name for name, _ in learner.model.named_parameters()]
    train_only(learner.model, [name for name in names if name.endswith("bias")])


METHOD = UpdateMethod(prepare)
