"""Merge models: choose which weights to combine, and how.

`policies` choose the weights and `rules` combine them. `apply` applies a rule to state dicts and
`files` to files. `ranks` finds the entries to keep for rules that trim whole models.
"""
