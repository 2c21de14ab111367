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

from helpers import data, models

_CHUNK = 500  # examples a pass over a population, so that memory is flat in their number
_GRADIENT_BYTES = 2**26  # of the gradients that `torch.func` holds at a time, example by example


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
    """Of a population at fixed weights, all float64: tr Σ, |G|² and the mean loss ``(replicas,)``; G by parameter."""

    trace: torch.Tensor
    squared_gradient: torch.Tensor
    loss: torch.Tensor
    gradient: list[torch.Tensor]

    @property
    def gradient_noise_scale(self) -> torch.Tensor:
        """B_simple = tr Σ / |G|² (McCandlish 2018, eq. 2.9): ``(replicas,)``."""
        return self.trace / self.squared_gradient


def exact(net: models.Model, inputs: torch.Tensor, targets: torch.Tensor) -> Noise:
    """tr Σ and |G|² over a population, from each of its examples' gradients; sums in float64, memory flat in N."""
    squares, loss, gradient = 0.0, 0.0, [0.0] * len(list(net.parameters()))
    for x, y in zip(inputs.split(_CHUNK), targets.split(_CHUNK)):
        norms, mean, losses = _examples(net, x, y)
        share = len(y) / len(targets)
        squares, loss = squares + norms.mean(1) * share, loss + losses * share
        gradient = [total + g.cpu().double() * share for total, g in zip(gradient, mean)]
    squared_gradient = sum(g.flatten(1).square().sum(1) for g in gradient)
    return Noise(squares - squared_gradient, squared_gradient, loss, gradient)


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
    function of (seed, size, its number). Raises ValueError for a size that cannot be drawn.
    """
    limit = draw_size if replace else min(draw_size, dataset.num_train)
    if not all(1 <= b <= limit for b in batch_sizes):
        raise ValueError(f"batch_sizes is {list(batch_sizes)!r}; expected whole numbers from 1 to {limit}")
    net = models.restored(model, dataset, weights)
    whole = [
        g.to(dataset.device, torch.float32) for g in exact(net, dataset.train_inputs, dataset.train_targets).gradient
    ]
    rows = []
    for batch_size in batch_sizes:
        for number in range(min(draws, draw_size // batch_size)):
            chosen = np.random.default_rng([seed, batch_size, number]).choice(dataset.num_train, batch_size, replace)
            indices = torch.from_numpy(chosen).to(dataset.device)
            logits = net(dataset.train_inputs[indices][None])
            loss = models.example_losses(logits, dataset.train_targets[indices][None]).mean()
            found = torch.autograd.grad(loss, list(net.parameters()))
            apart = [g - w for g, w in zip(found, whole)]
            lengths = {"squared_norm": _squared_norm(found), "squared_distance": _squared_norm(apart)}
            rows.append({"batch_size": batch_size, **lengths})
    return pd.DataFrame(rows)


def _squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors)


def _examples(
    net: models.Model, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Squared gradient norm of each example, gradients of the mean loss by parameter, and the mean loss."""
    if net.training and any(isinstance(m, models.BatchNorm) for m in net.modules()):
        raise ValueError(
            "under batch normalisation an example has no gradient of its own: its loss depends on the others in its "
            "batch; normalise with norm='group', or call net.eval() for the running statistics"
        )
    layers = [m for m in net.modules() if isinstance(m, (models.Linear, models.Conv2d))]
    closed = {id(p) for layer in layers for p in layer.parameters()}
    if all(id(p) in closed for p in net.parameters()):
        return _closed_form(net, layers, inputs, targets)
    return _one_by_one(net, inputs, targets)


def _closed_form(net: models.Model, layers: list[torch.nn.Module], inputs: torch.Tensor, targets: torch.Tensor):
    """For a linear layer with input a and output gradient δ the norm is (‖a‖² + 1)·‖δ‖² (Goodfellow 2015); a
    convolution's is that of Σ over positions of δ·patchᵀ."""
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
