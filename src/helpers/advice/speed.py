"""Speed: seconds a step by batch size, the loader's apart, and the turning point where the fixed part is paid off."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from helpers.advice.interval import Interval, number
from helpers.advice.subject import Subject
from helpers.measure import race

_REPEATS = 5  # steps timed at a size, at least
_ENOUGH = 0.3  # seconds of timed steps after which a size has been timed enough
_DRAWS = 400  # of the bootstrap
_RESOLVED = 20  # times the largest size timed: a turning point beyond it is not told from none
_FLAT = 0.95  # of the seconds an example at half the size: a larger size buys nothing more


@dataclass(frozen=True)
class Speed:
    """Seconds a step = ``fixed`` + ``per_example`` · batch.

    seconds: medians by batch size, of all that a step waits for. turning: fixed ÷ per_example, in examples.
    loader: seconds an example that loading takes (over its processes); ``loader_from``: the smallest size timed at
    which loading takes longer than all else; None where it never does.
    """

    seconds: dict[int, float]
    fixed: float
    per_example: float
    turning: Interval
    loader: float
    loader_from: int | None

    def step(self, batch_size: float, micro_batch_size: float | None = None) -> float:
        """Seconds of a step, whose fixed part recurs with every micro-batch."""
        return self.fixed * max(1.0, batch_size / (micro_batch_size or batch_size)) + self.per_example * batch_size

    @property
    def sentence(self) -> str:
        """The price of a step, in words."""
        price = f"{self.fixed * 1e3:.3g} ms + {self.per_example * 1e3:.3g} ms an example"
        text = f"a step takes {price}: the turning point is {self.turning} examples"
        if self.loader_from is None:
            return text
        return f"{text}; the loader is the limit from {number(self.loader_from)} on: a larger batch buys nothing there"


def measure(subject: Subject, seconds: float, most: int) -> Speed:
    """Time steps at sizes ×2 up to ``most``, until the seconds an example are flat or ``seconds`` are over.

    Raises ValueError where there are not two sizes to time.
    """
    ends, timed, flat = time.perf_counter() + seconds, {}, 0
    size = 1 if subject.training(1).stack.train().batch_statistics() is None else 2
    while size <= most and flat < 2:
        timed[size] = _steps(subject, size)
        took = np.median(timed[size].sum(1))
        half = timed.get(size // 2)
        flat = flat + 1 if half is not None and took > _FLAT * 2 * np.median(half.sum(1)) else 0
        size *= 2
        if len(timed) >= 3 and time.perf_counter() + 2 * (_REPEATS + 2) * took > ends:
            break
    if len(timed) < 2:
        raise ValueError(f"only batches of {[*timed]} can be timed; a fixed part and a price an example need two sizes")
    waited = {s: _waited(t, subject.workers) for s, t in timed.items()}
    loading = {s: float(np.median(t[:, 0])) / max(1, subject.workers) for s, t in timed.items()}
    bound = next((s for s, t in timed.items() if loading[s] > np.median(t[:, 1])), None)
    seconds = {s: float(np.median(w)) for s, w in waited.items()}
    price, turning = _price(seconds), _turning(waited)
    if not turning.low and math.isinf(turning.high):
        raise ValueError("the timings scatter too much for a line through them: give it more time, on a quiet machine")
    an_example = price.fixed / turning.estimate if turning.estimate < price.in_examples else price.per_example
    return Speed(seconds, price.fixed, an_example, turning, loading[size // 2] / (size // 2), bound)


def _steps(subject: Subject, size: int) -> np.ndarray:
    """Seconds of loading and of all else, ``(steps, 2)``, after two steps that warm up."""
    training, rows = subject.training(size), []
    device, data = subject.problem.dataset.device, subject.problem.dataset

    def wait() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    while len(rows) < _REPEATS + 2 or (sum(map(sum, rows)) < _ENOUGH and len(rows) < 10 * _REPEATS):
        if training.examples_seen + size > subject.num_train:
            training.examples_seen = 0  # whole minibatches only
        indices, started = training.next_indices()[0], wait()
        data.batch(indices)
        loaded = wait()
        training.step()
        rows.append((loaded - started, max(wait() - loaded - (loaded - started), 1e-9)))
    return np.array(rows[2:])


def _waited(timed: np.ndarray, workers: int) -> np.ndarray:
    """Seconds of each step: loading, then all else; or the longer of the two where processes load beside it."""
    loading, rest = timed.T
    return np.maximum(loading / workers, rest) if workers else loading + rest


def _price(seconds: dict[int, float]) -> race.StepPrice:
    return race.price_of([*seconds], [*seconds.values()])


def _turning(waited: dict[int, np.ndarray]) -> Interval:
    """Fixed ÷ per example, by a bootstrap over sizes (the line is a model) and over the timings of each."""
    rng, sizes, ratios = np.random.default_rng(0), [*waited], []
    for _ in range(_DRAWS):
        chosen = rng.choice(sizes, len(sizes))
        if len(set(chosen)) > 1:
            medians = {int(s): np.median(rng.choice(waited[s], len(waited[s]))) for s in set(chosen)}
            ratios.append(_price(medians).in_examples)
    most = _RESOLVED * sizes[-1]
    low, high = np.quantile(ratios, [0.025, 0.975])
    best = float(np.clip(_price({s: np.median(w) for s, w in waited.items()}).in_examples, 0.1, most))
    return Interval(min(float(low), best), best, max(float(high), best) if high < most else math.inf)
