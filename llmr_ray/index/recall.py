"""What an approximate index is trained on, and how much of what exact search finds it finds.

Shape suffixes: Q queries, S sampled documents, D embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import Artifact, seed_of
from llmr_ray.errors import DataError
from llmr_ray.index import approximate, shards
from llmr_ray.index.settings import IndexConfig
from llmr_ray.index.vectors import query_vectors, to_matrix

NUM_QUERIES = 256
DEPTHS = (10, 100)


def sample_documents(embeddings: Artifact, num_rows: int, seed: int) -> np.ndarray:
    """Vectors of documents drawn from the whole corpus, in corpus order: float32 [S, D]. Parts are read one by one."""
    total = embeddings.require()["rows"]["document_embeddings"]
    rng = np.random.default_rng(seed_of(seed, "index sample", embeddings.id))
    chosen = np.sort(rng.choice(total, size=min(num_rows, total), replace=False))
    pieces, first = [], 0
    for shard, record in sorted(embeddings.ledger().items()):
        size = record["rows"].get("document_embeddings", 0)
        inside = chosen[(chosen >= first) & (chosen < first + size)] - first
        if len(inside):
            pieces.append(to_matrix(embeddings.read("document_embeddings", shard).take(pa.array(inside))))
        first += size
    return np.concatenate(pieces)


def sample_queries(embeddings: Artifact, prepare: Artifact, seed: int) -> tuple[np.ndarray, str]:
    """Vectors of queries to measure with, float32 [Q, D], and what they are: the run's training and development
    queries, or documents where it has none."""
    if prepare.require()["rows"].get("queries") and embeddings.require()["rows"].get("query_embeddings"):
        queries = prepare.read("queries").select(["query_id", "split"]).to_pylist()
        ids = [query["query_id"] for query in queries if query["split"] in ("train", "dev")]
        if ids:
            drawn = sorted(ids, key=lambda query_id: seed_of(seed, "recall", query_id))[:NUM_QUERIES]
            return query_vectors(embeddings, drawn), "training and development queries"
    return sample_documents(embeddings, NUM_QUERIES, seed), "documents"


def measure(opened: Sequence[shards.Shard], query_QD: np.ndarray, settings: IndexConfig) -> dict[str, Any]:
    """Recall of the opened shards against exact search, at the least effort that reaches `least_recall`.

    Recall@k is the share of the k places filled with a document that scores at least what the k-th of the exact search
    does, so that it does not matter which of equal documents is found. The effort is chosen on the queries that recall
    is reported for.

    Raises:
        DataError: no effort reaches it.
    """
    num_rows = sum(shard.num_rows for shard in opened)
    depths = [min(depth, num_rows) for depth in DEPTHS]
    scopes_Q2 = np.tile([[opened[0].first_row, opened[0].first_row + num_rows]], (len(query_QD), 1))
    proposals = [shard.proposals for shard in opened]

    def found(depth: int) -> np.ndarray:
        return shards.search_all(opened, query_QD, scopes_Q2, depth)[1]

    for shard in opened:
        shard.proposals = None
    exact_QK = found(depths[-1])
    for shard, proposal in zip(opened, proposals, strict=True):
        shard.proposals = proposal
    recall: dict[str, float] = {}
    effort = 0
    for effort in approximate.efforts(settings, num_rows):
        for proposal in proposals:
            if proposal is not None:
                proposal.effort = effort
        # Each depth by a search of its own: a deeper one proposes more.
        recall = {
            f"recall@{wanted}": float((found(depth) >= exact_QK[:, depth - 1 : depth]).mean())
            for wanted, depth in zip(DEPTHS, depths, strict=True)
        }
        if recall["recall@10"] >= settings.least_recall:
            break
    if recall["recall@10"] < settings.least_recall:
        what = "lists" if settings.kind.startswith("ivf") else "wide"
        raise DataError(
            f"recall@10 of the index is {recall['recall@10']:.3f} at an effort of {effort} ({what}), below "
            f"index.least_recall = {settings.least_recall:g}. {_advice(settings)} Or lower index.least_recall, or take "
            "index.kind: flat, which is exact."
        )
    return {"effort": effort, "num_queries": len(query_QD), **{key: round(value, 4) for key, value in recall.items()}}


def _advice(settings: IndexConfig) -> str:
    effort = "Raise index.effort, or set it to 0 to have it chosen." if settings.effort else ""
    if settings.kind == "ivf_pq":
        return f"{effort} Raise index.pq_bytes or index.refine, or take ivf_sq8.".strip()
    if settings.kind == "ivf_sq8":
        return f"{effort} Raise index.refine.".strip()
    return f"{effort} Raise index.num_links or index.refine.".strip()
