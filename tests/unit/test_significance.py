"""Intervals and tests against scipy and by enumeration."""

import itertools

import numpy as np
import pytest
import scipy.stats

from llmr_ray.evaluation.significance import estimate, paired_difference

RNG = np.random.default_rng(7)
A = RNG.normal(0.6, 0.2, 80)
B = A - 0.05 + RNG.normal(0, 0.1, 80)


def test_interval_agrees_with_scipy():
    """A standard error in place of the interval, or one-sided percentiles, would look just as plausible."""
    ours = estimate([A], exponential=False, samples=20_000, seed=1)
    theirs = scipy.stats.bootstrap(
        (A,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.mean == pytest.approx(A.mean())
    assert ours.n == 80
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_perplexity_is_exp_of_the_mean_not_mean_of_exps():
    """Averaging perplexities is dominated by the worst query (A.7: exp of the mean of mean NLL)."""
    figure = estimate([np.array([1.0, 3.0])], exponential=True, samples=2_000, seed=1)
    assert figure.mean == pytest.approx(np.exp(2.0))
    assert (figure.low, figure.high) == pytest.approx((np.exp(1.0), np.exp(3.0)))


def test_macro_average_weighs_data_sets_equally():
    """A micro average lets the largest data set decide."""
    small, large = np.ones(2), np.zeros(98)
    assert estimate([small, large], exponential=False, samples=100, seed=0).mean == 0.5
    # Queries are resampled within their data set, so two constant data sets leave nothing uncertain.
    figure = estimate([small, large], exponential=False, samples=100, seed=0)
    assert (figure.low, figure.high) == (0.5, 0.5)


def test_pairing_narrows_the_interval():
    """Resampling the two methods apart throws the pairing away and hides real differences."""
    ours = paired_difference([A], [B], exponential=False, samples=20_000, seed=1)
    theirs = scipy.stats.bootstrap(
        (A, B),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.mean == pytest.approx((A - B).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.1])
def test_p_agrees_with_scipys_permutation_test(shift):
    """A one-sided p, or one that can be 0, overstates every finding."""
    a, b = A[:12] + shift, B[:12]
    ours = paired_difference([a], [b], exponential=False, samples=40_000, seed=3).p
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert ours == pytest.approx(theirs, abs=0.008)


def test_p_of_perplexity_equals_swapping_and_exponentiating():
    """The docstring claims that testing mean NLL gives perplexity's p; here it is by enumeration."""
    a, b = A[:10], B[:10]
    observed = np.exp(a.mean()) - np.exp(b.mean())
    extreme = 0
    for swaps in itertools.product([False, True], repeat=10):
        x, y = np.where(swaps, b, a), np.where(swaps, a, b)
        extreme += abs(np.exp(x.mean()) - np.exp(y.mean())) >= abs(observed) - 1e-12
    ours = paired_difference([a], [b], exponential=True, samples=40_000, seed=3)
    assert ours.mean == pytest.approx(observed)
    assert ours.p == pytest.approx(extreme / 2**10, abs=0.008)


def test_no_difference_is_never_significant():
    """Equal values must give p = 1 and a zero interval, whatever rounding does."""
    values = RNG.random(37) * 0.1
    same = paired_difference([values, values[:5]], [values, values[:5]], exponential=False, samples=500, seed=0)
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_same_seed_gives_the_same_figures_in_any_block_size(monkeypatch):
    """Intervals that change from run to run cannot be checked."""
    first = paired_difference([A], [B], exponential=False, samples=300, seed=9)
    assert paired_difference([A], [B], exponential=False, samples=300, seed=9) == first
    monkeypatch.setattr("llmr_ray.evaluation.significance._BLOCK", 999)
    assert paired_difference([A], [B], exponential=False, samples=300, seed=9).low == pytest.approx(first.low)
