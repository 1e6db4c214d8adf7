"""What the LLM said, kept for ever: a content-addressed, append-only store of answers.

An answer's key hashes everything that determines it (scorer, exact prompt, target or sampling parameters), so a new
run, another method or the next round pays only for what was never asked. A segment is one Parquet file, written to a
temporary name, synced and renamed; its name carries the hash of its bytes. Many processes may write at once: names
never collide, the store is the union of its segments, and where two hold one key the later wins.
"""

import hashlib
import io
import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.artifacts import canonical_json, write_atomic
from llmr_ray.feedback.requests import LLMRequest

log = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(32), nullable=False),
        pa.field("logprobs", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        pa.field("texts", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("prompt_sha", pa.string(), nullable=False),
    ]
)


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

    `max_new_tokens` belongs to a target's key too, because the prompt leaves room for it (feedback/fitting.py).
    """
    segments = [[item.text, item.trim_order, item.trim_side, item.max_tokens] for item in request.segments]
    prompt = hashlib.sha256(_bytes([scorer_id, segments, request.max_new_tokens])).hexdigest()
    if request.targets:
        return [hashlib.sha256(_bytes([prompt, "target", target])).digest() for target in request.targets]
    seed = request.seed if request.temperature > 0 else 0
    what = [prompt, "sample", request.num_samples, request.temperature, seed, list(request.stop)]
    return [hashlib.sha256(_bytes(what)).digest()]


class LLMStore:
    """The answers of one scorer in a folder.

    Args:
        folder: created when the first answer is written.

    Segments that were cut short or changed are moved to ``quarantine/`` with a warning; what they held counts as never
    asked. Opening checks every segment and keeps only where each key is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[bytes, tuple[str, int]] = {}
        self._seen: set[str] = set()

    def __len__(self) -> int:
        self._refresh()
        return len(self._where)

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that have no answer."""
        self._refresh()
        return {key for key in keys if key not in self._where}

    def get(self, keys: Collection[bytes]) -> dict[bytes, Answer]:
        """The answers there are, by key."""
        self._refresh()
        rows: dict[str, list[int]] = defaultdict(list)
        for key in set(keys):
            if key in self._where:
                name, row = self._where[key]
                rows[name].append(row)
        found: dict[bytes, Answer] = {}
        for name, wanted in rows.items():
            table = self._load(name)
            if table is None:
                self._reopen()
                return self.get(keys)
            found.update((answer.key, answer) for answer in map(_answer, table.take(sorted(wanted)).to_pylist()))
        return found

    def put(self, answers: Sequence[Answer]) -> None:
        """Makes answers durable in one new segment. Errors are left out: they may be asked again."""
        kept = [answer for answer in answers if answer.error is None]
        if not kept:
            return
        rows = [
            {
                "key": answer.key,
                "logprobs": answer.logprobs,
                "texts": answer.texts,
                "num_prompt_tokens": answer.num_prompt_tokens,
                "truncated": answer.truncated,
                "prompt_sha": answer.prompt_sha,
            }
            for answer in kept
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
        data = sink.getvalue()
        # Sorted names are the order of writing; the time only settles which of two equal keys is served.
        name = f"seg-{time.time_ns():020d}-{uuid.uuid4().hex[:12]}-{_digest(data)}.parquet"
        write_atomic(self.folder / name, data)
        self._index(name, [answer.key for answer in kept])

    def _refresh(self) -> None:
        if not self.folder.is_dir():
            return
        for name in sorted(entry.name for entry in os.scandir(self.folder) if _is_segment(entry.name)):
            if name not in self._seen:
                table = self._load(name)
                self._index(name, [] if table is None else table["key"].to_pylist())

    def _index(self, name: str, keys: Sequence[bytes]) -> None:
        self._seen.add(name)
        for row, key in enumerate(keys):
            if key not in self._where or self._where[key][0] <= name:
                self._where[key] = (name, row)

    def _reopen(self) -> None:
        # A segment spoiled under our hands; another may hold the same keys, so all are read anew.
        self._where.clear()
        self._seen.clear()
        self._refresh()

    def _load(self, name: str) -> pa.Table | None:
        """A segment's table; None after moving a broken one away."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if _digest(data) == name.removesuffix(".parquet").rsplit("-", 1)[-1]:
            return pq.read_table(io.BytesIO(data)).cast(_SCHEMA)
        quarantine = self.folder / "quarantine"
        quarantine.mkdir(exist_ok=True)
        log.warning("%s does not match its checksum; moved to %s. Its answers will be asked again.", path, quarantine)
        try:
            os.replace(path, quarantine / name)
        except FileNotFoundError:
            log.debug("%s was moved away by another process", path)
        return None


def _answer(row: Mapping[str, object]) -> Answer:
    fields = dict(row)
    fields["logprobs"], fields["texts"] = tuple(row["logprobs"]), tuple(row["texts"])  # type: ignore[arg-type]
    return Answer(**fields)  # type: ignore[arg-type]


def _is_segment(name: str) -> bool:
    return name.startswith("seg-") and name.endswith(".parquet")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _bytes(value: object) -> bytes:
    return canonical_json(value).encode("utf-8", "surrogatepass")
