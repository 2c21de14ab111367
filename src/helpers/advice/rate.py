"""Rate: the best and the largest stable learning rate at the present batch size, by branches on a grid of ×2."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pandas as pd

from helpers.advice.interval import Interval, number
from helpers.advice.speed import Speed
from helpers.advice.subject import Subject
from helpers.measure import critical

_FEWEST, _MOST = 30, 100  # steps of a branch
ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class Rate:
    """Learning rates at ``batch_size``, by the held-out loss after ``steps`` steps.

    best: with the range of rates that are no worse by a paired t-test (5 %). stable: the largest rate whose loss does
    not rise, and the smallest that does. edge: the best is the grid's first or last, after its extensions.
    tried: one row a branch: lr, order, loss.
    """

    batch_size: int
    steps: int
    best: Interval
    stable: Interval
    edge: bool
    tried: pd.DataFrame

    @property
    def sentence(self) -> str:
        """The rates, in words."""
        flag = " (at the edge of the rates tried)" if self.edge else ""
        return (f"at batch {self.batch_size} the best rate is {self.best}{flag}; training is stable up to "
                f"{number(self.stable.low)}")  # fmt: skip


def measure(subject: Subject, seconds: float, speed: Speed) -> Rate:
    """Train a branch for each rate and each of three orders of the data, as many steps as ``seconds`` allow.

    Raises ValueError where they do not allow thirty.
    """
    batch, grid = subject.batch_size, [subject.lr * 2.0**power for power in (-2, -1, 0, 1, 2)]
    replicas = 2 * len(grid) * len(ORDERS)  # twice the grid, for its edges may move
    price = replica_price(subject, speed, len(grid) * len(ORDERS), seconds)
    reading = subject.problem.dataset.num_test * speed.per_example / 3
    steps = min(_MOST, int((seconds / replicas / price - reading) / speed.step(batch)))
    if steps < _FEWEST:
        needed = replicas * price * (_FEWEST * speed.step(batch) + reading)
        raise ValueError(f"{_FEWEST} steps of {len(grid)} rates in {len(ORDERS)} orders take about {number(needed)} s")
    tried = critical.extended(
        lambda rates: critical.branch(subject.training, batch, rates, ORDERS, steps * batch, 1, subject.together), grid
    )
    losses = tried.pivot(index="lr", columns="order", values="loss")
    before = float(subject.training(batch).evaluate("test")[0])
    best = float(losses.mean(axis=1).idxmin())
    level = [lr for lr in losses.index if not critical.worse(losses.loc[lr], losses.loc[best])]
    calm = losses.index[(losses <= before).all(axis=1)]
    last = float(calm.max()) if len(calm) else float(losses.index[0])
    above = losses.index[losses.index > last]
    stable = Interval(last, last, float(above.min()) if len(above) else math.inf)
    edge = best in (losses.index[0], losses.index[-1])
    return Rate(batch, steps, Interval(min(level), best, max(level)), stable, edge, tried[["lr", "order", "loss"]])


def replica_price(subject: Subject, speed: Speed, replicas: int, seconds: float) -> float:
    """Seconds of a step a replica, among so many side by side, in terms of one alone; 1 where trying takes too long."""
    replicas = min(replicas, subject.together)
    if 2 * replicas * speed.step(subject.batch_size) > 0.1 * seconds:
        return 1.0
    training = subject.training(subject.batch_size, [subject.lr] * replicas, [*range(replicas)])
    training.step()
    started = time.perf_counter()
    training.step()
    return (time.perf_counter() - started) / replicas / speed.step(subject.batch_size)
