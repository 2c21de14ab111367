"""The race to a target, against loops over its runs and against figures worked out by hand."""

import itertools
import math
import statistics

import numpy as np
import pandas as pd
import pytest

from helpers.measure import fits, race


def _run(batch_size, lr, seed, accuracies, steps=(1, 2, 4, 8), seconds=0.5):
    rows = [{"steps": s, "examples_seen": s * batch_size - (s > 4), "seconds": seconds * s, "test_accuracy": a}
            for s, a in zip(steps, accuracies)]  # fmt: skip
    return pd.DataFrame(rows).assign(batch_size=batch_size, lr=lr, seed=seed)


@pytest.fixture
def history():
    rng = np.random.default_rng(0)
    runs = [
        _run(b, lr, s, np.sort(rng.uniform(0.3, 1, 4)))
        for b, lr, s in itertools.product([2, 8, 32], [0.1, 0.2], range(5))
    ]
    return pd.concat(runs, ignore_index=True)


def test_a_run_arrives_at_its_first_record_at_or_above_the_goal():
    history = pd.concat([_run(4, 0.1, 0, [0.2, 0.6, 0.5, 0.9]), _run(4, 0.1, 1, [0.1, 0.2, 0.3, math.nan])])
    first, second = race.arrivals(history, 0.6).itertuples(index=False)
    assert first == (4, 0.1, 0, 2.0, 8, 1.0, True, 4.0)
    assert second == (4, 0.1, 1, math.inf, 31, 4.0, False, 31 / 8)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5])
def test_a_target_out_of_reach_is_lowered_until_one_size_reaches_it(history, seeds):
    history = history[history.seed < seeds]
    assert race.within_reach(history, 0.4) == 0.4
    goal = race.within_reach(history, 1.1)
    assert len(race.best_rates(race.arrivals(history, goal))) >= 1
    assert race.best_rates(race.arrivals(history, goal + 1e-9)).empty


def test_a_goal_that_holds_before_the_first_step_is_reached_with_it():
    history = _run(4, 0.1, 0, [0.7, 0.6, 0.8, 0.9], steps=(0, 1, 2, 4))
    assert race.arrivals(history, 0.5).steps.item() == 1
    assert race.arrivals(history, 0.7).steps.item() == 2
    assert race.within_reach(history.iloc[:2], 0.7) == 0.6


def test_arrivals_do_not_depend_on_the_order_of_the_records(history):
    pd.testing.assert_frame_equal(
        race.arrivals(history, 0.7), race.arrivals(history.sample(frac=1, random_state=1), 0.7)
    )


@pytest.mark.parametrize("without", [None, 2])
def test_the_best_rate_takes_the_fewest_steps_in_the_median(history, without):
    runs = race.arrivals(history, 0.8)
    expected = {}
    for b in (2, 8, 32):
        steps = {
            lr: [r.steps for r in runs.itertuples() if (r.batch_size, r.lr) == (b, lr) and r.seed != without]
            for lr in (0.1, 0.2)
        }
        finite = [lr for lr in steps if statistics.median(steps[lr]) < math.inf]
        if finite:
            expected[b] = min(finite, key=lambda lr: (statistics.median(steps[lr]), statistics.fmean(steps[lr]), lr))
    assert expected
    assert race.best_rates(runs, without).to_dict() == expected
    chosen = race.at_best_rates(runs, without)
    assert set(zip(chosen.batch_size, chosen.lr)) == set(expected.items())


def test_a_size_that_never_arrives_has_no_best_rate():
    runs = race.arrivals(pd.concat([_run(4, 0.1, 0, [0.1] * 4), _run(8, 0.1, 0, [0.9] * 4)]), 0.5)
    assert race.best_rates(runs).to_dict() == {8: 0.1}


def test_selection_bias_by_hand():
    # Rate 0.1 takes 1, 8, 8 steps and rate 0.2 takes 4, 2, 4: the best is 0.2 (median 4 against 8). Without seed 0 it
    # is 0.2, without seeds 1 or 2 it is 0.2 again (medians 4.5 and 3; 4.5 and 4), so nothing is won by the choice.
    steps = {0.1: [1, 8, 8], 0.2: [4, 2, 4]}
    runs = pd.DataFrame(
        [
            {"batch_size": 4, "lr": lr, "seed": s, "steps": float(n)}
            for lr, of in steps.items()
            for s, n in enumerate(of)
        ]
    )
    assert race.selection_bias(runs) == 1.0
    # Now 0.2 wins by seed 1 alone: without that seed 0.1 is chosen, which takes it 8 steps instead of 2.
    runs.loc[(runs.lr == 0.1) & (runs.seed == 2), "steps"] = 3.0
    runs.loc[(runs.lr == 0.2) & (runs.seed == 0), "steps"] = 2.0
    assert race.best_rates(runs).to_dict() == {4: 0.2}
    assert race.selection_bias(runs) == pytest.approx((1 + 8 / 2 + 1) / 3)


