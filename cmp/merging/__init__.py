"""Model merging: which weights are combined, and how.

`policies` says which, `rules` how; `apply` applies a rule to state dicts, `files` to files, and
`ranks` finds what rules keep that trim whole models.
"""
