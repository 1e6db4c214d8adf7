"""The stages embed and index.

embed: shards of corpus rows, then shards of query rows, encoded by a pool of actors. index: contiguous blocks of the
embeddings as FAISS files, and beside them what proposes documents where the index is approximate. How many index shards
there are is runtime and recorded with the index; no result of an exact search depends on it (index/searcher.py).
"""

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from llmr_ray import cluster
from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts, canonical_json
from llmr_ray.assets import Asset
from llmr_ray.config import Config, TaskConfig, identity, later_identity
from llmr_ray.data.text import document_texts
from llmr_ray.durable import write_atomic
from llmr_ray.errors import DataError
from llmr_ray.index import approximate, recall, shards
from llmr_ray.index.approximate import is_approximate
from llmr_ray.index.rows import read_rows
from llmr_ray.index.vectors import (
    encoder_of,
    how_pooled,
    is_unit_norm,
    max_tokens,
    own_limits,
    to_matrix,
    to_table,
)
from llmr_ray.precision import resolve_precision

EMBED_VERSION = 3
INDEX_VERSION = 1

TRAINED = "trained.faiss"
"""What the shards of an approximate index share, while it is built; each has a copy."""

RECALL = "recall.json"

# --- embed -----------------------------------------------------------------------------------------------------------


def embed_spec(config: Config, embedder: Asset, prepare: Artifact) -> ArtifactSpec:
    """What determines embeddings: the weights, how texts are cut and pooled, the precision, the instructions."""
    tasks = sorted({dataset.task for dataset in config.datasets.values()})
    return ArtifactSpec(
        stage="embed",
        version=EMBED_VERSION,
        config={
            "pooling": config.embedder.pooling,
            "max_query_tokens": config.embedder.max_query_tokens,
            "max_document_tokens": config.embedder.max_document_tokens,
            "precision": resolve_precision(config.embedder.precision),
            "instructions": {
                task: [config.tasks[task].query_instruction, config.tasks[task].document_instruction] for task in tasks
            },
            "shard_rows": SHARD_ROWS,
            **own_limits(config, tasks),
            **later_identity(config.embedder),
        },
        inputs={"embedder": embedder.fingerprint, "prepare": prepare.id},
    )


def run_embed(
    config: Config, artifact: Artifact, embedder: Asset, prepare: Artifact, *, with_queries: bool = True
) -> None:
    """Embeds every document and every query: tables `document_embeddings` in corpus order and
    `query_embeddings` in queries order (none where `with_queries` is off).

    Raises:
        DataError: there are no documents or no queries.
    """
    started = time.monotonic()
    rows = prepare.require()["rows"]
    if not rows.get("corpus") or (with_queries and not rows.get("queries")):
        raise DataError(f"{prepare.id} holds {rows}; embedding needs documents and queries. Look at its quarantine.")
    num_document_shards, num_query_shards = _num_shards(rows["corpus"]), _num_shards(rows.get("queries", 0))
    num_shards = num_document_shards + num_query_shards
    cluster.map_shards(
        artifact.pending(num_shards),
        EmbedWorker,
        {
            "artifact": artifact,
            "prepare": prepare,
            "embedder_path": str(embedder.path),
            "tasks": config.tasks,
            "batch_tokens": config.runtime.encode_batch_tokens,
            "num_document_shards": num_document_shards,
        },
        num_actors=config.runtime.encode_actors,
        num_threads=config.runtime.encode_threads,
        num_gpus=config.runtime.encode_gpus,
        purpose="embed",
    )
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra={"encoder": encoder_of(artifact)})


