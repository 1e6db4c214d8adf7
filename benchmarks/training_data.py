"""Memory of the training data: of the worker that tokenises it, and of a worker that trains on it, by number of rows.

    python benchmarks/training_data.py [--rows 20000 200000] [--pool 8] [--words 60] [--steps 200]

Groups of random words, shards of 2048 rows, documents drawn from 100,000. Each part runs in a fresh process, which says
what its memory had grown by at its highest since its imports: resident memory while all shards are tokenised one after
the other; and while batches of 128 rows are made from all over the data, what is the process's own, and what it maps of
files (the system takes that back whenever it wants). Mapped bytes can only grow to the size of the data.
"""

import argparse
import json
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts
from llmr_ray.config import TaskTrain, TrainConfig
from llmr_ray.schemas import table_of
from llmr_ray.ticking import ticking
from llmr_ray.training.batches import Plan
from llmr_ray.training.bi_encoder import EmbedderRecipe
from llmr_ray.training.dataset import read_training_data
from llmr_ray.training.objective import local_batch
from llmr_ray.training.running import TokenizeWorker
from tests.tiny import tiny_bert

DOCUMENTS = 100_000
GROUPS = ArtifactSpec(stage="group", version=1, config={}, inputs={})


def texts(rng: np.random.Generator, count: int, words: int) -> list[str]:
    """Random words of one letter."""
    return [" ".join(letters) for letters in rng.choice(list(string.ascii_lowercase), (count, words)).tolist()]


def make_groups(root: Path, options: argparse.Namespace, rows: int) -> None:
    """Writes the groups artifact, a shard at a time."""
    rng = np.random.default_rng(7)
    docs = texts(rng, DOCUMENTS, options.words)
    artifact = Artifact(root, GROUPS)
    artifact.begin()
    starts = range(0, rows, SHARD_ROWS)
    for shard, start in enumerate(starts):
        count = min(SHARD_ROWS, rows - start)
        pools = rng.integers(DOCUMENTS, size=(count, options.pool)).tolist()
        queries = texts(rng, count, 8)
        table = table_of(
            "groups",
            [
                {
                    "query_id": f"dataset-train-{start + number}",
                    "task": "qa",
                    "dataset": "dataset",
                    "query": query,
                    "doc_ids": [str(place) for place in pool],
                    "docs": [docs[place] for place in pool],
                    "roles": ["gold"] + ["candidate"] * (options.pool - 1),
                    "rewards": rng.random(options.pool).tolist(),
                }
                for number, (query, pool) in enumerate(zip(queries, pools, strict=True))
            ],
        )
        artifact.write_shard(shard, {"groups": table}, Counts(rows_in=count, ok=count))
    artifact.commit(len(starts), seconds=0)


class Peak:
    """The highest values of some lines of /proc/self/status, in MiB above those at the start."""

    def __init__(self, *lines: str) -> None:
        self.start = {line: _status(line) for line in lines}
        self.highest = dict(self.start)

    def look(self) -> None:
        """Looks once."""
        self.highest = {line: max(value, _status(line)) for line, value in self.highest.items()}

    def grown(self) -> dict[str, float]:
        """MiB by line."""
        self.look()
        return {line: round((value - self.start[line]) / 1024, 1) for line, value in self.highest.items()}


def _status(line: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) for entry in lines if entry.startswith(f"{line}:"))


def folders_of(root: Path) -> Iterator[Path]:
    """Where the tokens of each shard are."""
    return (root / "data" / f"{shard:05d}" for shard in range(Artifact(root, GROUPS).require()["num_shards"]))


def write(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Tokenises all shards, as one actor does."""
    folders = list(folders_of(root))
    worker = TokenizeWorker(
        Artifact(root, GROUPS),
        folders,
        root / "base",
        EmbedderRecipe(
            train=TrainConfig(),
            seed=3,
            tasks={},
            instructions={"qa": ("query: ", "document: ")},
            max_query_tokens=32,
            max_document_tokens=64,
        ),
    )
    peak, started = Peak("VmRSS"), time.perf_counter()
    with ticking(peak.look, 0.05, "peak"):
        for shard in range(len(folders)):
            worker.run(shard)
    return peak.grown() | {"seconds": round(time.perf_counter() - started, 1)}


def train(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Opens the data and makes batches with their tokens, as a worker of two does."""
    peak, started = Peak("RssAnon", "RssFile"), time.perf_counter()
    with ticking(peak.look, 0.05, "peak"):
        data = read_training_data(list(folders_of(root)))
        plan = Plan(data.rows_by("dataset"), repeats={}, batch_size=128, batching="homogeneous", seed=3)
        plan.block(0)
        opened = time.perf_counter()
        for step in range(options.steps):
            batch = local_batch(
                data,
                plan.block(step),
                tasks={"qa": TaskTrain(graded_weight=1.0)},
                group_size=8,
                seed=3,
                rank=0,
                world_size=2,
            )
            _ = [data.text(int(number)).sum() for number in batch.texts]
    each = (time.perf_counter() - opened) / options.steps
    seconds = {"opening seconds": round(opened - started, 2), "ms a batch": round(1000 * each, 1)}
    return peak.grown() | seconds


def main() -> None:
    """Measures and prints a line for each number of rows and part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--pool", type=int, default=8)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--part", choices=["write", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps({"write": write, "train": train}[options.part](options.root, options)))
        return
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            tiny_bert(root / "base")
            make_groups(root, options, rows)
            for part in ("write", "train"):
                command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--root", str(root)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                print(f"{rows:>9,} rows, {part}: {done.stdout.splitlines()[-1]}", flush=True)
            size = sum(path.stat().st_size for path in (root / "data").rglob("*") if path.is_file())
            print(f"{rows:>9,} rows, on the disk: {size / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
