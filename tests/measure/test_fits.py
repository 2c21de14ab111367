import numpy as np
import pytest

from helpers.measure import fits


def test_fit_power_recovers_an_exact_power_law():
    t = np.arange(1, 31)
    fit = fits.fit_power(t, 3.0 * t**0.4)
    assert (fit.scale, fit.slope) == (pytest.approx(3.0), pytest.approx(0.4))
    assert fit.residual < 1e-12
    np.testing.assert_allclose(fit([4, 9]), [3 * 4**0.4, 3 * 9**0.4])


def test_fit_log_recovers_an_exact_logarithm():
    t = np.arange(1, 31)
    fit = fits.fit_log(t, -1.0 + 2.5 * np.log(t))
    assert (fit.scale, fit.slope) == (pytest.approx(-1.0), pytest.approx(2.5))
    assert fit.residual < 1e-12
    np.testing.assert_allclose(fit([1, np.e]), [-1.0, 1.5])


def test_the_residual_is_the_root_mean_square_of_the_deviations():
    t, y = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 2.5, 2.0, 5.0])
    for fit in (fits.fit_power(t, y), fits.fit_log(t, y)):
        squares = [(fit(ti) - yi) ** 2 for ti, yi in zip(t, y)]
        assert fit.residual == pytest.approx((sum(squares) / 4) ** 0.5)
        assert fit.residual > 0.1


def test_the_residuals_tell_a_power_law_from_a_logarithm():
    t = np.arange(1, 31)
    for y, better, worse in (
        (2 * t**0.5, fits.fit_power, fits.fit_log),
        (2 + np.log(t), fits.fit_log, fits.fit_power),
    ):
        assert better(t, y).residual < 1e-9 < 1e-3 < worse(t, y).residual


@pytest.mark.parametrize(
    ("t", "y"),
    [([1, 2], [1, 2]), ([0, 1, 2], [1, 2, 3]), ([-1, 1, 2], [1, 2, 3]), ([1, 2, np.nan], [1, 2, 3])],
    ids=["two points", "time 0", "negative time", "nan"],
)
def test_a_fit_needs_three_points_at_positive_times(t, y):
    for fit in (fits.fit_power, fits.fit_log):
        with pytest.raises(ValueError, match="at least three points, all finite and above 0"):
            fit(np.array(t), np.array(y))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf])
def test_a_power_law_needs_positive_values(bad):
    with pytest.raises(ValueError, match="at least three points, all finite and above 0"):
        fits.fit_power(np.arange(1, 4), np.array([1.0, bad, 2.0]))


SIZES = np.array([4, 16, 64, 256, 1024, 4096])


def hyperbola(sizes, min_steps=50.0, min_examples=6_000.0):
    return min_steps + min_examples / sizes


@pytest.mark.parametrize(("min_steps", "min_examples"), [(50.0, 6_000.0), (3.0, 3e6), (1_000.0, 2_000.0)])
def test_the_hyperbola_recovers_exact_points(min_steps, min_examples):
    fit = fits.fit_hyperbola(SIZES, hyperbola(SIZES, min_steps, min_examples))
    assert (fit.min_steps, fit.min_examples) == (
        pytest.approx(min_steps, rel=1e-5),
        pytest.approx(min_examples, rel=1e-5),
    )
    assert fit.critical_batch_size == pytest.approx(min_examples / min_steps, rel=1e-5)
    assert fit.residual < 1e-6


def test_its_curves_are_the_hyperbola_of_steps_and_examples():
    fit = fits.Hyperbola(50.0, 6_000.0, 0.0)
    sizes = np.array([1.0, 30.0, 120.0, 5_000.0])
    steps, examples = fit.steps(sizes), fit.examples(sizes)
    np.testing.assert_allclose((steps / 50 - 1) * (examples / 6_000 - 1), 1)
    np.testing.assert_allclose(examples, steps * sizes)
    assert (fit.critical_batch_size, fit.steps(120), fit.examples(120)) == (120, 100, 12_000)


def test_with_noise_the_critical_batch_size_is_recovered_within_its_spread():
    rng, spread = np.random.default_rng(0), 0.1
    logs, residuals = [], []
    for _ in range(300):
        fit = fits.fit_hyperbola(SIZES, hyperbola(SIZES) * np.exp(spread * rng.normal(size=6)))
        logs.append(np.log(fit.critical_batch_size / 120))
        residuals.append(fit.residual)
    assert abs(np.mean(logs)) < 3 * np.std(logs) / 300**0.5 + 0.005  # log S is fitted: its curvature biases a little
    assert np.std(logs) < 2 * spread
    assert np.sqrt(np.mean(np.square(residuals))) == pytest.approx(spread * np.sqrt(4 / 6), rel=0.1)  # two are fitted


def test_no_pair_of_parameters_nearby_leaves_a_smaller_residual():
    steps = hyperbola(SIZES) * np.exp(0.3 * np.random.default_rng(1).normal(size=6))
    fit = fits.fit_hyperbola(SIZES, steps)
    for a in (0.98, 1.0, 1.02):
        for b in (0.98, 1.0, 1.02):
            curve = hyperbola(SIZES, fit.min_steps * a, fit.min_examples * b)
            rms = np.sqrt(np.mean(np.log(curve / steps) ** 2))
            assert rms == pytest.approx(fit.residual) if a == b == 1 else rms > fit.residual


def test_perfect_scaling_alone_puts_the_knee_beyond_the_sizes():
    fit = fits.fit_hyperbola(SIZES, 6_000.0 / SIZES)
    assert fit.min_examples == pytest.approx(6_000, rel=1e-3)
    assert fit.critical_batch_size > 100 * SIZES.max()


@pytest.mark.parametrize(
    ("sizes", "steps", "message"),
    [
        ([4, 16], [9, 3], "at least three points"),
        ([4, 4, 16], [9, 8, 3], "at least three different batch sizes"),
        ([0, 4, 16], [9, 8, 3], "finite and above 0"),
        ([4, 16, 64], [9, 3, np.inf], "finite and above 0"),
        ([4, 16, 64], [9, 3, 0], "finite and above 0"),
    ],
)
def test_a_hyperbola_needs_three_sizes_that_reach_the_target(sizes, steps, message):
    with pytest.raises(ValueError, match=message):
        fits.fit_hyperbola(np.array(sizes), np.array(steps))
