"""Merging the many small segments of an LLM store into few big ones, so that it opens fast.

The new segments are durable and proven to hold every answer before the first old one is deleted, so a kill at any
point leaves duplicates at worst, which the next compaction removes. Readers notice that a segment is gone and list the
folder again. Writers only add segments, and those that appear meanwhile stay as they are.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmr_ray.errors import DataError
from llmr_ray.feedback.key_index import KeyIndex
from llmr_ray.feedback.segments import SegmentGone, SegmentWriter, open_segment, settled
from llmr_ray.feedback.store import LLMStore
from llmr_ray.locks import locked

SEGMENT_ROWS = 65_536
"""Rows of a full segment: a million answers in 16 files. Full ones are never rewritten, and a file is read whole to
check it even if one row is wanted, so more rows make reading here and there slower."""

_ABANDONED_SECONDS = 3600.0
"""A temporary file untouched for longer belongs to a writer that was killed: writing one takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What a compaction did: small segments merged, and what was written in their place."""

    merged_segments: int
    new_segments: int
    answers: int
    dropped_rows: int
    """Rows whose key has a later answer, which is the one that is served."""


def compact(folder: Path, *, segment_rows: int = SEGMENT_ROWS) -> Compaction:
    """Merges all segments of fewer than `segment_rows` rows; what the store answers stays the same.

    Where two segments hold one key, the answer that is served is kept. A folder with less than two small segments is
    left alone, so compacting twice is compacting once.

    Raises:
        LockedError: another process compacts this folder.
        DataError: the new segments do not hold every answer; nothing was deleted.
    """
    if not folder.is_dir():
        return Compaction(merged_segments=0, new_segments=0, answers=0, dropped_rows=0)
    with locked(folder):
        _sweep(folder)
        return settled(lambda: _compact(folder, segment_rows))


def _compact(folder: Path, segment_rows: int) -> Compaction:
    store = LLMStore(folder)
    keys, segments = store.keys(), store.segments()
    small = [segment for segment in segments if segment.num_rows < segment_rows]
    if len(small) < 2:
        return Compaction(merged_segments=0, new_segments=0, answers=0, dropped_rows=0)
    # After all that is merged and before all that is written meanwhile, so that the later answer stays the later.
    time_ns = max(segment.time_ns for segment in small) + 1
    written = _write(folder, store.scan(small), segment_rows, time_ns)
    _check(folder, keys, [*written, *(segment.name for segment in segments if segment.num_rows >= segment_rows)])
    for segment in small:
        segment.path.unlink(missing_ok=True)
    answers = sum(written.values())
    return Compaction(
        merged_segments=len(small),
        new_segments=len(written),
        answers=answers,
        dropped_rows=sum(segment.num_rows for segment in small) - answers,
    )


def _write(folder: Path, batches: Iterable[pa.RecordBatch], segment_rows: int, time_ns: int) -> dict[str, int]:
    """Writes rows into segments of that size (the last may be smaller); returns the rows of each by name."""
    written: dict[str, int] = {}
    writer: SegmentWriter | None = None
    try:
        for rest in batches:
            while rest.num_rows:
                writer = writer or SegmentWriter(folder, time_ns + len(written))
                piece = rest.slice(0, segment_rows - writer.num_rows)
                writer.write(piece)
                rest = rest.slice(piece.num_rows)
                if writer.num_rows == segment_rows:
                    written[writer.commit()] = writer.num_rows
                    writer = None
        if writer:
            written[writer.commit()] = writer.num_rows
    finally:
        if writer:
            writer.close()
    return written


def _check(folder: Path, keys: np.ndarray, names: Sequence[str]) -> None:
    """Reads segments back from the disk; DataError unless they hold all `keys`."""
    index = KeyIndex()
    try:
        index.add([open_segment(folder, name) for name in sorted(names)])
    except SegmentGone as gone:
        raise DataError(
            f"{gone} changed while {folder} was being compacted, so nothing was deleted. Look whether the "
            "disk is sound and no other program writes there, then compact again."
        ) from gone
    lost = int((~index.find(keys)[0]).sum())
    if lost:
        raise DataError(
            f"The compacted segments of {folder} would lack {lost} of {len(keys)} answers, each of which was paid for. "
            "Nothing was deleted. If other programs move files in this folder, stop them; then compact again."
        )


def _sweep(folder: Path) -> None:
    for path in folder.glob("seg-*.tmp-*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
