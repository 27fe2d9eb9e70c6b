"""The reader's own data: folders, tables, tars, and FoMo-in-Flux in its authors' layout.

`manifest` holds the schema of a manifest. `tables`, `tars` and `fomo` each turn a manifest and a
folder into an `index.ImageIndex`. `images` decodes the files, `collection` checks all sets of a
collection and joins them into a `cmp.data.Corpus`, `notes` says what its scores would hide, and
`infer` writes a first manifest.
"""
