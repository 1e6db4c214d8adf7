"""The stage `leakage`: every training query beside all test queries, every document beside those that may retrieve it.

A shard is a range of rows, training queries before documents, read in batches: memory holds the test queries and one
batch. Runs that share what was prepared share the artifact.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config
from llmr_ray.evaluation.leakage import (
    BANDS,
    LEAKAGE_VERSION,
    NEAR,
    NGRAM,
    POOL_TASKS,
    ROWS,
    SCHEMA,
    WINDOW,
    Probe,
    Probes,
    gravest,
    rows_of_document,
    rows_of_query,
)

SHARD_ROWS = 200_000
"""Rows that one shard compares; it decides what is in a file, so it is no setting."""

_COLUMNS = {"queries": ["query_id", "dataset", "split", "query"], "corpus": ["doc_id", "pool", "task", "text", "meta"]}


COMPARED = {"queries": rows_of_query, "corpus": rows_of_document}
"""What is made of a row of each table."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of one part of what was prepared; `first` is the place of its first row among all that are compared."""

    table: str
    part: int
    first: int
    num_rows: int


def leakage_spec(prepare: Artifact) -> ArtifactSpec:
    """What determines what is found: the data, and what counts as a copy."""
    return ArtifactSpec(
        stage="leakage",
        version=LEAKAGE_VERSION,
        config={"near": NEAR, "ngram": NGRAM, "bands": BANDS, "rows": ROWS, "window": WINDOW, "shard": SHARD_ROWS},
        inputs={"prepare": prepare.id},
    )


def run_leakage(config: Config, artifact: Artifact, prepare: Artifact) -> None:
    """Writes the table `leakage`. rows_in counts all queries, and documents of POOL_TASKS that are tested."""
    started = time.monotonic()
    compared = pieces(prepare)
    total = sum(piece.num_rows for piece in compared)
    num_shards = max(1, -(-total // SHARD_ROWS))
    pending = artifact.pending(num_shards)
    if num_shards == 1:
        # Of a small run comparing takes less time than starting an actor.
        for shard in pending:
            LeakageWorker(artifact, prepare, compared, SHARD_ROWS).run(shard)
    else:
        cluster.map_shards(
            pending,
            LeakageWorker,
            {"artifact": artifact, "prepare": prepare, "compared": compared, "shard_rows": SHARD_ROWS},
            num_actors=config.runtime.mine_actors,
            purpose="leakage",
        )
    artifact.commit(num_shards, seconds=time.monotonic() - started)


def pieces(prepare: Artifact) -> list[Piece]:
    """What is compared: the queries of every part, then the documents of parts with test queries of POOL_TASKS."""
    ledger = prepare.ledger()
    with_pools = [part for part in sorted(ledger) if _tested(prepare, part) & set(POOL_TASKS)]
    wanted = [("queries", part) for part in sorted(ledger)] + [("corpus", part) for part in with_pools]
    found, first = [], 0
    for table, part in wanted:
        num_rows = ledger[part]["rows"].get(table, 0)
        found.append(Piece(table=table, part=part, first=first, num_rows=num_rows))
        first += num_rows
    return found


def _tested(prepare: Artifact, part: int) -> set[str]:
    """Tasks of a part's test queries."""
    queries = prepare.read("queries", part, columns=["task", "split"])
    return set(queries.filter(pc.equal(queries["split"], "test"))["task"].unique().to_pylist())


class LeakageWorker:
    """Compares shards: shard n is rows [n * shard_rows, (n + 1) * shard_rows) of all pieces in a row."""

    def __init__(self, artifact: Artifact, prepare: Artifact, compared: list[Piece], shard_rows: int) -> None:
        self.artifact, self.prepare, self.compared, self.shard_rows = artifact, prepare, compared, shard_rows
        queries = prepare.read("queries")
        self.probes = Probes(
            [
                Probe(
                    query_id=row["query_id"],
                    dataset=row["dataset"],
                    task=row["task"],
                    pool=row["pool"],
                    text=row["query"],
                    targets=tuple(row["targets"]),
                )
                for row in queries.filter(pc.equal(queries["split"], "test")).to_pylist()
            ]
        )

    def run(self, shard: int) -> dict[str, Any]:
        """Compares one shard and commits it; returns its ledger record."""
        counts = Counts()
        rows: list[dict[str, Any]] = []
        for table, batch in self._batches(shard * self.shard_rows, (shard + 1) * self.shard_rows):
            counts.rows_in += batch.num_rows
            found = []
            for row in batch.to_pylist():
                if table == "queries" and row["split"] != "train":
                    counts.skipped["held_out_query"] += 1
                elif table == "corpus" and row["pool"] not in self.probes.pools:
                    counts.skipped["no_test_query_may_retrieve_it"] += 1
                else:
                    counts.ok += 1
                    found += COMPARED[table](self.probes, row)
            # At most one row for each test query and data set stays in memory.
            rows = gravest([*rows, *found])
        return self.artifact.write_shard(shard, {"leakage": pa.Table.from_pylist(rows, SCHEMA)}, counts)

    def _batches(self, first: int, last: int) -> Iterator[tuple[str, pa.Table]]:
        """The rows [first, last) of all pieces in a row, in batches of one table."""
        for piece in self.compared:
            start, end = max(first, piece.first) - piece.first, min(last, piece.first + piece.num_rows) - piece.first
            if start < end:
                for batch in self.prepare.batches(piece.table, piece.part, _COLUMNS[piece.table], start, end):
                    yield piece.table, batch
