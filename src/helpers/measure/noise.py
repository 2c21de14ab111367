"""The noise of a minibatch's gradient at fixed weights, and the gradient noise scale (McCandlish 2018).

g is the gradient of one example's loss; G and Σ are its mean and covariance over a named set of examples, the
population, whose N examples are equally likely (so Σ divides by N). A minibatch's gradient is the mean of B of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from helpers.engine import kernels as models
from helpers.problems import data

_CHUNK = 1_000  # examples a pass over a population, so that memory is flat in their number
_GRADIENT_BYTES = 2**26  # of the gradients that `torch.func` holds at a time, example by example
_GRAM_BYTES = 2**29  # of a Gram matrix, beyond which minibatches are taken one by one: some 8,000 examples


def per_example_squared_norms(
    net: models.Model, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared gradient norm of each example's loss ``(replicas, n)`` and of their mean loss ``(replicas,)``, float64.

    ``inputs`` ``(n, *input_shape)`` go to every replica. Closed forms from one backward pass where linear layers and
    convolutions have all the weights; else ``torch.func``. Raises ValueError under batch normalisation.
    """
    norms, mean, _ = _examples(net, inputs, targets)
    return norms, sum(g.flatten(1).square().sum(1).cpu().double() for g in mean)


def noise_statistics(
    net: models.Model, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of tr Σ, the variance of one example's gradient, and of |G|²: two float64 ``(replicas,)``.

    Unbiased for examples drawn independently (McCandlish 2018, appendix A.1, with batches of 1 and n); so |G|² may come
    out below 0. The gradient noise scale B_simple is their ratio, best of averages over several calls: a mean of
    ratios is biased. Raises ValueError for fewer than two examples.
    """
    n = len(inputs)
    if n < 2:
        raise ValueError(f"{n} examples; a variance needs at least two")
    norms, mean = per_example_squared_norms(net, inputs, targets)
    return (norms.mean(1) - mean) * n / (n - 1), (n * mean - norms.mean(1)) / (n - 1)


@dataclass(frozen=True)
class Noise:
    """Of a population at fixed weights, all float64: tr Σ, |G|² and the mean loss ``(replicas,)``; G by parameter.

    ``squared_norms`` are the examples' own ``(replicas, N)``.
    """

    trace: torch.Tensor
    squared_gradient: torch.Tensor
    loss: torch.Tensor
    gradient: list[torch.Tensor]
    squared_norms: torch.Tensor

    @property
    def gradient_noise_scale(self) -> torch.Tensor:
        """B_simple = tr Σ / |G|² (McCandlish 2018, eq. 2.9): ``(replicas,)``."""
        return self.trace / self.squared_gradient


def exact(net: models.Model, inputs: torch.Tensor, targets: torch.Tensor) -> Noise:
    """tr Σ and |G|² over a population, from each of its examples' gradients; sums in float64, memory flat in N."""
    squares, loss, gradient = [], 0.0, [torch.zeros(p.shape, dtype=torch.float64) for p in net.parameters()]
    for x, y in zip(inputs.split(_CHUNK), targets.split(_CHUNK)):
        norms, mean, losses = _examples(net, x, y)
        share = len(y) / len(targets)
        squares, loss = [*squares, norms], loss + losses * share
        for total, g in zip(gradient, mean):
            total.add_(g.cpu(), alpha=share)  # converted as it is added, entry by entry
    squared_gradient, norms = sum(g.flatten(1).square().sum(1) for g in gradient), torch.cat(squares, dim=1)
    return Noise(norms.mean(1) - squared_gradient, squared_gradient, loss, gradient, norms)


def variance_of_mean(trace: float, batch_size: int, population: int | None = None) -> float:
    """E|G_B − G|² of a minibatch of B: tr Σ/B, and with a ``population`` of N, none drawn twice, × (N − B)/(N − 1)."""
    return trace / batch_size * (1.0 if population is None else (population - batch_size) / (population - 1))


class TwoBatch(NamedTuple):
    """Estimates from the gradients of small and of big minibatches; the standard error is that of the ratio."""

    trace: float
    squared_gradient: float
    gradient_noise_scale: float
    standard_error: float


def two_batch(small_squares: Sequence[float], big_squares: Sequence[float], small: int, big: int) -> TwoBatch:
    """tr Σ and |G|², unbiased, from the squared norms of independent minibatch gradients of two sizes.

    McCandlish 2018, appendix A.1, with averages over the draws in place of single norms. The standard error of the
    ratio is the delta method's. Where |G|² does not stand out of the noise, the ratio is inf and its error NaN. Raises
    ValueError unless 1 <= small < big, with two draws of each.
    """
    draws = [np.asarray(squares, dtype=float) for squares in (small_squares, big_squares)]
    if not 1 <= small < big or min(len(d) for d in draws) < 2:
        counts = f"{len(draws[0])} and {len(draws[1])} draws"
        raise ValueError(f"batches of {small} and {big}, {counts}; expected 1 <= small < big, at least two draws each")
    at_small, at_big = (float(d.mean()) for d in draws)
    per_trace, per_gradient = 1 / (1 / small - 1 / big), 1 / (big - small)
    trace = (at_small - at_big) * per_trace
    squared_gradient = (big * at_big - small * at_small) * per_gradient
    if squared_gradient <= 0:
        return TwoBatch(trace, squared_gradient, math.inf, math.nan)
    ratio = trace / squared_gradient
    slopes = (per_trace + ratio * small * per_gradient, -per_trace - ratio * big * per_gradient)
    variance = sum((slope / squared_gradient) ** 2 * d.var(ddof=1) / len(d) for slope, d in zip(slopes, draws))
    return TwoBatch(trace, squared_gradient, ratio, math.sqrt(variance))


def scale(dataset: data.Dataset, model: str, weights: Mapping[str, torch.Tensor], *, seed: int = 0) -> pd.DataFrame:
    """``exact`` over the training set, for ``sweeps.measure``: one row, no draw in it, so ``seed`` changes nothing."""
    found = exact(models.restored(model, dataset, weights), dataset.train_inputs, dataset.train_targets)
    row = {"trace": found.trace, "squared_gradient": found.squared_gradient, "train_loss": found.loss}
    row["gradient_noise_scale"] = found.gradient_noise_scale
    return pd.DataFrame([{name: value.item() for name, value in row.items()}])


def minibatches(
    dataset: data.Dataset,
    model: str,
    weights: Mapping[str, torch.Tensor],
    *,
    batch_sizes: Sequence[int],
    draws: int,
    draw_size: int,
    replace: bool,
    seed: int = 0,
) -> pd.DataFrame:
    """Gradients of minibatches drawn from the training set, with or without replacement, at weights that stay.

    Of each size ``draws`` minibatches, or as many as ``draw_size`` examples make. One row each: ``batch_size``,
    ``squared_norm`` |G_B|² and ``squared_distance`` |G_B − G|² from the gradient over the whole set. A draw is a
    function of (seed, size, its number). Of a perceptron all are read off one ``gram`` of the training set, unless that
    is large. Raises ValueError for a size that cannot be drawn.
    """
    limit = draw_size if replace else min(draw_size, dataset.num_train)
    if not all(1 <= b <= limit for b in batch_sizes):
        raise ValueError(f"batch_sizes is {list(batch_sizes)!r}; expected whole numbers from 1 to {limit}")
    net, population = models.restored(model, dataset, weights), dataset.num_train
    drawn = {b: _drawn(population, b, min(draws, draw_size // b), replace, seed) for b in batch_sizes}
    if net.closed_form and 8 * population**2 <= _GRAM_BYTES:
        kernel = gram(net, dataset.train_inputs, dataset.train_targets)
        lengths = {b: _lengths_by_gram(kernel, chosen) for b, chosen in drawn.items()}
    else:
        lengths = {b: _lengths_one_by_one(dataset, net, chosen) for b, chosen in drawn.items()}
    columns = ["squared_norm", "squared_distance"]
    return pd.concat(
        [pd.DataFrame({"batch_size": b, **dict(zip(columns, each))}) for b, each in lengths.items()], ignore_index=True
    )


def _drawn(population: int, batch_size: int, draws: int, replace: bool, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, batch_size])
    if replace:
        return rng.integers(0, population, (draws, batch_size))
    return np.stack([rng.choice(population, batch_size, replace=False, shuffle=False) for _ in range(draws)])


@torch.no_grad()
def gram(net: models.Model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Inner products of the gradients of each two examples' losses, for one replica: float64 ``(n, n)``.

    Summed over linear layers with inputs a and output gradients δ: (aᵢ·aⱼ + 1)·(δᵢ·δⱼ), the empirical neural tangent
    kernel of the loss. A minibatch's squared gradient is the mean of its part of it. ValueError for other models.
    """
    if not net.closed_form or net.replicas > 1:
        raise ValueError("gram takes one replica of a perceptron without normalisation")
    kernel = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for factors in net.backpropagate(inputs[None], targets[None])[1]:
        delta, a = factors.delta.flatten(0, -2) * len(inputs), factors.given.flatten(0, -2)  # of losses, not their mean
        kernel += ((a @ a.T).add_(1) * (delta @ delta.T)).cpu()
    return kernel


def _lengths_by_gram(kernel: torch.Tensor, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of minibatches ``(draws, batch)``: |G_B|² and |G_B − G|², float64."""
    batch, population = chosen.shape[1], len(kernel)
    with_mean, squares = kernel.mean(1), []
    # Summing up each minibatch's own part costs B² look-ups; a product with how often it has each example, N² at the
    # speed of arithmetic, some 300 times as fast.
    one_by_one = 300 * batch**2 < population**2
    for part in torch.from_numpy(chosen).split(max(1, 4_000_000 // (batch**2 if one_by_one else population))):
        if one_by_one:
            squares.append(kernel[part[:, :, None], part[:, None, :]].sum((1, 2)))
        else:
            counts = torch.zeros(len(part), population, dtype=torch.float64)
            counts.scatter_add_(1, part, torch.ones(part.shape, dtype=torch.float64))
            squares.append(((counts @ kernel) * counts).sum(1))
    squared_norm = torch.cat(squares).numpy() / batch**2
    along = with_mean[torch.from_numpy(chosen)].mean(1).numpy()
    return squared_norm, (squared_norm - 2 * along + with_mean.mean().item()).clip(min=0)


def _lengths_one_by_one(dataset: data.Dataset, net: models.Model, chosen: np.ndarray) -> tuple[list, list]:
    whole = [
        g.to(dataset.device, torch.float32) for g in exact(net, dataset.train_inputs, dataset.train_targets).gradient
    ]
    norms, distances = [], []
    for indices in torch.from_numpy(chosen).to(dataset.device):
        logits = net(dataset.train_inputs[indices][None])
        loss = models.example_losses(logits, dataset.train_targets[indices][None]).mean()
        found = torch.autograd.grad(loss, list(net.parameters()))
        norms.append(_squared_norm(found))
        distances.append(_squared_norm([g - w for g, w in zip(found, whole)]))
    return norms, distances


def _squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)


def _examples(
    net: models.Model, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Squared gradient norm of each example, gradients of the mean loss by parameter, and the mean loss."""
    if net.training and any(isinstance(m, models.BatchNorm) for m in net.modules()):
        raise ValueError(
            "under batch normalisation an example has no gradient of its own: its loss depends on the others in its "
            "batch; normalise with norm='group', or call net.eval() for the running statistics"
        )
    if net.closed_form:
        return _by_factors(net, inputs, targets)
    layers = [m for m in net.modules() if isinstance(m, (models.Linear, models.Conv2d))]
    closed = {id(p) for layer in layers for p in layer.parameters()}
    if all(id(p) in closed for p in net.parameters()):
        return _closed_form(net, layers, inputs, targets)
    return _one_by_one(net, inputs, targets)


@torch.no_grad()
def _by_factors(net: models.Model, inputs: torch.Tensor, targets: torch.Tensor):
    """Of a layer with input a and output gradient δ an example's squared norm is (‖a‖² + 1)·‖δ‖² (Goodfellow 2015)."""
    n, mean = len(inputs), {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    norms = torch.zeros(net.replicas, n, dtype=torch.float64)
    losses, factors = net.backpropagate(inputs.expand(net.replicas, *inputs.shape), targets.expand(net.replicas, -1))
    for each in factors:
        each.add_to(mean, alpha=1.0)
        of_a, of_delta = (torch.linalg.vector_norm(t, dim=-1).cpu().double() for t in (each.given, each.delta))
        norms[each.replica] += (of_a.square() + 1) * (of_delta * n).square()  # of each example's own loss, not the mean
    return norms, list(mean.values()), losses.cpu().double()


def _closed_form(net: models.Model, layers: list[torch.nn.Module], inputs: torch.Tensor, targets: torch.Tensor):
    """As ``_by_factors``, by autograd; a convolution's gradient is Σ over positions of δ·patchᵀ."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0].detach(), out))) for layer in layers
    ]
    try:
        logits = net(inputs.expand(net.replicas, *inputs.shape))
    finally:
        for hook in hooks:
            hook.remove()
    losses = models.example_losses(logits, targets.expand(net.replicas, -1)).mean(1)
    found = torch.autograd.grad(losses.sum(), [out for _, out in seen] + list(net.parameters()))
    norms = torch.zeros(net.replicas, len(inputs), dtype=torch.float64)
    for layer, (given, _), delta in zip(layers, seen, found):
        delta = delta * len(inputs)  # of each example's own loss, not of the mean
        if isinstance(layer, models.Conv2d):
            patches = F.unfold(given, layer.weight.shape[-1], padding=layer.weight.shape[-1] // 2)
            patches = patches.view(len(inputs), net.replicas, -1, patches.shape[-1])
            delta = delta.view(len(inputs), net.replicas, -1, patches.shape[-1])
            weight = torch.einsum("nrop,nrip->nroi", delta, patches).flatten(2).square().sum(2)
            norms += (weight + delta.sum(3).square().sum(2)).T.cpu().double()
        else:
            norms += ((given.square().sum(2) + 1) * delta.square().sum(2)).cpu().double()
    return norms, list(found[len(seen) :]), losses.detach().cpu().double()


def _one_by_one(net: models.Model, inputs: torch.Tensor, targets: torch.Tensor):
    """Each example's gradient in full, so many at a time as fit into ``_GRADIENT_BYTES``; for any parameters."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: Mapping[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor):
        logits = torch.func.functional_call(net, parameters, (x.expand(net.replicas, 1, *x.shape),))
        losses = models.example_losses(logits, y.expand(net.replicas, 1)).squeeze(1)
        return losses.sum(), losses  # replicas do not mix: the gradient of the sum is each one's own

    gradients = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(None, 0, 0))
    chunk = max(1, _GRADIENT_BYTES // sum(p.numel() * p.element_size() for p in parameters.values()))
    norms, mean, total = [], [0.0] * len(parameters), 0.0
    for x, y in zip(inputs.split(chunk), targets.split(chunk)):
        each, losses = gradients(parameters, x, y)
        norms.append(sum(g.flatten(2).square().sum(2).cpu().double() for g in each.values()).T)
        mean = [before + g.sum(0) / len(inputs) for before, g in zip(mean, each.values())]
        total = total + losses.sum(0).cpu().double() / len(inputs)
    return torch.cat(norms, dim=1), mean, total
