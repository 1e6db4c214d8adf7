"""BM25 against the formula written out, and its ranges."""

import math
from collections import Counter

import bm25s
import numpy as np
import pytest
import Stemmer

from llmr_ray.mining import bm25
from llmr_ray.mining.bm25 import BM25, bm25_topk

WORDS = ["river", "rivers", "mountain", "running", "runs", "glacier", "the", "of", "city", "cities", "Paris", "tower"]


def naive(queries, documents, scopes_Q2, k, k1, b):
    """Lucene's BM25 with dictionaries and loops, each range on its own."""
    stemmer = Stemmer.Stemmer("english")

    def split(text):
        return bm25s.tokenize([text], stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)[0]

    rows, scores = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
    for number, (query, (start, end)) in enumerate(zip(queries, scopes_Q2.tolist(), strict=True)):
        inside = [split(text) for text in documents[start:end]]
        mean = sum(map(len, inside)) / len(inside) if inside else 0
        ranked = []
        for row, words in enumerate(inside):
            score, frequency = 0.0, Counter(words)
            for word in split(query):
                df = sum(word in other for other in inside)
                idf = math.log(1 + (len(inside) - df + 0.5) / (df + 0.5))
                if frequency[word]:
                    tf = frequency[word]
                    score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
            if score > 0:
                ranked.append((-score, start + row))
        for rank, (score, row) in enumerate(sorted(ranked)[:k]):
            rows[number, rank], scores[number, rank] = row, -score
    return rows, scores


@pytest.fixture
def texts() -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(60)]
    # Mostly empty: a mean length below one word.
    documents[10:30] = ["", "of the", "", "glacier", ""] * 4
    queries = [" ".join(rng.choice(WORDS, 4)) for _ in range(8)]
    return queries, documents


@pytest.mark.parametrize(("k1", "b"), [(0.82, 0.68), (0.9, 0.4)])
def test_scores_and_ranges_equal_the_formula(texts, k1: float, b: float) -> None:
    """A wrong variant, or statistics that see documents outside the range, would mine from text not yet written."""
    queries, documents = texts
    scopes = np.asarray([[0, 60], [0, 60], [0, 1], [10, 30], [10, 31], [59, 60], [7, 7], [0, 25]])
    rows, scores = bm25_topk(queries, documents, scopes, 15, k1, b)
    expected_rows, expected_scores = naive(queries, documents, scopes, 15, k1, b)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    np.testing.assert_array_equal(rows == -1, expected_rows == -1)
    for mine, oracle, oracle_scores in zip(rows, expected_rows, expected_scores, strict=True):
        # float32 may swap documents whose float64 scores differ in the last digits only.
        swapped = mine != oracle
        assert not swapped.any() or np.ptp(oracle_scores[swapped]) < 1e-5


def test_equal_documents_are_ranked_by_row() -> None:
    """An unstable order among duplicates changes candidates from run to run."""
    documents = ["a red fox", "blue whale"] * 40
    rows, scores = bm25_topk(["red fox"], documents, np.asarray([[3, 80]]), 10, 0.82, 0.68)
    assert rows[0].tolist() == list(range(4, 24, 2))
    assert len(set(scores[0].tolist())) == 1


def test_documents_without_a_common_word_are_no_results() -> None:
    """Filling up with documents of score 0 makes candidates of the first rows of the corpus."""
    documents = ["apples and pears", "the of", "", "oranges"]
    rows, scores = bm25_topk(["pear", "zebra", "the", ""], documents, np.asarray([[0, 4]] * 4), 3, 0.82, 0.68)
    assert rows.tolist() == [[0, -1, -1], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert np.isneginf(scores[rows == -1]).all()
    assert (bm25_topk(["pear"], documents, np.asarray([[1, 3]]), 3, 0.82, 0.68)[0] == -1).all()


def test_kept_indexes_change_nothing(texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index kept for the wrong range would answer with another pool's documents."""
    queries, documents = texts
    monkeypatch.setattr(bm25, "KEPT_ROWS", 5)
    monkeypatch.setattr(bm25, "KEPT_INDEXES", 2)
    searcher = BM25(documents, 0.82, 0.68)
    for scopes in ([[0, 30], [30, 60], [0, 60], [20, 40]] * 2, [[0, 60]] * 8, [[30, 60], [0, 30]] * 4):
        found = searcher.topk(queries, np.asarray(scopes), 7)
        fresh = bm25_topk(queries, documents, np.asarray(scopes), 7, 0.82, 0.68)
        np.testing.assert_array_equal(found[0], fresh[0])
        np.testing.assert_array_equal(found[1], fresh[1])
    assert len(searcher._kept) == 2


def test_scores_equal_those_of_bm25s() -> None:
    """The formula of the test above is ours; a library says whether it is what others call BM25."""
    rng = np.random.default_rng(1)
    words = [f"word{number}" for number in range(300)]
    weights = 1 / np.arange(1, 301)
    documents = [" ".join(rng.choice(words, rng.integers(1, 60), p=weights / weights.sum())) for _ in range(500)]
    queries = [" ".join(rng.choice(words, 6)) for _ in range(20)]
    split = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "return_ids": False, "show_progress": False}
    peer = bm25s.BM25(k1=0.82, b=0.68, method="lucene")
    peer.index(bm25s.tokenize(documents, **split), show_progress=False)
    rows, scores = bm25_topk(queries, documents, np.asarray([[0, 500]] * 20), 40, 0.82, 0.68)
    for query, mine_rows, mine_scores in zip(bm25s.tokenize(queries, **split), rows, scores, strict=True):
        theirs = peer.get_scores(query)
        found = mine_rows >= 0
        np.testing.assert_allclose(mine_scores[found], np.sort(theirs)[::-1][:40][found], rtol=1e-5)
        np.testing.assert_allclose(mine_scores[found], theirs[mine_rows[found]], rtol=1e-5)
        assert found.sum() == min(40, (theirs > 0).sum())
