"""Rankings that need no query: random documents, the most recent and the most central ones (methods.md A.7, B.9, G).

All return what a search returns: corpus rows [Q, K] (-1 where there are no more) and falling scores, here minus the
rank, which is all that such a ranking says.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import seed_of
from llmr_ray.data.example_tasks import owners, pool_of


def random_topk(
    query_ids: Sequence[str], eligible: Sequence[np.ndarray], k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents drawn without replacement; a query's draw depends on the seed and its id alone.

    Args:
        query_ids: Q ids.
        eligible: for each query, the corpus rows to draw from.
        k: documents per query at the most.
        seed: of the run.

    Returns:
        rows int64 [Q, k], scores float32 [Q, k].
    """
    rows = np.full((len(query_ids), k), -1, np.int64)
    for number, (query_id, choices) in enumerate(zip(query_ids, eligible, strict=True)):
        generator = np.random.default_rng(seed_of(seed, "random", query_id))
        drawn = generator.choice(choices, size=min(k, len(choices)), replace=False)
        rows[number, : len(drawn)] = drawn
    return rows, _rank_scores(rows)


def recency_topk(scopes: np.ndarray, strides: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The last documents of each query's range, the latest first.

    Args:
        scopes: int64 [Q, 2], row ranges.
        strides: for each query, the distance between documents taken: 2 where a document brings its successor along
            as continuation, so that the text read is contiguous; else 1.
        k: documents per query at the most.

    Returns:
        rows int64 [Q, k], scores float32 [Q, k].
    """
    rows = np.full((len(scopes), k), -1, np.int64)
    for number, ((start, end), stride) in enumerate(zip(scopes, strides, strict=True)):
        latest = np.arange(end - 1, start - 1, -stride)[:k]
        rows[number, : len(latest)] = latest
    return rows, _rank_scores(rows)


KMEANS_SAMPLE = 50_000
"""Examples of a task from which the centres are made; the nearest ones are sought among all."""

_KMEANS_ROUNDS = 100


def kmeans_topk(
    queries: pa.Table, eligible: Sequence[np.ndarray], vector_ND: np.ndarray, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k examples nearest to the centres of k clusters of a task's examples, the same for all of its queries (B.9).

    Args:
        queries: Q rows; those of other tasks than icl get no document.
        eligible: for each query, the corpus rows to choose from.
        vector_ND: embeddings of the whole corpus, float32.
        k: clusters and documents.
        seed: of the run.

    Returns:
        rows int64 [Q, k], scores float32 [Q, k].
    """
    rows = np.full((queries.num_rows, k), -1, np.int64)
    of_dataset: dict[str, np.ndarray] = {}
    for number, (task, dataset) in enumerate(
        zip(queries["task"].to_pylist(), queries["dataset"].to_pylist(), strict=True)
    ):
        if task != "icl":
            continue
        if dataset not in of_dataset:
            choices = eligible[number]
            of_dataset[dataset] = choices[central(vector_ND[choices], k, seed_of(seed, "kmeans", dataset))]
        rows[number, : len(of_dataset[dataset])] = of_dataset[dataset]
    return rows, _rank_scores(rows)


def central(vector_ND: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Which vectors are nearest to the centres of k clusters, that of the largest cluster first: int64 [min(k, N)].

    Lloyd's algorithm from k-means++ starts, to convergence. A vector stands for one centre only.
    """
    k = min(k, len(vector_ND))
    if not k:
        return np.zeros(0, np.int64)
    generator = np.random.default_rng(seed)
    size = min(len(vector_ND), KMEANS_SAMPLE)
    sample_SD = vector_ND[np.sort(generator.choice(len(vector_ND), size=size, replace=False))].astype(np.float64)
    centre_KD = _starts(sample_SD, k, generator)
    cluster_S = np.full(size, -1)
    for _ in range(_KMEANS_ROUNDS):
        nearest_S = _squared(sample_SD, centre_KD).argmin(axis=1)
        if (nearest_S == cluster_S).all():
            break
        cluster_S = nearest_S
        for cluster in np.unique(cluster_S):
            centre_KD[cluster] = sample_SD[cluster_S == cluster].mean(axis=0)
    chosen: list[int] = []
    distance_NK = _squared(vector_ND, centre_KD)
    for cluster in np.argsort(-np.bincount(cluster_S, minlength=k), kind="stable"):
        distance_N = distance_NK[:, cluster]
        distance_N[chosen] = np.inf
        chosen.append(int(distance_N.argmin()))
    return np.asarray(chosen, np.int64)


def _starts(sample_SD: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each start is drawn with a probability that grows with the squared distance to those before it."""
    chosen = [int(generator.integers(len(sample_SD)))]
    for _ in range(k - 1):
        distance_S = _squared(sample_SD, sample_SD[chosen]).min(axis=1)
        total = distance_S.sum()
        share_S = distance_S / total if total > 0 else None
        chosen.append(int(generator.choice(len(sample_SD), p=share_S)))
    return sample_SD[chosen]


def _squared(vector_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    """Squared distances [N, K]."""
    centre_KD = centre_KD.astype(vector_ND.dtype)
    norm_N = np.einsum("nd,nd->n", vector_ND, vector_ND)
    return np.maximum(norm_N[:, None] - 2 * vector_ND @ centre_KD.T + (centre_KD**2).sum(axis=1), 0.0)


def eligible(queries: pa.Table, corpus: pa.Table, ranges: np.ndarray) -> list[np.ndarray]:
    """What the rows "Random" and "k-means" may choose from: the query's range, and for examples only those of its own
    data set (methods.md A.7), or of the one whose examples are of its kind."""
    tasks, datasets = queries["task"].to_pylist(), queries["dataset"].to_pylist()
    rows_of: dict[str, np.ndarray] = {}
    if "icl" in tasks:
        members: dict[str, list[int]] = {}
        for row, owner in enumerate(owners(corpus["meta"].to_pylist())):
            if owner is not None:
                members.setdefault(owner, []).append(row)
        rows_of = {owner: np.asarray(rows, np.int64) for owner, rows in members.items()}
    result = []
    for task, dataset, (start, end) in zip(tasks, datasets, ranges, strict=True):
        if task == "icl":
            rows = rows_of.get(pool_of(dataset), np.zeros(0, np.int64))
            result.append(rows[(rows >= start) & (rows < end)])
        else:
            result.append(np.arange(start, end))
    return result


def _rank_scores(rows: np.ndarray) -> np.ndarray:
    return np.broadcast_to(-np.arange(1, rows.shape[1] + 1, dtype=np.float32), rows.shape).copy()
