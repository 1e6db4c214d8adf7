"""A corpus, its vectors and its index as finished artifacts, without a model or a cluster."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset, resolve
from llmr_ray.config import Config, DatasetConfig, EmbedderConfig, RuntimeConfig, TaskConfig
from llmr_ray.index import collection
from llmr_ray.index.stage import EmbedWorker, IndexWorker, embed_spec, index_spec
from llmr_ray.index.vectors import encoder_of, to_table
from llmr_ray.schemas import table_of
from tests.tiny import tiny_bert


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
    **settings: str,
) -> Artifact:
    """An index of some documents (d0, d1, ...), cut into shards; its embeddings and corpus are beside it.

    settings: further ones of the embeddings.
    """
    rows = rows or [document(f"d{row}", row) for row in range(len(vector_ND))]
    prepare = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={"name": name}, inputs={}))
    prepare.begin()
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        prepare.write_shard(shard, {"corpus": table_of("corpus", part)}, Counts(rows_in=len(part), ok=len(part)))
    prepare.commit(2, seconds=0)
    settings = {"pooling": "mean", "precision": "float32"} | settings
    inputs = {"embedder": embedder, "prepare": prepare.id}
    embeddings = Artifact(root, ArtifactSpec(stage="embed", version=1, config=settings, inputs=inputs))
    embeddings.begin()
    tables = {"document_embeddings": to_table("doc_id", [row["doc_id"] for row in rows], vector_ND)}
    embeddings.write_shard(0, tables, Counts(rows_in=len(rows), ok=len(rows)))
    embeddings.commit(1, seconds=0, extra={"encoder": encoder_of(embeddings)})
    return built(config or Config(), root, embeddings, cuts or [0, len(rows)])


def built(config: Config, root: Path, embeddings: Artifact, cuts: list[int]) -> Artifact:
    index = Artifact(root, index_spec(config, embeddings))
    index.begin()
    worker = IndexWorker(index, embeddings, cuts)
    for shard, _ in enumerate(pairwise(cuts)):
        worker.run(shard)
    index.commit(len(cuts) - 1, seconds=0, extra={"encoder": encoder_of(embeddings), "cuts": cuts})
    return index


def base_of(root: Path, num_documents: int = 300, **embedder: Any) -> tuple[Config, Asset]:
    """A collection named c of a small run in `root`."""
    config = Config(
        datasets={"one": DatasetConfig(task="qa"), "two": DatasetConfig(task="chat")},
        tasks={
            "qa": TaskConfig(query_instruction="query : ", document_instruction="document : "),
            "chat": TaskConfig(query_instruction="a a a ", document_instruction="z z "),
        },
        embedder=EmbedderConfig(max_query_tokens=8, max_document_tokens=12, precision="float32", **embedder),
        runtime=RuntimeConfig(artifact_root=str(root), object_store_mb=256),
    )
    rng = np.random.default_rng(0)
    rows = [
        document(f"d{row}", row, text=" ".join(rng.choice(list("abcdefghij"), 4)), task="qa" if row % 3 else "chat")
        for row in range(num_documents)
    ]
    prepare = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={}, inputs={}))
    prepare.begin()
    prepare.write_shard(0, {"corpus": table_of("corpus", rows)}, Counts(rows_in=len(rows), ok=len(rows)))
    prepare.commit(1, seconds=0)
    asset = resolve(str(tiny_bert(root.parent / "model")))
    embeddings = Artifact(root, embed_spec(config, asset, prepare))
    embeddings.begin()
    EmbedWorker(embeddings, prepare, str(asset.path), config.tasks, 4096, 1).run(0)
    embeddings.commit(1, seconds=0, extra={"encoder": encoder_of(embeddings)})
    index = built(config, root, embeddings, [0, num_documents // 2, num_documents])
    collection.create(root, "c", index.id, model=str(asset.path))
    return config, asset


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(first: int, number: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(first)
    return [
        {"doc_id": f"n{row}", "text": " ".join(rng.choice(list("abcdefghij"), 4)), "task": "qa", "metadata": {"n": row}}
        for row in range(first, first + number)
    ]
