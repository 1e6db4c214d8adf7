"""What the report says of the documents in the prompts, against a count by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.evaluation.shown import shown_figures
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact

LABELS = {"sst2": ["Negative", "Positive"], "nq": None}
METHODS = ("none", "bm25", "trained")


def world(root: Path) -> tuple[Artifact, Artifact, list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """A classification, questions, and a dialogue with a pool of its own; prompts of up to three documents."""
    rng = np.random.default_rng(3)
    corpus, queries, answers = [], [], []
    for dataset, task in (("msc", "chat"), ("nq", "qa"), ("sst2", "icl")):
        for number in range(9):
            text = f"{'word ' * number}\n{['Negative', 'Positive'][number % 2]}"
            # Two of the examples are another task's, whose labels are the same words.
            owner = "rte" if dataset == "sst2" and number > 6 else dataset
            row = {"doc_id": f"{dataset}-{number}", "pool": task, "position": number, "task": task, "text": text}
            corpus.append(row | {"meta": json.dumps({"dataset": owner})})
        for number in range(7):
            gold = int(rng.integers(2))
            row = {"query_id": f"{dataset}/{number}", "task": task, "dataset": dataset, "split": "test", "pool": task}
            row |= {"query": "?", "targets": ["x"], "options": LABELS.get(dataset), "gold_option": gold}
            queries.append(row)
            for method in METHODS:
                found = rng.choice(9, size=0 if method == "none" else rng.integers(1, 4), replace=False)
                # The trained one shows document 0 to everybody.
                doc_ids = [f"{dataset}-{document}" for document in found]
                if method == "trained" and f"{dataset}-0" not in doc_ids:
                    doc_ids.append(f"{dataset}-0")
                answers.append({"query_id": row["query_id"], "dataset": dataset, "method": method, "doc_ids": doc_ids})
    tables = {"queries": table_of("queries", queries), "corpus": table_of("corpus", corpus)}
    prepare = make_artifact(root, "prepare", tables)
    evaluate = make_artifact(root, "evaluate", {"answers": pa.Table.from_pylist(answers)})
    documents = {row["doc_id"]: row for row in corpus}
    return prepare, evaluate, answers, documents | {row["query_id"]: row for row in queries}


def test_figures_are_those_of_a_count_by_hand(tmp_path: Path) -> None:
    """Prevents a retriever's hubs from being counted in the wrong rows, and another task's label as the question's."""
    prepare, evaluate, answers, row_of = world(tmp_path)
    told = shown_figures(prepare, evaluate)
    # A dialogue's queries have no pool in common, and without retrieval nothing is shown.
    assert [(row["dataset"], row["method"]) for row in told] == [
        (dataset, method) for dataset in ("nq", "sst2") for method in ("bm25", "trained")
    ]
    for row in told:
        mine = [item for item in answers if (item["dataset"], item["method"]) == (row["dataset"], row["method"])]
        shown = [(item["query_id"], doc_id) for item in mine for doc_id in item["doc_ids"]]
        times = Counter(doc_id for _, doc_id in shown)
        assert (row["n"], row["documents"], row["different"]) == (7, len(shown), len(times))
        assert row["commonest"] == pytest.approx(max(times.values()) / 7)
        assert row["characters"] == pytest.approx(np.mean([len(row_of[doc_id]["text"]) for _, doc_id in shown]))
        if row["dataset"] == "nq":
            assert row["own_label"] is None
            assert row["by_label"] == []
            continue
        same = [
            row_of[doc_id]["text"].endswith(LABELS["sst2"][row_of[query_id]["gold_option"]])
            and "sst2" in row_of[doc_id]["meta"]
            for query_id, doc_id in shown
        ]
        assert 0 < np.mean(same) < 1
        assert row["own_label"] == pytest.approx(np.mean(same))
        for place, label in enumerate(LABELS["sst2"]):
            of_label = [one for one, (query_id, _) in zip(same, shown, strict=True)
                        if row_of[query_id]["gold_option"] == place]  # fmt: skip
            asked = {query_id for query_id, _ in shown if row_of[query_id]["gold_option"] == place}
            assert row["by_label"][place] == {
                "label": label, "n": len(asked), "own_label": pytest.approx(np.mean(of_label))
            }  # fmt: skip
        assert row["method"] == "bm25" or row["commonest"] == 1


def test_a_run_that_asks_nothing_shows_nothing(tmp_path: Path) -> None:
    """Prevents a report that fails where the LLM answers no question."""
    prepare, _, answers, _ = world(tmp_path / "asked")
    table = pa.Table.from_pylist(answers).slice(0, 0)
    assert shown_figures(prepare, make_artifact(tmp_path / "none", "evaluate", {"answers": table})) == []
