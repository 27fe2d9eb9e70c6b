"""Model merging: which weights are combined, and how (spec 4).

`policies` says which, `rules` how; `apply` applies a rule to state dicts, `files` to files.
"""
