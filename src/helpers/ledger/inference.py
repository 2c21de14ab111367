"""Inference from few seeds: what an interval, a published run and a number of seeds can and cannot say.

All of it follows from a part's mean, its 95 % Student-t interval and n, as the ledger keeps them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL, POWER, MOST_SEEDS = 0.95, 0.8, 1_000


def spread(mean: float, high: float, n: int) -> float:
    """The standard deviation over seeds that a 95 % Student-t interval of their mean up to ``high`` comes of."""
    return (high - mean) * math.sqrt(n) / stats.t.ppf(0.5 + LEVEL / 2, n - 1) if n > 1 else math.nan


def p_value(mean: float, std: float, n: int, low: float, high: float, *, outside: bool = False) -> float:
    """How often chance alone would put the mean of ``n`` seeds so far inside a rule that the true mean just misses.

    The larger of two one-sided t tests, so that a rule with both bounds is an equivalence test (Schuirmann 1987).
    ``outside``: so far outside a rule that the true mean just meets.
    """
    if not (n > 1 and math.isfinite(std)):
        return math.nan
    error = max(std / math.sqrt(n), 1e-12 * max(1.0, abs(mean)))  # seeds that agree to the bit leave none
    inside = [(mean - low) / error, (high - mean) / error]
    return float(stats.t.sf(max(-t for t in inside) if outside else min(inside), n - 1))


def survive(p_values: Sequence[float]) -> np.ndarray:
    """Which of many verdicts stand when at most 5 % of those that stand may be chance (Benjamini & Hochberg 1995)."""
    p = np.asarray(p_values, dtype=float)
    return stats.false_discovery_control(p) <= 1 - LEVEL if len(p) else np.zeros(0, dtype=bool)


def place(published: float, mean: float, std: float, n: int) -> float:
    """The share of single runs of ours that would fall below a published one (Student-t prediction), 0 to 1.

    Where it is below 0.025 or above 0.975 the published run is not one of our distribution at the 95 % level.
    """
    if not (n > 1 and std > 0):
        return math.nan
    return float(stats.t.cdf((published - mean) / (std * math.sqrt(1 + 1 / n)), n - 1))


def seeds_needed(mean: float, std: float, low: float, high: float) -> float:
    """The fewest seeds whose interval would clear the rule's nearest bound, either way, four times in five.

    By the noncentral t distribution, with the mean and the spread found as the true ones; infinity beyond MOST_SEEDS.
    """
    if not (math.isfinite(mean) and math.isfinite(std)):
        return math.nan
    distance = min(abs(mean - bound) for bound in (low, high))
    if std == 0:
        return 2 if distance else math.inf

    def power(n: int) -> float:
        return stats.nct.sf(stats.t.ppf(0.5 + LEVEL / 2, n - 1), n - 1, distance / std * math.sqrt(n))

    if not power(MOST_SEEDS) >= POWER:
        # Far beyond, the noncentral t has no figure to give; there the verdict is as good as sure.
        return 2 if distance / std > 20 else math.inf
    seeds = range(2, MOST_SEEDS + 1)  # power grows with them
    return seeds[bisect.bisect_left(seeds, POWER, key=lambda n: np.nan_to_num(power(n), nan=1.0))]


def sampling_error(accuracy: float, images: int) -> float:
    """Half the 95 % interval of an accuracy (0 to 1) that comes of drawing so many test images, as a share."""
    return stats.norm.ppf(0.5 + LEVEL / 2) * math.sqrt(accuracy * (1 - accuracy) / images)
