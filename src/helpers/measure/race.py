"""A race to a target: steps and seconds at each batch size's best learning rate, and the hyperbola through them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize

from helpers.measure import fits

_RUN = ["batch_size", "lr", "seed"]


def record_steps(most: int, factor: float = 1.2) -> tuple[int, ...]:
    """The steps before ``most`` after which a race is recorded, each ``factor`` times the one before.

    >>> record_steps(10)
    (1, 2, 3, 4, 5, 6, 7, 9)
    """
    powers = factor ** np.arange(math.ceil(math.log(max(most, 2), factor)) + 1)
    return tuple(int(s) for s in np.unique(np.round(powers)) if s < most)


def within_reach(history: pd.DataFrame, target: float, column: str = "test_accuracy") -> float:
    """``target`` or, if no batch size reaches it with most seeds at one rate, the highest value that one so reaches."""
    highest = history[history.steps > 0].groupby(_RUN)[column].max().groupby(level=["batch_size", "lr"])
    return min(target, float(highest.quantile(0.5, interpolation="lower").max()))


def arrivals(history: pd.DataFrame, goal: float, column: str = "test_accuracy") -> pd.DataFrame:
    """One row per run: the first record with ``column`` at or above ``goal``, or its last record if none is.

    The record before the first step does not count. ``reached`` says which; a run that does not reach the goal has
    infinite ``steps``. ``mean_batch`` is examples per step, which the short last minibatch of an epoch makes smaller
    than the batch size.
    """
    history = history[history.steps > 0]
    ordered = history.assign(reached=history[column] >= goal).sort_values("steps", kind="stable")
    first, last = ordered[ordered.reached].drop_duplicates(_RUN), ordered.drop_duplicates(_RUN, keep="last")
    runs = pd.concat([first, last]).drop_duplicates(_RUN).sort_values(_RUN)
    runs = runs[[*_RUN, "steps", "examples_seen", "seconds", "reached"]].reset_index(drop=True)
    runs["mean_batch"] = runs.examples_seen / runs.steps
    return runs.assign(steps=runs.steps.where(runs.reached, np.inf))


def best_rates(runs: pd.DataFrame, without: int | None = None) -> pd.Series:
    """The learning rate of each batch size whose median over seeds takes the fewest steps; ties go to the mean.

    ``without``: a seed to leave out. A size that reaches the goal with no rate, in the median, is left out.
    """
    steps = runs[runs.seed != without].groupby(["batch_size", "lr"]).steps.agg(["median", "mean"])
    order = steps[np.isfinite(steps["median"])].reset_index().sort_values(["median", "mean", "lr"])
    return order.groupby("batch_size").lr.first()


def at_best_rates(runs: pd.DataFrame, without: int | None = None) -> pd.DataFrame:
    """The runs at their batch size's best rate."""
    return runs[runs.lr == runs.batch_size.map(best_rates(runs, without))]


def selection_bias(runs: pd.DataFrame) -> float:
    """How many times as many steps a seed takes when its rate is chosen on the other seeds; NaN for one seed."""
    own = at_best_rates(runs).set_index(["batch_size", "seed"]).steps
    held_out = [at_best_rates(runs, without=seed).query("seed == @seed") for seed in sorted(runs.seed.unique())]
    ratio = pd.concat(held_out).set_index(["batch_size", "seed"]).steps / own[np.isfinite(own)]
    return float(ratio.mean())


def hyperbola(best: pd.DataFrame) -> fits.Hyperbola:
    """The hyperbola through runs that reached the goal; NaN unless there are three of different batch sizes."""
    if best.batch_size.nunique() < 3:
        return fits.Hyperbola(math.nan, math.nan, math.nan)
    return fits.fit_hyperbola(best.mean_batch, best.steps)


def critical_batch_sizes(best: pd.DataFrame) -> pd.Series:
    """The critical batch size of each seed, from a hyperbola of its own."""
    return pd.Series({seed: hyperbola(one).critical_batch_size for seed, one in best.groupby("seed")}, dtype=float)


def end_slopes(best: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Each seed's slope of log steps in log batch size: between the two smallest sizes and between the two largest.

    -1 is perfect scaling, 0 means that more examples a step save no steps. Raises ValueError for a single size.
    """
    sizes = sorted(best.batch_size.unique())
    if len(sizes) < 2:
        raise ValueError(f"a slope needs two batch sizes that reach the target; {len(sizes)} did")
    logs = np.log(best.pivot(index="seed", columns="batch_size", values=["steps", "mean_batch"]))
    rise = logs.T.groupby(level=0).diff().T  # from each size to the next
    slopes = rise["steps"] / rise["mean_batch"]
    return slopes[sizes[1]], slopes[sizes[-1]]


class StepPrice(NamedTuple):
    """Seconds of a step: a fixed part, and a part per example."""

    fixed: float
    per_example: float

    @property
    def in_examples(self) -> float:
        """The number of examples that take as long as the fixed part."""
        return self.fixed / max(self.per_example, 1e-12)


def step_price(best: pd.DataFrame) -> StepPrice:
    """The price of a step in runs at their best rates."""
    return price_of(best.mean_batch, best.seconds / best.steps)


def price_of(batch_sizes: Sequence[float], seconds: Sequence[float]) -> StepPrice:
    """Least squares in relative deviations of a step's seconds, neither part below 0; NaN without a step."""
    sizes, taken = np.asarray(batch_sizes, dtype=float), np.asarray(seconds, dtype=float)
    if not len(taken):
        return StepPrice(math.nan, math.nan)
    return StepPrice(*optimize.nnls(np.column_stack([1 / taken, sizes / taken]), np.ones(len(taken)))[0].tolist())


def noise_scale_before(measured: pd.DataFrame, goal: float, column: str = "test_accuracy") -> pd.Series:
    """Each seed's median ``gradient_noise_scale`` over its checkpoints up to the one that reaches ``goal``.

    ``measured``: columns ``seed``, ``epoch``, ``gradient_noise_scale`` and ``column``. Epoch 0 does not count.
    """
    highest = measured.groupby("seed")[column].transform(lambda values: values.cummax().shift(fill_value=0.0))
    return measured[(measured.epoch > 0) & (highest < goal)].groupby("seed").gradient_noise_scale.median()


def by_target(history: pd.DataFrame, measured: pd.DataFrame, goals: Iterable[float]) -> pd.DataFrame:
    """The hyperbola and the median noise scale for each of ``goals``, a row each."""
    rows = {}
    for goal in goals:
        runs = at_best_rates(arrivals(history, goal))
        fit = hyperbola(runs[runs.reached])
        rows[f"{goal:.0%}"] = {
            "S_min": fit.min_steps, "E_min": fit.min_examples, "critical_batch_size": fit.critical_batch_size,
            "residual": fit.residual, "noise_scale": noise_scale_before(measured, goal).median(),
        }  # fmt: skip
    return pd.DataFrame(rows).T
