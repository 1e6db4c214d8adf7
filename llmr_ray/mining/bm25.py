"""BM25 inside row ranges: Lucene's variant in NumPy, with the tokenizer of bm25s (stop words, Snowball stemming).

Scores are those of Lucene's BM25 without its constant factor: idf = ln(1 + (N - df + 0.5) / (df + 0.5)), term weight
tf / (tf + k1 * (1 - b + b * length / mean length)), summed over the query's tokens with their multiplicity. Each range
is an index of its own: N, df and the mean length of a dialogue's earlier turns must not see its later ones. bm25s
builds an index in Python loops, 3 ms for a hundred documents; with a range per query that is most of mining.

The defaults of the configuration, k1 0.82 and b 0.68, are those the released evaluator runs with; its class would say
0.9 and 0.4 (methods.md A.3, trap 30). It searches with Anserini; the tokenizer differs in details.
"""

from collections import OrderedDict
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer

from llmr_ray.index.topk import MISSING, by_range

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
        self._lengths_N = np.asarray([len(ids) for ids in tokens.ids], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths_N)])
        self._words_T = np.fromiter((word for ids in tokens.ids for word in ids), np.int64, self._offsets[-1])
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
                known = [self._vocabulary[word] for word in words[member] if word in self._vocabulary]
                scores_N = index.scores(np.asarray(known, np.int64))
                rows = _best(scores_N, k)
                rows_QK[member, : len(rows)] = rows + start
                scores_QK[member, : len(rows)] = scores_N[rows]
        return rows_QK, scores_QK

    def scores_of(self, query: str, start: int, end: int, rows: Sequence[int]) -> np.ndarray:
        """float32: the query's score of each of these documents of its range; 0 for one that shares no token with it.

        Args:
            query: a text.
            start, end: its range of rows, end exclusive.
            rows: within the range.
        """
        (words,) = bm25s.tokenize([query], stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False)
        known = [self._vocabulary[word] for word in words if word in self._vocabulary]
        scores_N = self._index(start, end).scores(np.asarray(known, np.int64))
        return scores_N[np.asarray(rows, np.int64) - start]

    def _index(self, start: int, end: int) -> "_RangeIndex":
        if (start, end) in self._kept:
            self._kept.move_to_end((start, end))
            return self._kept[start, end]
        tokens = slice(self._offsets[start], self._offsets[end])
        index = _RangeIndex(self._words_T[tokens], self._lengths_N[start:end], self._k1, self._b)
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
    """The weight of every (word, document) pair of one range, by word.

    Args:
        words_T: word number of each token of the range, document after document.
        lengths_N: tokens of each document.
    """

    def __init__(self, words_T: np.ndarray, lengths_N: np.ndarray, k1: float, b: float) -> None:
        self._num_documents = len(lengths_N)
        # Only the range's own words, so that a range of 50 documents costs what 50 documents cost.
        self._words, word_T = np.unique(words_T, return_inverse=True)
        document_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
        pair_P, tf_P = np.unique(word_T * len(lengths_N) + document_T, return_counts=True)
        word_P, self._documents = np.divmod(pair_P, max(1, len(lengths_N)))
        df = np.bincount(word_P, minlength=len(self._words))
        idf = np.log1p((len(lengths_N) - df + 0.5) / (df + 0.5))
        # Without any word there is no pair to weigh, and no mean length to divide by.
        mean_length = float(lengths_N.mean()) or 1.0
        saturation_N = k1 * (1 - b + b * lengths_N / mean_length)
        weight_P = idf[word_P] * tf_P / (tf_P + saturation_N[self._documents])
        self._weights = weight_P.astype(np.float32)
        self._starts = np.concatenate([[0], np.cumsum(df)])

    def scores(self, words: np.ndarray) -> np.ndarray:
        """float32 [N]: the score of each document of the range."""
        scores_N = np.zeros(self._num_documents, np.float32)
        places = np.searchsorted(self._words, words)
        for word, place in zip(words.tolist(), places.tolist(), strict=True):
            if place < len(self._words) and self._words[place] == word:
                pairs = slice(self._starts[place], self._starts[place + 1])
                scores_N[self._documents[pairs]] += self._weights[pairs]
        return scores_N


def _best(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k best positive scores, by score and then by row."""
    rows = np.flatnonzero(scores_N > 0)
    if len(rows) > k:
        threshold = np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores_N[rows] >= threshold]
    return rows[np.argsort(-scores_N[rows], kind="stable")][:k]
