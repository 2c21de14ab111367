import math

import numpy as np
import pandas as pd
import pytest

from helpers.measure import curves, fits


def test_the_noise_is_of_the_changes_in_the_last_half():
    accuracy = [0.0, 0.9, 0.1, 0.5, 0.6, 0.4, 0.5]  # epochs 0 to 6: the last half is 4, 5, 6, with changes −0.2 and 0.1
    history = pd.DataFrame({"epochs": range(7), "batch_size": 8, "seed": 3, "test_accuracy": accuracy})
    expected = {"batch_size": [8], "seed": [3], "noise": [np.std([-0.2, 0.1], ddof=1)]}
    pd.testing.assert_frame_equal(curves.noise_between_epochs(history[::-1]), pd.DataFrame(expected))
    assert curves.noise_between_epochs(history[:3]).noise.isna().all()


def test_a_trend_is_a_rank_correlation_within_each_seed():
    frame = pd.DataFrame({"batch_size": [1, 2, 4] * 2, "seed": [0] * 3 + [1] * 3, "y": [1, 5, 9, 3, 1, 2]})
    assert curves.trend_by_seed(frame, ["y"]).y.tolist() == pytest.approx([1.0, -0.5])
    assert curves.trend_by_seed(frame[frame.batch_size == 1], ["y"]).y.isna().all()


@pytest.mark.parametrize(("fit", "form"), [(fits.fit_power, "power"), (fits.fit_log, "log")])
def test_each_seed_gets_a_fit_of_its_own(fit, form):
    x = np.array([1.0, 2.0, 4.0, 8.0])
    runs = {s: pd.Series((s + 1) * x**0.5 if form == "power" else s + 1 + 2 * np.log(x), index=x) for s in (0, 5)}
    values = pd.concat(runs).swaplevel()
    found = curves.fits_by_seed(values, fit)
    assert {s: one.form for s, one in found.items()} == {0: form, 5: form}
    assert [one.scale for one in found.values()] == pytest.approx([1, 6])
    assert curves.fits_by_seed(values[values.index.get_level_values(0) < 4], fit) == {}
    values.iloc[0] = 0.0
    assert curves.fits_by_seed(values, fit) == {}


def test_splits_are_compared_within_a_draw_and_their_tails_counted():
    rows = [(e, s, t, b) for e in (1, 2) for s in (0, 1) for t in (0, 1) for b in (1, 4)]
    trials = pd.DataFrame(rows, columns=["epoch", "seed", "trial", "measured_batch_size"])
    trials["gradient_norm"] = 10.0**trials.trial  # draws differ, splits of one do not
    trials.loc[(trials.seed == 1) & (trials.trial == 1) & (trials.measured_batch_size == 4), "gradient_norm"] = 11.0
    assert curves.largest_deviation(trials).tolist() == pytest.approx([0.0, 0.1])
    trials["tail_fraction"] = np.where((trials.measured_batch_size == 4) & (trials.trial == 0), 0.5, 0.0)
    tails = curves.tail_fractions(trials, entries=100)
    assert tails[1, 4, 0] == 0.25 and tails[1, 1, 0] == 0.5 / 200


def test_the_ratio_farthest_from_one_may_be_below_it():
    index = pd.MultiIndex.from_product([[64, 256], [0, 1]], names=["batch_size", "seed"])
    assert curves.farthest_from_one(pd.Series([1.1, 0.99, 0.8, 1.02], index=index)).tolist() == [0.8, 1.02]
    assert math.isnan(curves.farthest_from_one(pd.Series([math.nan] * 4, index=index))[0])


def test_runs_are_compared_by_what_was_measured():
    nothing = {name: [math.nan] for name in ("test_accuracy", "train_accuracy", "test_loss", "train_loss")}
    assert curves.score_of(pd.DataFrame({**nothing, "test_accuracy": [0.9]})) == ("test_accuracy", "{:.1%}")
    assert curves.score_of(pd.DataFrame({**nothing, "train_accuracy": [0.9]}))[0] == "train_accuracy"
    assert curves.score_of(pd.DataFrame(nothing))[0] == "train_loss"
