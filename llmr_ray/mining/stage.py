"""The stage mine: candidates of every training query, from gold, dense search, BM25 and chance.

A worker opens all index shards itself (their files are mapped, so workers of one machine share them) and mines shards
of training queries; nothing travels between workers, and the result is the same however many there are.
"""

import json
import time
from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import BM25Config, Config, TaskMine, identity
from llmr_ray.data.example_tasks import owners, pool_of
from llmr_ray.data.scope import scopes
from llmr_ray.data.sources import brings_candidates
from llmr_ray.data.text import document_text, document_texts
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.index import shards
from llmr_ray.index.vectors import query_vectors
from llmr_ray.mining.candidates import Found, draw_random, own_first, text_key, union
from llmr_ray.mining.given import GivenCandidates
from llmr_ray.schemas import table_of

MINE_VERSION = 1

MINE_QUERIES = 256
"""Training queries in one shard."""

MIN_CANDIDATES = 2
"""A query with fewer has nothing to prefer over anything."""

_EXCLUSIONS = pa.schema([("query_id", pa.string()), ("reason", pa.string()), ("num_documents", pa.int32())])


def mine_spec(
    config: Config, prepare: Artifact, embeddings: Artifact, index: Artifact, *, again: bool = False
) -> ArtifactSpec:
    """What determines candidates: the retrievers' settings, the seed of random candidates, the data and the miner.

    again: for a round after the first.

    Raises:
        ConfigError: a task wants given candidates, but no data set of it names a file of them.
    """
    tasks = sorted({dataset.task for dataset in config.datasets.values()})
    given = {dataset.task for dataset in config.datasets.values() if brings_candidates(dataset)}
    without = [task for task in tasks if config.tasks[task].mine_in(again=again).num_given and task not in given]
    if without:
        raise ConfigError(
            f"tasks.{without[0]}.mine.num_given is set, but none of the task's data sets brings candidates: its "
            "source has none, and it names no file of `candidates`."
        )
    return ArtifactSpec(
        stage="mine",
        version=MINE_VERSION,
        config={
            "bm25": identity(config.bm25),
            "tasks": {task: identity(config.tasks[task].mine_in(again=again)) for task in tasks},
            "seed": config.seed,
            "shard_queries": MINE_QUERIES,
        },
        inputs={"prepare": prepare.id, "embeddings": embeddings.id, "index": index.id},
    )


