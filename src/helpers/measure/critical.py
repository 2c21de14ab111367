"""The critical batch size, by branches: from the same weights and optimizer state, equal examples in equal order at
several batch sizes, each at its best learning rate (the protocol of Merrill 2025, with a test and a fit for its ε).

At batch B, E examples make the progress of E/(1 + B/B_c) noiseless ones (McCandlish 2018). So the smallest batch, of
size b, needs E·(1 + b/B_c)/(1 + B/B_c) examples for the loss that batch B reached: its own curve, inverted, gives B_c.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from helpers.engine.training import Training
from helpers.measure.rates import RULES

# Makes a training at the weights to branch from: (batch size, a rate a replica, an order of the data a replica).
Start = Callable[[int, Sequence[float], Sequence[int]], Training]
_EXTENSIONS = 5  # how often an edge of the rates may be moved
_MOST_WASTE = 8.0  # times the examples: a batch that wastes more is too short of steps to tell how much
_MISFIT = 0.2  # of the hyperbola, in logs: a size is not weighed as if it were known better
_REACH = 32.0  # times the sizes compared: beyond that a critical batch size is not told from infinity


def branch(start: Start, batch_size: int, rates: Sequence[float], orders: Sequence[int], examples: int,
           records: int = 1, together: int = 64) -> pd.DataFrame:  # fmt: skip
    """Train a branch for each rate and order, and read its held-out loss.

    examples: of a branch; its last step may take fewer. records: losses read on the way, evenly in log examples.
    together: the most branches side by side, as memory holds.
    Returns one row a record: ``batch_size``, ``lr``, ``order``, ``examples_seen``, ``loss`` (inf where it diverged).
    """
    pairs, rows = [*itertools.product(rates, orders)], []
    for some in (pairs[i : i + together] for i in range(0, len(pairs), together)):
        training = start(batch_size, [rate for rate, _ in some], [order for _, order in some])
        for mark in np.geomspace(examples if records == 1 else batch_size, examples, records):
            if training.examples_seen >= mark:  # the step before went past it
                continue
            while training.examples_seen < mark:
                training.step()
            loss = training.evaluate("test")[0].nan_to_num(nan=math.inf)
            rows += [{"batch_size": batch_size, "lr": rate, "order": order, "examples_seen": training.examples_seen,
                      "loss": value} for (rate, order), value in zip(some, loss.tolist())]  # fmt: skip
    return pd.DataFrame(rows)


def extended(try_rates: Callable[[Sequence[float]], pd.DataFrame], rates: Sequence[float]) -> pd.DataFrame:
    """Try ``rates``, ascending by ×2, and go on beyond an edge as long as it is the best, some times."""
    tried = try_rates(rates)
    for _ in range(_EXTENSIONS):
        score = at_the_end(tried).groupby("lr").loss.mean()
        best, lowest, highest = score.idxmin(), score.index[0], score.index[-1]
        if best not in (lowest, highest):
            break
        tried = pd.concat([tried, try_rates([lowest / 2 if best == lowest else highest * 2])], ignore_index=True)
    return tried


def branches(start: Start, batch_sizes: Sequence[int], *, base: int, lr: float, rule: str, examples: int,
             orders: Sequence[int] = (1, 2, 3), records: int = 16, together: int = 64) -> pd.DataFrame:  # fmt: skip
    """Branches at several batch sizes, with the same examples in the same order.

    base, lr: a batch size and its rate. rule: of ``rates.RULES``, by which the rate follows the batch; its half and
    double are tried too, and more where the best is at the edge. Returns rows as ``branch``; the smallest size has
    ``records`` along the way, the others one at the end. together: as ``branch``.
    """
    rate, frames, smallest = {}, [], min(batch_sizes)
    above, below = [b for b in sorted(batch_sizes) if b >= base], [b for b in sorted(batch_sizes)[::-1] if b < base]
    for sizes in (above, below):
        before, centre = base, rate.get(base, lr)
        for b in sizes:
            centre *= (b / before) ** RULES[rule]
            count = records if b == smallest else 1
            tried = extended(lambda rates, b=b, n=count: branch(start, b, rates, orders, examples, n, together),
                             [centre / 2, centre, 2 * centre])  # fmt: skip
            before, centre = b, at_the_end(tried).groupby("lr").loss.mean().idxmin()
            rate[b], frames = centre, [*frames, tried]
    return pd.concat(frames, ignore_index=True).sort_values(["batch_size", "lr", "order", "examples_seen"])


def at_the_end(frame: pd.DataFrame) -> pd.DataFrame:
    """The last record of each branch."""
    return frame.loc[frame.groupby(["batch_size", "lr", "order"]).examples_seen.idxmax()]


def best_rates(frame: pd.DataFrame) -> pd.Series:
    """The rate of each batch size with the lowest mean loss at the end."""
    score = at_the_end(frame).groupby(["batch_size", "lr"]).loss.mean()
    return score.groupby(level="batch_size").idxmin().map(lambda at: at[1]).rename("lr")


class Critical(NamedTuple):
    """A critical batch size.

    keeps_up: the largest size below ``falls_behind``; ``falls_behind``: the smallest whose loss is worse than the
    smallest size's by a paired t-test (5 %, one-sided), and so is that of each larger one; inf where none is.
    estimate, low, high: B_c by the fit, with a 95 % interval in logs: the jackknife's over orders, and the misfit of
    the hyperbola; low 0 or high inf where the sizes compared do not bound it.
    """

    keeps_up: float
    falls_behind: float
    estimate: float
    low: float
    high: float


def critical_batch_size(frame: pd.DataFrame) -> Critical:
    """Read the critical batch size off ``branches``. Each order's rates are chosen on the other orders.

    Raises ValueError for fewer than three batch sizes or three orders, and where the loss does not fall any more.
    """
    orders, sizes = sorted(frame.order.unique()), sorted(frame.batch_size.unique())
    if len(sizes) < 3 or len(orders) < 3:
        raise ValueError(f"{len(sizes)} batch sizes and {len(orders)} orders; expected at least three of each")
    end, smallest = at_the_end(frame), frame[frame.batch_size == sizes[0]]
    losses = pd.DataFrame({b: _chosen(rows) for b, rows in end.groupby("batch_size")}, orders)
    curves = pd.DataFrame({n: _chosen(rows) for n, rows in smallest.groupby("examples_seen")}, orders)
    seen = end.groupby("batch_size").examples_seen.first()
    early = max((n for n in curves if n <= seen[sizes[0]] / _MOST_WASTE), default=curves.columns[0])
    if not worse(curves[early], curves[curves.columns[-1]]):
        raise ValueError(
            f"from {early} to {seen[sizes[0]]} examples the loss of batch {sizes[0]} does not fall, so it cannot tell "
            "how many examples another batch wastes"
        )
    behind = [b for b in sizes[1:] if worse(losses[b], losses[sizes[0]])]
    first = next((b for b in behind if all(c in behind for c in sizes if c > b)), math.inf)
    whole = _wasted(losses.mean(), curves.mean(), seen)
    without = np.array([_wasted(losses.drop(order).mean(), curves.drop(order).mean(), seen) for order in orders])
    weights = 1 / (_MISFIT**2 + _jackknife(without))
    middle = _fitted(whole, sizes, weights)
    sampling = _jackknife(np.array([_fitted(one, sizes, weights) for one in without]))
    slope = (_expected(middle + 0.01, sizes) - _expected(middle - 0.01, sizes)) / 0.02
    misfit = np.square(_MISFIT * weights * slope).sum() / max(np.square(slope).dot(weights), 1e-9) ** 2
    half = stats.t.ppf(0.975, len(orders) - 1) * math.sqrt(sampling)
    half = math.hypot(half, stats.norm.ppf(0.975) * math.sqrt(misfit))
    low, high = math.log(sizes[0] / _REACH), math.log(sizes[-1] * _REACH)
    return Critical(
        max(b for b in sizes if b < first), first, math.exp(middle),
        math.exp(middle - half) if middle - half > low and middle > low + 0.01 else 0.0,
        math.exp(middle + half) if middle + half < high and middle < high - 0.01 else math.inf,
    )  # fmt: skip


def _chosen(rows: pd.DataFrame) -> list[float]:
    """Each order's loss at the rate that is best on the other orders."""
    table = rows.pivot(index="order", columns="lr", values="loss").sort_index().to_numpy()
    return [own[np.delete(table, i, axis=0).mean(0).argmin()] for i, own in enumerate(table)]


