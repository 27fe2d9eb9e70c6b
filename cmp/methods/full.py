"""Fine-tuning of everything: both towers and the logit scale."""

from cmp.methods import Method

METHOD = Method()
