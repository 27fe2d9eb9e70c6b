"""Studies and what they show: grids, workers, results, claims, verdicts, and the planner."""

from pathlib import Path

BOOK = Path(__file__).resolve().parents[2]
"""The folder of studies, results, claims and advice."""
