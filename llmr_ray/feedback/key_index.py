"""Where the latest answer of each key is, for millions of keys at 40 bytes each.

An entry is key, segment number and row in 40 bytes whose order as a byte string is the order of (key, segment, row).
Entries lie in sorted runs, each more than twice as long as the next: new ones are a run of their own, and short runs
are merged, so that adding costs O(log n) per key over time and a lookup is a few binary searches, vectorised.
"""

from collections.abc import Sequence

import numpy as np

from llmr_ray.feedback.segments import Segment

_ENTRY = np.dtype([("key", "S32"), ("segment", ">u4"), ("row", ">u4")])
_ORDER = np.dtype("S40")


class KeyIndex:
    """Maps keys to (segment, row). Of equal keys, that of the segment with the later name counts, then the later row.

    `segments` are all that were added; a segment's number is its place there.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._runs: list[np.ndarray] = []
        self._num_keys = 0

    def __len__(self) -> int:
        return self._num_keys

    def add(self, opened: Sequence[tuple[Segment, np.ndarray]]) -> None:
        """Takes in segments with their keys (S32, in order of rows), given in order of their names."""
        entries = np.empty(sum(len(keys) for _, keys in opened), _ENTRY)
        start = 0
        for number, (segment, keys) in enumerate(opened, len(self.segments)):
            part = entries[start : start + len(keys)]
            part["key"], part["segment"], part["row"] = keys, number, np.arange(len(keys))
            start += len(keys)
            self.segments.append(segment)
        entries = self._winners(_latest(entries))
        if not len(entries):
            return
        self._runs.append(entries)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [_latest(np.concatenate(self._runs[-2:]))]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks up keys (S32 of shape [n]).

        Returns:
            Three arrays of shape [n]: whether there is an answer, and where there is, its segment's number and its row.
        """
        probes = np.zeros(len(keys), _ENTRY)
        probes["key"] = keys
        found = np.zeros(len(keys), bool)
        segments, rows = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        for run in self._runs:
            # A later run wins: what lost to an earlier one was never taken in.
            at = np.minimum(np.searchsorted(run.view(_ORDER), probes.view(_ORDER)), len(run) - 1)
            hit = run["key"][at] == keys
            segments[hit], rows[hit] = run["segment"][at[hit]], run["row"][at[hit]]
            found |= hit
        return found, segments, rows

    def keys(self) -> np.ndarray:
        """All keys in ascending order, as S32."""
        return self._merged()["key"]

    def serves_from(self, names: set[str]) -> bool:
        """Whether the answer of any key is in one of the segments of these names."""
        numbers = [number for number, segment in enumerate(self.segments) if segment.name in names]
        return bool(np.isin(self._merged()["segment"], numbers).any())

    def _winners(self, entries: np.ndarray) -> np.ndarray:
        """The entries without those whose key is already here in a segment of a later name."""
        known, segments, _ = self.find(entries["key"])
        self._num_keys += len(entries) - int(known.sum())
        if not known.any():
            return entries
        rank = np.empty(len(self.segments), np.int64)
        rank[sorted(range(len(rank)), key=lambda number: self.segments[number].name)] = np.arange(len(rank))
        return entries[~(known & (rank[segments] > rank[entries["segment"]]))]

    def _merged(self) -> np.ndarray:
        if not self._runs:
            return np.empty(0, _ENTRY)
        if len(self._runs) > 1:
            self._runs = [_latest(np.concatenate(self._runs))]
        return self._runs[0]


def _latest(entries: np.ndarray) -> np.ndarray:
    """Sorts entries in place; of equal keys, keeps the one of the highest segment and row."""
    entries.view(_ORDER).sort(kind="stable")
    last = np.ones(len(entries), bool)
    last[:-1] = entries["key"][:-1] != entries["key"][1:]
    return entries if last.all() else entries[last]
