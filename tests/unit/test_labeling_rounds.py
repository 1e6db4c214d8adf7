"""From round to round, an annotator of known quality, and whole rounds with a retriever that learns."""

import dataclasses
import math

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from llmr_ray.errors import ConfigError
from llmr_ray.labeling.calibration import calibrate, is_calibration, with_probability
from llmr_ray.labeling.rounds import (
    calibration_ndcg,
    calls_of_round,
    label_distribution,
    leads,
    next_labels,
    stop_reason,
    well_trained_questions,
)
from llmr_ray.labeling.selection import accounting, settle
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.labeling.simulation import annotate, label_quality
from tests.labeling_world import RATES, assert_sound, decided, gold_of, labels_of

# --- between rounds --------------------------------------------------------------------------------------------------


def cosines(*rows):
    return pl.DataFrame(rows, schema=["query_id", "doc_id", "cosine"], orient="row").to_arrow()


def test_well_trained_questions_lead_in_two_rounds_running():
    """Prevents one lucky round, or the retriever's own labels, from ending the calls for a question."""
    labels = labels_of(
        [
            *[("a", "p", 1.0, "llm"), ("a", "n", 0.0, "llm"), ("a", "h", 0.5, "llm"), ("b", "p", 1.0, "llm")],
            *[("c", "p", 1.0, "llm"), ("c", "n", 0.0, "retriever"), ("d", "p", 1.0, "llm"), ("d", "n", 0.0, "human")],
        ]
    )
    pairs = cosines(
        *[("a", "p", 0.5), ("a", "n", 0.25), ("a", "h", 0.9), ("b", "p", 0.9), ("b", "x", 0.1)],
        *[("c", "p", 0.9), ("c", "n", 0.1), ("d", "p", 0.5), ("d", "n", 0.46875)],
    )
    now = leads(pairs, labels)
    assert {row["query_id"]: row["lead"] for row in now.to_pylist()} == {"a": 0.25, "d": 0.03125}
    behind = leads(cosines(("a", "p", 0.1), ("a", "n", 0.2)), labels)
    assert well_trained_questions([now], AdaptiveConfig()) == set()
    assert well_trained_questions([now, now], AdaptiveConfig()) == {"a"}
    assert well_trained_questions([now, behind, now], AdaptiveConfig()) == set()
    assert well_trained_questions([behind, now, now], AdaptiveConfig(trained_margin=0.03)) == {"a", "d"}


def test_a_question_of_two_passages_is_well_trained_when_both_lead():
    """Prevents calls from ending for a question of which the retriever finds one passage and not the other."""
    labels = labels_of([("q", "p1", 1.0, "llm"), ("q", "p2", 1.0, "llm"), ("q", "n", 0.0, "llm")])
    one, both = (leads(cosines(("q", "p1", 0.75), ("q", "p2", at), ("q", "n", 0.5)), labels) for at in (0.125, 0.625))
    assert [table["lead"].to_pylist() for table in (one, both)] == [[-0.375], [0.125]]
    assert well_trained_questions([one, one], AdaptiveConfig()) == set()
    assert well_trained_questions([both, both], AdaptiveConfig()) == {"q"}


def test_calibration_ndcg_in_closed_form():
    """Prevents unjudged documents and questions that train from counting, and half labels from counting whole."""
    kept = next(f"k{n}" for n in range(99) if is_calibration(f"k{n}", 0.5))
    free = next(f"q{n}" for n in range(99) if not is_calibration(f"q{n}", 0.5))
    settings = AdaptiveConfig(calibration_fraction=0.5)
    labels = labels_of(
        [(kept, "one", 1.0, "llm"), (kept, "half", 0.5, "llm"), (kept, "none", 0.0, "llm"), (free, "one", 1.0, "llm")]
    )
    pairs = cosines(
        (kept, "half", 0.8), (kept, "unjudged", 0.9), (kept, "one", 0.7), (kept, "none", 0.75), (free, "one", 0.1)
    )
    ideal = 2 + 1 / math.log2(3)
    assert calibration_ndcg(pairs, labels, settings) == pytest.approx((1 + 2 / 2) / ideal)
    assert calibration_ndcg(pairs, labels_of([(free, "one", 1.0, "llm")]), settings) is None


