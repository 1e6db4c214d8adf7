"""Probabilities from a retriever's scores, their reliability, and the thresholds."""

import dataclasses
from itertools import product

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.optimize import minimize

from llmr_ray.errors import ConfigError, DataError
from llmr_ray.labeling.calibration import (
    calibrate,
    choose_thresholds,
    cross_fitted,
    fit,
    is_calibration,
    pair_features,
    reliability,
    with_probability,
)
from llmr_ray.labeling.settings import AdaptiveConfig

ALL = AdaptiveConfig(calibration_fraction=1.0)


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def drawn(num_pairs, curve, seed=0, per_question=10):
    """Features and labels from a known curve of the cosine; the margin says nothing."""
    rng = np.random.default_rng(seed)
    feature_PF = np.stack([rng.uniform(-1, 1, num_pairs), rng.normal(size=num_pairs)], axis=1)
    truth_P = curve(feature_PF[:, 0])
    return feature_PF, truth_P, rng.random(num_pairs) < truth_P, [f"q{n // per_question}" for n in range(num_pairs)]


# --- features --------------------------------------------------------------------------------------------------------


def test_margins_against_a_loop():
    """Prevents margins across questions, and a candidate that is its own rival."""
    rng = np.random.default_rng(0)
    query_ids = [f"q{n}" for n in rng.integers(0, 8, 60)] + ["alone"]
    cosine = np.round(rng.uniform(-1, 1, 61), 1)
    cosine[60] = -1.0
    found = pair_features(pa.table({"query_id": query_ids, "cosine": pa.array(cosine, pa.float64())}))
    for row, (name, own) in enumerate(zip(query_ids, cosine, strict=True)):
        others = [c for n, c in enumerate(cosine) if query_ids[n] == name and n != row]
        assert found[row, 0] == own
        assert found[row, 1] == pytest.approx(own - max(others, default=own))


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_known_curve_is_found_again(method):
    """Prevents a calibrator that only ranks: its figures are what thresholds are set on."""
    feature_PF, _, is_one_P, _ = drawn(6000, lambda cosine: sigmoid(5 * cosine - 1))
    fresh_PF, truth_P, _, _ = drawn(2000, lambda cosine: sigmoid(5 * cosine - 1), seed=1)
    error_P = fit(feature_PF, is_one_P, method=method).probability(fresh_PF) - truth_P
    assert np.sqrt((error_P**2).mean()) < 0.04


def test_isotonic_follows_a_curve_that_is_no_sigmoid():
    """Prevents the choice of method from being without effect."""

    def steps(cosine):
        return np.where(cosine < -0.5, 0.1, np.where(cosine < 0.6, 0.5, 0.9))

    feature_PF, truth_P, is_one_P, _ = drawn(6000, steps)
    error = {
        method: np.abs(fit(feature_PF, is_one_P, method=method).probability(feature_PF) - truth_P).mean()
        for method in ("platt", "isotonic")
    }
    assert error["isotonic"] < 0.05 < error["platt"]


def test_platt_against_a_direct_minimum():
    """Prevents soft targets that are weighted wrongly: the loss of Platt's paper, minimised by another optimiser."""
    feature_PF, _, is_one_P, _ = drawn(60, lambda cosine: sigmoid(4 * cosine))
    ones, others = is_one_P.sum(), (~is_one_P).sum()
    target_P = np.where(is_one_P, (ones + 1) / (ones + 2), 1 / (others + 2))

    def loss(weights):
        p = sigmoid(feature_PF @ weights[:2] + weights[2])
        return -(target_P * np.log(p) + (1 - target_P) * np.log(1 - p)).mean()

    best = minimize(loss, np.zeros(3), tol=1e-12)
    found = fit(feature_PF, is_one_P, method="platt")
    assert np.allclose([*found.weight_F, found.bias], best.x, atol=2e-3)


