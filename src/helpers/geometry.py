"""Where the weights are: radius, distance travelled, and how it grows with time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats


def _squared_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # On the CPU, because not every device has float64.
    return {name: t.detach().flatten(1).cpu().double().square().sum(1) for name, t in tensors.items()}


def weight_norm(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all weights and biases together, the *radius*: float64 ``(replicas,)``."""
    return sum(_squared_norms(weights).values()).sqrt()


def distances(model: torch.nn.Module, initial_weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Radius, and distance from the initial weights: in all, of weights and biases apart, and of each parameter.

    Keys ``weight_norm``, ``distance_from_init``, ``distance_weights``, ``distance_biases`` and ``distance/<name>``;
    values float64 ``(replicas,)``. A ``measures`` for ``Training``.
    """
    now = {name: p.detach() for name, p in model.named_parameters()}
    squared = _squared_norms({name: now[name] - initial_weights[name] for name in now})
    biases, weights = (sum(v for name, v in squared.items() if name.endswith("bias") == of) for of in (True, False))
    return {
        "weight_norm": weight_norm(now),
        "distance_from_init": (weights + biases).sqrt(),
        "distance_weights": weights.sqrt(),
        "distance_biases": biases.sqrt(),
        **{f"distance/{name}": v.sqrt() for name, v in squared.items()},
    }


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
    """``y = scale · t^slope``, by least squares in the logarithms; residual in the units of ``y``. Needs t, y > 0."""
    line = stats.linregress(*np.log(_positive(t, y)))
    return _with_residual(Fit("power", float(np.exp(line.intercept)), float(line.slope), 0.0), t, y)


def fit_log(t: np.ndarray, y: np.ndarray) -> Fit:
    """``y = scale + slope · log t``, by least squares (the form of Hoffer et al. 2017, section 4). Needs t > 0."""
    t, y = _positive(t), np.asarray(y, dtype=float)
    line = stats.linregress(np.log(t[0]), y)
    return _with_residual(Fit("log", float(line.intercept), float(line.slope), 0.0), t[0], y)


def _positive(*arrays: np.ndarray) -> np.ndarray:
    values = np.asarray(arrays, dtype=float)
    if values.shape[-1] < 3 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError("a fit needs at least three points, all finite and above 0")
    return values


def _with_residual(fit: Fit, t: np.ndarray, y: np.ndarray) -> Fit:
    return Fit(fit.form, fit.scale, fit.slope, float(np.sqrt(np.mean((fit(t) - np.asarray(y, dtype=float)) ** 2))))
