"""Answer: the batch size of least time, T(B) = S_min (1 + B_c/B)(a + b·B), as a range, and all that goes with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers.advice.contract import IMPOSSIBLE, Contract
from helpers.advice.critical import Branches
from helpers.advice.interval import Interval
from helpers.advice.memory import Memory
from helpers.advice.noise import Noise
from helpers.advice.rate import Rate
from helpers.advice.speed import Speed
from helpers.advice.subject import Subject
from helpers.measure.rates import RULES

SLACK = 0.1  # of the least time, which any batch size of the range keeps
_PER_EPOCH = 20  # steps an epoch, at least
STAND_IN = 4.0  # how far a noise scale may be off the critical batch, as a factor
DEVICES = (1, 2, 8, 64, 512)
BANDWIDTH, LATENCY = 1e10, 5e-5  # bytes and seconds of an all-reduce's rounds: stated, not measured


@dataclass(frozen=True)
class Answer:
    """The recommendation.

    critical: B_c, read off the phase ``critical_from``. best: B*, by the turning point and B_c alone.
    low, high: the sizes within 10 % of the least time that ``binding`` allows. cap: the largest size that memory, the
    data and the loader allow. batch_size: the one to take. lr: for it.
    decay_rates: momentum and β for it, with half-lives kept in examples. micro_batch_size × accumulation: how to take
    the present batch size. examples_count: the largest batch that wastes at most 10 % of the examples.
    table: by batch size. devices: by number of devices.
    """

    critical: Interval
    critical_from: str
    best: Interval
    low: int
    high: int
    cap: float
    binding: str
    batch_size: int
    lr: Interval
    decay_rates: dict[str, float]
    warm_up: str
    micro_batch_size: int
    accumulation: int
    examples_count: float
    table: pd.DataFrame
    devices: pd.DataFrame


def combine(subject: Subject, found: dict[str, object]) -> Answer | None:
    """Combine what the phases found, by name; None where the speed or any critical batch is missing."""
    speed, memory, noise, rate = (found.get(name) for name in ("speed", "memory", "noise", "rate"))
    branches = {name: one for name, one in found.items() if isinstance(one, Branches)}
    critical, source = _critical(branches, noise)
    if not isinstance(speed, Speed) or critical is None:
        return None
    best = (speed.turning * critical) ** 0.5
    caps = {"the data: 20 steps an epoch": subject.num_train / _PER_EPOCH}
    if isinstance(memory, Memory):
        caps["memory"] = memory.fits
    if speed.loader_from is not None:
        caps["the loader"] = speed.loader_from
    name = min(caps, key=caps.get)
    cap = max(caps[name], 1)
    low, least, high, bound = within(speed.turning.estimate, critical.estimate, cap)
    binding = name if bound else "the critical batch and the fixed part of a step"
    low, high = min(math.ceil(low), math.floor(high)), math.floor(high)
    chosen = _round(least, low, high)
    fits = memory.fits if isinstance(memory, Memory) else subject.batch_size
    micro = min(fits, subject.batch_size)
    contract = found.get("contract")
    if isinstance(contract, Contract) and contract.accumulation == IMPOSSIBLE:
        micro = subject.batch_size
    return Answer(
        critical, source, best, low, high, float(cap), binding, chosen, _rate(subject, rate, branches, chosen),
        {name: value ** (chosen / subject.batch_size) for name, value in subject.decay_rates.items()},
        _warm_up(subject, chosen), micro, math.ceil(subject.batch_size / micro), critical.estimate / 10,
        _table(subject, speed, critical, memory, high), _devices(subject, speed, critical),
    )  # fmt: skip


def _critical(branches: dict[str, Branches], noise: object) -> tuple[Interval | None, str]:
    """The critical batch of the latest weights, else the noise scale in its place, known no better than to a factor."""
    name = latest(branches)
    if name is not None:
        return branches[name].size, name
    if isinstance(noise, Noise):
        scale = noise.in_metric or noise.scale
        return scale.widened(STAND_IN), "noise"
    return None, ""


def latest(branches: dict[str, Branches]) -> str | None:
    """The latest weights whose branches bound the critical batch on both sides, else from below; None without any."""
    bounded = [name for name, one in branches.items() if one.size.bounded]
    return ([*(name for name, one in branches.items() if one.size.low > 0), *bounded] or [None])[-1]


def within(turning: float, critical: float, cap: float) -> tuple[float, float, float, bool]:
    """Sizes up to ``cap`` whose time is within ``SLACK`` of the least: lowest, least and highest; if the cap binds.

    Without a cap they reach equally far, by a factor of 1.86 or more, each way from B* = √(B_t · B_c).
    """
    best = math.sqrt(turning * critical)
    sizes = np.geomspace(min(1.0, best / 1e3), max(1e4, best * 1e3), 20_000)
    sizes = np.append(sizes[sizes < cap], min(cap, sizes[-1]))
    times = relative_time(sizes, turning, critical)
    inside = sizes[times <= (1 + SLACK) * times.min()]
    return max(1.0, inside[0]), max(1.0, sizes[times.argmin()]), max(1.0, inside[-1]), bool(inside[-1] == sizes[-1])


def _round(value: float, low: int, high: int) -> int:
    """The power of two nearest to ``value`` in the range; without one, the whole number nearest to it."""
    near = [2**power for power in range(31) if low <= 2**power <= high]
    return min(near, key=lambda size: abs(math.log(size / value))) if near else min(max(round(value), low), high)


def _rate(subject: Subject, rate: object, branches: dict[str, Branches], batch_size: int) -> Interval:
    """The learning rate for ``batch_size``: between those of the branches, else by the rule from the best found."""
    base, factor = Interval.exactly(subject.lr), (batch_size / subject.batch_size) ** RULES[subject.rule]
    base = rate.best if isinstance(rate, Rate) else base
    name = latest(branches)
    if name is None:
        return base * factor
    rates = branches[name].rates
    logs = np.pad(np.log([*rates.values()]), 1, mode="edge")
    smooth = (logs[:-2] + logs[1:-1] + logs[2:]) / 3  # each is known to the grid's step alone
    at = np.interp(math.log(batch_size), np.log([*rates]), smooth)
    return Interval(0.5, 1.0, 2.0) * math.exp(at)  # the grid's step


def _warm_up(subject: Subject, batch_size: int) -> str:
    second = subject.decay_rates.get("β₂")
    if second is None or subject.rule == "linear":
        return "the first 5 % of the steps, where the rate is above half the largest stable one (custom, not measured)"
    steps = 2 / (1 - second ** (batch_size / subject.batch_size))
    return f"{max(1, round(steps)):,} steps, 2/(1 − β₂) (custom, not measured)"


def relative_time(batch_size: np.ndarray, turning: float, critical: float) -> np.ndarray:
    """Seconds to the same loss, relative to the least: (1 + B_c/B)(B_t + B)/(√B_t + √B_c)²."""
    return (1 + critical / batch_size) * (turning + batch_size) / (math.sqrt(turning) + math.sqrt(critical)) ** 2


def _table(subject: Subject, speed: Speed, critical: Interval, memory: object, high: int) -> pd.DataFrame:
    """By batch size: what fits, and steps, examples and seconds to the same loss relative to the fewest, with bands."""
    top = min(subject.num_train, max(8 * high, 16 * subject.batch_size))
    sizes = np.array([2**power for power in range(31) if 2**power <= top], dtype=float)
    turning, c = speed.turning.estimate, critical.estimate
    ends = [[max(end, 1e-2) if end < math.inf else 1e2 * one.estimate for end in (one.low, one.high)]
            for one in (speed.turning, critical)]  # fmt: skip
    corners = np.array([relative_time(sizes, t, k) for t in (turning, *ends[0]) for k in (c, *ends[1])])
    fits = ["unknown"] * len(sizes)
    if isinstance(memory, Memory):
        fits = ["proven" if b <= memory.proven else "predicted" if b <= memory.fits else "no" for b in sizes]
    micro = memory.fits if isinstance(memory, Memory) else None
    return pd.DataFrame({
        "batch_size": sizes.astype(int), "fits": fits,
        "step_seconds": [speed.step(b, micro and min(b, micro)) for b in sizes],
        "steps": 1 + c / sizes, "steps_low": 1 + ends[1][0] / sizes, "steps_high": 1 + ends[1][1] / sizes,
        "examples": 1 + sizes / c, "examples_low": 1 + sizes / ends[1][1], "examples_high": 1 + sizes / ends[1][0],
        "seconds": relative_time(sizes, turning, c), "seconds_low": corners.min(0), "seconds_high": corners.max(0),
    })  # fmt: skip


def _devices(subject: Subject, speed: Speed, critical: Interval) -> pd.DataFrame:
    """By number of devices: the best global batch, the speed-up, and the share of examples that it wastes."""
    sizes = (v.numel() * v.element_size() for name, v in subject.state.items() if name.startswith("weights/"))
    bytes_, c, rows = sum(sizes), critical.estimate, []
    for count in DEVICES:
        reduce = 0.0 if count == 1 else 2 * (count - 1) / count * bytes_ / BANDWIDTH + LATENCY * math.log2(count)
        turning = count * max(speed.fixed + reduce, 1e-9) / speed.per_example
        best = max(math.sqrt(turning * c), count)
        seconds = (1 + c / best) * (speed.fixed + reduce + speed.per_example * best / count)
        rows.append({"devices": count, "batch_size": best, "per_device": best / count, "reduce_seconds": reduce,
                     "seconds": seconds, "examples": 1 + best / c})  # fmt: skip
    table = pd.DataFrame(rows)
    table["speed_up"] = table.seconds[0] / table.seconds
    table["worth"] = table.speed_up / table.devices >= 0.5
    return table.drop(columns="seconds")
