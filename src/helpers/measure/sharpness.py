"""Sharpness of pairs and series of solutions: at equal loss, on the line between two, rescaled, while training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from helpers.engine import stack
from helpers.measure import landscape
from helpers.problems import Solution


class AtEqualLoss(NamedTuple):
    """One power law of sharpness in the train loss, with a level for each of two batch sizes.

    ``ratio``: the large batch's level ÷ the small one's; ``by_seed`` is that ratio for each seed. ``residual``: the
    standard deviation left in the logarithm.
    """

    slope: float
    constant: float
    ratio: float
    residual: float
    by_seed: pd.Series

    def between(self, loss: np.ndarray) -> np.ndarray:
        """The sharpness halfway (in the logarithm) between the two levels."""
        return np.exp(self.constant) * self.ratio**0.5 * np.asarray(loss) ** self.slope


def at_equal_loss(sharpness: pd.Series, train_loss: pd.Series, small: int, large: int) -> AtEqualLoss:
    """Least squares of log sharpness in log train loss: one slope, two levels.

    Both series are indexed by ``batch_size``, ``lr`` and ``seed``. Points without a logarithm are left out; all is NaN
    where fewer than three are left.
    """
    points = pd.DataFrame({"sharpness": sharpness, "loss": train_loss})
    points = np.log(points[(points > 0).all(axis=1) & np.isfinite(points).all(axis=1)])
    if len(points) < 3:
        return AtEqualLoss(math.nan, math.nan, math.nan, math.nan, pd.Series(math.nan, sharpness.index.unique("seed")))
    is_large = ((points.index.get_level_values("batch_size") == large) & (large != small)).astype(float)
    design = np.stack([points.loss, is_large, np.ones(len(points))], axis=1)
    slope, apart, constant = np.linalg.lstsq(design, points.sharpness)[0]
    level = points.sharpness - slope * points.loss
    by_size = level.groupby(["batch_size", "seed"]).mean().unstack("batch_size").reindex(columns=sorted({small, large}))
    by_seed = np.exp(by_size[large] - by_size[small])
    return AtEqualLoss(slope, constant, float(np.exp(apart)), (level - apart * is_large - constant).std(), by_seed)


def line_between(start: Solution, end: Solution, alphas: Iterable[float]) -> pd.DataFrame:
    """Loss and accuracy at ``start + alpha · (end − start)``: columns ``split``, ``alpha``, ``loss``, ``accuracy``."""
    sides = {split: landscape.Landscape(start, split=split) for split in ("train", "test")}
    first, last = (landscape.Landscape(one, examples=1).origin for one in (start, end))
    rows = [(s, a, *here.loss(first + a * (last - first))) for s, here in sides.items() for a in alphas]
    return pd.DataFrame(rows, columns=["split", "alpha", "loss", "accuracy"])


def rise_around(line: pd.DataFrame, centre: float, distance: float = 0.25) -> pd.Series:
    """How far each seed's loss rises, on average, ``distance`` to either side of ``centre`` on the line.

    ``line``: columns ``alpha``, ``seed``, ``loss``, with these three alphas among the rows.
    """
    loss = line.pivot(index="alpha", columns="seed", values="loss")
    return (loss.loc[centre - distance] + loss.loc[centre + distance]) / 2 - loss.loc[centre]


@torch.no_grad()
def reparametrised(
    solution: Solution, factors: Sequence[float], examples: int | None, probes: int = 500
) -> pd.DataFrame:
    """Sharpness in other weights that make the same function: see ``landscape.rescale``.

    A row for each of ``factors``: ``eigenvalue``, the λ_max over ``examples`` training examples, and ``change``, the
    largest change of an output over ``probes`` test examples, relative to the largest output.
    """
    dataset, rows = solution.problem.dataset, []
    inputs, _ = dataset.batch(torch.arange(min(probes, dataset.num_test), device=dataset.device), "test")
    before = stack.at(solution).outputs(inputs)
    for factor in factors:
        other = landscape.rescale(solution, factor)
        change = (stack.at(other).outputs(inputs) - before).abs().max() / before.abs().max()
        with torch.enable_grad():
            top = landscape.eigenvalues(landscape.Landscape(other, examples=examples)).eigenvalue[0]
        rows.append({"factor": factor, "eigenvalue": top, "change": float(change)})
    return pd.DataFrame(rows)


def late_medians(sharpening: pd.DataFrame, share: float = 0.25) -> pd.DataFrame:
    """Each run's median ``eigenvalue`` and ``product`` (λ_max · η) over the last ``share`` of training.

    ``sharpening``: columns ``loss``, ``batch_size``, ``rate``, ``seed``, ``epoch``, ``eigenvalue``, ``product``; its
    last epoch is the end of training. The result is indexed by the first four.
    """
    late = sharpening[sharpening.epoch >= (1 - share) * sharpening.epoch.max()]
    return late.groupby(["loss", "batch_size", "rate", "seed"])[["eigenvalue", "product"]].median()


def binding_rates(eigenvalue: pd.Series, rates: Sequence[float]) -> list[float]:
    """The rates above the smallest whose edge 2/η lies below the sharpness that the smallest one reaches.

    ``eigenvalue``: late λ_max, indexed by ``rate`` and ``seed``.
    """
    reached = eigenvalue[min(rates)].median()
    return [rate for rate in rates if rate > min(rates) and 2 / rate < reached]
