"""Rewards against the worked numbers of methods.md A.5.5 and rules written out by hand."""

import json

import pytest

from llmr_ray.config import Config, DatasetConfig, LLMConfig, TaskConfig, TaskScore
from llmr_ray.errors import DataError
from llmr_ray.feedback.jobs import ScoreJobs, make_job
from llmr_ray.feedback.rewards import distinct_draws, likelihood, rank_of, rank_reward, reward_rows
from llmr_ray.feedback.rules import FURTHER, OTHER_LABEL, OTHER_TASK, rule_of
from llmr_ray.schemas import table_of

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


def test_a_label_is_the_reward():
    """A label that was quarantined is no reward of 0: nobody said that the passage does not help."""

    def row(doc_id, label, evidence=None, error=None):
        said = {"label": label, "evidence": evidence, "error": error}
        return {"query_id": "q", "doc_id": doc_id, "kind": "label", "llm_score": None, **said}

    scores = [
        row("d1", 1.0, "a quote"),
        row("d2", 0.0, ""),
        row("d3", None, error="cut short"),
        row("d4", None, error=OTHER_TASK),
    ]
    rows, counts = reward_rows(scores, {"q": "label"})
    assert [(r["doc_id"], r["reward"], r["reward_source"], r["evidence"]) for r in rows] == [
        ("d1", 1.0, "label", "a quote"),
        ("d2", 0.0, "label", ""),
        ("d4", None, OTHER_TASK, None),
    ]
    assert dict(counts.skipped) == {"the LLM request failed": 1}
    counts.check("rewards")


def test_documents_judged_by_a_rule_rank_below_all_scored_ones():
    """A sentinel such as -100 would enter means and softmaxes; a row dropped would be no negative (methods.md B.4)."""

    def row(query_id, doc_id, score, error=None):
        return {"query_id": query_id, "doc_id": doc_id, "kind": "likelihood", "llm_score": score, "error": error}

    scores = [
        row("q1", "d1", -1.0),
        row("q1", "d2", None, OTHER_TASK),
        row("q1", "d3", None, OTHER_LABEL),
        row("q1", "d4", None, "the prompt does not fit"),
        row("q2", "d1", None, OTHER_TASK),
        row("q2", "d2", None, OTHER_TASK),
    ]
    rows, counts = reward_rows(scores, dict.fromkeys(("q1", "q2"), "likelihood"))
    assert [(r["doc_id"], r["reward"], r["reward_source"]) for r in rows] == [
        ("d1", -1.0, "llm"),
        ("d2", None, OTHER_TASK),
        ("d3", None, OTHER_LABEL),
    ]
    counts.check("rewards")
    assert dict(counts.skipped) == {
        "the LLM request failed": 1,
        "the LLM scored no document of the query": 2,
    }
    table_of("rewards", rows)


@pytest.mark.parametrize(
    ("dataset", "of", "text", "settings", "expected"),
    [
        ("rte", "rte", "P\nYes", {"same_task": True, "same_label": True}, None),
        ("rte", "rte", "P\nNo", {"same_task": True, "same_label": True}, OTHER_LABEL),
        ("rte", "rte", "P\nNo", {"same_task": True}, None),
        ("rte", "rte", "No\nYes", {"same_label": True}, None),  # the label is the last line alone
        ("rte", "snli", "P\nNo", {"same_task": True, "same_label": True}, OTHER_TASK),
        ("rte", "snli", "P\nNo", {"same_label": True}, None),
        ("rte", None, "P\nYes", {"same_task": True}, OTHER_TASK),
        ("rte", "snli", "P\nNo", {}, None),
        ("mnli_m", "mnli", "P\nYes", {"same_task": True, "same_label": True}, None),
        ("mine", "mine", "P\nNo", {"same_task": True, "same_label": True}, OTHER_LABEL),
    ],
)
def test_rules_compare_tasks_and_then_the_labels_of_classifications(dataset, of, text, settings, expected):
    """Only where labels are the words of all questions does another one mean "worse"."""
    document = {"text": text, "meta": None if of is None else json.dumps({"dataset": of})}
    query = {"dataset": dataset, "options": ["No", "Yes"], "gold_option": 1}
    assert rule_of(TaskScore(**settings), query, document, is_classification=True) == expected
    of_task = None if expected == OTHER_LABEL else expected
    assert rule_of(TaskScore(**settings), query, document, is_classification=False) == of_task


def test_a_data_set_of_the_user_s_own_is_a_classification_by_its_options():
    """Prevents the LLM from being paid for examples of wrong labels where a data set is not in the task table."""

    def query(name, number, options):
        row = dict.fromkeys(("context", "meta", "history_end"))
        row |= {"query_id": f"{name}-{number}", "task": "icl", "dataset": name, "split": "train", "query": "w"}
        return row | {"targets": [options[0]], "options": options, "gold_option": 0, "pool": "icl"}

    queries = [query("intents", n, ["buy", "ask"]) for n in range(2)]
    queries += [query("quiz", n, [f"one {n}", f"two {n}"]) for n in range(2)]
    documents = [
        {"doc_id": f"{name}-{word}", "pool": "icl", "position": place, "task": "icl", "title": None}
        | {"text": f"x\n{word}", "continuation": None, "meta": json.dumps({"dataset": name})}
        for place, (name, word) in enumerate([("intents", "buy"), ("intents", "ask"), ("quiz", "ask")])
    ]
    named = {"intents": ("intents-buy", "intents-ask"), "quiz": ("quiz-ask",)}
    mined = [
        {"query_id": row["query_id"], "doc_id": doc_id, "source": "bm25", "rank": place, "retrieval_score": 1.0}
        for row in queries
        for place, doc_id in enumerate(named[row["dataset"]])
    ]
    settings = TaskScore(feedback="likelihood", prompt="llm_r", same_task=True, same_label=True)
    config = Config(tasks={"icl": TaskConfig(score=settings)}, datasets={"intents": DatasetConfig(task="icl")})
    jobs = ScoreJobs(config, table_of("queries", queries), table_of("corpus", documents), table_of("candidates", mined))
    assert [job.rules for job in jobs.of_shard(0)] == [(None, OTHER_LABEL)] * 2 + [(None,)] * 2


def test_the_llm_is_asked_about_the_first_candidates_alone():
    """AAR's negatives come from below the ten that the LLM sees; asked about, they would cost ten times as much."""
    documents = [{"doc_id": f"d{n}", "text": "x", "meta": None, "title": None} for n in range(5)]
    query = {"query_id": "q", "dataset": "x", "task": "qa", "targets": ["y"]}
    job = make_job(query, documents, TaskScore(num_first=2), LLMConfig(), seed=0)
    assert job.rules == (None, None, FURTHER, FURTHER, FURTHER)
    assert [document["doc_id"] for document in job.asked] == ["d0", "d1"]
