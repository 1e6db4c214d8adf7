"""Uncertainty of a mean over queries: percentile bootstrap intervals and paired randomisation tests.

Values are held in strata: one per data set, one only for a single data set. The statistic is the unweighted mean over
strata of the mean within each (the macro average of methods.md A.7), and queries are resampled within their stratum.
Perplexity is exp of that mean, the values being each query's mean NLL.

Legend: N queries of a stratum, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 4_000_000
"""Resampled values held in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval over `n` queries."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Method minus base over the same `n` queries, with its 95% interval and two-sided p."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def estimate(strata: Sequence[np.ndarray], *, exponential: bool, samples: int, seed: int) -> Estimate:
    """The mean and its percentile bootstrap interval over queries.

    Args:
        strata: float64 [N] for each stratum, none empty.
        exponential: True for perplexity: exp of the mean, bootstrapped as such.
        samples: number of resamples R.
        seed: of the NumPy generator.
    """
    resampled = _resampled_means([values[:, None] for values in strata], samples, seed)[:, 0]
    mean = float(np.mean([values.mean() for values in strata]))
    if exponential:
        mean, resampled = float(np.exp(mean)), np.exp(resampled)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(mean, float(low), float(high), sum(len(values) for values in strata))


def paired_difference(
    method: Sequence[np.ndarray], base: Sequence[np.ndarray], *, exponential: bool, samples: int, seed: int
) -> Difference:
    """Method minus base: the difference of means (or of perplexities), its interval, and a paired test.

    The interval resamples queries, the same ones for both. p is that of the two-sided paired randomisation test: under
    the null hypothesis the two values of each query may be swapped. For perplexity the swapped statistic is
    ``exp(m + s) - exp(m - s) = 2 exp(m) sinh(s)`` with m fixed and s half the difference of mean NLL, which grows with
    s alone; so testing the difference of means gives perplexity's p as well.

    Args:
        method: float64 [N] for each stratum.
        base: the same queries in the same order.
        exponential: True for perplexity.
        samples: number of resamples and of random swaps R.
        seed: of the NumPy generators.
    """
    pairs = [np.stack([a, b], axis=1) for a, b in zip(method, base, strict=True)]
    means = np.mean([pair.mean(axis=0) for pair in pairs], axis=0)
    resampled = _resampled_means(pairs, samples, seed)
    if exponential:
        means, resampled = np.exp(means), np.exp(resampled)
    low, high = np.percentile(resampled[:, 0] - resampled[:, 1], [2.5, 97.5])
    p = _swap_test([pair[:, 0] - pair[:, 1] for pair in pairs], samples, seed)
    return Difference(float(means[0] - means[1]), float(low), float(high), p, sum(len(pair) for pair in pairs))


def _resampled_means(strata: Sequence[np.ndarray], samples: int, seed: int) -> np.ndarray:
    """Macro means of R resamples: strata are [N, M], the result is [R, M]."""
    generator = np.random.default_rng(seed)
    total = np.zeros((samples, strata[0].shape[1]))
    for values in strata:
        block = max(1, _BLOCK // values.size)
        for start in range(0, samples, block):
            stop = min(samples, start + block)
            chosen = generator.integers(len(values), size=(stop - start, len(values)), dtype=np.int32)
            total[start:stop] += values[chosen].mean(axis=1)
    return total / len(strata)


def _swap_test(differences: Sequence[np.ndarray], samples: int, seed: int) -> float:
    """Two-sided p: share of random sign flips with a statistic as large, the observed one counted among them."""
    generator = np.random.default_rng(seed)
    weighted = np.concatenate([values / (len(values) * len(differences)) for values in differences])
    observed = abs(weighted.sum())
    # Sums of the same numbers in another order differ in the last bits; they count as equal.
    threshold = observed - 1e-9 * float(np.abs(weighted).sum())
    extreme = 0
    block = max(1, _BLOCK // len(weighted))
    for start in range(0, samples, block):
        signs = generator.integers(2, size=(min(samples, start + block) - start, len(weighted)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ weighted) >= threshold).sum())
    return (extreme + 1) / (samples + 1)
