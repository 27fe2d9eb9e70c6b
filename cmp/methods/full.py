"""Fine-tuning of everything: both towers and the logit scale."""

from cmp.training import UpdateMethod

METHOD = UpdateMethod()
