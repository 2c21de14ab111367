"""Summaries of sharpness, against exact power laws and figures worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from helpers import Solution, Training, problems
from helpers.measure import sharpness


def _solutions(value, lrs=(0.1, 0.2), seeds=(0, 1)):
    index = pd.MultiIndex.from_product([[16, 256], lrs, seeds], names=["batch_size", "lr", "seed"])
    return pd.Series([value(*at) for at in index], index, dtype=float)


def _loss(b, lr, s):
    return 0.01 * b**0.3 / lr * (1 + s)


def test_an_exact_power_law_with_two_levels_is_recovered():
    loss = _solutions(_loss)
    found = sharpness.at_equal_loss(
        _solutions(lambda b, lr, s: (5 if b == 16 else 15) * _loss(b, lr, s) ** 0.7), loss, 16, 256
    )
    assert (found.slope, math.exp(found.constant), found.ratio) == pytest.approx((0.7, 5, 3))
    assert found.by_seed.to_dict() == pytest.approx({0: 3, 1: 3})
    assert found.residual < 1e-12
    assert found.between(2.0) == pytest.approx(math.sqrt(5 * 15) * 2**0.7)


def test_the_fit_is_that_of_the_normal_equations():
    rng = np.random.default_rng(0)
    loss, top = _solutions(_loss), _solutions(lambda *at: rng.uniform(1, 9))
    x, y = np.log(loss.to_numpy()), np.log(top.to_numpy())
    large = np.array([b == 256 for b, *_ in loss.index], dtype=float)
    design = np.stack([x, large, np.ones(8)]).T
    slope, apart, constant = np.linalg.inv(design.T @ design) @ design.T @ y
    found = sharpness.at_equal_loss(top, loss, 16, 256)
    assert (found.slope, found.ratio, found.constant) == pytest.approx((slope, math.exp(apart), constant))
    left = y - design @ [slope, apart, constant]
    assert found.residual == pytest.approx(left.std(ddof=1))
    levels = {(b, s): np.mean([y[i] - slope * x[i] for i, at in enumerate(loss.index) if (at[0], at[2]) == (b, s)])
              for b in (16, 256) for s in (0, 1)}  # fmt: skip
    assert found.by_seed.to_dict() == pytest.approx({s: math.exp(levels[256, s] - levels[16, s]) for s in (0, 1)})


def test_solutions_without_a_logarithm_are_left_out():
    loss, top = _solutions(_loss), _solutions(lambda b, lr, s: 5 * _loss(b, lr, s))
    top.iloc[0], top.iloc[5], loss.iloc[3] = math.nan, -1.0, 0.0
    assert sharpness.at_equal_loss(top, loss, 16, 256).slope == pytest.approx(1)
    few = sharpness.at_equal_loss(top.iloc[:3] * 0, loss, 16, 256)
    assert math.isnan(few.ratio) and few.by_seed.isna().all()


def test_one_batch_size_in_both_roles_has_a_ratio_of_one():
    loss = _solutions(_loss).xs(16, drop_level=False)
    found = sharpness.at_equal_loss(loss**2, loss, 16, 16)
    assert (found.slope, found.ratio) == pytest.approx((2, 1)) and (found.by_seed == 1).all()


def test_the_rise_is_the_mean_of_both_sides():
    line = pd.DataFrame(
        [(a, s, (s + 1) * a**2 + a) for s in (0, 1) for a in (-0.25, 0.0, 0.25)], columns=["alpha", "seed", "loss"]
    )
    assert sharpness.rise_around(line, 0.0).to_dict() == pytest.approx({0: 0.0625, 1: 0.125})


def _sharpening(value):
    rows = [("squared", 8, r, s, e, value(r, e), r * value(r, e)) for r in (0.1, 0.4) for s in (0, 1) for e in range(9)]
    return pd.DataFrame(rows, columns=["loss", "batch_size", "rate", "seed", "epoch", "eigenvalue", "product"])


def test_late_medians_are_of_the_last_quarter():
    late = sharpness.late_medians(_sharpening(lambda r, e: e**2))
    assert late.eigenvalue["squared", 8, 0.1, 0] == 49  # of 36, 49 and 64
    assert late["product"]["squared", 8, 0.4, 1] == pytest.approx(0.4 * 49)


def test_the_edge_binds_where_it_lies_below_the_sharpness_of_the_smallest_rate():
    late = sharpness.late_medians(_sharpening(lambda r, e: 6.0)).eigenvalue["squared", 8]
    assert sharpness.binding_rates(late, [0.4, 0.1]) == [0.4]
    assert sharpness.binding_rates(late / 2, [0.4, 0.1]) == []
    assert sharpness.binding_rates(late, [0.1]) == []


@pytest.fixture(scope="module")
def solutions():
    problem = problems.named("digits", "brownlee_mlp", num_train=100)
    training = Training(problem, seeds=[0, 1], batch_size=20, lr=0.1).advance(epochs=2, record=False)
    return [Solution(problem, {n: w[i : i + 1] for n, w in training.weights().items()}) for i in (0, 1)]


def _evaluated(solution, weights):
    """Loss and accuracy on both splits."""
    module, data = solution.problem.net.module(0), solution.problem.dataset
    module.load_state_dict({name: w[0] for name, w in weights.items()})
    with torch.no_grad():
        pairs = [(module(x), y) for x, y in map(data.tensors, ("train", "test"))]
    return [[float(F.cross_entropy(out, y)), float((out.argmax(1) == y).float().mean())] for out, y in pairs]


def test_the_line_between_two_solutions_is_that_of_the_module_there(solutions):
    first, second = solutions
    found = sharpness.line_between(first, second, [-0.5, 0.0, 1.0]).set_index(["split", "alpha"])
    for alpha in (-0.5, 0.0, 1.0):
        weights = {n: (1 - alpha) * w + alpha * second.weights[n] for n, w in first.weights.items()}
        for split, expected in zip(("train", "test"), _evaluated(first, weights)):
            assert found.loc[(split, alpha), ["loss", "accuracy"]].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_rescaled_net_is_the_same_function_with_another_sharpness(solutions):
    found = sharpness.reparametrised(solutions[0], [0.25, 1.0, 4.0], examples=50).set_index("factor")
    assert found.change[1.0] == 0 and (found.change < 1e-5).all()
    assert found.eigenvalue.max() > 2 * found.eigenvalue[1.0] > 0
