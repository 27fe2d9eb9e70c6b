"""The embedded benchmark: its data, made from public packages, and its small models.

`manifest` defines the schema of a dataset and checks whether it is built. `packages` downloads the
sources of datasets, `icons` and `drawn` define recipes, `build` runs them, and `packed` writes,
reads and joins the results. `models` has the towers, their vocabulary and their bases, and `sheets`
draws contact sheets.
"""