def worse(one: pd.Series, other: pd.Series) -> bool:
    """Whether losses by order are larger than others of the same orders: paired t-test, one-sided, 5 %."""
    difference = (one - other).to_numpy()
    if not np.isfinite(difference).all():
        return True
    if not difference.std():
        return bool(difference.mean() > 0)
    return bool(stats.ttest_1samp(difference, 0, alternative="greater").pvalue < 0.05)


def _wasted(losses: pd.Series, curve: pd.Series, seen: pd.Series) -> np.ndarray:
    """log of how many times the examples each size takes, against the smallest, for the loss that it reached."""
    return np.log([seen[b] / _examples_for(curve.cummin(), losses[b]) for b in losses.index[1:]])


def _jackknife(without: np.ndarray) -> np.ndarray:
    """Variance of a statistic, from its values without each order."""
    return np.square(without - without.mean(0)).sum(0) * (len(without) - 1) / len(without)


def _expected(log_critical: np.ndarray | float, sizes: Sequence[int]) -> np.ndarray:
    """What ``_wasted`` is by the hyperbola ``(..., sizes)``; beyond ``_MOST_WASTE`` no more is told."""
    relative = np.array(sizes, dtype=float) / np.exp(np.asarray(log_critical))[..., None]
    return np.minimum(np.log1p(relative[..., 1:]) - np.log1p(relative[..., :1]), math.log(_MOST_WASTE))


def _fitted(wasted: np.ndarray, sizes: Sequence[int], weights: np.ndarray) -> float:
    """log B_c by least squares in the logs of what is wasted, on a grid and a finer one around its best point."""
    wasted = np.minimum(wasted, math.log(_MOST_WASTE))
    low, high = math.log(sizes[0] / _REACH), math.log(sizes[-1] * _REACH)
    for _ in range(2):
        grid, step = np.linspace(low, high, 200, retstep=True)
        best = grid[np.square(wasted - _expected(grid, sizes)).dot(weights).argmin()]
        low, high = best - step, best + step
    return float(best)


def _examples_for(curve: pd.Series, loss: float) -> float:
    """Examples at which a falling curve reaches ``loss``; its last piece goes on beyond its end, at most fourfold."""
    falls = np.r_[True, np.diff(curve) < 0]
    logs, values = np.log(curve.index.to_numpy(dtype=float))[falls], curve.to_numpy()[falls]
    if loss >= values[0] or len(values) < 2:
        return math.exp(logs[0])
    if loss >= values[-1]:
        return math.exp(np.interp(-loss, -values, logs))
    slope = (logs[-1] - logs[-2]) / (values[-2] - values[-1])
    return min(math.exp(logs[-1] + slope * (values[-1] - loss)), 4 * float(curve.index[-1]))
