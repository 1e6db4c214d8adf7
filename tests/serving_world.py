"""A collection of a tiny real embedder: documents with metadata, queries, snapshots, without a cluster."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.assets import resolve
from llmr_ray.config import Config, DatasetConfig, EmbedderConfig, TaskConfig
from llmr_ray.index import collection
from llmr_ray.index.snapshot import current, folder_of, read_manifest
from llmr_ray.index.stage import EmbedWorker, IndexWorker, embed_spec, index_spec
from llmr_ray.index.vectors import encoder_of
from llmr_ray.schemas import table_of
from llmr_ray.serving import engine
from llmr_ray.serving.api import Service
from llmr_ray.serving.canaries import canary_queries
from llmr_ray.serving.gate import Gate
from llmr_ray.serving.keys import KeyRing
from llmr_ray.serving.metrics import Metrics
from llmr_ray.serving.models import PairScorer, TextEncoder, encoder_spec
from llmr_ray.serving.settings import ServingSettings
from llmr_ray.serving.switching import Switcher
from tests.tiny import tiny_bert

LETTERS = list("abcdefghij")

CONFIG = Config(
    datasets={"one": DatasetConfig(task="qa"), "two": DatasetConfig(task="chat")},
    tasks={
        "qa": TaskConfig(query_instruction="query : ", document_instruction="document : "),
        "chat": TaskConfig(query_instruction="a a a ", document_instruction="z z "),
    },
    embedder=EmbedderConfig(max_query_tokens=12, max_document_tokens=16, precision="float32"),
)


def documents(number: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "doc_id": f"d{seed}-{row}",
            "pool": "even" if row < number // 2 else "odd",
            "position": row,
            "task": "qa",
            "title": "t" if row % 5 == 0 else None,
            "text": " ".join(rng.choice(LETTERS, 5)),
            "meta": f'{{"year": {2000 + row % 20}, "lang": "{"de" if row % 3 else "en"}"}}',
        }
        for row in range(number)
    ]


def queries(number: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    return [
        {
            "query_id": f"q{row}",
            "task": "qa" if row % 2 else "chat",
            "dataset": "one" if row % 2 else "two",
            "split": "test",
            "query": " ".join(rng.choice(LETTERS, 4)),
            "targets": ["a"],
            "pool": "even" if row % 2 else "odd",
        }
        for row in range(number)
    ]


def index_of(
    root: Path, model: Path, rows: list[dict[str, Any]], num_shards: int = 3, config: Config = CONFIG
) -> Artifact:
    """Embeds and indexes documents as the stages do."""
    prepare = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={"of": rows[0]["doc_id"]}, inputs={}))
    prepare.begin()
    tables = {"corpus": table_of("corpus", rows), "queries": table_of("queries", queries(12))}
    prepare.write_shard(0, tables, Counts(rows_in=len(rows), ok=len(rows)))
    prepare.commit(1, seconds=0)
    asset = resolve(str(model))
    embeddings = Artifact(root, embed_spec(config, asset, prepare))
    embeddings.begin()
    worker = EmbedWorker(embeddings, prepare, str(asset.path), config.tasks, 4096, 1)
    for shard in (0, 1):
        worker.run(shard)
    embeddings.commit(2, seconds=0, extra={"encoder": encoder_of(embeddings)})
    index = Artifact(root, index_spec(config, embeddings))
    index.begin()
    cuts = [len(rows) * shard // num_shards for shard in range(num_shards + 1)]
    builder = IndexWorker(index, embeddings, cuts)
    for shard in range(num_shards):
        builder.run(shard)
    index.commit(num_shards, seconds=0, extra={"encoder": encoder_of(embeddings), "cuts": cuts})
    return index


@dataclass
class World:
    """A collection `docs` of 60 documents below a root."""

    root: Path
    model: Path

    @property
    def collection(self) -> Path:
        return folder_of(self.root, "docs")

    @property
    def current(self) -> str:
        return current(self.collection)

    def settings(self, **changes: Any) -> ServingSettings:
        given = {"artifact_root": str(self.root), "collection": "docs", "fast": False, "poll_seconds": 0.1}
        return ServingSettings(**(given | changes))

    def add(self, number: int = 20, seed: int = 1) -> str:
        """A snapshot with more documents; it becomes current."""
        index = index_of(self.root, self.model, documents(number, seed))
        return collection.add_segment(self.root, "docs", index.id).snapshot

    def replace(self, model: Path | None = None, seed: int = 5) -> str:
        """A snapshot of other documents alone, by another model if one is given; it becomes current."""
        index = index_of(self.root, model or self.model, documents(30, seed))
        name = str(model or self.model)
        return collection.create(self.root, "docs", index.id, model=name, replace=True).snapshot

    def rollback(self) -> str:
        return collection.rollback(self.root, "docs").snapshot

    def service(
        self, settings: ServingSettings | None = None, groups: int = 0, shared: Sequence[engine.ShardGroup] = ()
    ) -> "Service":
        """A service in this process; `groups` shard groups instead of one, or those of another service."""
        settings = settings or self.settings()
        manifest = read_manifest(self.collection, self.current)
        spec = encoder_spec(self.root, manifest, settings.embedder)
        encoder = TextEncoder(spec, settings)
        ranker = PairScorer(settings.reranker, settings).score if settings.reranker else None
        local = engine.LocalShards(self.root, settings)
        parts = list(shared) or [engine.LocalShards(self.root, settings, group, groups) for group in range(groups)]
        store = engine.DocumentStore(self.root, settings) if parts else local
        composed = engine.Engine(
            settings, engine.LocalEncoder(encoder.encode, ranker, settings), parts or [local], store
        )
        metrics = Metrics()
        canaries = canary_queries(self.root, "docs", spec, settings.num_canaries)
        switcher = Switcher(self.root, settings, composed, spec, canaries, metrics.watch)
        asyncio.run(switcher.start())
        keys = KeyRing(Path(settings.keys_file)) if settings.keys_file else None
        return Service(Gate(settings, metrics, keys), composed, switcher, spec)


def world(root: Path, rows: list[dict[str, Any]] | None = None) -> World:
    """A fresh collection of 60 documents, or of some rows."""
    model = tiny_bert(root / "model")
    made = World(root / "artifacts", model)
    index = index_of(made.root, model, rows or documents(60))
    collection.create(made.root, "docs", index.id, model=str(model))
    return made
