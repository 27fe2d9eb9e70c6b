"""Model merging: which weights are combined, and how (spec 4).

`policies` says which, `rules` how; `combining` applies a rule to state dicts, `streamed` to files.
"""
