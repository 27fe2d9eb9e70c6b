"""Compute studies, which are grids of runs, and evaluate their results."""
