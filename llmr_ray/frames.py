"""Arrow tables as polars frames, where tables are joined and grouped."""

from collections.abc import Sequence

import polars as pl
import pyarrow as pa

PAIR = ["query_id", "doc_id"]
"""What names a pair in every table of pairs."""


def frame_of(table: pa.Table, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of a table for polars."""
    frame = pl.from_arrow(table.select(list(columns)))
    assert isinstance(frame, pl.DataFrame)
    return frame
