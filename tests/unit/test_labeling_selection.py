"""What a round of adaptive self-training decides about each pair, and its audit."""

import dataclasses
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.errors import ConfigError, DataError
from llmr_ray.labeling.calibration import Thresholds, is_calibration
from llmr_ray.labeling.selection import accounting, settle
from llmr_ray.labeling.settings import AdaptiveConfig
from tests.labeling_world import (
    BETWEEN,
    NO_CALIBRATION,
    answers_to,
    assert_sound,
    decided,
    labels_of,
    many_labels,
    outcomes,
    pairs_of,
)

# --- one round -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive", "uncertainty", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_the_rules_hold_for_any_round(policy, seed):
    """Prevents pairs without a reason, calls beyond the budget, and caps that hold for one round only."""
    rng = np.random.default_rng(seed)
    questions = [f"q{n}" for n in rng.integers(0, 40, 500)]
    pairs = pairs_of(np.round(rng.beta(0.3, 0.3, 500), 2), questions)
    chosen = rng.choice(500, 60, replace=False)
    settings = AdaptiveConfig(policy=policy, calibration_fraction=0.2)
    rows = []
    for n in chosen:
        is_kept = is_calibration(questions[n], 0.2)
        source = "llm" if is_kept else str(rng.choice(["llm", "retriever", "human"]))
        label = None if source == "llm" and rng.random() < 0.2 else float(rng.choice([0.0, 0.5, 1.0]))
        rows.append((questions[n], f"d{n}", label, source))
    labels, trained = labels_of(rows), {"q1", "q2", "q3"}
    for calls in (0, 1, 7, 60, 1000):
        found = decided(pairs, labels, settings, calls=calls, seed=seed, well_trained=trained)
        assert_sound(found, pairs, labels, settings, BETWEEN, calls, trained)
        left = [reason for decision, reason in outcomes(found) if decision == "leave"]
        asked = sum(decision == "ask" for decision, _ in outcomes(found))
        if policy != "adaptive" and "budget" in left and calls < 400:
            assert asked == calls


def test_the_most_uncertain_pairs_are_asked_about_first():
    """Prevents calls for pairs about which the retriever is nearly sure."""
    probability = np.random.default_rng(0).uniform(0.11, 0.89, 50)
    for settings in (NO_CALIBRATION, dataclasses.replace(NO_CALIBRATION, policy="uncertainty")):
        found = decided(pairs_of(probability), many_labels(9), settings, calls=12)
        asked = {n for n, (decision, _) in enumerate(outcomes(found)) if decision == "ask"}
        # calibration_share is free where no question is kept
        assert asked == set(np.argsort(np.abs(probability - 0.5))[:12].tolist())


def test_equal_probabilities_are_drawn_not_taken_in_order():
    """Prevents the first documents of the corpus from getting all calls where isotonic regression ties pairs."""
    pairs = pairs_of(np.full(200, 0.5))
    asked = {}
    for seed in range(3):
        found = outcomes(decided(pairs, many_labels(9), calls=20, seed=seed))
        asked[seed] = {n for n, (decision, _) in enumerate(found) if decision == "ask"}
        assert asked[seed] != set(range(20))
    assert asked[0] != asked[1] != asked[2]


def test_decisions_do_not_depend_on_the_order_of_rows():
    """Prevents another sharding of the candidates from deciding otherwise."""
    rng = np.random.default_rng(1)
    pairs = pairs_of(np.round(rng.random(300), 1), [f"q{n % 30}" for n in range(300)])
    settings = AdaptiveConfig(calibration_fraction=0.2)
    order = rng.permutation(300)
    one, other = (decided(table, many_labels(20), settings, calls=40) for table in (pairs, pairs.take(order)))
    assert one.take(order).equals(other)


