"""Learning rates across batch sizes, against loops and figures worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from helpers.measure import rates


def _score(values):
    return pd.Series(values, [0.01 * 2**k for k in range(len(values))], dtype=float)


def test_the_best_rate_of_each_setting():
    index = pd.MultiIndex.from_product([["SGD", "Adam"], [64, 16], [0.1, 0.2]], names=["flavour", "batch_size", "lr"])
    score = pd.Series([1, 2, 4, 3, math.nan, 5, 7, 7], index, dtype=float)
    assert rates.best_rates(score).to_dict() == {
        ("SGD", 64): 0.2,
        ("SGD", 16): 0.1,
        ("Adam", 64): 0.2,
        ("Adam", 16): 0.1,
    }


def test_the_best_rate_of_settings_with_one_level():
    index = pd.MultiIndex.from_product([[64, 16], [0.1, 0.2]], names=["batch_size", "lr"])
    assert rates.best_rates(pd.Series([1, 2, 4, 3], index)).to_dict() == {64: 0.2, 16: 0.1}


@pytest.mark.parametrize(
    ("values", "lowest", "count"),
    [
        ([90, 80, 91, 92, 93, 10], 2, 3),  # 90 is one point too low
        ([93, 93, 10, 93, 93], 0, 2),  # of two series of a length, the lower rates
        ([93, 10, 93, 93], 2, 2),
        ([50], 0, 1),
        ([93, 92, 91, 90.9], 0, 3),  # the margin itself is within
    ],
)
def test_the_range_that_trains(values, lowest, count):
    found = rates.trainable_range(_score(values), margin=2.0)
    assert found.to_dict() == {"lowest": 0.01 * 2**lowest, "highest": 0.01 * 2 ** (lowest + count - 1), "rates": count}


def test_the_range_that_trains_as_a_loop_finds_it():
    rng = np.random.default_rng(1)
    for _ in range(50):
        score = _score(rng.uniform(88, 93, 8))
        passed, best = [v >= score.max() - 2 for v in score], (0, 0)
        for start in range(8):
            length = next((n for n in range(8 - start) if not passed[start + n]), 8 - start)
            best = max(best, (length, -start))
        found = rates.trainable_range(score, 2.0)
        assert (found["rates"], found["lowest"]) == (best[0], score.index[-best[1]])


def test_rules_start_from_rates_that_train_and_are_not_above_the_best():
    assert rates.starting_rates(_score([91, 92, 91.5, 93, 92.5]), margin=1.5) == [0.02, 0.04, 0.08]
    assert rates.starting_rates(_score([90, 89, 93, 92.9]), margin=2) == [0.04]
    assert rates.starting_rates(_score([93, 93, 93, 93, 93]), margin=2) == [0.01]
    assert rates.starting_rates(_score([90, 91, 92, 93]), margin=9, most=2) == [0.04, 0.08]


def test_the_rules():
    assert [rates.scaled(0.1, rule, 16, epochs=4) for rule in ("none", "√", "linear")] == pytest.approx([0.1, 0.4, 1.6])
    warmed = rates.scaled(0.1, "warm-up", 16, epochs=4)
    assert [warmed(e) for e in (0, 0.1, 0.2, 4)] == pytest.approx([1.6 / 32, 1.6 * (1 + 1 / 32) / 2, 1.6, 1.6])


def test_ruled_settings_have_one_per_rule_start_and_size():
    found = rates.ruled_settings({"model": "m"}, [0.1, 0.2], [32, 64], 16, 600, epochs=3)
    assert len(found) == 4 * 2 * 2
    assert found["√", 0.2, 64] == {"model": "m", "batch_size": 64, "lr": 0.4, "epochs": 3}
    assert found["linear", 0.1, 32] == {"model": "m", "batch_size": 32, "lr": 0.2, "epochs": 3}
    assert found["warm-up", 0.1, 32]["lr"] == rates.scaled(0.1, "warm-up", 2, 3)


def test_at_equal_steps_warm_up_lasts_a_share_of_the_epochs_that_these_steps_take():
    found = rates.ruled_settings({}, [0.1], [64], 16, 600, steps=300)
    assert found["linear", 0.1, 64] == {"batch_size": 64, "lr": 0.4, "steps": 300}
    assert found["warm-up", 0.1, 64]["lr"] == rates.scaled(0.1, "warm-up", 4, 300 * 64 / 600)


def test_a_half_life_in_examples_is_the_same_for_every_batch_size():
    for growth in (1 / 64, 0.5, 4):
        beta = rates.half_life_in_examples(0.999, growth)
        halved_after = math.log(0.5) / math.log(beta)  # steps
        assert halved_after * growth == pytest.approx(math.log(0.5) / math.log(0.999))


def _stale(distance):
    rows = [
        (s, e, n, r, distance(s, n, r))
        for s in (0, 1)
        for e in (0, 2)
        for n in (2, 4, 8)
        for r in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    return pd.DataFrame(rows, columns=["seed", "epoch", "count", "base_rate", "relative_distance"])


def test_the_order_in_the_rate_is_the_power_at_the_lowest_rates():
    stale = _stale(lambda s, n, r: n * r ** (1 + s) if r < 0.05 else 7.0)
    assert rates.order_in_rate(stale).to_dict() == pytest.approx({0: 1.0, 1: 2.0})


def test_growth_with_the_count_is_a_rank_correlation():
    stale = _stale(lambda s, n, r: r * n if s == 0 else r / n)
    assert rates.growth_with_count(stale).to_dict() == pytest.approx({0: 1.0, 1: -1.0})


def test_raising_the_rate_helps_up_to_the_last_rate_that_gains():
    score = _score([10, 20, 40, 35, 15])  # at 0.01, 0.02, 0.04, 0.08, 0.16
    assert rates.raising_helps_up_to(score, 2.0) == 0.02
    assert rates.raising_helps_up_to(score, 4.0) == 0.02  # 35 instead of 20; from 0.04, 15 instead of 40
    assert rates.raising_helps_up_to(score, 16.0) == 0.01  # the end of the map is on it
    assert math.isnan(rates.raising_helps_up_to(score, 17.0))
    assert math.isnan(rates.raising_helps_up_to(score[::-1].set_axis(score.index), 20.0))
    assert math.isnan(rates.raising_helps_up_to(score, 1.0))


def test_between_two_rates_the_score_is_read_off_a_line_in_the_logarithm():
    score = pd.Series([10.0, 11.0, 50.0], [1.0, 2.0, 32.0])  # four times 2 is two octaves of four along: 30.5
    assert rates.raising_helps_up_to(score, 4.0) == 2.0
    assert rates.raising_helps_up_to(pd.Series([10.0, 31.0, 30.0], [1.0, 2.0, 32.0]), 4.0) == 1.0
