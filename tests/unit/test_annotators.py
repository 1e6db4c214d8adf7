"""Agreement between annotators, against counting by hand and against Krippendorff's own example."""

import itertools
import math

import numpy as np
import pytest

from llmr_ray.errors import DataError
from llmr_ray.evaluation.annotators import (
    cohen_kappa,
    consensus,
    krippendorff_alpha,
    label_matrix,
    relevance_quality,
)

NO = math.nan
DRAWN = {"samples": 400, "seed": 1}


def alpha_by_counting(labels, distance):
    """Every ordered pair of labels, of an item for what is observed and of all items for what is expected."""
    items = [[label for label in item if not math.isnan(label)] for item in labels]
    items = [item for item in items if len(item) > 1]
    pool = [label for item in items for label in item]
    observed = sum(
        distance(a, b, pool) / (len(item) - 1) for item in items for a, b in itertools.permutations(item, 2)
    ) / len(pool)
    pairs = [distance(a, b, pool) for a, b in itertools.permutations(pool, 2)]
    return 1 - observed / (sum(pairs) / len(pairs))


def interval(a, b, pool):
    return (a - b) ** 2


def ordinal(a, b, pool):
    low, high = min(a, b), max(a, b)
    between = sum(low <= label <= high for label in pool)
    return (between - (pool.count(a) + pool.count(b)) / 2) ** 2 if a != b else 0


@pytest.mark.parametrize(("level", "distance"), [("interval", interval), ("ordinal", ordinal)])
@pytest.mark.parametrize("missing", [0.0, 0.4, 0.7])
def test_alpha_is_what_counting_every_pair_gives(level, distance, missing):
    """Wrong weights of items with missing labels go unnoticed as long as nothing is missing."""
    rng = np.random.default_rng(int(10 * missing))
    labels = rng.choice([0, 0.5, 1, 7], size=(30, 4), p=[0.5, 0.2, 0.2, 0.1])
    labels = np.where(rng.random(labels.shape) < 0.5, labels[:, :1], labels)
    labels[rng.random(labels.shape) < missing] = NO
    assert krippendorff_alpha(labels, level=level) == pytest.approx(alpha_by_counting(labels.tolist(), distance))


@pytest.mark.parametrize(("level", "published"), [("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_example(level, published):
    """Four observers, twelve units, 2011."""
    by_observer = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NO, NO, NO],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NO, 3],
        [NO, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NO],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NO],
    ]
    assert krippendorff_alpha(np.asarray(by_observer).T, level=level) == pytest.approx(published, abs=6e-4)


def test_alpha_at_its_ends():
    """No variation is no agreement: an annotator that always says 1 has not looked."""
    assert krippendorff_alpha(np.asarray([[0, 0], [1, 1.0]])) == 1
    assert krippendorff_alpha(np.asarray([[0, 1], [1, 0.0]])) < 0
    assert math.isnan(krippendorff_alpha(np.ones((5, 2))))
    with pytest.raises(DataError, match="no item"):
        krippendorff_alpha(np.asarray([[1, NO], [NO, 0.5]]))
    with pytest.raises(ValueError, match="nominal"):
        krippendorff_alpha(np.asarray([[0, 0], [1, 1.0]]), level="nominal")


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
def test_kappa_is_one_minus_disagreement_over_chance(weights):
    rng = np.random.default_rng(0)
    one = rng.choice([0, 0.5, 1], size=60)
    other = np.where(rng.random(60) < 0.6, one, rng.choice([0, 0.5, 1], size=60))
    one[:5], other[3:8] = NO, NO
    both = [(a, b) for a, b in zip(one, other, strict=True) if not math.isnan(a) and not math.isnan(b)]

    def apart(a, b):
        return float(a != b) if weights is None else abs(a - b) ** (1 if weights == "linear" else 2)

    observed = np.mean([apart(a, b) for a, b in both])
    expected = np.mean([apart(a, b) for a, _ in both for _, b in both])
    assert cohen_kappa(one, other, weights=weights) == pytest.approx(1 - observed / expected)


def test_kappa_without_anything_to_compare():
    assert math.isnan(cohen_kappa(np.ones(4), np.ones(4)))
    assert cohen_kappa(np.asarray([0, 1.0]), np.asarray([1, 0.0])) == -1
    with pytest.raises(DataError, match="in common"):
        cohen_kappa(np.asarray([1, NO]), np.asarray([NO, 1]))


def test_a_missing_label_is_no_zero():
    annotations = {("q", "a"): {"x": 0.0, "y": 1.0}, ("q", "b"): {"y": 0.5}}
    np.testing.assert_array_equal(label_matrix(annotations, ["y", "x"]), [[1, 0], [0.5, NO]])
    assert label_matrix({}, ["x"]).shape == (0, 1)


def test_precision_and_recall_of_relevant():
    """Half relevant counts as relevant only from its threshold on; pairs that one left out count for nothing."""
    said = [(1, 1), (0.5, 1), (0.5, 0), (0, 0), (0, 1), (1, 0.5)]
    annotations = {(f"q{n % 3}", f"d{n}"): {"llm": mine, "gold": gold} for n, (mine, gold) in enumerate(said)}
    annotations |= {("q9", "x"): {"llm": 1.0}, ("q9", "y"): {"gold": 1.0}}
    quality = relevance_quality(annotations, "llm", "gold", threshold=0.5, **DRAWN)
    assert (quality.precision.mean, quality.recall.mean) == pytest.approx((3 / 4, 3 / 4))
    strict = relevance_quality(annotations, "llm", "gold", threshold=1, **DRAWN)
    assert (strict.precision.mean, strict.recall.mean) == pytest.approx((1 / 2, 1 / 3))
    assert (quality.precision.n, strict.recall.n) == (3, 3)
    assert quality.precision.low < quality.precision.mean < quality.precision.high
    with pytest.raises(DataError, match="in common"):
        relevance_quality(annotations, "llm", "nobody", threshold=1, **DRAWN)


def test_intervals_draw_queries_and_not_pairs():
    """A hundred candidates of one query are one observation: as pairs they would look like a sure thing."""
    annotations = {(f"q{q}", f"d{d}"): {"llm": 1.0, "gold": float(q == 0)} for q in range(2) for d in range(100)}
    precision = relevance_quality(annotations, "llm", "gold", threshold=1, **DRAWN).precision
    assert (precision.mean, precision.low, precision.high, precision.n) == (0.5, 0, 1, 2)


@pytest.mark.parametrize(
    ("said", "settings", "label", "share"),
    [
        ({"a": 1, "b": 1, "c": 0}, {}, 1, 2 / 3),
        ({"a": 1, "b": 0}, {}, 0, 1 / 2),
        ({"a": 1, "b": 0.5, "c": 0}, {}, None, 1 / 3),
        ({"a": 1, "b": 0.5, "c": 0}, {"min_agreement": 0}, 0, 1 / 3),
        ({"a": 1, "b": 1, "c": 0}, {"min_agreement": 0.7}, None, 2 / 3),
        ({"a": 1, "b": 1, "c": 0, "d": 0.5, "e": 0.5}, {"min_agreement": 0.4}, 0.5, 2 / 5),
        ({"a": 0.5}, {"min_agreement": 1}, 0.5, 1),
    ],
)
def test_consensus(said, settings, label, share):
    """In doubt the lower label: a wrong positive teaches more than a missing one. Who said what stays."""
    found = consensus(said, **settings)
    assert (found.label, found.share, found.votes) == (label, pytest.approx(share), said)


def test_a_consensus_of_nobody_is_an_error():
    with pytest.raises(DataError, match="no annotator"):
        consensus({})
