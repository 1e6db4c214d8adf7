"""Uncertainty of a mean over queries: percentile bootstrap intervals and paired randomisation tests.

Values are held in strata: one per data set, one only for a single data set. The statistic is the unweighted mean over
strata of the mean within each (the macro average of methods.md A.7), and queries are resampled within their stratum.
Perplexity is exp of that mean, the values being each query's mean NLL. A stratum may also hold a numerator and a
denominator of each query; its statistic is then the ratio of their sums, 0 where there is nothing to divide by (F1).

Legend: N queries of a stratum, M methods, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def record(self) -> dict[str, Any]:
        """As results.json has it."""
        return {"mean": self.mean, "ci95": [self.low, self.high], "p": self.p, "n": self.n}


def estimate(strata: Sequence[np.ndarray], *, exponential: bool, samples: int, seed: int) -> Estimate:
    """The mean and its percentile bootstrap interval over queries.

    Args:
        strata: float64 [N] for each stratum, or [N, 2] for a ratio; none empty.
        exponential: True for perplexity: exp of the mean, bootstrapped as such.
        samples: number of resamples R.
        seed: of the NumPy generator.
    """
    alone = [values[:, None] for values in strata]
    resampled = _resampled_means(alone, samples, seed)[:, 0]
    mean = float(np.mean([_statistic(values, values.mean(axis=0)) for values in alone]))
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
        method: float64 [N] for each stratum, or [N, 2] for a ratio.
        base: the same queries in the same order.
        exponential: True for perplexity.
        samples: number of resamples and of random swaps R.
        seed: of the NumPy generators.
    """
    pairs = [np.stack([a, b], axis=1) for a, b in zip(method, base, strict=True)]
    means = np.mean([_statistic(pair, pair.mean(axis=0)) for pair in pairs], axis=0)
    resampled = _resampled_means(pairs, samples, seed)
    if exponential:
        means, resampled = np.exp(means), np.exp(resampled)
    low, high = np.percentile(resampled[:, 0] - resampled[:, 1], [2.5, 97.5])
    p = _swap_test(pairs, samples, seed)
    return Difference(float(means[0] - means[1]), float(low), float(high), p, sum(len(pair) for pair in pairs))


def _resampled_means(strata: Sequence[np.ndarray], samples: int, seed: int) -> np.ndarray:
    """Macro means of R resamples: strata are [N, M] or [N, M, 2], the result is [R, M]."""
    generator = np.random.default_rng(seed)
    total = np.zeros((samples, strata[0].shape[1]))
    for values in strata:
        block = max(1, _BLOCK // values.size)
        for start in range(0, samples, block):
            stop = min(samples, start + block)
            chosen = generator.integers(len(values), size=(stop - start, len(values)), dtype=np.int32)
            total[start:stop] += _statistic(values, values[chosen].mean(axis=1))
    return total / len(strata)


def _statistic(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A stratum's statistic, given a mean over its queries: that itself, or of [..., 2] parts their ratio."""
    if values.ndim == 2:
        return mean
    numerator, denominator = mean[..., 0], mean[..., 1]
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _swap_test(pairs: Sequence[np.ndarray], samples: int, seed: int) -> float:
    """Two-sided p: share of random swaps with a statistic as large, the observed one counted among them.

    Args:
        pairs: [N, 2] or [N, 2, 2] for each stratum; the second axis is method and base.
        samples, seed: as above.
    """
    generator = np.random.default_rng(seed)
    # What a query adds to the difference of means; ratios, which are no sums over queries, come on top.
    weighted = np.concatenate(
        [
            (pair[:, 0] - pair[:, 1]) / (len(pair) * len(pairs)) if pair.ndim == 2 else np.zeros(len(pair))
            for pair in pairs
        ]
    )
    ends = np.cumsum([len(pair) for pair in pairs])
    ratios = [(slice(end - len(pair), end), pair) for end, pair in zip(ends, pairs, strict=True) if pair.ndim == 3]

    def difference(signs_RN: np.ndarray) -> np.ndarray:
        total = signs_RN @ weighted
        for part, pair in ratios:
            total += _swapped_ratios(signs_RN[:, part], pair) / len(pairs)
        return total

    observed = abs(float(difference(np.ones((1, len(weighted)), np.int8))[0]))
    # Sums of the same numbers in another order differ in the last bits; they count as equal.
    threshold = observed - 1e-9 * (float(np.abs(weighted).sum()) + len(ratios))
    extreme = 0
    block = max(1, _BLOCK // len(weighted))
    for start in range(0, samples, block):
        signs = generator.integers(2, size=(min(samples, start + block) - start, len(weighted)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(difference(signs)) >= threshold).sum())
    return (extreme + 1) / (samples + 1)


def _swapped_ratios(signs_RN: np.ndarray, pair_N22: np.ndarray) -> np.ndarray:
    """The difference of two ratios of sums when the queries of sign -1 have changed sides: [R]."""
    both, apart_R2 = pair_N22.sum(axis=(0, 1)), signs_RN @ (pair_N22[:, 0] - pair_N22[:, 1])
    sides_R22 = np.stack([both + apart_R2, both - apart_R2], axis=1) / 2
    ratio_R2 = _statistic(pair_N22, sides_R22)
    return ratio_R2[:, 0] - ratio_R2[:, 1]
