"""Positive quantities, each known within an interval; products and powers combine the intervals in logarithms."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A positive quantity with its 95 % interval; ``low`` 0 or ``high`` inf leaves that side open.

    The estimate is always a positive number: where a side is open and nothing better is known, the bound itself.

    >>> str(Interval(90, 180, 360) * 2), str(Interval(700, 700, math.inf)), str(Interval(4, 9, 9) ** 0.5)
    ('360 [180, 720]', '≥ 700', '3 [2, 3]')
    """

    low: float
    estimate: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """A quantity that is known."""
        return cls(value, value, value)

    @property
    def bounded(self) -> bool:
        """Whether both sides are closed."""
        return self.low > 0 and math.isfinite(self.high)

    def __mul__(self, other: Interval | float) -> Interval:
        if not isinstance(other, Interval):
            return Interval(self.low * other, self.estimate * other, self.high * other)
        down, up = (math.hypot(mine, its) for mine, its in zip(self._spread(), other._spread()))
        return _around(self.estimate * other.estimate, down, up)

    def __pow__(self, power: float) -> Interval:
        down, up = (abs(power) * side for side in self._spread())
        return _around(self.estimate**power, *((down, up) if power >= 0 else (up, down)))

    def __truediv__(self, other: Interval | float) -> Interval:
        return self * (other**-1 if isinstance(other, Interval) else 1 / other)

    def widened(self, factor: float) -> Interval:
        """The same estimate, known no better than within ``factor`` each way besides."""
        return self * Interval(1 / factor, 1.0, factor)

    def within(self, factor: float) -> bool:
        """Whether the interval reaches no further than ``factor`` each way."""
        return self.low * factor >= self.estimate and self.high <= self.estimate * factor

    def _spread(self) -> tuple[float, float]:
        """How far the interval reaches down and up from the estimate, in logarithms."""
        down = math.log(self.estimate / self.low) if self.low > 0 else math.inf
        return down, math.log(self.high / self.estimate)

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.estimate)
        if self.bounded:
            return f"{number(self.estimate)} [{number(self.low)}, {number(self.high)}]"
        if self.low > 0:
            return f"≥ {number(self.low)}"
        return f"≤ {number(self.high)}" if math.isfinite(self.high) else "unknown"


def _around(estimate: float, down: float, up: float) -> Interval:
    return Interval(estimate * math.exp(-down), estimate, estimate * math.exp(up))


def number(value: float) -> str:
    """A number as a reader wants it: three digits, thousands apart.

    >>> number(0.012345), number(12345.6)
    ('0.0123', '12,300')
    """
    if value >= 100:
        return f"{round(value, 2 - math.floor(math.log10(value))):,.0f}"
    return f"{value:.3g}"
