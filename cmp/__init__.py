"""Continual multimodal pretraining: training, merging, schedules, mixtures, streams, budgets."""

__version__ = "0.1.0"

NUMERICS = 3
"""Part of every run's id. Bumped by hand when a change may alter a run's result."""
