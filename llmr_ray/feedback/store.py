"""What the LLM said, kept for ever: a content-addressed, append-only store of answers.

An answer's key hashes everything that determines it (scorer, exact prompt, target or sampling parameters), so a new
run, another method or the next round pays only for what was never asked. A segment is one Parquet file, written to a
temporary name, synced and renamed; its name carries the hash of its bytes. Many processes may write at once: names
never collide, the store is the union of its segments, and where two hold one key the later wins.
"""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import canonical_json
from llmr_ray.feedback.key_index import KeyIndex
from llmr_ray.feedback.requests import LLMRequest
from llmr_ray.feedback.segments import (
    SCHEMA,
    Segment,
    SegmentGone,
    SegmentWriter,
    key_array,
    list_segments,
    open_segment,
    settled,
)

CACHE_BYTES = 128 << 20
"""Decoded rows that a reader keeps in memory: about a million answers of ten tokens."""

_OPEN_AT_ONCE = 1024
"""Segments whose keys are in memory beside the index while a store opens."""

_VALUES = [name for name in SCHEMA.names if name != "key"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer for one key: a target's token log-probabilities, or the sampled texts; or why there is none."""

    key: bytes
    logprobs: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    num_prompt_tokens: int = 0
    truncated: bool = False
    prompt_sha: str = ""
    error: str | None = None
    num_computed_tokens: int = 0
    num_least_tokens: int = 0
    """What it cost when it was computed just now, and the least it could have; not kept."""


def request_keys(scorer_id: str, request: LLMRequest) -> list[bytes]:
    """The keys of a request: one per target, or one for all its samples.

    `max_new_tokens` belongs to a target's key too, because the prompt leaves room for it (feedback/fitting.py), and so
    do a limit of the request's own and what may be cut together. A target that is only compared with the first has
    another key than the same target read to its end.
    """
    segments = [
        [item.text, item.trim_order, item.trim_side, item.max_tokens, *(["separates"] if item.separates else [])]
        for item in request.segments
    ]
    limits = [request.max_new_tokens] + ([request.max_tokens] if request.max_tokens else [])
    prompt = hashlib.sha256(_bytes([scorer_id, segments, *limits])).hexdigest()
    if request.targets:
        first = request.targets[0]
        against = [request.rank_by, first] if request.rank_by else []
        return [
            hashlib.sha256(_bytes([prompt, "target", target, *(against if target != first else [])])).digest()
            for target in request.targets
        ]
    seed = request.seed if request.temperature > 0 else 0
    what = [prompt, "sample", request.num_samples, request.temperature, seed, list(request.stop)]
    what += ["says_something"] if request.says_something else []
    what += ["output_schema", request.output_schema] if request.output_schema else []
    return [hashlib.sha256(_bytes(what)).digest()]


class LLMStore:
    """The answers of one scorer in a folder. One object is for one thread; the folder is for any number of processes.

    Args:
        folder: created when the first answer is written.
        cache_bytes: how much of what was read stays decoded.

    Segments that were cut short or changed are moved to ``quarantine/`` with a warning; what they held counts as never
    asked. Opening checks every segment and keeps only where each key is.
    """

    def __init__(self, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder
        self.cache_bytes = cache_bytes
        self._index = KeyIndex()
        self._names: set[str] = set()
        self._cache: OrderedDict[tuple[str, int], pa.RecordBatch] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        self._refresh()
        return len(self._index)

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that have no answer."""
        self._refresh()
        asked = list(dict.fromkeys(keys))
        found, _, _ = self._index.find(_key_array(asked))
        return {asked[number] for number in np.flatnonzero(~found)}

    def get(self, keys: Collection[bytes]) -> dict[bytes, Answer]:
        """The answers there are, by key."""
        asked = list(dict.fromkeys(keys))
        return settled(lambda: {answer.key: answer for answer in self._read(asked)})

    def put(self, answers: Sequence[Answer]) -> None:
        """Makes answers durable in one new segment. Errors are left out: they may be asked again."""
        kept = [answer for answer in answers if answer.error is None]
        if not kept:
            return
        rows = [{name: getattr(answer, name) for name in SCHEMA.names} for answer in kept]
        with closing(SegmentWriter(self.folder)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            writer.commit()

    def keys(self) -> np.ndarray:
        """The keys of all answers in ascending order, as S32."""
        self._refresh()
        return self._index.keys()

    def segments(self) -> list[Segment]:
        """The segments there are, in the order of writing."""
        self._refresh()
        living = (segment for segment in self._index.segments if segment.name in self._names)
        return sorted(living, key=lambda segment: segment.name)

    def scan(self, segments: Iterable[Segment] | None = None) -> Iterator[pa.RecordBatch]:
        """Every answer once, in order of writing, as batches of SCHEMA, a row group or less each.

        Args:
            segments: some of `segments()`; then only the answers that are served from these.

        Raises:
            SegmentGone: another process compacted; begin anew (`settled`).
        """
        chosen = self.segments() if segments is None else list(segments)
        index = self._index
        numbers = {segment.name: number for number, segment in enumerate(index.segments)}
        for segment in chosen:
            for group, start in enumerate(segment.starts):
                batch = segment.read(group)
                found, served_from, row = index.find(key_array(batch["key"]))
                here = found & (served_from == numbers[segment.name]) & (row == start + np.arange(batch.num_rows))
                yield batch if here.all() else batch.filter(pa.array(here))

    def _refresh(self) -> None:
        """Takes in what was written, compacted or set aside since, by whatever process."""
        # Until two listings agree: one that began before a compaction and ended after it may show neither the old
        # segments nor the new.
        previous: set[str] | None = None
        while (names := list_segments(self.folder)) != previous or names != self._names:
            previous = names
            new, gone = sorted(names - self._names), self._names - names
            self._names -= gone
            for start in range(0, len(new), _OPEN_AT_ONCE):
                self._open(new[start : start + _OPEN_AT_ONCE])
            if gone and self._index.serves_from(gone):
                # Lost rather than compacted; another may hold an earlier answer to the same keys, so all are read anew.
                self._index, self._names = KeyIndex(), set()

    def _open(self, names: Sequence[str]) -> None:
        """Takes in segments, given in the order of their names."""
        opened = []
        for name in names:
            with suppress(SegmentGone):
                opened.append(open_segment(self.folder, name))
        self._index.add(opened)
        self._names |= {segment.name for segment, _ in opened}

    def _read(self, keys: Sequence[bytes]) -> Iterator[Answer]:
        self._refresh()
        found, numbers, rows = self._index.find(_key_array(keys))
        wanted: dict[tuple[int, int], list[tuple[int, bytes]]] = defaultdict(list)
        for at in np.flatnonzero(found).tolist():
            number, row = int(numbers[at]), int(rows[at])
            segment = self._index.segments[number]
            group = segment.group_of(row)
            wanted[number, group].append((row - segment.starts[group], keys[at]))
        for (number, group), members in wanted.items():
            batch = self._group(self._index.segments[number], group)
            yield from answers_of([key for _, key in members], batch.take(pa.array([row for row, _ in members])))

    def _group(self, segment: Segment, group: int) -> pa.RecordBatch:
        """The values of a row group, from memory if they were read lately."""
        place = segment.name, group
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        batch = segment.read(group, _VALUES)
        self._cache[place] = batch
        self._cached_bytes += batch.nbytes
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return batch


def answers_of(keys: Sequence[bytes], rows: pa.RecordBatch) -> Iterator[Answer]:
    """The answers in some rows (the columns of SCHEMA; `key` may be absent), whose keys are given."""
    for key, *values in zip(keys, *(rows[name].to_pylist() for name in _VALUES), strict=True):
        fields = dict(zip(_VALUES, values, strict=True))
        fields["logprobs"], fields["texts"] = tuple(fields["logprobs"]), tuple(fields["texts"])
        yield Answer(key=key, **fields)


def _key_array(keys: Sequence[bytes]) -> np.ndarray:
    """Keys as S32. Raises ValueError if one has not 32 bytes."""
    wrong = next((key for key in keys if len(key) != 32), None)
    if wrong is not None:
        raise ValueError(f"key {wrong!r} has {len(wrong)} bytes, not the 32 of `request_keys`; it cannot be looked up.")
    return np.frombuffer(b"".join(keys), "S32")


def _bytes(value: object) -> bytes:
    return canonical_json(value).encode("utf-8", "surrogatepass")
