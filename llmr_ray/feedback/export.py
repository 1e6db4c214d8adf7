"""All answers of LLM stores as one Parquet file sorted by key, in bounded memory.

Keys are hashes, hence uniform: rows are first dealt into temporary files by key range, which are then sorted one after
the other.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.durable import staged
from llmr_ray.feedback.segments import GROUP_ROWS, SCHEMA, key_array, settled
from llmr_ray.feedback.store import LLMStore

_RANGE_ROWS = 131_072
"""Answers in a key range: what is sorted in memory at once."""

EXPORT_SCHEMA = pa.schema([pa.field("scorer", pa.string(), nullable=False), *SCHEMA])


def export_answers(folders: Mapping[str, Path], out: Path) -> int:
    """Writes every answer of some scorers to `out`, one row each with the columns of EXPORT_SCHEMA.

    Args:
        folders: the scorers' folders by scorer id.
        out: written whole or not at all; replaced if it is there.

    Returns:
        The number of answers.
    """
    return settled(lambda: _export(folders, out))


def _export(folders: Mapping[str, Path], out: Path) -> int:
    stores = {scorer: LLMStore(folder) for scorer, folder in folders.items()}
    num_ranges = -(-sum(map(len, stores.values())) // _RANGE_ROWS) or 1
    rows = 0
    with staged(out) as whole, tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.tmp-") as scratch:
        ranges = [Path(scratch) / f"{number:06d}.parquet" for number in range(num_ranges)]
        _deal(stores, ranges)
        with pq.ParquetWriter(
            whole, EXPORT_SCHEMA, compression="zstd", use_dictionary=["scorer", "prompt_sha"]
        ) as file:
            for path in ranges:
                table = pq.ParquetFile(path).read().sort_by([("key", "ascending"), ("scorer", "ascending")])
                file.write_table(table, row_group_size=GROUP_ROWS)
                rows += table.num_rows
                path.unlink()
    return rows


def _deal(stores: Mapping[str, LLMStore], ranges: list[Path]) -> None:
    """Writes every answer into the file of its key range."""
    with ExitStack() as open_files:
        files = [
            open_files.enter_context(pq.ParquetWriter(path, EXPORT_SCHEMA, use_dictionary=False)) for path in ranges
        ]
        for table in _tables(stores):
            # The first two bytes, scaled to the number of ranges; more than 65,536 ranges are beyond any disk.
            first = key_array(table["key"]).view(np.uint8).reshape(-1, 32)[:, :2].astype(np.int64)
            place = (first[:, 0] * 256 + first[:, 1]) * len(ranges) >> 16
            order = np.argsort(place, kind="stable")
            cuts = np.searchsorted(place[order], np.arange(len(ranges) + 1))
            for file, start, end in zip(files, cuts[:-1], cuts[1:], strict=True):
                if end > start:
                    file.write_table(table.take(pa.array(order[start:end])))


def _tables(stores: Mapping[str, LLMStore]) -> Iterator[pa.Table]:
    """All answers with their scorer, in tables of about _RANGE_ROWS rows, so that few row groups are written."""
    parts: list[pa.Table] = []
    for scorer, store in stores.items():
        for batch in store.scan():
            names = pa.repeat(scorer, batch.num_rows)
            parts.append(pa.Table.from_arrays([names, *batch.columns], schema=EXPORT_SCHEMA))
            if sum(part.num_rows for part in parts) >= _RANGE_ROWS:
                yield pa.concat_tables(parts)
                parts = []
    if parts:
        yield pa.concat_tables(parts)
