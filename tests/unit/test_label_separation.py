"""The weight that a reward model leaves to examples of another label, against a softmax query by query."""

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.evaluation.label_separation import SCHEMA, label_separation, separation_rows, untold_labels
from llmr_ray.feedback.rules import OTHER_LABEL, OTHER_TASK


def world(gaps, *, queries=12, seed=0):
    """Rewards of a model whose right examples are `gap` above the others, by label; of the LLM; and the queries."""
    rng = np.random.default_rng(seed)
    taught, of_llm, asked = [], [], []
    for label, gap in gaps.items():
        for number in range(queries):
            query_id = f"{label}{number}"
            asked.append({"query_id": query_id, "dataset": "sentiment", "options": [label, "x"], "gold_option": 0})
            for doc in range(6):
                source = ("llm", OTHER_LABEL, OTHER_TASK)[doc % 3]
                pair = {"query_id": query_id, "doc_id": f"d{doc}"}
                taught.append(pair | {"reward": rng.normal() + gap * (source == "llm") + 50 * (source == OTHER_TASK)})
                of_llm.append(pair | {"reward": 1.0 if source == "llm" else None, "reward_source": source})
    return [pa.Table.from_pylist(rows) for rows in (taught, of_llm, asked)]


def test_weights_are_a_softmax_over_what_is_of_the_task():
    """Examples of other tasks are told apart by everything; they would hide that the labels are not."""
    taught, of_llm, asked = world({"bad": 0.5, "good": 4.0})
    found = label_separation(taught, of_llm, asked)
    assert found.schema == SCHEMA
    assert found["query_id"].to_pylist() == asked["query_id"].to_pylist()
    rewards = {(row["query_id"], row["doc_id"]): row["reward"] for row in taught.to_pylist()}
    for row in found.to_pylist():
        right, other = (
            np.exp([rewards[row["query_id"], doc] for doc in docs]) for docs in (("d0", "d3"), ("d1", "d4"))
        )
        assert row["weight"] == pytest.approx(other.sum() / (other.sum() + right.sum()))
        assert row["share"] == 0.5
    good = [row["weight"] for row in found.to_pylist() if row["label"] == "good"]
    told = {row["label"]: row for row in separation_rows(found, samples=200, seed=1)}
    assert told["good"]["weight"] == pytest.approx(np.mean(good))
    assert told["good"]["ci95"][0] < told["good"]["weight"] < told["good"]["ci95"][1]
    assert (told["good"]["n"], told["good"]["share"], told["good"]["dataset"]) == (12, 0.5, "sentiment")


def test_a_query_of_one_kind_tells_nothing():
    """A share of 0 or 1 leaves no weight to compare, and would move a mean."""
    taught, of_llm, asked = world({"good": 2.0}, queries=3)
    rows = of_llm.to_pylist()
    for row in rows:
        if row["query_id"] == "good0" and row["reward_source"] == OTHER_LABEL:
            row["reward_source"] = OTHER_TASK
        if row["query_id"] == "good1" and row["reward_source"] == "llm":
            row["reward"] = None  # the LLM failed at it
    found = label_separation(taught, pa.Table.from_pylist(rows), asked)
    assert found["query_id"].to_pylist() == ["good2"]
    none = label_separation(taught, pa.Table.from_pylist([row | {"reward_source": "llm"} for row in rows]), asked)
    assert none.num_rows == 0
    assert separation_rows(none, samples=10, seed=1) == []
    assert untold_labels(none) is None


def test_a_label_that_was_not_learned_is_named():
    """A run whose reward model knows one of two labels looks well by its loss, and teaches the embedder that label."""
    found = label_separation(*world({"bad": 0.0, "good": 4.0}))
    warning = untold_labels(found)
    assert warning is not None
    assert "sentiment 'bad'" in warning
    assert "'good'" not in warning
    assert untold_labels(label_separation(*world({"bad": 4.0, "good": 4.0}))) is None
    assert untold_labels(label_separation(*world({"bad": 0.0}, queries=9))) is None, "too few to say"