def test_one_seed_has_no_selection_bias():
    assert math.isnan(race.selection_bias(race.arrivals(_run(4, 0.1, 0, [0.9] * 4), 0.5)))


def _exact(sizes, seeds, min_steps=20.0, min_examples=4000.0):
    rows = [
        {"batch_size": b, "lr": 0.1, "seed": s, "mean_batch": b, "steps": (1 + s) * (min_steps + min_examples / b)}
        for b in sizes
        for s in range(seeds)
    ]
    return pd.DataFrame(rows)


def test_the_hyperbola_recovers_exact_steps_for_all_and_for_each_seed():
    best = _exact([4, 64, 1024], 2)
    assert race.critical_batch_sizes(best).to_dict() == pytest.approx({0: 200, 1: 200})
    assert race.hyperbola(best[best.seed == 0]).min_steps == pytest.approx(20)


@pytest.mark.parametrize("sizes", [[], [4], [4, 64]])
def test_fewer_than_three_sizes_have_no_hyperbola(sizes):
    best = _exact(sizes, 3) if sizes else _exact([4], 1).iloc[:0]
    assert math.isnan(race.hyperbola(best).critical_batch_size)
    assert race.critical_batch_sizes(best).isna().all()


def test_slopes_at_the_ends_are_of_the_two_smallest_and_the_two_largest_sizes():
    rows = [
        {"batch_size": b, "seed": s, "mean_batch": b, "steps": n}
        for s in (3, 5)
        for b, n in ((1, 64), (4, 16), (16, 8), (64, 8))
    ]
    first, last = race.end_slopes(pd.DataFrame(rows).sample(frac=1, random_state=0))
    assert first.to_dict() == pytest.approx({3: -1.0, 5: -1.0})
    assert last.to_dict() == pytest.approx({3: 0.0, 5: 0.0})


def test_two_sizes_are_both_ends_and_one_is_refused():
    first, last = race.end_slopes(_exact([4, 64], 1))
    assert first[0] == last[0] == pytest.approx(math.log(82.5 / 1020) / math.log(16))
    with pytest.raises(ValueError, match="two batch sizes"):
        race.end_slopes(_exact([4], 1))


def test_a_seed_that_misses_a_size_has_no_slope_there():
    best = _exact([4, 16, 64], 2)
    first, last = race.end_slopes(best[~((best.seed == 1) & (best.batch_size == 64))])
    assert first.notna().all() and last.notna().to_dict() == {0: True, 1: False}


def test_the_price_of_a_step_recovers_exact_seconds():
    best = _exact([4, 64, 1024], 2).assign(seconds=lambda d: d.steps * (2e-3 + 5e-6 * d.mean_batch))
    price = race.step_price(best)
    assert price == pytest.approx((2e-3, 5e-6))
    assert price.in_examples == pytest.approx(400)
    assert math.isnan(race.step_price(best.iloc[:0]).fixed)


def test_no_part_of_the_price_is_below_zero():
    best = _exact([4, 64, 1024], 1).assign(seconds=lambda d: d.steps * (2e-3 - 1e-6 * d.mean_batch))
    assert min(race.step_price(best)) >= 0


def test_the_noise_scale_counts_up_to_the_checkpoint_that_reaches_the_goal():
    measured = pd.DataFrame(
        {
            "seed": 0,
            "epoch": [0, 1, 2, 3, 4],
            "test_accuracy": [0.1, 0.6, 0.5, 0.9, 0.8],
            "gradient_noise_scale": [7, 10, 20, 40, 80],
        }
    )
    assert race.noise_scale_before(measured, 0.6)[0] == 10
    assert race.noise_scale_before(measured, 0.9)[0] == 20  # 10, 20 and 40
    assert race.noise_scale_before(measured, 0.99)[0] == 30


def test_the_table_by_target_has_a_row_a_goal(history):
    measured = pd.DataFrame(
        {"seed": 0, "epoch": [1, 2], "test_accuracy": [0.5, 0.9], "gradient_noise_scale": [10.0, 30.0]}
    )
    table = race.by_target(history, measured, [0.5, 0.6, 1.5])
    assert list(table.index) == ["50%", "60%", "150%"]
    best = race.at_best_rates(race.arrivals(history, 0.6))
    best = best[best.reached]
    fit = fits.fit_hyperbola(best.mean_batch, best.steps)
    assert table.loc["60%", "critical_batch_size"] == fit.critical_batch_size
    assert table.loc["50%", "noise_scale"] == 10 and table.loc["60%", "noise_scale"] == 20
    assert math.isnan(table.loc["150%", "S_min"])


def test_records_are_a_factor_apart():
    steps = race.record_steps(10_000)
    assert steps[0] == 1 and steps[-1] < 10_000
    assert all(b / a < 1.2 + 1 / a for a, b in zip(steps, steps[1:]))
    assert race.record_steps(1) == () and race.record_steps(2) == (1,)
