"""Critical batch: branches at ¼ … 16 times the batch from one set of weights, planned so that they fit the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from helpers.advice.interval import Interval, number
from helpers.advice.rate import replica_price
from helpers.advice.speed import Speed
from helpers.advice.subject import Subject
from helpers.measure import critical

_RATES = 3  # tried at a batch size, at least
_FEWEST, _MOST = 3, 10  # orders of the data
_RECORDS = 16  # of the smallest batch's curve
_SHORTEST, _ENOUGH, _LONGEST = 8, 32, 64  # steps of the largest batch


@dataclass(frozen=True)
class Branches:
    """The critical batch size at one set of weights.

    size: B_c by the fit. keeps_up, falls_behind: the bracket by tests. examples: of a branch.
    rates: the best by batch size. frame: every branch, as ``measure.critical.branches``.
    """

    size: Interval
    keeps_up: float
    falls_behind: float
    examples: int
    rates: dict[int, float]
    frame: pd.DataFrame

    @property
    def sentence(self) -> str:
        """The critical batch, in words."""
        behind = "none tried falls" if self.falls_behind == float("inf") else f"{self.falls_behind:g} falls"
        return (
            f"the critical batch is {self.size} examples (batch {self.keeps_up:g} keeps up with the smallest, {behind} "
            f"behind; {number(self.examples)} examples a branch)"
        )


def measure(subject: Subject, seconds: float, speed: Speed, lr: float, most: int) -> Branches:
    """Branch from the subject's weights. ``lr``: a good rate at its batch size. ``most``: examples that fit.

    Raises ValueError where ``seconds`` do not allow three sizes.
    """
    price = replica_price(subject, speed, _RATES * _FEWEST, seconds)
    most = min(most, subject.num_train // _SHORTEST)
    for sizes in _plans(subject.batch_size, min(speed.seconds), most):
        total = _affordable(sizes, seconds, price, speed, subject)
        enough = min(_ENOUGH * sizes[-1], subject.num_train)
        orders = next((n for n in range(_MOST, _FEWEST, -1) if total / n >= enough), _FEWEST)
        examples = min(total // orders, _LONGEST * sizes[-1], subject.num_train)
        if examples >= _SHORTEST * sizes[-1]:
            break
    else:
        raise ValueError(
            f"branches at three sizes up to {most}, {_SHORTEST} steps of the largest, do not fit into {seconds:.0f} s"
        )
    examples -= examples % sizes[-1]
    frame = critical.branches(
        subject.training, sizes, base=subject.batch_size, lr=lr, rule=subject.rule, examples=examples,
        orders=range(1, 1 + orders), records=_RECORDS, together=subject.together,
    )  # fmt: skip
    found = critical.critical_batch_size(frame)
    rates = {int(b): float(rate) for b, rate in critical.best_rates(frame).items()}
    return Branches(Interval(found.low, found.estimate, found.high), float(found.keeps_up), float(found.falls_behind),
                    examples, rates, frame)  # fmt: skip


def _plans(batch_size: int, least: int, most: int) -> list[list[int]]:
    """Sets of batch sizes to compare, the most telling first."""
    plans = []
    for top, step in ((16, 2), (16, 4), (8, 4), (4, 4)):
        shares = [top / step**i for i in range(7) if top / step**i >= 0.25]
        sizes = sorted({round(batch_size * share) for share in shares if least <= batch_size * share <= most})
        if len(sizes) >= 3:
            plans.append(sizes)
    return plans


def _affordable(sizes: Sequence[int], seconds: float, price: float, speed: Speed, subject: Subject) -> int:
    """Examples of all branches at a rate and size together for which the time suffices, extensions included."""
    an_example = sum(speed.step(size) / size for size in sizes) * (_RATES + 1)
    reading = (
        _FEWEST * subject.problem.dataset.num_test * speed.per_example / 3 * (_RATES + 1) * (len(sizes) + _RECORDS)
    )
    return int((seconds / price - reading) / an_example)
