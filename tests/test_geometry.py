import numpy as np
import pytest
import torch

from helpers import geometry, models


def moved_model():
    """A model of two replicas whose every parameter has moved, and its initial weights."""
    model = models.build("brownlee_mlp", (2,), 3, [0, 1])
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator)
    return model, initial


def norm(*arrays):
    return np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))


def test_weight_norm_is_the_euclidean_norm_of_weights_and_biases_together():
    weights = {name: p.detach() for name, p in moved_model()[0].named_parameters()}
    for replica, ours in enumerate(geometry.weight_norm(weights)):
        assert ours.item() == pytest.approx(norm(*(w[replica].numpy() for w in weights.values())), rel=1e-12)


def test_distances_are_those_of_numpy_in_all_by_kind_and_by_parameter():
    model, initial = moved_model()
    ours = geometry.distances(model, initial)
    for replica in range(2):
        steps = {k: (p.detach() - initial[k])[replica].numpy() for k, p in model.named_parameters()}
        biases = [v for k, v in steps.items() if k.endswith("bias")]
        weights = [v for k, v in steps.items() if k.endswith("weight")]
        expected = {
            "weight_norm": norm(*(p.detach()[replica].numpy() for p in model.parameters())),
            "distance_from_init": norm(*steps.values()),
            "distance_weights": norm(*weights),
            "distance_biases": norm(*biases),
            **{f"distance/{k}": norm(v) for k, v in steps.items()},
        }
        assert set(ours) == set(expected)
        for name, value in expected.items():
            assert ours[name][replica].item() == pytest.approx(value, rel=1e-10), name


def test_squared_distances_of_weights_and_biases_add_up():
    ours = geometry.distances(*moved_model())
    total = ours["distance_weights"] ** 2 + ours["distance_biases"] ** 2
    np.testing.assert_allclose(ours["distance_from_init"] ** 2, total, rtol=1e-12)


def test_nothing_moved_is_no_distance():
    model = moved_model()[0]
    ours = geometry.distances(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(value.tolist() == [0, 0] for name, value in ours.items() if name != "weight_norm")


def test_fit_power_recovers_an_exact_power_law():
    t = np.arange(1, 31)
    fit = geometry.fit_power(t, 3.0 * t**0.4)
    assert (fit.scale, fit.slope) == (pytest.approx(3.0), pytest.approx(0.4))
    assert fit.residual < 1e-12
    np.testing.assert_allclose(fit([4, 9]), [3 * 4**0.4, 3 * 9**0.4])


def test_fit_log_recovers_an_exact_logarithm():
    t = np.arange(1, 31)
    fit = geometry.fit_log(t, -1.0 + 2.5 * np.log(t))
    assert (fit.scale, fit.slope) == (pytest.approx(-1.0), pytest.approx(2.5))
    assert fit.residual < 1e-12
    np.testing.assert_allclose(fit([1, np.e]), [-1.0, 1.5])


def test_the_residual_is_the_root_mean_square_of_the_deviations():
    t, y = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 2.5, 2.0, 5.0])
    for fit in (geometry.fit_power(t, y), geometry.fit_log(t, y)):
        squares = [(fit(ti) - yi) ** 2 for ti, yi in zip(t, y)]
        assert fit.residual == pytest.approx((sum(squares) / 4) ** 0.5)
        assert fit.residual > 0.1


def test_the_residuals_tell_a_power_law_from_a_logarithm():
    t = np.arange(1, 31)
    for y, better, worse in (
        (2 * t**0.5, geometry.fit_power, geometry.fit_log),
        (2 + np.log(t), geometry.fit_log, geometry.fit_power),
    ):
        assert better(t, y).residual < 1e-9 < 1e-3 < worse(t, y).residual


@pytest.mark.parametrize(
    ("t", "y"),
    [([1, 2], [1, 2]), ([0, 1, 2], [1, 2, 3]), ([-1, 1, 2], [1, 2, 3]), ([1, 2, np.nan], [1, 2, 3])],
    ids=["two points", "time 0", "negative time", "nan"],
)
def test_a_fit_needs_three_points_at_positive_times(t, y):
    for fit in (geometry.fit_power, geometry.fit_log):
        with pytest.raises(ValueError, match="at least three points, all finite and above 0"):
            fit(np.array(t), np.array(y))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf])
def test_a_power_law_needs_positive_values(bad):
    with pytest.raises(ValueError, match="at least three points, all finite and above 0"):
        geometry.fit_power(np.arange(1, 4), np.array([1.0, bad, 2.0]))
