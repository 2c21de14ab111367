"""Least-squares fits that show their residual: a power law, a logarithm, and the critical-batch hyperbola."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class Fit:
    """A least-squares fit: its parameters, its curve, and its residual (root mean square, in the data's units)."""

    form: str
    scale: float
    slope: float
    residual: float

    def __call__(self, t: np.ndarray) -> np.ndarray:
        t = np.asarray(t, dtype=float)
        return self.scale * t**self.slope if self.form == "power" else self.scale + self.slope * np.log(t)


def fit_power(t: np.ndarray, y: np.ndarray) -> Fit:
    """Fit ``y = scale · t^slope`` by least squares in the logarithms; residual in the units of ``y``. Needs t, y > 0.

    >>> fit_power([1, 2, 4], [3, 6, 12])(8).round(9)
    np.float64(24.0)
    """
    t, y = _positive(t, y)
    line = stats.linregress(np.log(t), np.log(y))
    return _fit("power", float(np.exp(line.intercept)), float(line.slope), t, y)


def fit_log(t: np.ndarray, y: np.ndarray) -> Fit:
    """Fit ``y = scale + slope · log t`` by least squares (the form of Hoffer et al. 2017, section 4). Needs t > 0."""
    (t,), y = _positive(t), np.asarray(y, dtype=float)
    line = stats.linregress(np.log(t), y)
    return _fit("log", float(line.intercept), float(line.slope), t, y)


@dataclass(frozen=True)
class Hyperbola:
    """Steps and examples to a target against batch size: (S/S_min − 1)(E/E_min − 1) = 1 (McCandlish 2018, eq. 2.11).

    ``residual``: root mean square of log S, so about the relative deviation of a point.
    """

    min_steps: float
    min_examples: float
    residual: float

    @property
    def critical_batch_size(self) -> float:
        """E_min/S_min, where a run takes twice the fewest steps and twice the fewest examples."""
        return self.min_examples / self.min_steps

    def steps(self, batch_size: np.ndarray) -> np.ndarray:
        """S = S_min + E_min/B."""
        return self.min_steps + self.min_examples / np.asarray(batch_size, dtype=float)

    def examples(self, batch_size: np.ndarray) -> np.ndarray:
        """E = S·B = E_min + S_min·B."""
        return self.min_examples + self.min_steps * np.asarray(batch_size, dtype=float)


def fit_hyperbola(batch_sizes: np.ndarray, steps: np.ndarray) -> Hyperbola:
    """Fit the hyperbola to steps-to-target by batch size, by least squares in log S; both parameters above 0.

    Raises ValueError for fewer than three different sizes. Points on one branch alone fix one parameter; the other is
    then an extrapolation, so compare ``critical_batch_size`` with the sizes given.
    """
    b, s = _positive(batch_sizes, steps)
    if len(set(b)) < 3:
        raise ValueError("a hyperbola has two parameters: its fit needs at least three different batch sizes")

    def deviations(logs: np.ndarray) -> np.ndarray:
        return np.logaddexp(logs[0], logs[1] - np.log(b)) - np.log(s)

    found = optimize.least_squares(deviations, np.log([s.min(), (s * b).min()]), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    return Hyperbola(*np.exp(found.x).tolist(), float(np.sqrt(np.mean(found.fun**2))))


def _positive(*arrays: np.ndarray) -> np.ndarray:
    values = np.asarray(arrays, dtype=float)
    if values.shape[-1] < 3 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError("a fit needs at least three points, all finite and above 0")
    return values


def _fit(form: str, scale: float, slope: float, t: np.ndarray, y: np.ndarray) -> Fit:
    exact = Fit(form, scale, slope, 0.0)
    return replace(exact, residual=float(np.sqrt(np.mean((exact(t) - y) ** 2))))