def test_at_most_three_positives_a_question_the_likeliest_first():
    """Prevents a question with known positives from getting three more, and the cap from taking the least likely."""
    pairs = pairs_of([0.91, 0.99, 0.95, 0.97, 0.93], ["q"] * 5)
    labels = pa.concat_tables([many_labels(30), labels_of([("q", "known", 1.0, "human")])])
    found = outcomes(decided(pairs, labels))
    # The most likely two fit; one is drawn for the audit.
    assert [n for n, (_, reason) in enumerate(found) if reason != "positives_cap"] == [1, 3]


def test_positives_come_first_where_the_ratio_ends():
    """Prevents the many sure negatives from using up all pseudo-labels."""
    pairs = pairs_of([0.01] * 40 + [0.92] * 6)
    settings = dataclasses.replace(NO_CALIBRATION, max_pseudo_ratio=1.8)
    found = Counter(outcomes(decided(pairs, many_labels(5), settings)))
    assert found["positive", "confident"] + found["ask", "audit_positive"] == 6
    assert found["negative", "confident"] + found["ask", "audit_negative"] == 3
    assert found["ask", "uncertain"] == 37


def test_pairs_for_which_no_pseudo_label_is_left_are_asked_about():
    """Prevents a loose threshold from leaving pairs to nobody while calls are left."""
    pairs = pairs_of([0.5, 0.01, 0.3, 0.2, 0.1])
    settings = dataclasses.replace(NO_CALIBRATION, max_pseudo_ratio=1.0)
    loose = Thresholds(hi=0.9, lo=0.4)
    for calls, asked in ((4, {0, 1, 2, 3}), (3, {0, 1, 2})):
        found = outcomes(decided(pairs, many_labels(1), settings, thresholds=loose, calls=calls))
        # The only pseudo-label is of the surest pair, and is audited.
        assert found[1] == ("ask", "audit_negative")
        assert {n for n, (decision, _) in enumerate(found) if decision == "ask"} == asked
        assert {found[n] for n in range(5) if n not in asked} == {("leave", "budget")}


def test_calibration_labels_do_not_buy_pseudo_labels():
    """Prevents labels that nothing trains on from raising the number of pseudo-labels in training."""
    settings = AdaptiveConfig(calibration_fraction=0.5)
    kept = next(f"k{n}" for n in range(99) if is_calibration(f"k{n}", 0.5))
    free = [f"q{n}" for n in range(99) if not is_calibration(f"q{n}", 0.5)][:10]
    found = decided(pairs_of([0.01] * 10, free), many_labels(50, kept), settings)
    assert set(outcomes(found)) == {("ask", "uncertain")}


def test_without_calls_for_the_audit_nothing_is_accepted():
    """Prevents pseudo-labels that nobody looks at once the budget is spent."""
    pairs = pairs_of([0.01] * 100)
    assert set(outcomes(decided(pairs, many_labels(99), calls=0))) == {("leave", "budget")}
    found = Counter(decision for decision, _ in outcomes(decided(pairs, many_labels(99), calls=3)))
    assert found["ask"] <= 3
    assert found["negative"] > 0
    # The shares of two labels are both rounded up.
    for calls in range(2, 9):
        asked = outcomes(decided(pairs_of([0.95] * 30 + [0.02] * 200), many_labels(99), calls=calls))
        assert 0 < sum(decision == "ask" for decision, _ in asked) <= calls


def test_well_trained_questions_need_no_calls_but_are_audited():
    """Prevents calls for what is learned, and an audit that looks away from a part of the pseudo-labels."""
    pairs = pairs_of([0.5, 0.5, 0.01], ["done", "open", "done"])
    settings = dataclasses.replace(NO_CALIBRATION, audit_share=1.0)
    found = outcomes(decided(pairs, many_labels(9), settings, well_trained={"done"}))
    assert found == [("leave", "well_trained"), ("ask", "uncertain"), ("ask", "audit_negative")]


