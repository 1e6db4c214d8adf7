"""How far two rankings of the same candidates agree: Kendall's tau-b, gamma, and Krippendorff's alpha of ranks; and how
far values agree that belong together.

Legend: M candidates of a query, Q queries.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import rankdata

_DRAWN = 200_000_000
"""Queries drawn by a bootstrap at the most, over all its samples; of more queries fewer samples are drawn."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of a query's candidates: how many both rankings put in the same order, in the opposite one, or tie.

    tied_one, tied_other: pairs that the one (the other) ranking holds equal, whatever the other says.
    """

    num_pairs: int
    concordant: int
    discordant: int
    tied_one: int
    tied_other: int

    @property
    def tau(self) -> float:
        """Kendall's tau-b; NaN where one ranking holds all candidates equal."""
        room = (self.num_pairs - self.tied_one) * (self.num_pairs - self.tied_other)
        return (self.concordant - self.discordant) / math.sqrt(room) if room else math.nan

    @property
    def ordered(self) -> int:
        """Pairs that both rankings order."""
        return self.concordant + self.discordant

    @property
    def gamma(self) -> float:
        """Goodman and Kruskal's gamma, over the pairs that both order; NaN where there is none.

        Unlike tau-b it reaches -1 where one ranking has few distinct values, as labels do.
        """
        return (self.concordant - self.discordant) / self.ordered if self.ordered else math.nan


def pairs_of(one_M: np.ndarray, other_M: np.ndarray) -> Pairs:
    """Compares two judges' values of the same candidates; -inf ranks below every number, NaN may not occur."""
    upper = np.triu_indices(len(one_M), 1)
    one, other = (
        (values_M[upper[0]] > values_M[upper[1]]).astype(np.int8)
        - (values_M[upper[0]] < values_M[upper[1]]).astype(np.int8)
        for values_M in (one_M, other_M)
    )
    product = one * other
    return Pairs(
        num_pairs=len(product),
        concordant=int((product > 0).sum()),
        discordant=int((product < 0).sum()),
        tied_one=int((one == 0).sum()),
        tied_other=int((other == 0).sum()),
    )


def relative_ranks(values_M: np.ndarray) -> np.ndarray:
    """float64 [M]: 0 for the best, 1 for the worst, ties in the middle of their places. M is at least 2.

    Ranks within a query make judges of any scale comparable, and queries with more or fewer candidates too.
    """
    ranks: np.ndarray = (rankdata(-values_M, method="average") - 1) / (len(values_M) - 1)
    return ranks


def alpha_parts(one_M: np.ndarray, other_M: np.ndarray) -> np.ndarray:
    """float64 [4]: what a query adds to the sums of `alpha`: number of values, their sum, that of their squares, and
    that of the squared differences between the two judges."""
    both = np.concatenate([one_M, other_M])
    return np.asarray([len(both), both.sum(), (both**2).sum(), ((one_M - other_M) ** 2).sum()])


def alpha(sums: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha of two judges, level "interval", from sums of `alpha_parts` along the last axis: [...].

    annotators.krippendorff_alpha says the same from the values; sums can be drawn again with the queries. NaN where all
    values are equal.
    """
    number, total, squares, apart = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    expected = number * squares - total**2
    possible = expected > 1e-9 * np.maximum(1.0, total**2)
    ratio = np.divide((number - 1) * apart, expected, out=np.full_like(expected, np.nan), where=possible)
    return 1 - ratio


def alpha_interval(parts_Q4: np.ndarray, *, samples: int, seed: int) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of `alpha` over queries; NaN where no draw has an alpha."""
    generator = np.random.default_rng(seed)
    found = np.empty(samples)
    block = max(1, 4_000_000 // len(parts_Q4))
    for start in range(0, samples, block):
        stop = min(samples, start + block)
        drawn = generator.integers(len(parts_Q4), size=(stop - start, len(parts_Q4)), dtype=np.int32)
        found[start:stop] = alpha(parts_Q4[drawn].sum(axis=1))
    found = found[np.isfinite(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def affordable_samples(samples: int, num_queries: int) -> int:
    """Bootstrap samples that a report can wait for: all of them up to some ten thousand queries, 200 at the least."""
    return min(samples, max(200, _DRAWN // max(1, num_queries)))


@dataclass(frozen=True, kw_only=True)
class Intraclass:
    """The share of the variance of some values that their groups explain, with its 95% interval: `num_values` values
    in `num_groups` groups of two and more."""

    value: float
    low: float
    high: float
    num_groups: int
    num_values: int


def intraclass(value_N: np.ndarray, group_N: np.ndarray) -> Intraclass | None:
    """The intraclass correlation ICC(1) of one-way random effects, groups of unequal sizes.

    By the analysis of variance; the interval is that of F (Shrout and Fleiss 1979, exact for groups of one size). 1:
    the values of a group are all equal; 0: groups say nothing; chance gives values below 0 too.

    Args:
        value_N: float64.
        group_N: integers; values alone in their group do not count.

    Returns:
        None where fewer than two groups have two values, or all values are equal.
    """
    _, group_N, size_G = np.unique(group_N, return_inverse=True, return_counts=True)
    shared_N = size_G[group_N] > 1
    value_N, group_N = value_N[shared_N], group_N[shared_N]
    _, group_N, size_G = np.unique(group_N, return_inverse=True, return_counts=True)
    num_groups, num_values = len(size_G), len(value_N)
    if num_groups < 2:
        return None
    mean_G = np.bincount(group_N, value_N) / size_G
    between = float((size_G * (mean_G - value_N.mean()) ** 2).sum()) / (num_groups - 1)
    within = float(((value_N - mean_G[group_N]) ** 2).sum()) / (num_values - num_groups)
    if not between + within > 0:
        return None
    mean_size = (num_values - (size_G**2).sum() / num_values) / (num_groups - 1)

    def share(ratio: float) -> float:
        return (ratio - 1) / (ratio + mean_size - 1) if np.isfinite(ratio) else 1.0

    ratio = between / within if within else math.inf
    degrees = num_groups - 1, num_values - num_groups
    return Intraclass(
        value=float(share(ratio)),
        low=float(share(ratio / f_distribution.ppf(0.975, *degrees))),
        high=float(share(ratio * f_distribution.ppf(0.975, *reversed(degrees)))),
        num_groups=num_groups,
        num_values=num_values,
    )
