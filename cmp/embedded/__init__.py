"""The embedded benchmark: its data, drawn from public packages, and its small models.

`manifest` holds the schema of a dataset and says whether it is built. `packages` fetches what
datasets are made from; `icons` and `drawn` make them; `build` runs these recipes; `packed` writes,
reads and joins the result. `models` has the towers, their vocabulary and their bases, and `sheets`
draws contact sheets.
"""