def test_calibration_questions_are_completed_one_after_the_other():
    """Prevents a calibration set of the pairs that the retriever found interesting."""
    settings = AdaptiveConfig(calibration_fraction=1.0, calibration_share=0.5)
    pairs = pairs_of(np.linspace(0, 1, 60), [f"q{n % 6}" for n in range(60)])
    labels = labels_of([])
    for number in range(1, 4):
        found = decided(pairs, labels, settings, calls=50, number=number)
        asked = [row for row in found.to_pylist() if row["decision"] == "ask"]
        assert {row["reason"] for row in asked} == {"calibration"}
        labels = pa.concat_tables(
            [labels, settle(found, answers_to(found, lambda _: 0.0), BETWEEN, settings).new_labels]
        )
        num_begun = Counter(labels["query_id"].to_pylist())
        assert sum(number < 10 for number in num_begun.values()) <= 1
    assert labels.num_rows == 60


@pytest.mark.parametrize(
    ("pairs", "labels", "settings", "error"),
    [
        (pairs_of([0.5]), [], AdaptiveConfig(policy="greedy"), ConfigError),
        (pairs_of([0.5, np.nan]), [], NO_CALIBRATION, DataError),
        (pairs_of([0.5, None]), [], NO_CALIBRATION, DataError),
        (pairs_of([0.5]), [("q", "d", 1.0, "llm"), ("q", "d", 0.0, "human")], NO_CALIBRATION, DataError),
        (pa.concat_tables([pairs_of([0.5])] * 2), [], NO_CALIBRATION, DataError),
    ],
)
def test_what_cannot_be_decided_is_refused(pairs, labels, settings, error):
    """Prevents pairs that are counted twice or judged by nothing."""
    table = pa.Table.from_pylist(
        [dict(zip(("query_id", "doc_id", "label", "source"), row, strict=True)) for row in labels],
        schema=pa.schema([("query_id", "string"), ("doc_id", "string"), ("label", "float32"), ("source", "string")]),
    )
    with pytest.raises(error):
        decided(pairs, table, settings)


# --- the audit -------------------------------------------------------------------------------------------------------


def test_answers_become_labels_and_refusals_are_not_asked_again():
    """Prevents pairs that the LLM cannot judge from using up the calls of every round, and their loss."""
    pairs = pairs_of([0.5, 0.6, 0.95, 0.02])
    first = decided(pairs, many_labels(9))
    done = settle(first, answers_to(first, lambda row: None if row["doc_id"] == "d1" else 0.5), BETWEEN, NO_CALIBRATION)
    assert outcomes(done.decisions)[1] == ("leave", "no_answer")
    new = {row["doc_id"]: (row["label"], row["source"], row["round"]) for row in done.new_labels.to_pylist()}
    assert new == {"d0": (0.5, "llm", 1), "d1": (None, "llm", 1), "d2": (0.5, "llm", 1), "d3": (0.5, "llm", 1)}
    evidence = {row["doc_id"]: row["evidence"] for row in done.new_labels.to_pylist()}
    assert evidence == {"d0": "quote of d0", "d1": None, "d2": "quote of d2", "d3": "quote of d3"}
    labels = pa.concat_tables([many_labels(9), done.new_labels])
    second = decided(pairs, labels, number=2)
    assert Counter(outcomes(second)) == {("labelled", "llm"): 3, ("leave", "no_answer"): 1}
    again = settle(second, answers_to(second, lambda _: 1.0), BETWEEN, NO_CALIBRATION)
    assert again.new_labels.num_rows == 0
    assert again.audit.agreement is None
    assert (
        accounting(second).to_dict() | {"rows_in": 4, "cached": 3, "skipped": {"no_answer": 1}}
        == accounting(second).to_dict()
    )


def test_pseudo_labels_carry_the_probability_that_they_are_right():
    """Prevents the confidence of a negative from being that of a positive."""
    # They stand exactly on the thresholds, which is beyond them.
    found = decided(pairs_of([0.9, 0.9, 0.1, 0.1]), many_labels(9))
    done = settle(found, answers_to(found, lambda row: float(row["probability"] > 0.5)), BETWEEN, NO_CALIBRATION)
    pseudo = [row for row in done.new_labels.to_pylist() if row["source"] == "retriever"]
    assert [(row["label"], row["confidence"], row["evidence"]) for row in pseudo] == [(1, 0.9, None), (0, 0.9, None)]
    assert done.audit.agreement == 1
    assert done.thresholds == BETWEEN


