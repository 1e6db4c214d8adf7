"""Ranges of rows of an artifact's table, whose parts other stages cut as they need."""

import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.artifacts import Artifact
from llmr_ray.errors import DataError


def read_rows(artifact: Artifact, table: str, start: int, end: int, columns: list[str] | None = None) -> pa.Table:
    """Rows [start, end) of a table, reading only the parts that hold them (fewer rows at the table's end).

    Args:
        artifact: a finished one.
        table: its name.
        start: first row.
        end: last row, exclusive.
        columns: read these alone, from files whose bytes are checked first; None: all.

    Raises:
        DataError: there are no such rows, or a file's bytes changed.
    """
    first, pieces = 0, []
    for shard, record in sorted(artifact.ledger().items()):
        num_rows = record["rows"].get(table, 0)
        if num_rows and first < end and first + num_rows > start:
            offset = max(0, start - first)
            path = None if columns is None else artifact.checked_part(table, shard)
            part = artifact.read(table, shard) if path is None else pq.read_table(path, columns=columns)
            pieces.append(part.slice(offset, min(end, first + num_rows) - first - offset))
        first += num_rows
    if not pieces:
        raise DataError(f"{artifact.id} has {first} rows of '{table}', none of them in [{start}, {end}).")
    return pa.concat_tables(pieces)
