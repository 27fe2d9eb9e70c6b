"""Programs for those who work on the package: each runs as `python -m tools.NAME`.

None of them is part of a wheel, and nothing in `cmp` or the book imports them.
"""
