"""Readers of image files: each turns a manifest and a folder into an `index.Index`."""

from collections.abc import Callable
from pathlib import Path

from cmp.data.filesets import FileSet
from cmp.data.readers import folders, fomo, rows, tars
from cmp.data.readers.index import Index

READERS: dict[str, Callable[[FileSet, Path], Index]] = {
    "folder": folders.read, "csv": rows.read, "parquet": rows.read, "tars": tars.read,
    "fomo": fomo.read,
}  # fmt: skip
"""By `reader.kind`. A frame in memory is read by `rows.read_frame`."""
