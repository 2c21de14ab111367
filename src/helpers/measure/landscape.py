"""The loss as a function of the weights: on the line between solutions, around them, its sharpness and its Hessian.

Everything is of a named set of examples; sharpness of another set is another number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import optimize
from scipy.sparse import linalg as sparse_linalg

from helpers.engine import kernels as models
from helpers.problems import data

_CHUNK = 5_000  # examples a pass, so that memory is flat in their number


class Landscape:
    """The mean loss over a named set of examples as a function of the weights, one vector of a network's parameters.

    ``weights``: one replica's, by name, with a replica axis of 1; they make ``origin``, float64 ``(parameters,)`` in
    the model's order. ``split``: ``"train"`` or ``"test"``; ``examples``: so many of it, the same for every network, or
    None for all. ``loss``: see ``models.example_losses``. ``dtype``: what the network computes with.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        model: str,
        weights: Mapping[str, torch.Tensor],
        *,
        split: str = "train",
        examples: int | None = None,
        loss: str = "cross_entropy",
        dtype: torch.dtype = torch.float32,
    ):
        inputs, targets = getattr(dataset, f"{split}_inputs"), getattr(dataset, f"{split}_targets")
        if examples is not None and not 1 <= examples <= len(targets):
            raise ValueError(
                f"examples is {examples!r}; expected 1 to {len(targets)} (the {split} set), or None for all"
            )
        chosen = data.epoch_order(len(targets), 0, 0)[:examples].to(dataset.device)
        models.check_loss(loss)
        self._kind = loss
        self.inputs, self.targets = inputs[chosen].to(dtype), targets[chosen]
        self.description = f"{len(chosen):,} {split} examples"
        self.net = models.restored(model, dataset, weights, dtype=dtype)
        self.origin = _vector(self.net.parameters())

    def _chunks(self):
        return zip(self.inputs.split(_CHUNK), self.targets.split(_CHUNK))

    def _move(self, vector: np.ndarray) -> list[torch.nn.Parameter]:
        parameters = list(self.net.parameters())
        with torch.no_grad():
            for p, part in zip(parameters, self._parts(vector)):
                p.copy_(part)
        return parameters

    def _parts(self, vector: np.ndarray) -> list[torch.Tensor]:
        flat = torch.from_numpy(np.ascontiguousarray(vector)).to(self.inputs.device, self.inputs.dtype)
        shapes = [p.shape for p in self.net.parameters()]
        return [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes)]

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return models.example_losses(self.net(inputs[None]), targets[None], self._kind).sum() / len(self.targets)

    @torch.no_grad()
    def loss(self, vector: np.ndarray) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) at ``vector``."""
        self._move(vector)
        loss, right = 0.0, 0
        for inputs, targets in self._chunks():
            logits = self.net(inputs[None])
            loss += float(models.example_losses(logits, targets[None], self._kind).sum())
            right += int((logits[0].argmax(1) == targets).sum())
        return loss / len(self.targets), right / len(self.targets)

    def gradient(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean loss and its gradient at ``vector``: float64 ``(parameters,)``."""
        parameters = self._move(vector)
        loss, total = 0.0, np.zeros_like(self.origin)
        for chunk in self._chunks():
            part = self._loss(*chunk)
            total += _vector(torch.autograd.grad(part, parameters))
            loss += float(part.detach())
        return loss, total

    def hessian_vector(self, v: np.ndarray) -> np.ndarray:
        """The Hessian at ``origin`` times ``v``, by differentiating twice (Pearlmutter 1994): ``(parameters,)``."""
        parameters, direction, total = self._move(self.origin), self._parts(v), np.zeros_like(self.origin)
        for chunk in self._chunks():
            slopes = torch.autograd.grad(self._loss(*chunk), parameters, create_graph=True)
            products = torch.autograd.grad(sum((g * d).sum() for g, d in zip(slopes, direction)), parameters)
            total += _vector(products)
        return total


def _vector(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).cpu().double().numpy()


def eigenvalues(landscape: Landscape, count: int = 1, *, tolerance: float = 1e-3, limit: int = 300) -> pd.DataFrame:
    """The largest eigenvalues of the Hessian, by Lanczos (scipy's ``eigsh``); the first is the *sharpness* λ_max.

    A row each: ``rank`` from 1, ``eigenvalue``, ``residual`` ‖Hv − λv‖ ÷ |λ|, ``converged`` within ``tolerance``, and
    ``products``, the Hessian–vector products that Lanczos took. What has not converged within ``limit`` restarts is
    NaN, and so is all of a network that diverged.
    """
    size, products = len(landscape.origin), 0

    def multiply(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return landscape.hessian_vector(np.ravel(v))

    if not math.isfinite(landscape.loss(landscape.origin)[0]):
        lost = {"rank": range(1, count + 1), "eigenvalue": math.nan, "residual": math.nan, "converged": False}
        return pd.DataFrame(lost).assign(products=0)
    operator = sparse_linalg.LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)  # fixed: ARPACK's own start would differ from run to run
    try:
        values, vectors = sparse_linalg.eigsh(operator, count, which="LA", v0=start, tol=tolerance, maxiter=limit)
    except sparse_linalg.ArpackNoConvergence as partly:
        values, vectors = partly.eigenvalues, partly.eigenvectors
    except sparse_linalg.ArpackError:  # a Hessian of zeros, or of what is not finite
        values, vectors = np.empty(0), np.empty((size, 0))
    rows = []
    for value, vector in sorted(zip(values, vectors.T), key=lambda pair: -pair[0]):
        residual = np.linalg.norm(landscape.hessian_vector(vector) - value * vector) / abs(value)
        rows.append({"eigenvalue": value, "residual": residual, "converged": True})
    rows += [{"eigenvalue": math.nan, "residual": math.nan, "converged": False}] * (count - len(rows))
    return pd.DataFrame(rows).assign(rank=range(1, count + 1), products=products)


