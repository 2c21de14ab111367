"""The critical batch size on a noisy quadratic, whose expected losses are known in closed form."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers import Dataset, Net, Problem, Training
from helpers.measure import critical

CURVATURE, START = 1 / np.arange(1, 17), 3.0  # loss ½ Σ h (w − x)², with x of variance 1; w starts at 3 everywhere
SIZES, EXAMPLES, RECORDS = (4, 16, 64, 256), 2048, 16
RATES = {b: [0.01 * b * 2.0**k for k in (-1, 0, 1, 2)] if b < 256 else [0.4, 0.8, 1.6, 3.2] for b in SIZES}


def marks(batch_size):
    if batch_size > min(SIZES):
        return [EXAMPLES]
    return sorted({math.ceil(n / batch_size) * batch_size for n in np.geomspace(batch_size, EXAMPLES, RECORDS)})


def expected_loss(batch_size, lr, examples):
    """E ½ Σ h (w − E x)² after that many examples of SGD: the start's part, and the noise's."""
    left = (1 - lr * CURVATURE) ** (2 * examples / batch_size)
    noise = lr * CURVATURE / (2 - lr * CURVATURE) / batch_size
    return (CURVATURE * (left * START**2 + (1 - left) * noise)).sum() / 2


def expected():
    rows = [(b, lr, order, n, expected_loss(b, lr, n))
            for b in SIZES for lr in RATES[b] for n in marks(b) for order in range(3)]  # fmt: skip
    return pd.DataFrame(rows, columns=["batch_size", "lr", "order", "examples_seen", "loss"])


def simulated(orders, seed=0):
    """SGD on examples drawn for each order, the same for every batch size and rate."""
    rng = np.random.default_rng(seed)
    examples = rng.normal(size=(orders, EXAMPLES, len(CURVATURE)))
    rows = []
    for b in SIZES:
        rates = np.array(RATES[b])[:, None]
        w = np.full((orders, len(rates), len(CURVATURE)), START)
        for step, mean in enumerate(examples.reshape(orders, -1, b, len(CURVATURE)).mean(2).swapaxes(0, 1), 1):
            w -= rates * CURVATURE * (w - mean[:, None])
            if step * b in marks(b):
                loss = (CURVATURE * w**2).sum(2) / 2
                rows += [(b, lr, o, step * b, loss[o, i]) for o in range(orders) for i, lr in enumerate(RATES[b])]
    return pd.DataFrame(rows, columns=["batch_size", "lr", "order", "examples_seen", "loss"])


def test_at_least_ninety_of_a_hundred_seeds_have_the_closed_form_inside_and_no_interval_is_wider_than_eightfold():
    truth = critical.critical_batch_size(expected()).estimate
    frame = simulated(orders=600)
    found = [
        critical.critical_batch_size(one.assign(order=one.order % 6)) for _, one in frame.groupby(frame.order // 6)
    ]
    assert len(found) == 100
    assert sum(one.low <= truth <= one.high for one in found) >= 90
    assert max(one.high / one.low for one in found) <= 8
    assert all(one.keeps_up < one.falls_behind <= 256 for one in found)


def test_a_hyperbola_is_read_back():
    rows = []
    for order in range(3):
        for b in (4, 16, 64, 256):
            for n in marks(b):
                useful = n / (1 + b / 50)
                rows.append((b, 0.1, order, n, math.exp(-useful / 500) * (1 + 0.001 * order)))
    frame = pd.DataFrame(rows, columns=["batch_size", "lr", "order", "examples_seen", "loss"])
    assert critical.critical_batch_size(frame).estimate == pytest.approx(50, rel=0.05)


def test_sizes_that_all_keep_up_leave_the_critical_batch_open_above():
    frame = expected()
    end = critical.at_the_end(frame[frame.batch_size == 4])
    frame.loc[frame.batch_size > 4, "loss"] = end.loss.min()
    found = critical.critical_batch_size(frame)
    assert math.isinf(found.high) and math.isinf(found.falls_behind) and found.keeps_up == 256


def test_a_loss_that_falls_no_more_tells_nothing():
    frame = expected().assign(loss=lambda rows: 1 + 1e-5 * rows.examples_seen)
    with pytest.raises(ValueError, match="does not fall"):
        critical.critical_batch_size(frame)


def test_branches_of_a_problem_see_equal_examples_and_extend_their_rates():
    x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((16,), 3.0))

        def forward(self, inputs):
            return self.w - inputs

    curvature = torch.from_numpy(CURVATURE).float()
    data = Dataset.of(x, torch.zeros(1024), torch.zeros(1, 16), torch.zeros(1), device="cpu")
    problem = Problem(data, Net(Point), lambda outputs, _: (outputs.square() * curvature).sum(1) / 2)

    def start(batch_size, rates, orders):
        return Training(problem, seeds=orders, batch_size=batch_size, lr=rates)

    frame = critical.branches(start, (8, 32, 128), base=8, lr=0.05, rule="linear", examples=512, records=8)
    apart = critical.branches(start, (8, 32, 128), base=8, lr=0.05, rule="linear", examples=512, records=8, together=2)
    pd.testing.assert_frame_equal(*(f.reset_index(drop=True) for f in (frame, apart)), rtol=1e-4)
    assert critical.at_the_end(frame).examples_seen.eq(512).all()
    assert frame[frame.batch_size == 8].examples_seen.nunique() > 5
    best = critical.best_rates(frame)
    tried = frame.groupby("batch_size").lr.agg(["min", "max"])
    assert (best > 0.2).all() and (best < tried["max"]).all()  # 0.1 was the highest of the first three at batch 8
    for order in (1, 2, 3):
        end = critical.at_the_end(frame[frame.order == order]).set_index(["batch_size", "lr"]).loss
        w = torch.full((16,), 3.0)
        for indices in start(8, [0.01], [order])._order.next(0, 512)[0].split(32):
            w -= best[32] * curvature * (w - x[indices].mean(0))
        assert end[32, best[32]] == pytest.approx(float((curvature * w.square()).sum() / 2), rel=1e-3)
