"""What EWC and SI share: parameters are held where they were, the more so the more they matter.

`Learner.state` holds "importance/NAME" and "anchor/NAME" for each parameter NAME that trains, where
the network is, so that a penalty copies nothing.
"""

import torch
from torch import Tensor

from cmp.methods import Learner, trainable


def prepare(learner: Learner) -> None:
    """Nothing matters yet; the anchor comes with the first task."""
    for name, parameter in trainable(learner.model).items():
        learner.state[f"importance/{name}"] = torch.zeros_like(parameter)


def drop_anchor(learner: Learner) -> None:
    """The weights that a task starts from are where they are held; those are the merged ones, where
    a policy merges."""
    for name, parameter in trainable(learner.model).items():
        learner.state[f"anchor/{name}"] = parameter.detach().clone()


def penalty(learner: Learner) -> Tensor:
    """sum over parameters of importance * (theta - anchor)^2, in fp32."""
    state = learner.state
    terms = [
        (state[f"importance/{name}"] * (parameter - state[f"anchor/{name}"]).square()).sum()
        for name, parameter in trainable(learner.model).items()
    ]
    return torch.stack(terms).sum()