def box_sharpness(
    landscape: Landscape, epsilon: float = 1e-3, *, dimensions: int | None = None, iterations: int = 10, seed: int = 0
) -> float:
    """How far the loss can rise within a box around the weights, in % of 1 + loss (Keskar 2016, metric 2.1).

    The box, ±ε(|A⁺w| + 1) a coordinate, spans all weights (A = 1) or a random subspace of so many ``dimensions`` (A has
    unit columns, drawn by ``seed``). Maximised by ``iterations`` of L-BFGS-B, as in the paper: a lower bound.
    """
    origin = landscape.origin
    if dimensions is None:
        size, forward, back = np.abs(origin) + 1, lambda z: z, lambda gradient: gradient
    else:
        columns = np.random.default_rng(seed).standard_normal((len(origin), dimensions))
        columns /= np.linalg.norm(columns, axis=0)
        size = np.abs(np.linalg.solve(columns.T @ columns, columns.T @ origin)) + 1  # A⁺w: the columns are independent
        forward, back = columns.__matmul__, columns.T.__matmul__

    def fall(z: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = landscape.gradient(origin + forward(z))
        return -loss, -back(gradient)

    at_origin = landscape.gradient(origin)[0]
    bounds = optimize.Bounds(-epsilon * size, epsilon * size)
    options = {"maxiter": iterations, "gtol": 0, "ftol": 0}  # scipy's own would stop before a step at a well-fitted net
    found = optimize.minimize(fall, np.zeros(len(size)), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return 100 * (-found.fun - at_origin) / (1 + at_origin)


def line(landscape: Landscape, start: np.ndarray, end: np.ndarray, alphas: Iterable[float]) -> pd.DataFrame:
    """Loss and accuracy at ``start + alpha · (end − start)``: columns ``alpha``, ``loss``, ``accuracy``."""
    rows = [(alpha, *landscape.loss(start + alpha * (end - start))) for alpha in alphas]
    return pd.DataFrame(rows, columns=["alpha", "loss", "accuracy"])


def filter_normalised(landscape: Landscape, seed: int = 0) -> np.ndarray:
    """A random direction, for each unit as long as that unit's weights; biases stay (Li 2018, section 4)."""
    rng, parts = np.random.default_rng(seed), []
    for name, p in landscape.net.named_parameters():
        units = p.detach()[0].flatten(1).cpu().double().numpy() if name.endswith("weight") else np.zeros(p[0].shape)
        noise = rng.standard_normal(units.shape)
        parts.append(
            noise * np.linalg.norm(units, axis=-1, keepdims=True) / np.linalg.norm(noise, axis=-1, keepdims=True)
        )
    return np.concatenate([part.ravel() for part in parts])


def rescale(weights: Mapping[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """The same function in other weights: the first ReLU layer times ``factor``, the next divided by it (Dinh 2017).

    Raises ValueError unless the factor is above 0: ReLU commutes with no other.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor is {factor!r}; expected a finite number above 0")
    following = "layers.1.weight" if "layers.1.weight" in weights else "head.weight"
    factors = {"layers.0.weight": factor, "layers.0.bias": factor, following: 1 / factor}
    return {name: tensor * factors.get(name, 1.0) for name, tensor in weights.items()}


def spectrum(
    dataset: data.Dataset, model: str, weights: Mapping[str, torch.Tensor], *, seed: int, count: int = 1, **of: object
) -> pd.DataFrame:
    """``eigenvalues`` of a network, as ``sweeps.measure`` asks for it; ``of``: the options of ``Landscape``."""
    return eigenvalues(Landscape(dataset, model, weights, **of), count)


def boxes(
    dataset: data.Dataset,
    model: str,
    weights: Mapping[str, torch.Tensor],
    *,
    seed: int,
    epsilons: Sequence[float],
    dimensions: Sequence[int | None] = (None,),
    **of: object,
) -> pd.DataFrame:
    """``box_sharpness`` of a network for each of ``epsilons`` and ``dimensions``, as ``sweeps.measure`` asks for it."""
    # In float64, for a rise of a fitted network's loss is small; where the device has it.
    dtype = torch.float32 if dataset.device.type == "mps" else torch.float64
    landscape = Landscape(dataset, model, weights, dtype=dtype, **of)
    rows = [
        {
            "epsilon": e,
            "dimensions": d or len(landscape.origin),
            "box_sharpness": box_sharpness(landscape, e, dimensions=d),
        }
        for e, d in itertools.product(epsilons, dimensions)
    ]
    return pd.DataFrame(rows)
