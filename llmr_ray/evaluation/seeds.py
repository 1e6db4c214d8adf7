"""Figures over training seeds: how much of a difference is what training happened to draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with Student's 95% interval and the two-sided p of the mean being 0.

    low, high, sd, p: None for a single seed, which says nothing about others.
    """

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    p: float | None
    num_seeds: int

    def record(self) -> dict[str, Any]:
        """As study.json has it."""
        interval = None if self.low is None or self.high is None else [self.low, self.high]
        return {"mean": self.mean, "ci95": interval, "sd": self.sd, "p": self.p, "num_seeds": self.num_seeds}


def over_seeds(values: Sequence[float]) -> Spread:
    """The spread of a figure, or of a difference paired by seed.

    With k seeds the interval is mean +- t(.975, k - 1) * sd / sqrt(k): with three seeds t is 4.30, so that few seeds
    are not taken for many. Values that are all equal have an interval of no width, and p 1 where they are 0, else 0.

    Args:
        values: one for each seed, at least one.
    """
    array = np.asarray(values, np.float64)
    mean, num_seeds = float(array.mean()), len(array)
    if num_seeds == 1:
        return Spread(mean, None, None, None, None, 1)
    sd = float(array.std(ddof=1))
    error = sd / math.sqrt(num_seeds)
    width = float(stdtrit(num_seeds - 1, 0.975)) * error
    p = 2 * float(stdtr(num_seeds - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Spread(mean, mean - width, mean + width, sd, p, num_seeds)
