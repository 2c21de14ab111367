"""What inference says of few seeds, against simulation, published tables and other ways to compute it."""

import math

import numpy as np
import pytest
from scipy import stats

from helpers.ledger import inference, rules

RNG = np.random.default_rng(0)


def test_the_spread_is_that_of_the_figures_the_interval_came_of():
    values = RNG.normal(3, 2, size=7)
    mean, _, high = rules.interval(values)
    assert inference.spread(mean, high, 7) == pytest.approx(values.std(ddof=1))
    assert math.isnan(inference.spread(1.0, math.nan, 1))


def test_a_verdict_of_the_rule_has_a_p_value_below_two_and_a_half_per_cent_and_no_other_has():
    for _ in range(300):
        values, low, high = RNG.normal(0, 1, size=RNG.integers(3, 8)), *sorted(RNG.normal(0, 2, size=2))
        mean, left, right = rules.interval(values)
        p = inference.p_value(mean, values.std(ddof=1), len(values), low, high)
        assert (p < 0.025) == (low <= left and right <= high)
        p = inference.p_value(mean, values.std(ddof=1), len(values), low, high, outside=True)
        assert (p < 0.025) == (right < low or left > high)


def test_a_one_sided_rule_gives_the_one_sided_t_test():
    values = RNG.normal(0.4, 1, size=9)
    expected = stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    found = inference.p_value(values.mean(), values.std(ddof=1), 9, 0.1, math.inf)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("mean", "std", "low", "high"), [(1.0, 1.0, 0.0, math.inf), (0.1, 0.2, -0.3, 0.3)])
def test_so_many_seeds_decide_four_times_in_five_and_one_fewer_does_not(mean, std, low, high):
    needed = inference.seeds_needed(mean, std, low, high)

    def decided(n):
        draws = RNG.normal(mean, std, size=(20_000, n))
        half = stats.t.ppf(0.975, n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
        return np.mean(draws.mean(1) - half > low if math.isinf(high) else draws.mean(1) + half < high)

    assert decided(needed) > 0.79
    assert decided(needed - 1) < 0.81


def test_seeds_needed_agree_with_the_textbooks_ten():
    # One-sample t test, effect size 1, two-sided 5 %, power 80 %: 10 (Cohen 1988).
    assert inference.seeds_needed(1.0, 1.0, 0.0, math.inf) == 10
    assert inference.seeds_needed(50.0, 1.0, 0.0, math.inf) == 2
    assert inference.seeds_needed(0.001, 1.0, 0.0, math.inf) == math.inf
    assert inference.seeds_needed(1.0, 0.0, 0.0, math.inf) == 2
    assert math.isnan(inference.seeds_needed(1.0, math.nan, 0.0, math.inf))


def test_the_place_of_a_run_of_ours_is_uniform():
    """Of runs from the same distribution as much as its level lies below any of them: the prediction is calibrated."""
    draws = RNG.normal(5, 3, size=(4_000, 5))
    places = [inference.place(one[4], one[:4].mean(), one[:4].std(ddof=1), 4) for one in draws]
    assert stats.kstest(places, "uniform").pvalue > 0.001
    assert math.isnan(inference.place(1.0, 1.0, 0.0, 5))


def test_the_sampling_error_of_98_per_cent_of_10000_images_is_the_known_one():
    assert 100 * inference.sampling_error(0.98, 10_000) == pytest.approx(0.274, abs=0.001)  # ±0.14 is one deviation
    draws = RNG.binomial(500, 0.8, size=20_000) / 500
    half = inference.sampling_error(0.8, 500)
    assert np.mean(np.abs(draws - 0.8) <= half) == pytest.approx(0.95, abs=0.01)


def test_of_many_verdicts_those_that_stand_are_rarely_chance():
    assert list(inference.survive([])) == []
    assert list(inference.survive([0.001, 0.04, 0.2])) == [True, False, False]
    false_alarms = [inference.survive(RNG.uniform(size=40)).any() for _ in range(1_000)]
    assert np.mean(false_alarms) < 0.07
