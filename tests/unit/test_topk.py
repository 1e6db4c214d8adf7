"""Top-k selection against naive loops: ties, duplicates, padding, ranges, merging."""

import math
from itertools import pairwise

import numpy as np
import pytest

from llmr_ray.errors import DataError
from llmr_ray.index.topk import MISSING, by_range, exact_topk, merge_topk, pair_scores, select_topk


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def naive(query_QD, doc_ND, scopes_Q2, k):
    """Python loops with correctly rounded sums."""
    rows, scores = [], []
    for query, (start, end) in zip(query_QD.tolist(), scopes_Q2.tolist(), strict=True):
        ranked = sorted(
            (-np.float32(math.fsum(a * b for a, b in zip(query, doc_ND[row].tolist(), strict=True))), row)
            for row in range(start, end)
        )[:k]
        rows.append([row for _, row in ranked] + [-1] * (k - len(ranked)))
        scores.append([-score for score, _ in ranked] + [-math.inf] * (k - len(ranked)))
    return np.asarray(rows), np.asarray(scores, np.float32)


def test_topk_equals_a_naive_loop_with_ties_empty_ranges_and_few_documents() -> None:
    """A result that depends on the order of equal documents, or that fills up with wrong rows, is not reproducible."""
    rng = np.random.default_rng(0)
    docs = unit(rng, 12, 8)[rng.integers(0, 12, 60)]
    queries = unit(rng, 7, 8)
    scopes = np.asarray([[0, 60], [0, 60], [5, 9], [60, 60], [0, 0], [59, 60], [10, 40]])
    rows, scores = exact_topk(queries, docs, scopes, 10)
    expected_rows, expected_scores = naive(queries, docs, scopes, 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (rows[3] == MISSING).all()
    assert np.isneginf(scores[3]).all()


def test_a_score_does_not_depend_on_its_neighbours() -> None:
    """Sums in another order per position would break ties between equal documents at random."""
    rng = np.random.default_rng(1)
    query, docs = unit(rng, 1, 383)[0], unit(rng, 5000, 383)
    whole = pair_scores(query, docs)
    for row in (0, 1, 7, 2729, 2730, 2731, 4999):
        assert pair_scores(query, docs[row : row + 1])[0] == whole[row]
        assert pair_scores(query, docs[row - 3 :])[3 if row >= 3 else row] == whole[row] or row < 3


def test_merging_shards_equals_the_whole_corpus() -> None:
    """A merge that breaks ties by shard, or lets fillers in, makes the result depend on the number of shards."""
    rng = np.random.default_rng(2)
    docs = unit(rng, 20, 16)[rng.integers(0, 20, 90)]
    queries = unit(rng, 5, 16)
    scopes = np.asarray([[0, 90], [25, 35], [29, 31], [80, 90], [40, 40]])
    whole = exact_topk(queries, docs, scopes, 25)
    for cuts in ([0, 90], [0, 30, 90], [0, 1, 45, 89, 90]):
        parts = []
        for start, end in pairwise(cuts):
            rows, scores = exact_topk(queries, docs[start:end], np.clip(scopes - start, 0, end - start), 25)
            parts.append((np.where(rows == MISSING, MISSING, rows + start), scores))
        for found, expected in zip(merge_topk(parts[::-1], 25), whole, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_fillers_lose_against_negative_scores() -> None:
    """A missing row that counts as score 0 would push out documents of negative similarity."""
    rows, scores = select_topk(np.asarray([[-1, 4, 2, -1]]), np.asarray([[9.0, -0.5, -0.5, 0.0]], np.float32), 3)
    assert rows.tolist() == [[2, 4, -1]]
    assert scores.tolist() == [[-0.5, -0.5, -math.inf]]


def test_bad_values_and_ranges_are_refused() -> None:
    """A NaN query gets arbitrary documents; a range beyond the corpus means that two artifacts do not match."""
    docs, query, scope = np.eye(3, dtype=np.float32), np.ones((1, 3), np.float32), np.asarray([[0, 3]])
    nan = np.asarray([[1, np.nan, 0]], np.float32)
    with pytest.raises(DataError, match="queries hold NaN"):
        exact_topk(nan, docs, scope, 1)
    with pytest.raises(DataError, match="documents hold NaN"):
        exact_topk(query, nan, scope, 1)
    with pytest.raises(DataError, match="3 values"):
        exact_topk(query[:, :2], docs, scope, 1)
    with pytest.raises(DataError, match="outside"):
        exact_topk(query, docs, np.asarray([[0, 4]]), 1)
    with pytest.raises(DataError, match="row ranges"):
        exact_topk(query, docs, np.zeros((2, 2), int), 1)


def test_ranges_are_grouped_completely() -> None:
    """A query that falls out of its group would silently get no result."""
    scopes = np.random.default_rng(3).integers(0, 4, (50, 2))
    seen = {}
    for start, end, members in by_range(scopes):
        assert end > start
        for member in members.tolist():
            seen[member] = (start, end)
    assert seen == {row: tuple(scope) for row, scope in enumerate(scopes.tolist()) if scope[1] > scope[0]}
    assert list(by_range(np.zeros((0, 2), int))) == []
