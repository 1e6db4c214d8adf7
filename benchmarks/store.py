"""The LLM store at a million keys, against sqlite3 with the keys as its primary key.

    python benchmarks/store.py [--keys 1000000] [--segment-rows 64] [--batches 16]

The store is measured as actors leave it (segments of 64 answers) and after `compact`. Every contender runs in a fresh
process: CPU seconds until the first `len`, resident memory then and at its peak, and the same before it opened.
Lookups are of 1280 keys at once (64 queries with 20 candidates): keys written together, as a run asks them, keys drawn
at random from all, each first from empty caches and then once more. A gate: every answer must equal what was written.
Seconds are CPU seconds of all threads: files are in the page cache, and nobody waits for the disk while data is made.
"""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmr_ray.feedback.compaction import compact
from llmr_ray.feedback.segments import SCHEMA, SegmentWriter
from llmr_ray.feedback.store import Answer, LLMStore

TOKENS = 10
"""Log-probabilities of an answer."""

BATCH = 1280
"""Keys of a lookup."""

COLUMNS = ", ".join(SCHEMA.names)


class Data:
    """Answers like those of a run: ten tokens each, and a prompt that four targets share."""

    def __init__(self, num_keys: int) -> None:
        rng = np.random.default_rng(7)
        self.keys = np.frombuffer(rng.bytes(32 * num_keys), "V32")
        self.logprobs = rng.standard_normal((num_keys, TOKENS), np.float32)
        self.shas = [rng.bytes(32).hex() for _ in range(-(-num_keys // 4))]

    def rows(self, start: int, end: int) -> list[tuple]:
        """Some rows as tuples of SCHEMA."""
        texts: list[str] = []
        return [
            (self.keys[row].tobytes(), self.logprobs[row], texts, 300, row % 3 == 0, self.shas[row // 4])
            for row in range(start, end)
        ]

    def answers(self, rows: np.ndarray) -> dict[bytes, Answer]:
        """What must be found for the keys of some rows."""
        return {
            self.keys[row].tobytes(): Answer(
                key=self.keys[row].tobytes(),
                logprobs=tuple(self.logprobs[row].tolist()),
                num_prompt_tokens=300,
                truncated=row % 3 == 0,
                prompt_sha=self.shas[row // 4],
            )
            for row in rows.tolist()
        }


class SQLite:
    """The peer: one table, keys as its primary key, read into the same answers."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path)

    def __len__(self) -> int:
        return self.connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    def get(self, keys: list[bytes]) -> dict[bytes, Answer]:
        """As LLMStore.get."""
        found = {}
        marks = ", ".join("?" * len(keys))
        for row in self.connection.execute(f"SELECT {COLUMNS} FROM answers WHERE key IN ({marks})", keys):
            key, logprobs, texts, num_prompt_tokens, truncated, sha = row
            found[key] = Answer(
                key=key,
                logprobs=tuple(np.frombuffer(logprobs, np.float32).tolist()),
                texts=tuple(json.loads(texts)),
                num_prompt_tokens=num_prompt_tokens,
                truncated=bool(truncated),
                prompt_sha=sha,
            )
        return found


def write_store(data: Data, folder: Path, segment_rows: int) -> None:
    """Writes all answers in segments of that size."""
    for start in range(0, len(data.keys), segment_rows):
        rows = data.rows(start, min(start + segment_rows, len(data.keys)))
        columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
        with closing(SegmentWriter(folder)) as writer:
            writer.write(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
            writer.commit()


def write_sqlite(data: Data, path: Path) -> None:
    """Writes all answers into one table."""
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE answers ({COLUMNS}, PRIMARY KEY (key)) WITHOUT ROWID")
    for start in range(0, len(data.keys), 100_000):
        rows = data.rows(start, min(start + 100_000, len(data.keys)))
        plain = [(key, values.tobytes(), json.dumps(texts), *more) for key, values, texts, *more in rows]
        connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", plain)
    connection.commit()
    connection.close()


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call, all threads: the machine may be shared, and no file has to come from the disk."""
    start = time.process_time()
    function()
    return time.process_time() - start


def memory() -> tuple[float, float]:
    """Resident megabytes of this process: now and at its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, int(status["VmHWM"].split()[0]) / 1024


def measure(path: Path, num_keys: int, num_batches: int) -> dict[str, float]:
    """Opens a store and reads from it; what the process of one contender does."""
    figures = {"imports_mb": memory()[0]}
    store = SQLite(path) if path.is_file() else LLMStore(path)
    figures["open_s"] = seconds(lambda: len(store))
    figures["open_mb"], figures["peak_mb"] = memory()
    assert len(store) == num_keys
    data, rng = Data(num_keys), np.random.default_rng(1)
    starts = rng.choice(num_keys // BATCH, num_batches, replace=False) * BATCH
    together = [np.arange(start, start + BATCH) for start in starts]
    at_random = [rng.choice(num_keys, BATCH, replace=False) for _ in range(num_batches)]
    for name, batches in (("together", together), ("random", at_random)):
        store = SQLite(path) if path.is_file() else LLMStore(path)
        assert len(store) == num_keys
        expected = [data.answers(rows) for rows in batches]
        for times in ("first", "again"):
            taken = sum(seconds(partial(store.get, list(wanted))) for wanted in expected)
            figures[f"{name}_{times}_per_s"] = num_batches * BATCH / taken
        assert all(store.get(list(wanted)) == wanted for wanted in expected), f"{path} gave another answer"
    return figures


def main() -> None:
    """Writes the data, then measures each contender in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--segment-rows", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.keys, options.batches)))
        return

    def show(name: str, path: Path) -> None:
        command = [sys.executable, __file__, "--measure", path, "--keys", options.keys, "--batches", options.batches]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout)
        files = [path] if path.is_file() else list(path.iterdir())
        size = sum(file.stat().st_size for file in files) / 2**20
        print(f"{name} ({len(files)} files, {size:.0f} MB): opened in {figures['open_s']:.2f} s; ", end="")
        print("memory {imports_mb:.0f} MB before, {open_mb:.0f} MB open, {peak_mb:.0f} MB peak".format(**figures))
        rates = (
            "  answers/s: written together {together_first_per_s:,.0f}, again {together_again_per_s:,.0f}; "
            "at random {random_first_per_s:,.0f}, again {random_again_per_s:,.0f}"
        )
        print(rates.format(**figures), flush=True)

    os.fsync = lambda _: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        folder, database = Path(scratch) / "store", Path(scratch) / "answers.sqlite"
        data = Data(options.keys)
        print(f"writing: store {seconds(lambda: write_store(data, folder, options.segment_rows)):.1f} s, ", end="")
        print(f"sqlite3 {seconds(lambda: write_sqlite(data, database)):.1f} s (no fsync)", flush=True)
        show("store as written", folder)
        print(f"compact: {seconds(lambda: compact(folder)):.1f} s")
        show("store compacted", folder)
        show("sqlite3", database)


if __name__ == "__main__":
    main()
