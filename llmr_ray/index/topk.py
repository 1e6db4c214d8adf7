"""Exact top-k in NumPy: what a retrieval score is, how ties are broken, and how the results of shards are merged.

The score of a pair is its inner product summed in double precision in a fixed order, rounded to float32. It depends on
the two vectors alone, not on the batch, shard or library that found the pair, so equal documents tie exactly and every
way of cutting a corpus gives the same result. Ties go to the lower row.

Shape suffixes: Q queries, N documents, D embedding, K results, M candidates.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llmr_ray.errors import DataError

MISSING = -1
"""The row of a result that does not exist (a range of fewer than k documents); its score is -inf."""

_BLOCK = 1 << 20
"""Numbers held in double precision at once in `pair_scores`."""


def pair_scores(query_D: np.ndarray, doc_ND: np.ndarray) -> np.ndarray:
    """The scores of one query with N documents: float32 [N], each independent of its neighbours."""
    query = query_D.astype(np.float64)
    step = max(1, _BLOCK // max(1, len(query)))
    result = np.empty(len(doc_ND), np.float32)
    for start in range(0, len(doc_ND), step):
        # Not a matrix product: BLAS sums a row of one in an order that depends on where in the block it stands.
        result[start : start + step] = np.vecdot(doc_ND[start : start + step].astype(np.float64), query)
    return result


def select_topk(rows_QM: np.ndarray, scores_QM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of M candidates per query, by score and then by lower row.

    Args:
        rows_QM: int64 [Q, M]; MISSING where there is no candidate.
        scores_QM: float32 [Q, M].
        k: results per query.

    Returns:
        rows int64 [Q, k] and scores float32 [Q, k], filled with MISSING and -inf.
    """
    none = rows_QM == MISSING
    rows = np.where(none, np.iinfo(np.int64).max, rows_QM)
    scores = np.where(none, -np.inf, scores_QM).astype(np.float32)
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    found = np.take_along_axis(np.where(none, MISSING, rows_QM), order, axis=-1)
    kept = np.take_along_axis(scores, order, axis=-1)
    result = nothing(len(rows_QM), k)
    result[0][:, : found.shape[1]] = found
    result[1][:, : kept.shape[1]] = kept
    return result


def merge_topk(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merges the (rows [Q, K], scores [Q, K]) of several shards, rows being those of the whole corpus."""
    if len(parts) == 1 and parts[0][0].shape[1] == k:
        return parts[0]
    rows = np.concatenate([rows for rows, _ in parts], axis=1)
    scores = np.concatenate([scores for _, scores in parts], axis=1)
    return select_topk(rows, scores, k)


def exact_topk(
    query_QD: np.ndarray, doc_ND: np.ndarray, scopes_Q2: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best documents of each query inside its range of rows, by comparing with every one of them.

    Args:
        query_QD: float32 [Q, D].
        doc_ND: float32 [N, D].
        scopes_Q2: int64 [Q, 2], start and end row (exclusive) of each query.
        k: results per query.

    Returns:
        rows int64 [Q, k] and scores float32 [Q, k], filled with MISSING and -inf.

    Raises:
        DataError: NaN or infinite values, differing dimensions, or a range outside the documents.
    """
    check_finite(doc_ND, "documents")
    check_queries(query_QD, scopes_Q2, doc_ND.shape[1], len(doc_ND))
    rows_QK, scores_QK = nothing(len(query_QD), k)
    for start, end, members in by_range(scopes_Q2):
        rows_QK[members], scores_QK[members] = block_topk(query_QD[members], doc_ND[start:end], k, start)
    return rows_QK, scores_QK


def block_topk(query_QD: np.ndarray, doc_ND: np.ndarray, k: int, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """`exact_topk` over one block that all queries search whole; its first document is row `first_row`."""
    scores = np.stack([pair_scores(query_D, doc_ND) for query_D in query_QD])
    rows = np.broadcast_to(np.arange(first_row, first_row + len(doc_ND)), scores.shape)
    return select_topk(rows, scores, k)


def by_range(scopes_Q2: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Groups queries by their range: yields (start, end, query numbers) of each distinct range that is not empty."""
    if not len(scopes_Q2):
        return
    ranges, inverse = np.unique(scopes_Q2, axis=0, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    cuts = np.cumsum(np.bincount(inverse.reshape(-1)))[:-1]
    for (start, end), members in zip(ranges, np.split(order, cuts), strict=True):
        if end > start:
            yield int(start), int(end), members


def check_finite(vector_ND: np.ndarray, what: str) -> None:
    """Raises DataError for NaN or infinite values: they compare as neither better nor worse and spoil a ranking."""
    bad = np.flatnonzero(~np.isfinite(vector_ND).all(-1))
    if len(bad):
        raise DataError(f"{len(bad)} {what} hold NaN or infinite values, the first is row {bad[0]}. Embed again.")


def check_queries(query_QD: np.ndarray, scopes_Q2: np.ndarray, dimension: int, num_rows: int) -> None:
    """Raises DataError when queries do not fit an index of `num_rows` documents with `dimension` values each."""
    if query_QD.ndim != 2 or query_QD.shape[1] != dimension:
        raise DataError(
            f"queries have the shape {query_QD.shape}, but the documents have {dimension} values each. Both must come "
            "from one embedder."
        )
    check_finite(query_QD, "queries")
    if scopes_Q2.shape != (len(query_QD), 2):
        raise DataError(f"{len(query_QD)} queries need row ranges of the shape [Q, 2], but got {scopes_Q2.shape}.")
    if len(scopes_Q2) and (scopes_Q2.min() < 0 or scopes_Q2.max() > num_rows):
        raise DataError(f"row ranges reach outside the {num_rows} documents; corpus and index do not belong together.")


def nothing(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A result without documents: rows int64 [Q, k] of MISSING and scores float32 [Q, k] of -inf."""
    return np.full((num_queries, k), MISSING, np.int64), np.full((num_queries, k), -np.inf, np.float32)
