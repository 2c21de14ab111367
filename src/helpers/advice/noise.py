"""Noise: tr Σ and |G|² of the gradient at held weights, from micro-batches of any net; an interval for their ratio.

Each micro-batch's gradient is kept as a sketch of 8,192 numbers: entries are added up in random places with random
signs, which keeps inner products to 1.6 %. So the jackknife over micro-batches costs next to nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from helpers.advice.interval import Interval
from helpers.advice.subject import Subject
from helpers.engine.stack import Stack
from helpers.measure import noise
from helpers.measure.gradients import mean_gradient
from helpers.problems import Solution

_SKETCH = 8_192
_FEWEST, _MOST = 24, 4_096  # micro-batches
_FACTOR = 2.0  # an interval that reaches no further each way is narrow enough
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg")


@dataclass(frozen=True)
class Noise:
    """The gradient noise scale tr Σ ÷ |G|² in examples, plain and in the optimizer's metric (None where it has none).

    draws of ``micro_batch_size`` examples each; 0 draws: exact, from every example's own gradient.
    """

    trace: float
    squared_gradient: float
    scale: Interval
    in_metric: Interval | None
    micro_batch_size: int
    draws: int

    @property
    def sentence(self) -> str:
        """The noise scale, in words."""
        how = f"{self.draws} micro-batches of {self.micro_batch_size}" if self.draws else "every example's gradient"
        metric = "" if self.in_metric is None else f"; {self.in_metric} in the optimizer's metric"
        return f"the gradient noise scale is {self.scale} examples{metric} (from {how})"


def measure(subject: Subject, seconds: float, micro_batch_size: int, seed: int = 0) -> Noise:
    """Draw micro-batches with replacement until the intervals are narrow or ``seconds`` are over.

    The net is measured as it trains, dropout included. Raises ValueError under batch statistics, naming the layer.
    """
    ends = time.perf_counter() + seconds
    training, data = subject.training(), subject.problem.dataset
    s = training.stack.train()
    s.refuse_batch_statistics("the gradient noise")
    metric = _metric(subject, s)
    m = max(1, min(micro_batch_size, subject.num_train // 2))
    sketch, rng = _Sketch(sum(p.numel() for p in s.parameters.values()), data.device), np.random.default_rng(seed)
    plain, preconditioned, look = [], [], _FEWEST
    while len(plain) < _MOST and (time.perf_counter() < ends or len(plain) < 3):
        indices = torch.from_numpy(rng.integers(0, data.num_train, m)).to(data.device)
        gradient = mean_gradient(s, *data.batch(indices))[1]
        plain.append(sketch(gradient.values()))
        if metric:
            preconditioned.append(sketch(g / metric[name] for name, g in gradient.items()))
        if len(plain) == look:
            look *= 2
            if all(ratio(np.stack(x), m)[2].within(_FACTOR) for x in (plain, preconditioned) if x):
                break
    trace, squared, scale = ratio(np.stack(plain), m)
    draws, in_metric = len(plain), ratio(np.stack(preconditioned), m)[2] if metric else None
    if s.closed_form:
        exact = noise.exact(Solution(subject.problem, s.state()))
        trace, squared, draws = exact.trace, exact.squared_gradient, 0
        scale = Interval.exactly(exact.gradient_noise_scale) if squared > 0 else scale
    return Noise(trace, squared, scale, in_metric, m, draws)


def ratio(gradients: np.ndarray, micro_batch_size: int) -> tuple[float, float, Interval]:
    """tr Σ and |G|², unbiased, from micro-batches' gradients ``(draws, entries)``; Fieller's interval of their ratio.

    Their covariance is the jackknife's over draws. Where |G|² does not stand out, the interval has no upper end.
    """
    k, m = len(gradients), micro_batch_size
    squares, total = np.square(gradients).sum(1), gradients.sum(0)

    def estimates(sum_of_squares: np.ndarray, square_of_sum: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        trace = m * (sum_of_squares - square_of_sum / n) / (n - 1)
        return trace, square_of_sum / n**2 - trace / (m * n)

    trace, squared = (float(v) for v in estimates(squares.sum(), total.dot(total), k))
    without = estimates(squares.sum() - squares, total.dot(total) - 2 * gradients @ total + squares, k - 1)
    covariance = np.cov(np.stack(without)) * (k - 1) ** 2 / k
    return trace, squared, fieller(trace, squared, covariance, k - 1)


def fieller(x: float, y: float, covariance: np.ndarray, freedom: int) -> Interval:
    """The 95 % interval of x/y, two estimates with this covariance; open above where y does not stand out."""
    t = stats.t.ppf(0.975, freedom) ** 2
    a, b, c = y**2 - t * covariance[1, 1], x * y - t * covariance[0, 1], x**2 - t * covariance[0, 0]
    root = math.sqrt(max(b**2 - a * c, 0.0))
    if a > 0 and y > 0:
        low, high = max((b - root) / a, 0.0), (b + root) / a
        return Interval(low, max(x / y, 1e-300), high)
    low = max((b - root) / a, (b + root) / a, 0.0) if a and c > 0 else 0.0
    return Interval(low, max(x / y if y > 0 else low, low, 1e-300), math.inf)


class _Sketch:
    """Adds the entries of a gradient up in ``_SKETCH`` places, with signs; a short one is kept as it is."""

    def __init__(self, entries: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self._at = None
        if entries > _SKETCH:  # the second half of the places counts negatively
            self._at = torch.randint(2 * _SKETCH, (entries,), generator=generator).to(device)

    def __call__(self, gradients) -> np.ndarray:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        if self._at is not None:
            halves = torch.zeros(2 * _SKETCH, dtype=flat.dtype, device=flat.device).index_add_(0, self._at, flat)
            flat = halves[:_SKETCH] - halves[_SKETCH:]
        return flat.double().cpu().numpy()


def _metric(subject: Subject, s: Stack) -> Mapping[str, torch.Tensor]:
    """The square root of the optimizer's second moments, by parameter; empty where it keeps none."""
    found, names = {}, list(s.parameters)
    for path, value in subject.state.items():
        kind, _, rest = path.partition("/")
        name, _, key = rest.rpartition("/")
        if kind == "optimizer" and key in _SECOND_MOMENTS:
            name = names[int(name)] if name.isdigit() and name not in s.parameters else name
            found[name] = value.to(s.problem.dataset.device).sqrt() + 1e-8
    fits = found.keys() == set(names) and all(found[n].shape == p.shape for n, p in s.parameters.items())
    return found if fits else {}
