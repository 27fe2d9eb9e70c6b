"""Parquet files that are read as what they must be, or not at all."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_string_dtype

KINDS = {str: is_string_dtype, int: is_integer_dtype, float: is_numeric_dtype, list: lambda _: True}

METRICS = {"task": int, "scope": str, "dataset": str, "role": str, "score": float}
"""What the metrics of a run hold at least."""


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """The table of a parquet file; `OSError` or `ValueError` if it is none or lacks a column.

    columns: name -> str, int, float, or list for anything else.
    """
    try:
        table = pd.read_parquet(path)
    except (pyarrow.ArrowException, LookupError, MemoryError, TypeError) as error:
        raise ValueError(f"{path.name}: no readable table ({error!r:.200})") from error
    for name, kind in columns.items():
        if list(table.columns).count(name) != 1 or not KINDS[kind](table[name]):
            raise ValueError(f"{path.name}: {name}: must be one column of {kind.__name__}")
    return table