def run_mine(
    config: Config,
    artifact: Artifact,
    prepare: Artifact,
    embeddings: Artifact,
    index: Artifact,
    *,
    again: bool = False,
) -> None:
    """Mines every query of the split "train": table `candidates`, and `exclusions` (query_id, reason, num_documents).

    A query left with fewer than two candidates is skipped, with its reason counted, and has no rows.

    Raises:
        DataError: there are no training queries, embeddings are missing, or the index belongs to other embeddings.
    """
    started = time.monotonic()
    num_queries = int(pc.sum(pc.equal(prepare.read("queries")["split"], "train")).as_py() or 0)
    if not num_queries:
        raise DataError(f"{prepare.id} holds no training queries. Raise datasets.*.num_train.")
    if index.spec.inputs["embeddings"] != embeddings.id:
        raise DataError(f"{index.id} indexes other embeddings than {embeddings.id}; their scores mean nothing.")
    num_shards = -(-num_queries // MINE_QUERIES)
    cluster.map_shards(
        artifact.pending(num_shards),
        MineWorker,
        {
            "artifact": artifact,
            "prepare": prepare,
            "embeddings": embeddings,
            "index": index,
            "tasks": {name: task.mine_in(again=again) for name, task in config.tasks.items()},
            "bm25": config.bm25,
            "seed": config.seed,
            "how": shards.Opening(exact=True, scan=config.runtime.index_scan, num_threads=config.runtime.index_threads),
        },
        num_actors=config.runtime.mine_actors,
        num_threads=config.runtime.index_threads,
        num_gpus=config.runtime.index_gpus,
        purpose="mine",
    )
    artifact.commit(num_shards, seconds=time.monotonic() - started)


class MineWorker:
    """Mines shards of training queries: queries [shard * MINE_QUERIES, (shard + 1) * MINE_QUERIES) of the split."""

    def __init__(
        self,
        artifact: Artifact,
        prepare: Artifact,
        embeddings: Artifact,
        index: Artifact,
        tasks: dict[str, TaskMine],
        bm25: BM25Config,
        seed: int,
        how: shards.Opening,
    ) -> None:
        from llmr_ray.mining.bm25 import BM25

        self.artifact, self.tasks, self.seed = artifact, tasks, seed
        wants_owners = any(task.same_task_first for task in tasks.values())
        columns = ["doc_id", "pool", "position", "title", "text", *(["meta"] if wants_owners else [])]
        corpus, queries = prepare.read("corpus", columns=columns), prepare.read("queries")
        self.queries = queries.filter(pc.equal(queries["split"], "train"))
        self.doc_ids, titles, texts = corpus["doc_id"], corpus["title"], corpus["text"]
        self.owners = owners(corpus["meta"].to_pylist()) if wants_owners else []
        self.text_key = cache(lambda row: text_key(document_text(titles[row].as_py(), texts[row].as_py())))
        self.scopes_Q2 = scopes(self.queries, corpus)
        self.query_QD = query_vectors(embeddings, self.queries["query_id"].to_pylist())
        qrels = prepare.read("qrels")
        own = [_meta(query).get("self_doc_id") for query in self.queries.select(["meta"]).to_pylist()]
        self.row_of = _rows_of(self.doc_ids, chain(qrels["doc_id"].to_pylist(), own))
        self.gold_rows = _gold_rows(qrels, self.row_of)
        wants_given = any(task.num_given for task in tasks.values())
        given = prepare.read("given") if wants_given else table_of("given", [])
        self.given = GivenCandidates(given, self.doc_ids)
        shards.set_threads(how.num_threads)
        self.shards = shards.open_shards(index, range(index.require()["num_shards"]), how=how)
        if sum(shard.num_rows for shard in self.shards) != len(self.doc_ids):
            raise DataError(f"{index.id} holds another number of documents than the corpus. Build the index again.")
        wants_bm25 = any(task.num_bm25 for task in tasks.values())
        self.bm25 = BM25(document_texts(corpus), bm25.k1, bm25.b) if wants_bm25 else None

    def run(self, shard: int) -> dict[str, Any]:
        """Mines one shard and commits it; returns its ledger record."""
        first = shard * MINE_QUERIES
        queries = self.queries.slice(first, MINE_QUERIES).to_pylist()
        found = self._retrieve(queries, first)
        counts = Counts(rows_in=len(queries))
        candidates, exclusions = [], []
        for query, offered, (start, end) in zip(queries, found, self.scopes_Q2[first:].tolist(), strict=False):
            query_id = query["query_id"]
            meta = _meta(query)
            gold = self.gold_rows.get(query_id, []) if self._takes_gold(query["task"], meta) else []
            in_range = [row for row in gold if start <= row < end]
            chosen, excluded = union(
                gold_rows=in_range,
                self_row=self.row_of.get(meta.get("self_doc_id", "")),
                query=query["query"],
                found=offered,
                key_of=self.text_key,
                skip_same_input=self.tasks[query["task"]].skip_same_input,
            )
            excluded["gold_out_of_range"] += len(gold) - len(in_range)
            exclusions += [
                {"query_id": query_id, "reason": reason, "num_documents": number}
                for reason, number in sorted(excluded.items())
                if number
            ]
            if len(chosen) < MIN_CANDIDATES:
                counts.skipped["one_candidate" if chosen else "no_candidate"] += 1
                continue
            counts.ok += 1
            candidates += [
                {
                    "query_id": query_id,
                    "doc_id": self.doc_ids[candidate.row].as_py(),
                    "source": candidate.source,
                    "rank": candidate.rank,
                    "retrieval_score": candidate.retrieval_score,
                }
                for candidate in chosen
            ]
        tables = {
            "candidates": table_of("candidates", candidates),
            "exclusions": pa.Table.from_pylist(exclusions, schema=_EXCLUSIONS),
        }
        return self.artifact.write_shard(shard, tables, counts)

    def _retrieve(self, queries: list[dict[str, Any]], first: int) -> list[list[Found]]:
        """What each source offers each query, in the order given, dense, bm25, random."""
        found: list[list[Found]] = [[] for _ in queries]
        for task in sorted({query["task"] for query in queries}):
            settings = self.tasks[task]
            members = np.asarray([row for row, query in enumerate(queries) if query["task"] == task])
            scopes_Q2 = self.scopes_Q2[first + members]
            ranked = []
            if settings.num_dense:
                vectors = self.query_QD[first + members]
                rows_QK, scores_QK = shards.search_all(self.shards, vectors, scopes_Q2, settings.depth)
                if settings.same_task_first:
                    own = [pool_of(queries[member]["dataset"]) for member in members]
                    rows_QK, scores_QK = own_first(rows_QK, scores_QK, own, self.owners)
                ranked.append(("dense", settings.num_dense, rows_QK, scores_QK))
            if settings.num_bm25 and self.bm25 is not None:
                texts = [queries[member]["query"] for member in members]
                ranked.append(("bm25", settings.num_bm25, *self.bm25.topk(texts, scopes_Q2, settings.depth)))
            for position, member in enumerate(members):
                rows, scores = self.given.of(queries[member]["query_id"])
                given = Found(source="given", num=settings.num_given, rows=rows, scores=scores)
                found[member] = [given] + [
                    Found(
                        source=source,
                        num=num,
                        rows=rows_QK[position],
                        scores=scores_QK[position],
                        skip_top=settings.skip_top,
                    )
                    for source, num, rows_QK, scores_QK in ranked
                ]
                start, end = scopes_Q2[position].tolist()
                query_id = queries[member]["query_id"]
                found[member].append(draw_random(start, end, settings.num_random, self.seed, query_id))
        return found

    def _takes_gold(self, task: str, meta: dict[str, Any]) -> bool:
        """Whether relevant documents are candidates though not found: as the task says, and for generated questions,
        whose only one is the passage that they were written about (ARL2, methods.md C.1.4)."""
        return self.tasks[task].with_gold or "source_doc_id" in meta


def _meta(query: dict[str, Any]) -> dict[str, Any]:
    """What else is known of a query; "self_doc_id" is the document made from its own example, if it has one."""
    return json.loads(query["meta"]) if query["meta"] else {}


def _rows_of(doc_ids: pa.ChunkedArray, named: Iterable[str | None]) -> dict[str, int]:
    """Corpus rows of those of the documents named that there are."""
    wanted = pa.array(sorted({name for name in named if name is not None}), pa.string())
    rows = np.flatnonzero(pc.is_in(doc_ids, value_set=wanted).to_numpy())
    return dict(zip(doc_ids.take(pa.array(rows)).to_pylist(), rows.tolist(), strict=True))


def _gold_rows(qrels: pa.Table, row_of: dict[str, int]) -> dict[str, list[int]]:
    """Corpus rows of each query's relevant documents, most relevant first, then by row."""
    gold: dict[str, list[tuple[int, int]]] = {}
    for entry in qrels.filter(pc.greater(qrels["relevance"], 0)).to_pylist():
        if entry["doc_id"] not in row_of:
            raise DataError(f"qrels name document '{entry['doc_id']}', which the corpus lacks. Prepare the data again.")
        gold.setdefault(entry["query_id"], []).append((-entry["relevance"], row_of[entry["doc_id"]]))
    return {query_id: [row for _, row in sorted(rows)] for query_id, rows in gold.items()}
