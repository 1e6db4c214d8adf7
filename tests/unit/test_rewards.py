"""Rewards against the worked numbers of methods.md A.5.5 and rules written out by hand."""

import pytest

from llmr_ray.errors import DataError
from llmr_ray.feedback.rewards import distinct_draws, likelihood, rank_of, rank_reward, reward_rows

SAMPLES_WITHOUT = [-1.2, -0.8, -2.0, -1.5]
SAMPLES_WITH = [-1.2, -0.9, -2.0, -1.5]


def test_rank_reward_worked_numbers():
    """methods.md A.5.5: r^a = 4, r^b = 2, R = 2; a sign or origin mistake turns helpful candidates harmful."""
    before, after = rank_of(-1.6, SAMPLES_WITHOUT), rank_of(-1.0, SAMPLES_WITH)
    assert (before, after, rank_reward(before, after)) == (4, 2, 2)


def test_rank_ties_and_bounds():
    """Ties must not push the desired output down, and the rank stays in [1, N + 1]."""
    assert rank_of(-1.0, [-1.0, -1.0]) == 1
    assert rank_of(-5.0, SAMPLES_WITHOUT) == 5
    assert rank_of(-0.1, []) == 1


def test_rank_with_counts_equals_rank_with_repeats():
    """Scoring a repeated draw once must not lose its weight in the rank."""
    assert rank_of(-1.0, [-0.5, -2.0], counts=[3, 1]) == rank_of(-1.0, [-0.5, -0.5, -0.5, -2.0])


def test_draws_drop_empty_and_the_target_itself():
    """An output equal to the desired one beats or ties it only by rounding (methods.md A.4.1)."""
    draws = distinct_draws([" Paris", "London ", "", " \n", "London", "paris"], "Paris ")
    assert draws.texts == ("London", "paris")
    assert draws.counts == (2, 1)


def test_likelihood_is_mean_unless_sum():
    """The sum favours short outputs: published code divides by the number of tokens."""
    assert likelihood([-1.0, -3.0], "mean") == -2.0
    assert likelihood([-1.0, -3.0], "sum") == -4.0
    with pytest.raises(DataError):
        likelihood([], "mean")


def test_reward_rows_account_for_every_score():
    """Rows dropped without a reason cannot be told from rows lost."""

    def row(query_id, doc_id, kind, score, error=None):
        return {"query_id": query_id, "doc_id": doc_id, "kind": kind, "llm_score": score, "error": error}

    scores = [
        row("q1", "d1", "likelihood", -1.0),
        row("q1", "d1", "rank", 2.0),
        row("q1", "d2", "likelihood", -1.5),
        row("q1", "d2", "rank", -1.0),
        row("q2", "d1", "likelihood", -0.5),
        row("q2", "d2", "likelihood", None, "empty"),
    ]
    rows, counts = reward_rows(scores, {"q1": "rank", "q2": "likelihood"})
    assert [(r["query_id"], r["doc_id"], r["reward"]) for r in rows] == [("q1", "d1", 2.0), ("q1", "d2", -1.0)]
    counts.check("rewards")
    assert dict(counts.skipped) == {
        "a kind the task does not use": 2,
        "the LLM request failed": 1,
        "the query has fewer than 2 rewarded documents": 1,
    }