@pytest.mark.parametrize("is_one", [True, False])
def test_one_class_gives_a_constant_that_is_not_certain(is_one):
    """Prevents a crash, or a probability of 1, where all calibration labels are equal: Platt's target is the answer."""
    feature_PF = np.random.default_rng(0).normal(size=(8, 2))
    found = fit(feature_PF, np.full(8, is_one), method="platt").probability(feature_PF)
    assert np.allclose(found, 9 / 10 if is_one else 1 / 10, atol=1e-4)


def test_parted_classes_and_constant_features_stay_finite():
    """Prevents infinite weights where a retriever is perfect, and a division by a spread of 0."""
    feature_PF = np.array([[0.1, 0], [0.2, 0], [0.8, 0], [0.9, 0]])
    found = fit(feature_PF, np.array([False, False, True, True]), method="platt")
    assert np.isfinite([*found.weight_F, found.bias]).all()
    assert (np.diff(found.probability(feature_PF)) > 0).all()
    assert np.isfinite(found.probability(np.array([[1e4, 0], [-1e4, 0]]))).all()


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="platt or isotonic"):
        fit(np.zeros((2, 2)), np.array([True, False]), method="beta")


def test_probabilities_are_told_on_other_questions():
    """Prevents a calibrator from being judged on what it has learned: here there is nothing to learn.

    Labels are a coin's for each question, features name the question, so in-sample isotonic regression is perfectly
    calibrated and cross-fitted probabilities are off.
    """
    rng = np.random.default_rng(0)
    query_ids = [f"q{n // 5}" for n in range(200)]
    feature_PF = np.repeat(rng.normal(size=(40, 2)), 5, axis=0)
    is_one_P = np.repeat(rng.random(40) < 0.5, 5)
    alone = fit(feature_PF, is_one_P, method="isotonic").probability(feature_PF)
    crossed = cross_fitted(query_ids, feature_PF, is_one_P, method="isotonic")
    assert reliability(alone, is_one_P).ece < 0.01
    assert reliability(crossed, is_one_P).ece > 0.1
    # What the question's own labels are has no say in its probabilities.
    of_first = np.asarray(query_ids) == "q0"
    flipped = cross_fitted(query_ids, feature_PF, is_one_P ^ of_first, method="isotonic")
    assert (flipped[of_first] == crossed[of_first]).all()
    assert (flipped != crossed).any()


def test_one_question_cannot_be_cross_fitted():
    with pytest.raises(DataError, match="1 calibration questions"):
        cross_fitted(["q", "q"], np.zeros((2, 2)), np.array([True, False]), method="platt")


# --- reliability -----------------------------------------------------------------------------------------------------


def test_reliability_against_a_loop():
    """Prevents pairs at a bin's edge from counting twice or never, and errors that cancel between bins."""
    rng = np.random.default_rng(3)
    probability_P = np.concatenate([rng.random(200), np.linspace(0, 1, 11)])
    is_one_P = rng.random(211) < 0.4
    found = reliability(probability_P, is_one_P)
    error, total = 0.0, 0
    for row in found.table.to_pylist():
        inside = [
            n for n, p in enumerate(probability_P) if row["low"] < p <= row["high"] or (row["low"] == 0 and p == 0)
        ]
        mean, share = np.mean(probability_P[inside]), np.mean(is_one_P[inside])
        assert row["num_pairs"] == len(inside)
        assert (row["mean_probability"], row["share_of_ones"]) == (pytest.approx(mean), pytest.approx(share))
        error, total = error + len(inside) * abs(mean - share), total + len(inside)
    assert total == 211
    assert found.ece == pytest.approx(error / 211)
    assert found.brier == pytest.approx(
        sum((p - one) ** 2 for p, one in zip(probability_P, is_one_P, strict=True)) / 211
    )


def test_overconfidence_shows_in_closed_form():
    """Prevents an error measure that a retriever wrong with certainty passes."""
    always = np.full(100, 1.0)
    half = np.arange(100) < 50
    found = reliability(always, half)
    assert (found.ece, found.brier) == (0.5, 0.5)
    assert found.table.num_rows == 1


