"""The loss as a function of the weights: on the line between solutions, around them, its sharpness and its Hessian.

Everything is of a named set of examples; sharpness of another set is another number.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import optimize
from scipy.sparse import linalg as sparse_linalg

from helpers.engine import stack
from helpers.engine.order import epoch_order
from helpers.measure import kernels
from helpers.measure.gradients import cast, deterministic
from helpers.problems import Solution, nets

_CHUNK = 5_000  # examples a pass of a built-in net, so that memory is flat in their number


class Landscape:
    """The mean loss over a named set of examples as a function of the weights, one vector of a net's parameters.

    The solution's weights make ``origin``, float64 ``(parameters,)``. Dropout is off, and batch normalisation uses its
    running statistics.

    split: ``"train"`` or ``"test"``.
    examples: so many of the split, the same for every net; None for all.
    dtype: of the net's computations.
    Raises ValueError for more examples than there are.
    """

    def __init__(self, solution: Solution, *, split: str = "train", examples: int | None = None,
                 dtype: torch.dtype = torch.float32):  # fmt: skip
        dataset = solution.problem.dataset
        size = dataset.size(split)
        if not 1 <= (size if examples is None else examples) <= size:
            raise ValueError(f"examples is {examples!r}; expected 1 to {size} (the {split} set), or None for all")
        chosen = epoch_order(size, 0, 0)[:examples].to(dataset.device)
        self.num_examples = len(chosen)
        self.stack = stack.at(solution, dtype=dtype)
        chunk = self.stack.chunk if self.stack.kernel is None else _CHUNK
        self.batches = [cast(dataset.batch(part, split), dtype) for part in chosen.split(chunk)]
        self.origin = _vector(self.stack.parameters.values())
        # Where one batch holds all examples, every product shares one forward and backward pass.
        self._curvature = functools.lru_cache(maxsize=1)(lambda i: kernels.curvature(self.stack, *self.batches[i]))

    def _move(self, vector: np.ndarray) -> None:
        with torch.no_grad():
            for p, part in zip(self.stack.parameters.values(), self._parts(vector)):
                p.copy_(part)

    def _parts(self, vector: np.ndarray) -> list[torch.Tensor]:
        parameters = list(self.stack.parameters.values())
        flat = torch.from_numpy(np.ascontiguousarray(vector)).to(parameters[0].device, parameters[0].dtype)
        return [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters)]

    def _slopes(self, batch: tuple, create_graph: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A batch's part of the mean loss, and of its gradient."""
        loss = self.stack.losses(*batch).sum() / self.num_examples
        leaves = self.stack.autograd_leaves()
        return loss, torch.autograd.grad(loss, leaves, create_graph=create_graph, materialize_grads=True)

    @torch.no_grad()
    def loss(self, vector: np.ndarray) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1; NaN where there is none) at ``vector``."""
        self._move(vector)
        with deterministic(self.stack):
            sums = [torch.cat(self.stack.evaluate(*batch)) for batch in self.batches]
        return tuple((sum(sums) / self.num_examples).tolist())

    def gradient(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean loss and its gradient at ``vector``: float64 ``(parameters,)``."""
        self._move(vector)
        loss, total = 0.0, np.zeros_like(self.origin)
        with deterministic(self.stack):
            for batch in self.batches:
                part, slopes = self._slopes(batch)
                total += _vector(slopes)
                loss += float(part.detach())
        return loss, total

    def hessian_vector(self, v: np.ndarray) -> np.ndarray:
        """The Hessian at ``origin`` times ``v`` (Pearlmutter 1994): ``(parameters,)``."""
        self._move(self.origin)
        direction, total = self._parts(v), np.zeros_like(self.origin)
        if self.stack.closed_form:
            named = dict(zip(self.stack.parameters, direction))
            for i, (_, targets) in enumerate(self.batches):
                total += _vector(self._curvature(i)(named).values()) * (len(targets) / self.num_examples)
            return total
        if self.stack.kernel is None:
            direction = [d.squeeze(0) for d in direction]  # a module's parameters have no replica axis
        with deterministic(self.stack):
            for batch in self.batches:
                _, slopes = self._slopes(batch, create_graph=True)
                along = sum((g * d).sum() for g, d in zip(slopes, direction))
                leaves = self.stack.autograd_leaves()
                total += _vector(torch.autograd.grad(along, leaves, materialize_grads=True))
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

    operator = sparse_linalg.LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)  # fixed: ARPACK's own start would differ from run to run
    kept = min(size, 2 * count + 10)  # Lanczos vectors: λ_max converges within a dozen, and scipy takes 20 at least
    values, vectors = np.empty(0), np.empty((size, 0))
    try:
        if math.isfinite(landscape.loss(landscape.origin)[0]):
            values, vectors = sparse_linalg.eigsh(
                operator, count, which="LA", v0=start, tol=tolerance, maxiter=limit, ncv=kept
            )
    except sparse_linalg.ArpackNoConvergence as partly:
        values, vectors = partly.eigenvalues, partly.eigenvectors
    except sparse_linalg.ArpackError:
        pass  # a Hessian of zeros, or of what is not finite
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


