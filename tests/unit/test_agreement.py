"""Kendall's tau against counting pairs."""

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.evaluation.agreement import rank_agreement


def table(rewards):
    """{query: {document: reward}} as a table."""
    rows = [(query, doc, reward) for query, of in rewards.items() for doc, reward in of.items()]
    return pa.table(dict(zip(("query_id", "doc_id", "reward"), map(list, zip(*rows, strict=True)), strict=True)))


def brute_force(one, other):
    """Tau-b: concordant - discordant pairs over the geometric mean of the pairs that either does not tie."""
    signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i in range(len(one)) for j in range(i)]
    return sum(a * b for a, b in signs) / np.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def test_agreement_is_tau_b_by_query():
    """Prevents ties from counting as agreement, and documents from being matched by position."""
    rng = np.random.default_rng(0)
    mine, llm = {}, {}
    for query in "abcdef":
        docs = [f"{query}{n}" for n in range(7)]
        mine[query] = dict(zip(docs, rng.integers(0, 5, 7).astype(float), strict=True))
        llm[query] = dict(zip(rng.permutation(docs), rng.integers(0, 5, 7).astype(float), strict=True))
    found = rank_agreement(table(mine), table(llm))
    assert set(found) == set("abcdef")
    for query, of in mine.items():
        expected = brute_force(list(of.values()), [llm[query][doc] for doc in of])
        assert found[query] == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_compared_is_left_out():
    """Prevents a NaN, or a 0 that nobody measured, from entering a mean."""
    mine = {"same": {"x": 1.0, "y": 2.0, "z": 9.0}, "tied": {"x": 1.0, "y": 1.0}, "one": {"x": 1.0, "y": 2.0}}
    llm = {"same": {"x": 5.0, "y": 6.0}, "tied": {"x": 1.0, "y": 2.0}, "one": {"y": 2.0, "z": 1.0}, "new": {"x": 1.0}}
    assert rank_agreement(table(mine), table(llm)) == {"same": 1.0}