# --- thresholds ------------------------------------------------------------------------------------------------------


def swept(probability_P, label_P, precision, most_missed):
    """Every value tried, pair by pair."""
    fewest = {0.95: 20, 0.9: 10, 0.5: 2, 0.8: 5}[precision]
    helping = sum(label > 0 for label in label_P)
    found = {"hi": None, "lo": None}
    for value in sorted(set(probability_P)):
        above = [label for p, label in zip(probability_P, label_P, strict=True) if p >= value]
        if value >= 0.5 and len(above) >= fewest and above.count(1) / len(above) >= precision and found["hi"] is None:
            found["hi"] = value
        below = [label for p, label in zip(probability_P, label_P, strict=True) if p <= value]
        is_precise = value <= 0.5 and len(below) >= fewest and below.count(0) / len(below) >= precision
        if is_precise and len(below) - below.count(0) <= most_missed * helping:
            found["lo"] = value
    return found["hi"], found["lo"]


@pytest.mark.parametrize("seed", range(12))
def test_thresholds_against_a_brute_force_sweep(seed):
    """Prevents thresholds inside a tie, beyond an early run of errors, or off by one pair."""
    rng = np.random.default_rng(seed)
    probability_P = rng.beta(0.3, 0.5, 150)
    if seed % 2:
        probability_P = np.round(probability_P, 1)
    sharpness = rng.choice([1, 3, 12])
    truth_P = sigmoid(sharpness * np.log((probability_P + 1e-9) / (1 - probability_P + 1e-9)))
    label_P = np.where(rng.random(150) < truth_P, 1.0, rng.choice([0.0, 0.0, 0.0, 0.5], 150))
    for precision, missed in product((0.95, 0.9, 0.8, 0.5), (1, 0.1)):
        settings = AdaptiveConfig(least_precision=precision, most_missed=missed)
        found = choose_thresholds(probability_P, label_P, settings)
        hi, lo = swept(probability_P.tolist(), label_P.tolist(), precision, missed)
        assert found.hi == (0.9 if hi is None else hi)
        assert found.lo == lo or (lo is None and found.lo <= 0.1)
        assert (label_P[probability_P <= found.lo] > 0).sum() <= missed * (label_P > 0).sum()
        assert found.num_hi == (probability_P >= found.hi).sum()
        assert found.num_lo == (probability_P <= found.lo).sum()
        assert [note[:2] for note in found.notes] == ["hi"] * (hi is None) + ["lo"] * (lo is None)


@pytest.mark.parametrize(("most_missed", "lo", "num_lo"), [(1.0, 0.1, 200), (0.1, 0.02, 100), (0.05, 0.02, 0)])
def test_a_precision_that_rare_labels_give_away_is_none(most_missed, lo, num_lo):
    """One pair in twenty is relevant, so 0 for all is right often enough: it taught a retriever that half of what was
    still to be found is irrelevant."""
    probability_P = np.repeat([0.02, 0.1], 100)
    label_P = np.zeros(200)
    label_P[[0, *range(100, 109)]] = 1.0
    found = choose_thresholds(probability_P, label_P, AdaptiveConfig(most_missed=most_missed))
    # 1 of 10 relevant pairs lies at 0.02: too many where 0.05 may be missed, whose threshold is a little lower.
    assert found.lo == pytest.approx(lo)
    assert found.num_lo == num_lo


def test_too_few_pairs_fall_back_and_say_how_few():
    """Prevents a threshold that three lucky pairs have chosen."""
    found = choose_thresholds(np.array([0.7, 0.8, 0.95, 0.05]), np.array([1, 1, 1, 0]), AdaptiveConfig())
    assert (found.hi, found.lo) == (0.9, 0.1)
    assert found.notes == (
        "hi: 3 calibration pairs are on this side, and a precision of 0.95 needs 20",
        "lo: 1 calibration pairs are on this side, and a precision of 0.95 needs 20",
    )


