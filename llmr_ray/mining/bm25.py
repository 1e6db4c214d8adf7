"""BM25 inside row ranges, on bm25s (Lucene's variant), with English stop words and Snowball stemming.

Scores are those of Lucene's BM25 without its constant factor: idf = ln(1 + (N - df + 0.5) / (df + 0.5)), term weight
tf / (tf + k1 * (1 - b + b * length / mean length)), summed over the query's tokens with their multiplicity. Each range
is an index of its own: N, df and the mean length of a dialogue's earlier turns must not see its later ones.

The defaults of the configuration, k1 0.82 and b 0.68, are those the released evaluator runs with; its class would say
0.9 and 0.4 (methods.md A.3, trap 30). It searches with Anserini; the tokenizer differs in details.
"""

from collections import OrderedDict
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer

from llmr_ray.index.topk import MISSING, by_range

NUMBA_ROWS = 200_000
"""Ranges this long score with numba: same numbers, but compiling takes over a second (benchmarks/search.py)."""

KEPT_ROWS = 1024
"""Indexes of ranges this long are kept for the next call: shared pools, searched by shard after shard of queries."""

KEPT_INDEXES = 8
"""How many of them."""


class BM25:
    """Documents tokenized once, indexed per distinct range when a query asks for it.

    Args:
        documents: texts in corpus order.
        k1: term frequency saturation.
        b: length normalisation.
    """

    def __init__(self, documents: Sequence[str], k1: float, b: float) -> None:
        self._k1, self._b = k1, b
        self._stemmer = Stemmer.Stemmer("english")
        tokens = bm25s.tokenize(list(documents), stopwords="en", stemmer=self._stemmer, show_progress=False)
        self._vocabulary: dict[str, int] = tokens.vocab
        self._document_ids: list[list[int]] = tokens.ids
        self._kept: OrderedDict[tuple[int, int], _RangeIndex] = OrderedDict()

    def topk(self, queries: Sequence[str], scopes_Q2: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query inside its range, ties by lower row.

        Args:
            queries: Q texts.
            scopes_Q2: int64 [Q, 2], start and end row (exclusive).
            k: results per query.

        Returns:
            rows int64 [Q, k] and scores float32 [Q, k]. A document that shares no token with the query scores 0 and is
            no result: what is not found is MISSING and -inf.
        """
        rows_QK = np.full((len(queries), k), MISSING, np.int64)
        scores_QK = np.full((len(queries), k), -np.inf, np.float32)
        words = bm25s.tokenize(
            list(queries), stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        for start, end, members in by_range(scopes_Q2):
            index = self._index(start, end)
            for member in members:
                ids = [self._vocabulary[word] for word in words[member] if word in self._vocabulary]
                scores_N = index.scores(ids)
                rows = _best(scores_N, k)
                rows_QK[member, : len(rows)] = rows + start
                scores_QK[member, : len(rows)] = scores_N[rows]
        return rows_QK, scores_QK

    def _index(self, start: int, end: int) -> "_RangeIndex":
        if (start, end) in self._kept:
            self._kept.move_to_end((start, end))
            return self._kept[start, end]
        index = _RangeIndex(self._document_ids[start:end], self._k1, self._b)
        if end - start >= KEPT_ROWS:
            self._kept[start, end] = index
            if len(self._kept) > KEPT_INDEXES:
                self._kept.popitem(last=False)
        return index


def bm25_topk(
    queries: Sequence[str], documents: Sequence[str], scopes_Q2: np.ndarray, k: int, k1: float, b: float
) -> tuple[np.ndarray, np.ndarray]:
    """`BM25.topk` for a single call: rows int64 [Q, k] (MISSING: no more) and scores float32 [Q, k]."""
    return BM25(documents, k1, b).topk(queries, scopes_Q2, k)


class _RangeIndex:
    """A bm25s index of one range, with the range's own small vocabulary (bm25s walks all of it)."""

    def __init__(self, document_ids: list[list[int]], k1: float, b: float) -> None:
        self._num_documents = len(document_ids)
        words = sorted({word for ids in document_ids for word in ids})
        self._local = {word: local for local, word in enumerate(words)}
        self._bm25 = bm25s.BM25(k1=k1, b=b, method="lucene")
        if not words:
            return
        local_ids = [[self._local[word] for word in ids] for ids in document_ids]
        vocabulary = {str(word): local for word, local in self._local.items()}
        self._bm25.index((local_ids, vocabulary), create_empty_token=False, show_progress=False)
        if self._num_documents >= NUMBA_ROWS:
            self._bm25.activate_numba_scorer()

    def scores(self, word_ids: list[int]) -> np.ndarray:
        """float32 [N]: the score of each document of the range."""
        known = [self._local[word] for word in word_ids if word in self._local]
        if not known:
            return np.zeros(self._num_documents, np.float32)
        scores: np.ndarray = self._bm25.get_scores_from_ids(known)
        return scores


def _best(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k best positive scores, by score and then by row."""
    rows = np.flatnonzero(scores_N > 0)
    if len(rows) > k:
        threshold = np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores_N[rows] >= threshold]
    return rows[np.argsort(-scores_N[rows], kind="stable")][:k]
