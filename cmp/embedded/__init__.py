"""The embedded benchmark as a clone has built it, and its small models.

`manifest` defines the schema of a dataset and checks whether it is built, `packed` writes, reads
and joins what was built, and `sheets` draws contact sheets. `models` has the towers, their
vocabulary and their bases. How the data are made is the package `benchmark` of the book.
"""
