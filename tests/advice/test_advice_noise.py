"""The noise of a quadratic's gradient, whose tr Σ and |G|² are known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import Dataset, Net, Problem, Training
from helpers.advice import noise
from helpers.advice.subject import subject as make_subject

CURVATURE = 1 / torch.arange(1.0, 33)


class Point(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.full((32,), start))

    def forward(self, x):
        return self.w - x


def quadratic(start):
    """Example losses ½ (w − x)ᵀ H (w − x), and by hand tr Σ and |G|² at the start."""
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1)) * 2
    data = Dataset.of(x, torch.zeros(2000), x[:1], torch.zeros(1), device="cpu")
    made = Problem(data, Net(lambda: Point(start)), lambda outputs, _: (outputs.square() * CURVATURE).sum(1) / 2)
    gradients = (CURVATURE * (start - x)).double()
    return made, gradients.var(0, correction=0).sum().item(), gradients.mean(0).square().sum().item()


def test_at_least_ninety_of_a_hundred_seeds_have_the_closed_form_inside_and_no_interval_is_wider_than_eightfold():
    made, trace, squared = quadratic(start=0.5)
    found = [noise.measure(make_subject(made, "sgd", 16, 0.1, None), 60.0, 4, seed) for seed in range(100)]
    assert sum(one.scale.low <= trace / squared <= one.scale.high for one in found) >= 90
    assert max(one.scale.high / one.scale.low for one in found) <= 8
    assert np.mean([one.trace for one in found]) == pytest.approx(trace, rel=0.03)
    assert np.mean([one.squared_gradient for one in found]) == pytest.approx(squared, rel=0.1)


def test_a_gradient_that_drowns_leaves_the_scale_open_above():
    made, trace, squared = quadratic(start=0.0)
    found = noise.measure(make_subject(made, "sgd", 16, 0.1, None), 0.02, 1)
    assert math.isinf(found.scale.high) and found.scale.low <= trace / squared
    assert str(found.scale).startswith("≥") and math.isfinite(found.scale.estimate)


def test_fieller_covers_a_ratio_of_normals():
    rng = np.random.default_rng(0)
    covariance = np.array([[0.5, 0.1], [0.1, 0.04]])
    draws = rng.multivariate_normal([10.0, 1.0], covariance, 2000)
    found = [noise.fieller(x, y, covariance, 10**6) for x, y in draws]
    assert np.mean([one.low <= 10 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def test_the_sketch_keeps_norms_to_two_percent():
    sketch = noise._Sketch(200_000, torch.device("cpu"))
    for seed in range(5):
        g = torch.randn(200_000, generator=torch.Generator().manual_seed(seed))
        assert np.square(sketch([g])).sum() == pytest.approx(g.square().sum().item(), rel=0.06)
    assert noise._Sketch(5, torch.device("cpu"))([torch.arange(5.0)]).tolist() == [0, 1, 2, 3, 4]


def test_in_adams_metric_a_weights_scale_does_not_count():
    made, *_ = quadratic(start=0.5)
    training = Training(made, batch_size=16, lr=1e-6, optimizer="adam").advance(steps=200, record=False)
    found = noise.measure(make_subject(made, "adam", 16, 0.1, training), 60.0, 4)
    gradients = CURVATURE * (training.stack.parameters["w"][0].detach() - made.dataset.train_inputs)
    scaled = (gradients / training.state()["optimizer/w/exp_avg_sq"][0].sqrt()).double()
    truth = scaled.var(0, correction=0).sum().item() / scaled.mean(0).square().sum().item()
    assert found.in_metric.low * 0.8 <= truth <= found.in_metric.high * 1.25
    assert found.in_metric.estimate != pytest.approx(found.scale.estimate, rel=0.05)