@pytest.mark.parametrize(
    ("before", "after", "spent", "reason"),
    [
        (None, 0.5, 10, None),
        (0.5, 0.502, 10, "no_gain"),
        (0.5, 0.503, 10, None),
        (0.5, 0.4, 10, "no_gain"),
        (0.0, 0.0, 10, "no_gain"),
        (0.0, 0.1, 10, None),
        (0.5, 0.9, 100, "budget"),
        (0.5, None, 10, None),
        (None, None, 100, "budget"),
    ],
)
def test_stop_rule(before, after, spent, reason):
    """Prevents rounds beyond the budget and rounds that gain nothing."""
    assert stop_reason(before, after, spent=spent, settings=AdaptiveConfig(total_calls=100)) == reason


def test_a_negative_least_gain_never_stops():
    """Prevents policies that are compared at a budget from spending others: one stops, another does not."""
    settings = AdaptiveConfig(total_calls=100, min_gain=-1.0)
    assert [stop_reason(0.5, after, spent=10, settings=settings) for after in (0.5, 0.0)] == [None, None]
    assert stop_reason(0.5, 0.9, spent=100, settings=settings) == "budget"


def test_calls_of_the_last_round_are_what_is_left():
    settings = AdaptiveConfig(calls_per_round=40, total_calls=100)
    assert [calls_of_round(settings, spent) for spent in (0, 60, 90, 100, 120)] == [40, 40, 10, 0, 0]
    assert calls_of_round(AdaptiveConfig(calls_per_round=40), 1_000_000) == 40


# --- the annotator ---------------------------------------------------------------------------------------------------


def test_the_annotator_errs_at_its_rates_and_never_changes_its_mind():
    """Prevents noise that depends on the order of questions, on the round or on other pairs."""
    gold = gold_of(1500)
    said = annotate(gold.to_arrow(), gold.to_arrow(), RATES, seed=1)
    truth, given = gold["label"].to_numpy(), said["label"].to_numpy()
    for true, flips in RATES.items():
        for label in (0.0, 0.5, 1.0):
            expected = flips.get(label, 1 - sum(flips.values()) if label == true else 0.0)
            num = (truth == true).sum()
            assert abs((given[truth == true] == label).mean() - expected) <= 4 * np.sqrt(
                expected * (1 - expected) / num
            )
    order = np.random.default_rng(0).permutation(len(gold))[:100]
    part = gold[order].select("query_id", "doc_id").to_arrow()
    assert annotate(part, gold.to_arrow(), RATES, seed=1)["label"].equals(said.take(order)["label"])
    assert annotate(part, gold.to_arrow(), RATES, seed=2) != annotate(part, gold.to_arrow(), RATES, seed=1)


@pytest.mark.parametrize("rates", [{1.0: {1.0: 0.1}}, {0.0: {0.7: 0.1}}, {0.0: {0.5: 0.6, 1.0: 0.6}}, {2.0: {}}])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ConfigError, match="flip rates"):
        annotate(gold_of(1).to_arrow(), gold_of(1).to_arrow(), rates, seed=0)


# --- whole rounds ----------------------------------------------------------------------------------------------------


class Learner:
    """A retriever whose noise falls with right labels and rises with wrong ones; `spoil` moves its scores."""

    def __init__(self, gold, spoil=None):
        self.gold, self.spoil = gold, spoil or (lambda frame: pl.col("cosine"))
        self.noise = np.random.default_rng(7).normal(size=len(gold))

    def cosines(self, labels, settings):
        frame = pl.from_arrow(labels).drop_nulls("label").join(self.gold, on=["query_id", "doc_id"], suffix="_true")
        taught = [not is_calibration(name, settings.calibration_fraction) for name in frame["query_id"]]
        is_right = (frame["label"] == frame["label_true"]).to_numpy()[taught]
        worth = max(0.0, is_right.sum() - 4 * (~is_right).sum())
        spread = 0.05 + 0.3 * math.exp(-worth / 200)
        scored = self.gold.with_columns(cosine=0.2 + 0.6 * pl.col("label") + spread * pl.Series(self.noise))
        return scored.with_columns(cosine=self.spoil(scored)).select("query_id", "doc_id", "cosine").to_arrow()


