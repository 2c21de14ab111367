"""The settings of a live training, as a table. To add one, add its row here and its control's row in ``controls``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from helpers.engine.optimizers import OPTIMIZERS, check_optimizer
from helpers.engine.schedules import check_examples, check_lr


@dataclass(frozen=True)
class Setting:
    """A keyword of ``Training`` that a control moves.

    check: (value, settings, num_train) → the value in its type; raises ValueError for a bad one.
    live: it is an attribute of a training and acts at the next step; any other starts over.
    """

    default: object
    check: Callable[[object, Mapping[str, object], int], object]
    live: bool = False


def one_of(name: str, value: object, choices: tuple) -> object:
    """Return ``value``. Raises ValueError unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(map(str, choices))}")
    return value


def _momentum(value: object, settings: Mapping[str, object], _: int) -> float:
    check_optimizer(settings["optimizer"], value)
    return float(value)


SETTINGS = {
    "optimizer": Setting("sgd", lambda value, *_: one_of("optimizer", value, OPTIMIZERS)),
    "batch_size": Setting(8, lambda value, _, num_train: check_examples("batch_size", value, num_train), live=True),
    "lr": Setting(0.05, lambda value, *_: check_lr(value), live=True),
    "momentum": Setting(0.0, _momentum, live=True),
}
LIVE = tuple(name for name, setting in SETTINGS.items() if setting.live)
