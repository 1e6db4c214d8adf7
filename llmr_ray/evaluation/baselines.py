"""Rankings that need no retriever: random documents and the most recent ones (methods.md A.7, G).

Both return what a search returns: corpus rows [Q, K] (-1 where there are no more) and falling scores, here minus the
rank, which is all that such a ranking says.
"""

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import seed_of


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


def eligible(queries: pa.Table, corpus: pa.Table, ranges: np.ndarray) -> list[np.ndarray]:
    """What the row "Random" may draw: the query's range, and for examples only its own data set (methods.md A.7)."""
    tasks, datasets = queries["task"].to_pylist(), queries["dataset"].to_pylist()
    rows_of: dict[str, np.ndarray] = {}
    if "icl" in tasks:
        members: dict[str, list[int]] = defaultdict(list)
        for row, meta in enumerate(corpus["meta"].to_pylist()):
            dataset = json.loads(meta).get("dataset") if meta else None
            if dataset is not None:
                members[dataset].append(row)
        rows_of = {dataset: np.asarray(rows, np.int64) for dataset, rows in members.items()}
    result = []
    for task, dataset, (start, end) in zip(tasks, datasets, ranges, strict=True):
        if task == "icl":
            rows = rows_of.get(dataset, np.zeros(0, np.int64))
            result.append(rows[(rows >= start) & (rows < end)])
        else:
            result.append(np.arange(start, end))
    return result


def _rank_scores(rows: np.ndarray) -> np.ndarray:
    return np.broadcast_to(-np.arange(1, rows.shape[1] + 1, dtype=np.float32), rows.shape).copy()
