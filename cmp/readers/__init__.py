"""Read user data from folders, tables and tars, and FoMo-in-Flux in its original layout.

`manifest` defines the schema of a manifest. `folders`, `tables`, `pairs`, `tars` and `fomo` each
turn a manifest and a folder into an `index.ImageIndex`. `images` decodes the files, `collection`
checks all datasets of a collection and joins them into a `cmp.data.Corpus`, `notes` reports what
would distort its scores, and `infer` writes a first manifest.
"""
