"""Compute runs, and keep their identities, checkpoints, logs and results."""