def filter_normalised(landscape: Landscape, seed: int = 0) -> np.ndarray:
    """A random direction, for each unit as long as that unit's weights; biases stay (Li 2018, section 4).

    Units are the first axis of every parameter with at least two axes; any other parameter counts as a bias.
    """
    rng, parts = np.random.default_rng(seed), []
    for p in landscape.stack.parameters.values():
        own = p.detach()[0].cpu().double()
        units = own.flatten(1).numpy() if own.dim() > 1 else np.zeros(own.numel())
        noise = rng.standard_normal(units.shape)
        parts.append(
            noise * np.linalg.norm(units, axis=-1, keepdims=True) / np.linalg.norm(noise, axis=-1, keepdims=True)
        )
    return np.concatenate([part.ravel() for part in parts])


def rescale(solution: Solution, factor: float) -> Solution:
    """The same function in other weights: the first ReLU layer times ``factor``, the next divided by it (Dinh 2017).

    Raises ValueError unless the factor is above 0, because ReLU commutes with no other; and for a net that is neither a
    built-in one without normalisation nor a Sequential of linear layers, convolutions, ReLU and max pooling.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor is {factor!r}; expected a finite number above 0")
    module, names, weighted = solution.problem.net.module(0), [], (torch.nn.Linear, torch.nn.Conv2d)
    if type(module) in (nets.MLP, nets.CNN) and not module.norms:
        names = [*(f"layers.{i}" for i in range(len(module.layers))), "head"]
    elif type(module) is torch.nn.Sequential:
        homogeneous = (*weighted, torch.nn.ReLU, torch.nn.Flatten, torch.nn.MaxPool2d)
        if all(isinstance(layer, homogeneous) for layer in module):
            names = [str(i) for i, layer in enumerate(module) if isinstance(layer, weighted)]
    if len(names) < 2 or f"{names[1]}.weight" not in solution.weights:
        raise ValueError(f"{solution.problem.net.name} is no plain ReLU net with a hidden layer, which rescale needs")
    factors = {f"{names[0]}.weight": factor, f"{names[0]}.bias": factor, f"{names[1]}.weight": 1 / factor}
    return Solution(solution.problem, {n: tensor * factors.get(n, 1.0) for n, tensor in solution.weights.items()})


def spectrum(solution: Solution, *, seed: int = 0, count: int = 1, **of: object) -> pd.DataFrame:
    """``eigenvalues`` for ``sweep.measure``; ``of``: the options of ``Landscape``."""
    return eigenvalues(Landscape(solution, **of), count)


def boxes(solution: Solution, *, seed: int = 0, epsilons: Sequence[float], dimensions: Sequence[int | None] = (None,),
          **of: object) -> pd.DataFrame:  # fmt: skip
    """``box_sharpness`` for each of ``epsilons`` and ``dimensions``, for ``sweep.measure``."""
    # In float64, where the device has it, because the loss of a fitted net rises by little.
    dtype = torch.float32 if solution.problem.dataset.device.type == "mps" else torch.float64
    landscape, rows = Landscape(solution, dtype=dtype, **of), []
    for e, d in itertools.product(epsilons, dimensions):
        sharpness = box_sharpness(landscape, e, dimensions=d)
        rows.append({"epsilon": e, "dimensions": d or len(landscape.origin), "box_sharpness": sharpness})
    return pd.DataFrame(rows)
