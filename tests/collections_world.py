"""A corpus, its vectors and its index as finished artifacts, without a model or a cluster."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config
from llmr_ray.index.stage import IndexWorker, index_spec
from llmr_ray.index.vectors import encoder_of, to_table
from llmr_ray.schemas import table_of


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def document(doc_id: str, number: int, **columns: Any) -> dict[str, Any]:
    return {"doc_id": doc_id, "pool": "p", "position": number, "task": "qa", "text": f"text of {doc_id}", **columns}


def indexed(
    root: Path,
    vector_ND: np.ndarray,
    rows: list[dict[str, Any]] | None = None,
    *,
    name: str = "base",
    cuts: list[int] | None = None,
    embedder: str = "model",
    config: Config | None = None,
) -> Artifact:
    """An index of some documents (d0, d1, ...), cut into shards; its embeddings and corpus are beside it."""
    rows = rows or [document(f"d{row}", row) for row in range(len(vector_ND))]
    prepare = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={"name": name}, inputs={}))
    prepare.begin()
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        prepare.write_shard(shard, {"corpus": table_of("corpus", part)}, Counts(rows_in=len(part), ok=len(part)))
    prepare.commit(2, seconds=0)
    settings = {"pooling": "mean", "precision": "float32"}
    inputs = {"embedder": embedder, "prepare": prepare.id}
    embeddings = Artifact(root, ArtifactSpec(stage="embed", version=1, config=settings, inputs=inputs))
    embeddings.begin()
    tables = {"document_embeddings": to_table("doc_id", [row["doc_id"] for row in rows], vector_ND)}
    embeddings.write_shard(0, tables, Counts(rows_in=len(rows), ok=len(rows)))
    embeddings.commit(1, seconds=0, extra={"encoder": encoder_of(embeddings)})
    index = Artifact(root, index_spec(config or Config(), embeddings))
    index.begin()
    cuts = cuts or [0, len(rows)]
    worker = IndexWorker(index, embeddings, cuts)
    for shard, _ in enumerate(pairwise(cuts)):
        worker.run(shard)
    index.commit(len(cuts) - 1, seconds=0, extra={"encoder": encoder_of(embeddings), "cuts": cuts})
    return index