def test_a_failed_audit_takes_back_what_is_near_the_thresholds():
    """Prevents a round's doubtful pseudo-labels from staying, and earlier labels from going with them."""
    probability = [0.905] * 40 + [0.95] * 40 + [0.09] * 40 + [0.05] * 40
    found = decided(pairs_of(probability), many_labels(99))
    before = Counter(outcomes(found))
    done = settle(found, answers_to(found, lambda row: 0.5), BETWEEN, NO_CALIBRATION)
    assert (done.audit.num_drawn, done.audit.num_answered, done.audit.agreement, done.audit.steps) == (8, 8, 0, 1)
    assert (done.thresholds.hi, done.thresholds.lo) == (pytest.approx(0.92), pytest.approx(0.08))
    for row, (was, _) in zip(done.decisions.to_pylist(), outcomes(found), strict=True):
        if was == "ask":
            assert row["decision"] == "ask"
        else:
            is_near = 0.08 < row["probability"] < 0.92
            assert (row["decision"], row["reason"]) == (("leave", "audit_failed") if is_near else (was, "confident"))
    assert done.audit.discarded == sum(reason == "audit_failed" for _, reason in outcomes(done.decisions)) > 0
    assert sum(before.values()) == len(done.decisions)
    assert done.new_labels.num_rows == 160 - done.audit.discarded


def test_pseudo_labels_whose_audit_nobody_answered_do_not_stand():
    """Prevents labels from training for which nothing speaks; those of the other label keep their own audit."""
    found = decided(pairs_of([0.95] * 40 + [0.02] * 40), many_labels(99))
    done = settle(
        found, answers_to(found, lambda row: 1.0 if row["probability"] > 0.5 else None), BETWEEN, NO_CALIBRATION
    )
    fates = Counter(outcomes(done.decisions))
    assert fates["positive", "confident"] == 38
    assert fates["leave", "audit_failed"] == done.audit.discarded == 38
    assert ("negative", "confident") not in fates
    assert (done.audit.num_drawn, done.audit.num_answered, done.audit.agreement) == (4, 2, 1)
    assert done.thresholds == BETWEEN


def test_wrong_positives_are_not_lost_among_right_negatives():
    """Prevents a retriever all of whose few positives are wrong from passing: together 98% of the audit agrees."""
    probability = [0.95] * 20 + [0.02] * 1000
    found = decided(pairs_of(probability), many_labels(999), calls=200)
    done = settle(found, answers_to(found, lambda _: 0.0), BETWEEN, NO_CALIBRATION)
    assert done.audit.num_drawn == 51
    assert (done.audit.agreement, done.audit.steps) == (0, 1)


def test_several_steps_end_where_the_audit_agrees_or_has_nothing_left():
    """Prevents one small step from keeping what is confidently wrong, and further steps from taking what is right."""
    probability = [0.93] * 60 + [0.985] * 60
    settings = dataclasses.replace(NO_CALIBRATION, audit_steps=50, audit_share=0.2)
    found = decided(pairs_of(probability), many_labels(99), settings)
    done = settle(found, answers_to(found, lambda row: float(row["probability"] > 0.95)), BETWEEN, settings)
    kept = {row["probability"] for row in done.decisions.to_pylist() if row["decision"] == "positive"}
    assert kept == {0.985}
    assert done.audit.steps == 2
    done = settle(found, answers_to(found, lambda _: 0.0), BETWEEN, settings)
    assert "positive" not in done.decisions["decision"].to_pylist()
    assert done.audit.steps == 5


def test_answers_to_what_was_not_asked_are_refused():
    """Prevents answers of another round from being settled with this one."""
    found = decided(pairs_of([0.5, 0.95]), many_labels(9), calls=1)
    stray = pa.table({"query_id": ["x"], "doc_id": ["y"], "label": [1.0], "evidence": ["z"]})
    with pytest.raises(DataError, match="did not ask"):
        settle(found, stray, BETWEEN, NO_CALIBRATION)