def run_rounds(settings, *, rounds=4, spoil=None, seed=0, checked=None):
    """Adaptive self-training on simulated data; returns the labels, each round's outcome, nDCG before and after."""
    gold = gold_of()
    learner = Learner(gold, spoil)
    kept = [is_calibration(name, settings.calibration_fraction) for name in gold["query_id"]]
    begun = gold["query_id"].is_in([f"q{n}" for n in range(12)])
    first = annotate(gold.filter(pl.Series(kept) | begun).to_arrow(), gold.to_arrow(), RATES, seed=seed)
    labels = labels_of([(*row.values(), "llm") for row in first.to_pylist()])
    history, spent, done, tightening, ndcg = [], 0, [], 0.0, []
    for number in range(1, rounds + 1):
        scored = learner.cosines(labels, settings)
        made = calibrate(scored, labels, settings)
        pairs, thresholds = with_probability(scored, made.calibrator), made.thresholds.tightened(tightening)
        history.append(leads(scored, labels))
        trained, calls = well_trained_questions(history, settings), calls_of_round(settings, spent)
        found = decided(pairs, labels, settings, thresholds, calls, number, seed, trained)
        assert_sound(found, pairs, labels, settings, thresholds, calls, trained)
        asked = found.filter(pa.compute.equal(found["decision"], "ask"))
        said = annotate(asked, gold.to_arrow(), RATES, seed=seed)
        said = said.append_column("evidence", pa.nulls(said.num_rows, pa.string()))
        settled = settle(found, said, thresholds, settings)
        accounting(settled.decisions).check("settled")
        labels = next_labels(labels, settled.new_labels)
        spent, tightening = spent + asked.num_rows, settled.thresholds.tightening
        ndcg.append(calibration_ndcg(scored, labels, settings))
        done.append((settled, made))
    return labels, done, spent, ndcg, gold.to_arrow()


MANY_PSEUDO_LABELS = {"calibration_fraction": 0.25, "most_missed": 1.0}


@pytest.mark.parametrize("policy", ["adaptive", "uncertainty", "random"])
def test_whole_rounds_keep_every_rule(policy):
    """Prevents budgets that leak between rounds, and calibration questions that get a label of the retriever.

    The rules themselves are checked within each round, pair by pair.
    """
    settings = AdaptiveConfig(policy=policy, calls_per_round=60, total_calls=200, **MANY_PSEUDO_LABELS)
    labels, _, spent, ndcg, gold = run_rounds(settings)
    assert spent <= 200
    frame = pl.from_arrow(labels)
    assert not frame.select("query_id", "doc_id").is_duplicated().any()
    pseudo = frame.filter(pl.col("source") == "retriever")
    assert not any(is_calibration(name, 0.25) for name in pseudo["query_id"])
    assert set(pseudo["label"]) <= {0.0, 1.0}
    assert label_distribution(labels)["num_pairs"].to_numpy().sum() == len(frame)
    assert len(frame.filter((pl.col("source") == "llm") & (pl.col("round") > 0))) == spent
    if policy == "adaptive":
        assert len(pseudo) > spent
        assert set(pseudo["round"]) == {4}
        quality = {(row["source"], row["label"]): row["precision"] for row in label_quality(labels, gold).to_pylist()}
        assert quality["retriever", 0.0] > 0.9
        assert ndcg[-1] > ndcg[0]
    else:
        assert not len(pseudo)


def test_rounds_are_a_function_of_the_seed():
    """Prevents a resumed run from deciding otherwise than the undisturbed one."""
    settings = AdaptiveConfig(calls_per_round=60, calibration_fraction=0.25)
    first, again, other = (run_rounds(settings, rounds=2, seed=seed)[0] for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)


def test_audits_catch_a_retriever_that_is_confidently_wrong():
    """Prevents poison from passing: calibration questions look fine, the scores of all others are turned round."""
    settings = AdaptiveConfig(calls_per_round=60, **MANY_PSEUDO_LABELS)

    def spoil(frame):
        is_kept = pl.Series([is_calibration(name, 0.25) for name in frame["query_id"]])
        return pl.when(is_kept).then("cosine").otherwise(1.0 - pl.col("cosine"))

    _, trusted, *_ = run_rounds(settings, rounds=1)
    labels, done, _, _, gold = run_rounds(settings, spoil=spoil)
    poisoned, made = done[0]
    # What the calibration set can tell is what it told of the retriever that is right.
    assert made.record() == trusted[0][1].record()
    assert trusted[0][0].audit.agreement >= settings.audit_agreement
    assert poisoned.audit.agreement < 0.5
    assert poisoned.audit.steps == 1
    assert poisoned.audit.discarded > 0
    assert poisoned.thresholds.tightening == pytest.approx(0.02)

    def wrong(table):
        rows = label_quality(table, gold).to_pylist()
        return sum(row["num_pairs"] * (1 - row["precision"]) for row in rows if row["source"] == "retriever")

    # One small step keeps most of what is surely wrong; as many as it takes do not, and rounds undo the damage.
    strict, *_ = run_rounds(dataclasses.replace(settings, audit_steps=50), rounds=1, spoil=spoil)
    assert wrong(poisoned.new_labels) > 50
    assert wrong(strict) == 0
    assert wrong(labels) < wrong(poisoned.new_labels) / 2
