"""Studies: grids of runs, computed once and stored, and what their results say."""