class EmbedWorker:
    """Embeds shards of documents (numbers below `num_document_shards`) and of queries."""

    def __init__(
        self,
        artifact: Artifact,
        prepare: Artifact,
        embedder_path: str,
        tasks: dict[str, TaskConfig],
        batch_tokens: int,
        num_document_shards: int,
    ) -> None:
        from llmr_ray.modeling.embedder import Embedder

        self.artifact, self.prepare, self.tasks = artifact, prepare, tasks
        self.batch_tokens, self.num_document_shards = batch_tokens, num_document_shards
        settings = artifact.spec.config
        self.embedder = Embedder(
            embedder_path,
            max_query_tokens=max_tokens(settings, None, "query"),
            max_document_tokens=max_tokens(settings, None, "document"),
            **how_pooled(settings),
        )

    def run(self, shard: int) -> dict[str, Any]:
        """Embeds one shard and commits it; returns its ledger record."""
        if shard < self.num_document_shards:
            rows = read_rows(self.prepare, "corpus", shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
            texts = document_texts(rows)
            side, key = "document", "doc_id"
        else:
            first = (shard - self.num_document_shards) * SHARD_ROWS
            rows = read_rows(self.prepare, "queries", first, first + SHARD_ROWS)
            texts = rows["query"].to_pylist()
            side, key = "query", "query_id"
        vector_ND = self._encode(texts, rows["task"].to_pylist(), side)
        table = to_table(key, rows[key], vector_ND)
        return self.artifact.write_shard(
            shard, {f"{side}_embeddings": table}, Counts(rows_in=rows.num_rows, ok=rows.num_rows)
        )

    def _encode(self, texts: list[str], tasks: list[str], side: str) -> np.ndarray:
        """Encodes texts of several tasks, each under its own task's instruction and limit: float32 [N, D]."""
        parts, order = [], []
        for task in sorted(set(tasks)):
            members = [row for row, name in enumerate(tasks) if name == task]
            parts.append(
                self.embedder.encode(
                    [texts[row] for row in members],
                    instruction=self.tasks[task].instruction(side),
                    max_tokens=max_tokens(self.artifact.spec.config, task, side),
                    batch_tokens=self.batch_tokens,
                )
            )
            order += members
        stacked_ND = np.concatenate(parts)
        vector_ND = np.empty_like(stacked_ND)
        vector_ND[order] = stacked_ND
        return vector_ND


# --- index -----------------------------------------------------------------------------------------------------------


def index_spec(config: Config, embeddings: Artifact) -> ArtifactSpec:
    """What determines an index: the embeddings, and where it is not exact, its settings and the seed of its samples.
    That embeddings do not have unit norm is in its settings too, for whoever opens it."""
    settings = {**identity(config.index), "seed": config.seed} if is_approximate(config.index) else {}
    if not is_unit_norm(embeddings.spec.config):
        settings["similarity"] = embeddings.spec.config["similarity"]
    return ArtifactSpec(stage="index", version=INDEX_VERSION, config=settings, inputs={"embeddings": embeddings.id})


def run_index(config: Config, artifact: Artifact, embeddings: Artifact) -> None:
    """Writes the documents' embeddings as FAISS shards, and the table `ids` (row, doc_id).

    Of an approximate index, what its shards share is trained first, and recall is measured last; both stay through a
    kill, as shards do.

    Raises:
        DataError: its recall is below `index.least_recall`.
    """
    started = time.monotonic()
    manifest = embeddings.require()
    cuts = _cuts(artifact, manifest["rows"]["document_embeddings"], config.runtime.index_shards)
    num_shards = len(cuts) - 1
    built = {"artifact": artifact, "embeddings": embeddings, "cuts": cuts}

    def run(shards: Sequence[int], worker: type) -> None:
        cluster.map_shards(
            shards,
            worker,
            built,
            num_actors=config.runtime.index_actors,
            num_threads=config.runtime.index_threads,
            num_gpus=config.runtime.index_gpus if config.index.kind == "cagra" else 0,
            purpose="index",
        )

    extra = {"encoder": manifest["extra"]["encoder"], "cuts": cuts}
    pending = artifact.pending(num_shards)
    if is_approximate(config.index):
        largest = max(end - start for start, end in pairwise(cuts))
        if pending and largest >= approximate.MIN_ROWS and not artifact.file(TRAINED).exists():
            run([0], TrainWorker)
        run(pending, IndexWorker)
        if not (artifact.path / RECALL).exists():
            run([0], RecallWorker)
        extra["recall"] = json.loads((artifact.path / RECALL).read_text())
    else:
        run(pending, IndexWorker)
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra=extra)


def _cuts(artifact: Artifact, num_rows: int, num_shards: int) -> list[int]:
    """First row of each shard, and the number of rows at the end. A resumed build keeps the cuts it began with."""
    path = artifact.path / "cuts.json"
    if not path.exists():
        num_shards = max(1, min(num_shards, num_rows))
        cuts = [num_rows * shard // num_shards for shard in range(num_shards + 1)]
        write_atomic(path, canonical_json(cuts).encode())
    kept: list[int] = json.loads(path.read_text())
    return kept


class IndexWorker:
    """Builds index shards: corpus rows [cuts[shard], cuts[shard + 1])."""

    def __init__(self, artifact: Artifact, embeddings: Artifact, cuts: list[int]) -> None:
        self.artifact, self.embeddings, self.cuts = artifact, embeddings, cuts
        self.settings = shards.settings_of(artifact)

    def run(self, shard: int) -> dict[str, Any]:
        """Builds one shard and commits it; returns its ledger record."""
        start, end = self.cuts[shard], self.cuts[shard + 1]
        table = read_rows(self.embeddings, "document_embeddings", start, end)
        vector_ND = to_matrix(table)
        files = [shards.file_name(shard)]
        unit_norm = is_unit_norm(self.artifact.spec.config)
        shards.write_shard(vector_ND, self.artifact.file(files[0]), unit_norm=unit_norm)
        if is_approximate(self.settings):
            path = self.artifact.file(shards.proposals_name(shard))
            if approximate.write_proposals(vector_ND, self.artifact.file(TRAINED), self.settings, path):
                files.append(path.name)
        ids = pa.table({"row": pa.array(range(start, end), pa.int64()), "doc_id": table["doc_id"]})
        counts = Counts(rows_in=end - start, ok=end - start)
        return self.artifact.write_shard(shard, {"ids": ids}, counts, files=tuple(f"files/{name}" for name in files))


class TrainWorker(IndexWorker):
    """Trains what all shards of an approximate index share."""

    def run(self, shard: int) -> dict[str, Any]:
        """Writes it; returns a record without content."""
        seed = self.artifact.spec.config["seed"]
        [dimension] = {to_matrix(self.embeddings.read("document_embeddings", 0)).shape[1]}
        approximate.write_trained(
            lambda num_rows: recall.sample_documents(self.embeddings, num_rows, seed),
            self.cuts[-1],
            dimension,
            self.settings,
            seed,
            self.artifact.file(TRAINED),
        )
        return {"shard": shard}


class RecallWorker(IndexWorker):
    """Measures an approximate index whose shards are built."""

    def run(self, shard: int) -> dict[str, Any]:
        """Writes the figures; returns a record without content."""
        opened = shards.open_built(self.artifact, self.cuts)
        prepare = Artifact.found(self.artifact.path.parents[1], self.embeddings.spec.inputs["prepare"])
        queries, what = recall.sample_queries(self.embeddings, prepare, self.artifact.spec.config["seed"])
        figures = {"queries": what, **recall.measure(opened, queries, self.settings)}
        write_atomic(self.artifact.path / RECALL, canonical_json(figures).encode())
        return {"shard": shard}


def _num_shards(num_rows: int) -> int:
    return -(-num_rows // SHARD_ROWS)
