"""One segment of the LLM store: an immutable Parquet file whose name carries its time and the digest of its bytes.

A segment is written to a temporary name, synced and renamed, so that it is there whole or not at all. Names sort by
time. Whoever reads one checks its digest first; a file that does not match is moved to ``quarantine/`` with a warning.
"""

import hashlib
import logging
import os
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.artifacts import sha256_file
from llmr_ray.durable import commit_rename, flush
from llmr_ray.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

GROUP_ROWS = 8192
"""Rows of a Parquet row group: what is decoded to serve any of them."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(32), nullable=False),
        pa.field("logprobs", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        pa.field("texts", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("prompt_sha", pa.string(), nullable=False),
    ]
)


class SegmentGone(Exception):
    """A segment is no longer there: compacted by another process, or spoiled and set aside. List the folder again."""


def settled(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again whenever a segment vanished under it."""
    while True:
        try:
            return read()
        except SegmentGone as gone:
            log.debug("%s is gone; reading again", gone)


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that was found whole.

    folder, name: where it is.
    starts: the first row of each row group.
    """

    folder: Path
    name: str
    starts: tuple[int, ...]
    num_rows: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    @property
    def time_ns(self) -> int:
        """When it was written, as its name says."""
        return int(self.name.split("-")[1])

    def group_of(self, row: int) -> int:
        """The number of the row group that holds a row."""
        return bisect_right(self.starts, row) - 1

    def read(self, group: int, columns: Sequence[str] = SCHEMA.names) -> pa.RecordBatch:
        """The rows of a row group. Raises SegmentGone."""
        table = _checked(self.path).read_row_group(group, columns=list(columns), use_threads=False)
        return table.combine_chunks().to_batches()[0]


def open_segment(folder: Path, name: str) -> tuple[Segment, np.ndarray]:
    """A segment and its keys in order of rows, as S32 of shape [rows].

    Raises:
        SegmentGone: it is not there, or was spoiled.
        DataError: it is whole but has other columns.
    """
    file = _checked(folder / name)
    if not file.schema_arrow.equals(SCHEMA):
        raise DataError(
            f"{folder / name} is whole but has the columns {file.schema_arrow.names} of another version, so its "
            "answers cannot be read. Use the version that wrote it, or move the file away."
        )
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    keys = key_array(file.read(columns=["key"], use_threads=False)["key"])
    return Segment(folder, name, tuple(accumulate(sizes, initial=0))[:-1], len(keys)), keys


def key_array(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of keys as S32. (Two of them are equal exactly if all 32 bytes are, although S drops zeros at the end
    when one is turned into `bytes`.)"""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.frombuffer(part.buffers()[1], "S32")[part.offset :][: len(part)] for part in chunks if len(part)]
    return np.concatenate(parts) if parts else np.empty(0, "S32")


def list_segments(folder: Path) -> set[str]:
    """The names of the segments in a folder; none where there is no folder."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {item.name for item in entries if is_segment(item.name) and item.is_file()}


def is_segment(name: str) -> bool:
    """Whether a file of that name is a finished segment."""
    return name.startswith("seg-") and name.endswith(".parquet")


class SegmentWriter:
    """Writes a segment as rows come; `commit` makes it durable and visible, and until then `close` removes it.

    Args:
        folder: created if need be.
        time_ns: the time in the segment's name; now by default.
    """

    def __init__(self, folder: Path, time_ns: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_rows = 0
        # Sorted names are the order of writing; the time only settles which of two equal keys is served.
        self._stem = f"seg-{time.time_ns() if time_ns is None else time_ns:020d}-{uuid.uuid4().hex[:12]}"
        self._temporary = folder / f"{self._stem}.tmp-{uuid.uuid4().hex}"
        self._pending: list[pa.RecordBatch] = []
        # Prompts repeat from target to target; a dictionary of keys or log-probabilities would hold each value once.
        self._file = pq.ParquetWriter(self._temporary, SCHEMA, compression="zstd", use_dictionary=["prompt_sha"])

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows of SCHEMA."""
        self._pending.append(batch)
        self.num_rows += batch.num_rows
        if sum(part.num_rows for part in self._pending) >= GROUP_ROWS:
            self._flush()

    def commit(self) -> str:
        """Makes the segment durable; returns its name."""
        self._flush()
        self._file.close()
        flush(self._temporary)
        name = f"{self._stem}-{sha256_file(self._temporary)[:16]}.parquet"
        commit_rename(self._temporary, self.folder / name)
        return name

    def close(self) -> None:
        """Ends the writing; what was not committed is removed."""
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._file.write_table(pa.Table.from_batches(self._pending, SCHEMA), row_group_size=GROUP_ROWS)
        self._pending = []


def _checked(path: Path) -> pq.ParquetFile:
    """A segment's file, read whole, after its bytes were found to be those of its name."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SegmentGone(path) from None
    if hashlib.sha256(data).hexdigest()[:16] != path.stem.rsplit("-", 1)[-1]:
        _set_aside(path)
        raise SegmentGone(path)
    return pq.ParquetFile(pa.BufferReader(data))


def _set_aside(path: Path) -> None:
    quarantine = path.parent / "quarantine"
    quarantine.mkdir(exist_ok=True)
    log.warning("%s does not match its checksum; moved to %s. Its answers will be asked again.", path, quarantine)
    try:
        os.replace(path, quarantine / path.name)
    except FileNotFoundError:
        log.debug("%s was moved away by another process", path)
