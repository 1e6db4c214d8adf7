"""Rounds of adaptive self-training in small: tables made from lists, and their rules checked pair by pair."""

import math
from collections import Counter

import numpy as np
import polars as pl
import pyarrow as pa

from llmr_ray.labeling.calibration import Thresholds, is_calibration
from llmr_ray.labeling.selection import accounting, decide
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.schemas import table_of

BETWEEN = Thresholds(hi=0.9, lo=0.1)
NO_CALIBRATION = AdaptiveConfig(calibration_fraction=0.0)


def pairs_of(probability, questions=None):
    """Pairs d0, d1, ... of the questions, or of one question each."""
    names = questions or [f"q{n}" for n in range(len(probability))]
    doc_ids = [f"d{n}" for n in range(len(probability))]
    return pa.table({"query_id": names, "doc_id": doc_ids, "probability": pa.array(probability, pa.float64())})


def labels_of(rows):
    """Labels from (question, document, label, source)."""
    names = ("query_id", "doc_id", "label", "source")
    return table_of("labels", [dict(zip(names, row, strict=True)) | {"round": 0} for row in rows])


def many_labels(number, question="other"):
    return labels_of([(question, f"l{n}", 0.0, "llm") for n in range(number)])


def decided(pairs, labels, settings=NO_CALIBRATION, thresholds=BETWEEN, calls=100, number=1, seed=0, well_trained=()):
    return decide(
        pairs,
        labels,
        thresholds,
        settings,
        number=number,
        calls=calls,
        seed=seed,
        well_trained=frozenset(well_trained),
    )


def outcomes(decisions):
    return [(row["decision"], row["reason"]) for row in decisions.to_pylist()]


def answers_to(decisions, label_of):
    asked = [row for row in decisions.to_pylist() if row["decision"] == "ask"]
    return pa.table(
        {
            "query_id": pa.array([row["query_id"] for row in asked], pa.string()),
            "doc_id": pa.array([row["doc_id"] for row in asked], pa.string()),
            "label": pa.array([label_of(row) for row in asked], pa.float32()),
            "evidence": pa.array([f"quote of {row['doc_id']}" for row in asked], pa.string()),
        }
    )


def assert_sound(decisions, pairs, labels, settings, thresholds, calls, well_trained=()):
    """The rules of methods.md C.4, pair by pair."""
    known = {(row["query_id"], row["doc_id"]): row for row in labels.to_pylist() if row["source"] != "retriever"}
    rows = decisions.to_pylist()
    assert [(row["query_id"], row["doc_id"]) for row in rows] == list(
        zip(pairs["query_id"].to_pylist(), pairs["doc_id"].to_pylist(), strict=True)
    )
    positives = Counter(row["query_id"] for row in known.values() if row["label"] == 1)
    accepted, audited = Counter(), Counter()
    for row in rows:
        what, why, p = row["decision"], row["reason"], row["probability"]
        is_kept = is_calibration(row["query_id"], settings.calibration_fraction)
        not_accepted = {("ask", "uncertain"), ("leave", "budget")}
        if row["query_id"] in well_trained:
            not_accepted = {("leave", "well_trained")}
        label = known.get((row["query_id"], row["doc_id"]))
        if label is not None:
            allowed = {("leave", "no_answer")} if label["label"] is None else {("labelled", label["source"])}
        elif is_kept:
            allowed = {("ask", "calibration"), ("leave", "budget")}
        elif settings.policy != "adaptive":
            why_asked = "drawn" if settings.policy == "random" else "uncertain"
            allowed = {("ask", why_asked), ("leave", "budget")}
        elif p >= thresholds.hi:
            caps = {("leave", "positives_cap"), *not_accepted}
            allowed = {("positive", "confident"), ("ask", "audit_positive")} | caps
        elif p <= thresholds.lo:
            allowed = {("negative", "confident"), ("ask", "audit_negative"), *not_accepted}
        else:
            allowed = not_accepted
        assert (what, why) in allowed
        kind = "positive" if (what, why) in {("positive", "confident"), ("ask", "audit_positive")} else None
        kind = "negative" if (what, why) in {("negative", "confident"), ("ask", "audit_negative")} else kind
        if kind:
            accepted[kind] += 1
            audited[kind] += what == "ask"
            if kind == "positive":
                positives[row["query_id"]] += 1
                assert positives[row["query_id"]] <= settings.max_positives
    assert sum(row["decision"] == "ask" for row in rows) <= calls
    for kind, number in accepted.items():
        assert audited[kind] == math.ceil(number * 5 / 100)
    judges = [row for row in known.values() if row["label"] is not None]
    num_train = sum(not is_calibration(row["query_id"], settings.calibration_fraction) for row in judges)
    assert accepted.total() <= settings.max_pseudo_ratio * num_train
    accounting(decisions).check("the round")


def gold_of(num_questions=60, per_question=15, seed=0):
    """One or two documents of label 1, two of 0.5 and else 0."""
    rng, rows = np.random.default_rng(seed), []
    for question in range(num_questions):
        labels = [1.0] * int(rng.integers(1, 3)) + [0.5] * 2
        labels += [0.0] * (per_question - len(labels))
        rows += [(f"q{question}", f"d{question}.{place}", label) for place, label in enumerate(labels)]
    return pl.DataFrame(rows, schema=["query_id", "doc_id", "label"], orient="row")


RATES = {1.0: {0.5: 0.05, 0.0: 0.03}, 0.5: {1.0: 0.1, 0.0: 0.1}, 0.0: {0.5: 0.03}}
