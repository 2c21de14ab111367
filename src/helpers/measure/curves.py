"""Statistics of histories and of trials, one figure a seed: noise, trends, fits, tails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from helpers.measure import fits


def score_of(history: pd.DataFrame) -> tuple[str, str]:
    """Choose the column to compare runs by, and the format of its values.

    The test accuracy; or the next that has values: without a test set that is the train accuracy, and in a regression
    the test loss.

    >>> score_of(pd.DataFrame({"test_accuracy": [np.nan], "test_loss": [0.2], "train_accuracy": [np.nan]}))
    ('test_loss', '{:.3g}')
    """
    columns = ("test_accuracy", "train_accuracy", "test_loss")
    score = next((c for c in columns if history[c].notna().any()), "train_loss")
    return score, "{:.1%}" if score.endswith("accuracy") else "{:.3g}"


def noise_between_epochs(history: pd.DataFrame, column: str = "test_accuracy") -> pd.DataFrame:
    """Measure how unsteady each run is: columns ``batch_size``, ``seed`` and ``noise``.

    history: records of runs at one learning rate.
    ``noise`` is the standard deviation of the change in ``column`` from one record to the next, over the last half of
    the training; NaN where that holds fewer than three records.
    """
    late = history[history.epochs > history.epochs.max() / 2].sort_values("epochs")
    noise = late.groupby(["batch_size", "seed"])[column].agg(lambda values: values.diff().std())
    return noise.rename("noise").reset_index()


def trend_by_seed(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Correlate columns with the batch size, by rank (Spearman): one row a seed, NaN for a single batch size.

    >>> frame = pd.DataFrame({"batch_size": [1, 2, 4], "seed": 0, "loss": [3.0, 2.0, 1.0]})
    >>> trend_by_seed(frame, ["loss"]).loss.tolist()
    [-1.0]
    """
    ranks = frame.set_index("seed").groupby("seed")[["batch_size", *columns]].corr("spearman")
    return ranks.xs("batch_size", level=1)[columns]


def fits_by_seed(
    values: pd.Series, fit: Callable[[np.ndarray, np.ndarray], fits.Fit] = fits.fit_power
) -> dict[int, fits.Fit]:
    """Fit each seed's values, indexed by (x, seed); empty if a seed has fewer than three, or any is not above 0."""
    groups = dict(list(values.groupby(level=-1)))
    x = {seed: one.index.get_level_values(0) for seed, one in groups.items()}
    if any(len(one) < 3 or not (np.isfinite(one) & (one > 0)).all() for one in groups.values()):
        return {}
    return {seed: fit(x[seed], one) for seed, one in groups.items()}


def largest_deviation(trials: pd.DataFrame, column: str = "gradient_norm") -> pd.Series:
    """Compare the splits of each draw: by seed, the largest of max ÷ min − 1 over checkpoints and trials."""
    by_draw = trials.groupby(["epoch", "seed", "trial"])[column]
    return (by_draw.max() / by_draw.min() - 1).groupby("seed").max()


def tail_fractions(trials: pd.DataFrame, entries: int) -> pd.Series:
    """The share of large gradient entries by checkpoint, batch size and seed; half an entry stands for none.

    entries: of the gradient, in one trial.
    """
    by_setting = trials.groupby(["epoch", "measured_batch_size", "seed"]).tail_fraction
    return by_setting.mean().clip(lower=0.5 / (entries * by_setting.size()))


def farthest_from_one(ratios: pd.Series) -> pd.Series:
    """By seed, the ratio that is farthest from 1, NaN if any is; ``ratios`` is indexed by (anything, seed)."""
    return ratios.groupby(level=-1).agg(lambda values: values.iloc[int((values - 1).abs().fillna(np.inf).argmax())])