def test_partly_helpful_pairs_are_right_for_neither_label():
    """Prevents pairs labelled 0.5 from being taught as useless or as sufficient."""
    probability_P = np.concatenate([np.full(30, 0.2), np.full(30, 0.8)])
    found = choose_thresholds(probability_P, np.full(60, 0.5), AdaptiveConfig())
    assert (found.hi, found.lo) == (0.9, 0.1)
    assert "(0 of 30 calibration pairs on this side are right)" in found.notes[0]


def test_thresholds_of_a_perfect_retriever_do_not_overlap():
    """Prevents a pair from being beyond both, and labels against the likelier one that a precise rest would pay for."""
    probability_P = np.linspace(0, 1, 1001)
    found = choose_thresholds(probability_P, (probability_P > 0.5).astype(float), AdaptiveConfig())
    assert found.lo <= 0.5 <= found.hi
    tighter = found.tightened(0.02).tightened(0.02)
    assert (tighter.hi, tighter.lo) == (pytest.approx(found.hi + 0.04), pytest.approx(found.lo - 0.04))
    assert tighter.tightening == pytest.approx(0.04)


# --- a round's calibration -------------------------------------------------------------------------------------------


def world(num_questions=60, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for question in range(num_questions):
        for place in range(10):
            label = 1.0 if place == 0 else 0.0
            rows.append((f"q{question}", f"d{place}", float(rng.normal(0.6 if label else 0.2, 0.1)), label))
    frame = pl.DataFrame(rows, schema=["query_id", "doc_id", "cosine", "label"], orient="row")
    pairs = frame.select("query_id", "doc_id", "cosine")
    return pairs.to_arrow(), frame.select("query_id", "doc_id", "label", source=pl.lit("llm"))


def test_only_calibration_questions_are_looked_at():
    """Prevents questions that train from judging, by spoiling all of their labels."""
    pairs, labels = world(200)
    settings = AdaptiveConfig(calibration_fraction=0.3)
    is_kept = [is_calibration(name, 0.3) for name in labels["query_id"]]
    assert 0 < sum(is_kept) < len(is_kept)
    spoiled = labels.with_columns(label=pl.when(pl.Series(is_kept)).then("label").otherwise(1 - pl.col("label")))
    one, other = (calibrate(pairs, table.to_arrow(), settings) for table in (labels, spoiled))
    assert one.record() == other.record()
    assert one.num_pairs == sum(is_kept)


def test_margins_are_to_all_candidates_not_to_the_labelled_ones():
    """Prevents features that mean one thing in the fit and another where they are used."""
    pairs, labels = world()
    few = labels.filter(pl.col("doc_id").is_in(["d0", "d3"])).to_arrow()
    made = calibrate(pairs, few, ALL)
    rows = [n for n, doc_id in enumerate(pairs["doc_id"].to_pylist()) if doc_id in ("d0", "d3")]
    expected = fit(pair_features(pairs)[rows], np.tile([True, False], 60), method="platt")
    assert np.allclose(made.calibrator.weight_F, expected.weight_F)
    assert with_probability(pairs, made.calibrator)["probability"].to_pylist() == pytest.approx(
        expected.probability(pair_features(pairs)).tolist()
    )


def test_a_pseudo_label_of_a_calibration_question_stops_the_round():
    """Prevents the retriever from judging itself after calibration_fraction was changed between rounds."""
    pairs, labels = world(5)
    with pytest.raises(DataError, match="pseudo-label"):
        calibrate(pairs, labels.with_columns(source=pl.lit("retriever")).to_arrow(), ALL)


def test_pairs_without_an_answer_do_not_calibrate():
    """Prevents a missing label from counting as 0."""
    pairs, labels = world()
    gaps = labels.with_columns(label=pl.when(pl.col("doc_id") == "d0").then(None).otherwise("label"))
    made = calibrate(pairs, gaps.to_arrow(), ALL)
    assert made.num_pairs == 60 * 9
    without = labels.filter(pl.col("doc_id") != "d0").to_arrow()
    assert made.record() == calibrate(pairs, without, dataclasses.replace(ALL)).record()
