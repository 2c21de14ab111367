"""Learning rates across batch sizes: the best, the range that trains, scaling rules, the stale-gradient test."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from helpers.engine.schedules import Schedule, schedule

# A rule multiplies the learning rate by (B/B₀)^power when the batch grows from B₀ to B.
RULES = {"none": 0.0, "√": 0.5, "linear": 1.0, "warm-up": 1.0}


def best_rates(score: pd.Series) -> pd.Series:
    """The learning rate with the highest score for each setting.

    ``score``: indexed by the setting's levels and, last, by ``lr``.
    """
    settings = score.index.names[:-1]
    return score.dropna().groupby(level=settings, sort=False).idxmax().map(lambda at: at[-1]).rename("lr")


def starting_rates(score: pd.Series, margin: float, most: int = 3) -> list[float]:
    """The highest ``most`` rates, none above the best one, that score within ``margin`` of it: a rule starts there."""
    trains = score[score >= score.max() - margin]
    return [float(lr) for lr in trains.index if lr <= score.idxmax()][-most:]


def trainable_range(score: pd.Series, margin: float) -> pd.Series:
    """The longest unbroken series of rates within ``margin`` of the best: ``lowest``, ``highest``, number of ``rates``.

    ``score``: indexed by the learning rate, ascending. Of two series of a length, the one of lower rates.
    """
    passed = (score >= score.max() - margin).to_numpy()
    series = np.split(np.arange(len(passed)), np.flatnonzero(np.diff(passed.astype(int))) + 1)
    longest = max((s for s in series if passed[s[0]]), key=len)
    return pd.Series({"lowest": score.index[longest[0]], "highest": score.index[longest[-1]], "rates": len(longest)})


def scaled(lr: float, rule: str, growth: float, epochs: float) -> float | Schedule:
    """The learning rate that ``rule`` gives a batch ``growth`` times as large, in a run of ``epochs``.

    "warm-up" is the linear rule, reached by a straight rise from a rate 32 times smaller over the first 5 % of the run
    (Goyal 2017).

    >>> scaled(0.1, "√", 4, epochs=5), scaled(0.1, "linear", 4, epochs=5)
    (0.2, 0.4)
    """
    lr = lr * growth ** RULES[rule]
    return schedule({0: lr / 32, 0.05 * epochs: lr}, linear=True) if rule == "warm-up" else lr


def ruled_settings(
    base: Mapping[str, object],
    starts: Iterable[float],
    batch_sizes: Iterable[int],
    base_batch_size: int,
    num_train: int,
    **length: int,
) -> dict[tuple[str, float, int], dict[str, object]]:
    """A setting for each rule, starting rate and batch size, labelled by these three.

    ``starts`` are rates at ``base_batch_size``. ``length``: ``epochs`` or ``steps`` of every run.
    """
    settings = {}
    for rule, start, b in itertools.product(RULES, starts, batch_sizes):
        epochs = length["epochs"] if "epochs" in length else length["steps"] * b / num_train
        lr = scaled(start, rule, b / base_batch_size, epochs)
        settings[rule, start, b] = {**base, "batch_size": b, "lr": lr, **length}
    return settings


def half_life_in_examples(beta: float, growth: float) -> float:
    """A decay rate whose half-life, counted in examples, stays when the batch grows ``growth`` times (Marek 2025)."""
    return beta**growth


def order_in_rate(stale: pd.DataFrame, lowest: int = 3) -> pd.Series:
    """Each seed's order at which the end points of small and large steps part in the base rate: 1 is first order.

    ``stale``: the staleness protocol's frame. A log-log slope over the ``lowest`` base rates, the median over
    checkpoints and counts: where a ReLU switches on the way, a series has a floor.
    """
    rates = sorted(stale.base_rate.unique())[:lowest]
    low = stale[stale.base_rate.isin(rates)]
    low = low.pivot(index=["seed", "epoch", "count"], columns="base_rate", values="relative_distance")
    slopes = np.polyfit(np.log(low.columns.to_numpy(dtype=float)), np.log(low.to_numpy().T), 1)[0]
    return pd.Series(slopes, low.index).groupby("seed").median()


def growth_with_count(stale: pd.DataFrame) -> pd.Series:
    """Each seed's rank correlation between the number of small steps and the distance, averaged over the rest."""
    groups = stale.groupby(["seed", "epoch", "base_rate"])[["count", "relative_distance"]]
    return groups.apply(lambda g: g.corr("spearman").iloc[0, 1]).groupby("seed").mean()


def raising_helps_up_to(score: pd.Series, growth: float) -> float:
    """The highest rate from which ``growth`` times the rate scores more than the rate itself; NaN for none.

    ``score``: indexed by the learning rate, ascending; between two rates it is linear in the rate's logarithm.
    """
    rates, scores = np.log(score.index.to_numpy(dtype=float)), score.to_numpy()
    raised = np.interp(rates + np.log(growth), rates, scores, right=np.nan)
    # A raised rate that is on the map must not miss it by rounding.
    raised[np.isclose(rates + np.log(growth), rates[-1])] = scores[-1]
    return float(score.index[raised > scores].max())
