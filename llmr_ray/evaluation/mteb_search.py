"""MTEB's retrieval tasks on a cluster: `mteb.evaluate(RaySearch(...), tasks)` (`pip install llmr_ray[mteb]`).

The corpus of a task is embedded and indexed by the stages that a run has, as Ray jobs; what was made once is found
again under the same artifact root, also after a kill. MTEB sees its `SearchProtocol` and computes the measures.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.model_meta import ModelMeta

from llmr_ray import cluster
from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts, canonical_json
from llmr_ray.assets import resolve
from llmr_ray.config import Config, DatasetConfig, EmbedderConfig, RuntimeConfig, TaskConfig, later_identity
from llmr_ray.errors import DataError
from llmr_ray.index.searcher import Searcher
from llmr_ray.index.stage import EmbedWorker, embed_spec, index_spec, run_embed, run_index
from llmr_ray.index.topk import pair_scores
from llmr_ray.index.vectors import encoder_of, query_vectors, to_matrix
from llmr_ray.schemas import table_of

TASK = "mteb"
"""The name of the task, pool and data set that texts of MTEB have in our tables."""

TEXTS_VERSION = 1

Rows = Callable[[int, int], list[dict[str, Any]]]


class RaySearch:
    """MTEB's SearchProtocol over an index of shards; exact, whatever the numbers of shards and actors.

    Args:
        embedder: the model, and how it cuts and pools texts.
        task: its `query_instruction` and `document_instruction` stand before the texts.
        runtime: where artifacts are kept, and how many actors, threads and shards there are.
        name: the model's name in MTEB's results, as `organisation/model`; None: llmr_ray and the model's own.

    Raises:
        ResourceError: the model cannot be had.
    """

    def __init__(
        self,
        embedder: EmbedderConfig,
        task: TaskConfig | None = None,
        runtime: RuntimeConfig | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self._config = Config(
            datasets={TASK: DatasetConfig(task=TASK)},
            tasks={TASK: task or TaskConfig()},
            embedder=embedder,
            runtime=runtime or RuntimeConfig(),
        )
        self._asset = resolve(embedder.model, self._config.runtime.cache_root)
        self._name = name or f"llmr_ray/{Path(embedder.model).name}"
        self._embeddings: Artifact | None = None
        self._index: Artifact | None = None
        self._doc_ids: list[str] = []

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What MTEB files the results under; the revision is the fingerprint of the weights and of what embeds them."""
        settings = self._config.embedder
        task = self._config.tasks[TASK]
        revision = hashlib.sha256(
            canonical_json(
                [
                    self._asset.fingerprint,
                    settings.pooling,
                    settings.max_query_tokens,
                    settings.max_document_tokens,
                    task.query_instruction,
                    task.document_instruction,
                    *later_identity(settings).items(),
                ]
            ).encode()
        )
        unknown = (
            "release_date languages n_parameters memory_usage_mb embed_dim license open_weights public_training_code "
            "public_training_data training_datasets"
        )
        return ModelMeta(
            loader=None,
            name=self._name,
            revision=revision.hexdigest()[:12],
            max_tokens=settings.max_document_tokens,
            framework=["PyTorch"],
            similarity_fn_name=self._config.embedder.similarity,
            use_instructions=bool(task.query_instruction or task.document_instruction),
            **dict.fromkeys(unknown.split()),
        )

    def index(self, corpus: Any, **_: Any) -> None:
        """Embeds and indexes a corpus, unless that was done before.

        Args:
            corpus: rows with `id`, `text` and possibly `title`.

        Raises:
            DataError: no documents, two of the same id, or what is no text.
        """
        cluster.start(self._config.runtime)
        doc_ids = [str(doc_id) for doc_id in corpus["id"]]
        if not doc_ids or len(set(doc_ids)) < len(doc_ids):
            raise DataError(
                f"MTEB's corpus has {len(doc_ids)} documents of {len(set(doc_ids))} ids; each needs its own."
            )

        def rows(start: int, stop: int) -> list[dict[str, Any]]:
            part = corpus[start:stop]
            titles = part.get("title") or [None] * len(part["id"])
            return [
                {
                    "doc_id": doc_id,
                    "pool": TASK,
                    "position": start + at,
                    "task": TASK,
                    "title": title or None,
                    "text": _text(text, doc_id),
                }
                for at, (doc_id, title, text) in enumerate(zip(doc_ids[start:stop], titles, part["text"], strict=True))
            ]

        texts = self._kept("corpus", rows, len(doc_ids))
        self._embeddings = Artifact(self._root, embed_spec(self._config, self._asset, texts))
        embeddings = self._embeddings
        embeddings.make(lambda: run_embed(self._config, embeddings, self._asset, texts, with_queries=False))
        self._index = index = Artifact(self._root, index_spec(self._config, embeddings))
        index.make(lambda: run_index(self._config, index, embeddings))
        self._doc_ids = doc_ids

    def search(
        self, queries: Any, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """The best documents of each query, or the scores of those that it names.

        Args:
            queries: rows with `id`, `text` and possibly `instruction`.
            top_k: documents for each query.
            top_ranked: of a reranking task: the documents to score, by query.

        Returns:
            query id -> document id -> similarity.

        Raises:
            DataError: no corpus was indexed, a query is no text, or top_ranked names documents that are not there.
        """
        if self._index is None or self._embeddings is None:
            raise DataError("there is no index to search. MTEB calls index() first.")
        query_ids = [str(query_id) for query_id in queries["id"]]
        asked = self._embedded(queries, query_ids)
        query_QD = query_vectors(asked, query_ids)
        if top_ranked is not None:
            return self._scored(query_ids, query_QD, top_ranked, top_k)
        scopes_Q2 = np.tile(np.array([0, len(self._doc_ids)], np.int64), (len(query_ids), 1))
        k = min(top_k, len(self._doc_ids))
        with Searcher(self._config, self._index, encoder=encoder_of(asked)) as searcher:
            rows_QK, scores_QK = searcher.search(query_QD, scopes_Q2, k)
        return {
            query_id: {self._doc_ids[row]: float(score) for row, score in zip(rows, scores, strict=True) if row >= 0}
            for query_id, rows, scores in zip(query_ids, rows_QK, scores_QK, strict=True)
        }

    def _scored(
        self, query_ids: Sequence[str], query_QD: np.ndarray, top_ranked: Mapping[str, Sequence[str]], top_k: int
    ) -> dict[str, dict[str, float]]:
        assert self._embeddings is not None
        doc_ND = to_matrix(self._embeddings.read("document_embeddings"))
        row_of = {doc_id: row for row, doc_id in enumerate(self._doc_ids)}
        found: dict[str, dict[str, float]] = {}
        for query_id, query_D in zip(query_ids, query_QD, strict=True):
            named = list(dict.fromkeys(top_ranked.get(query_id, ())))
            if any(doc_id not in row_of for doc_id in named):
                raise DataError(f"the task ranks documents for query '{query_id}' that its corpus lacks.")
            scores = pair_scores(query_D, doc_ND[[row_of[doc_id] for doc_id in named]])
            order = np.argsort(-scores, kind="stable")[:top_k]
            found[query_id] = {named[at]: float(scores[at]) for at in order}
        return found

    def _embedded(self, queries: Any, query_ids: list[str]) -> Artifact:
        """The queries' embeddings."""

        def rows(start: int, stop: int) -> list[dict[str, Any]]:
            part = queries[start:stop]
            said = part.get("instruction") or [None] * len(part["id"])
            return [
                {
                    "query_id": query_id,
                    "task": TASK,
                    "dataset": TASK,
                    "split": "test",
                    "query": " ".join(filter(None, (_text(text, query_id), instruction))),
                    "targets": [],
                    "pool": TASK,
                }
                for query_id, text, instruction in zip(query_ids[start:stop], part["text"], said, strict=True)
            ]

        texts = self._kept("queries", rows, len(query_ids))
        embeddings = Artifact(self._root, embed_spec(self._config, self._asset, texts))

        def run() -> None:
            started, num_shards = time.monotonic(), texts.require()["num_shards"]
            runtime = self._config.runtime
            worker = {
                "artifact": embeddings,
                "prepare": texts,
                "embedder_path": str(self._asset.path),
                "tasks": self._config.tasks,
                "batch_tokens": runtime.encode_batch_tokens,
                "num_document_shards": 0,
            }
            cluster.map_shards(
                embeddings.pending(num_shards),
                EmbedWorker,
                worker,
                num_actors=runtime.encode_actors,
                num_threads=runtime.encode_threads,
                num_gpus=runtime.encode_gpus,
                purpose="embed",
            )
            seconds = time.monotonic() - started
            embeddings.commit(num_shards, seconds=seconds, extra={"encoder": encoder_of(embeddings)})

        embeddings.make(run)
        return embeddings

    @property
    def _root(self) -> Path:
        return Path(self._config.runtime.artifact_root).resolve()

    def _kept(self, table: str, rows: Rows, number: int) -> Artifact:
        """Texts as an artifact that is named by what they are."""

        def parts() -> Iterator[list[dict[str, Any]]]:
            return (rows(start, min(start + SHARD_ROWS, number)) for start in range(0, number, SHARD_ROWS))

        digest = hashlib.sha256()
        for part in parts():
            digest.update(canonical_json(part).encode("utf-8", "surrogatepass"))
        spec = ArtifactSpec(
            stage="mteb", version=TEXTS_VERSION, config={table: digest.hexdigest(), "shard_rows": SHARD_ROWS}, inputs={}
        )
        texts = Artifact(self._root, spec)

        def run() -> None:
            started = time.monotonic()
            num_shards = 0
            for shard, part in enumerate(parts()):
                num_shards = shard + 1
                texts.write_shard(shard, {table: table_of(table, part)}, Counts(rows_in=len(part), ok=len(part)))
            texts.commit(num_shards, seconds=time.monotonic() - started)

        texts.make(run)
        return texts


def _text(value: Any, row_id: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"'{row_id}' of the task is no text but {type(value).__name__}; RaySearch embeds texts alone.")
    return value
