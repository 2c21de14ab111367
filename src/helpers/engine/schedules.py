"""Settings that may change while training runs: their checks, and schedules of them over epochs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A setting as a function of the epoch: ``points`` (epoch, value), held as steps or joined by lines."""

    points: tuple[tuple[float, float], ...]
    linear: bool = False

    def __call__(self, epoch: float) -> float:
        before = [point for point in self.points if point[0] <= epoch]
        (start, value), after = before[-1], self.points[len(before) :]
        if not self.linear or not after:
            return value
        (end, target) = after[0]
        return value + (target - value) * (epoch - start) / (end - start)

    def __str__(self) -> str:
        return ("~" if self.linear else "→").join(f"{value:g}@{epoch:g}" for epoch, value in self.points)

    def until(self, epoch: float) -> Schedule | float:
        """Return the part before ``epoch``; a plain number where it is constant there."""
        points = tuple(point for point in self.points if point[0] < epoch)
        if self.linear and len(points) < len(self.points):
            return Schedule((*points, (epoch, self(epoch))), linear=True)
        return points[0][1] if len(points) == 1 else Schedule(points, self.linear)


def schedule(points: Mapping[float, float], *, linear: bool = False) -> Schedule:
    """Make a schedule that has each value from its epoch on.

    points: epoch → value. linear: join the values by lines. Raises ValueError unless it begins at epoch 0.

    >>> schedule({0: 1024, 30: 64})(29.5)
    1024
    """
    ordered = tuple(sorted(points.items()))
    if not ordered or ordered[0][0] != 0:
        raise ValueError(f"a schedule begins at epoch 0; this one has {dict(points)}")
    return Schedule(ordered, linear)


def values_of(setting: object) -> list[object]:
    """List the values that a setting takes: a schedule's, those of each in a tuple, or the setting itself."""
    if isinstance(setting, tuple):
        return [value for each in setting for value in values_of(each)]
    return [value for _, value in setting.points] if isinstance(setting, Schedule) else [setting]


def at_epoch(lr: float | Schedule | tuple, epoch: float) -> float | tuple[float, ...]:
    """A learning rate at an epoch: a schedule's, the number itself, or a tuple of these, one a replica."""
    if isinstance(lr, tuple):
        return tuple(at_epoch(each, epoch) for each in lr)
    return float(lr(epoch) if isinstance(lr, Schedule) else lr)


def check_examples(name: str, value: object, num_train: int) -> int:
    """Return ``value`` as an int. Raises ValueError unless it is a whole number from 1 to the training set's size."""
    whole = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not whole or not 1 <= value <= num_train or value != int(value):
        raise ValueError(f"{name} is {value!r}; expected a whole number from 1 to {num_train} (the training set)")
    return int(value)


def check_batch_size(value: object, num_train: int) -> int:
    """Return ``value`` as an int. Raises ValueError unless it is a whole number from 1 to the training set's size."""
    return check_examples("batch_size", value, num_train)


def check_above(name: str, value: object) -> float:
    """Return ``value`` as a float. Raises ValueError unless it is finite and above 0."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; expected a finite number above 0")
    return float(value)


def check_lr(value: object) -> float:
    """Return ``value`` as a float. Raises ValueError unless it is finite and above 0."""
    return check_above("lr", value)
