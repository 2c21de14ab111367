"""The noise of a minibatch's gradient at fixed weights, and the gradient noise scale (McCandlish 2018).

g is the gradient of one example's loss; G and Σ are its mean and covariance over the training set, whose N examples are
equally likely (so Σ divides by N). A minibatch's gradient is the mean of B of them.

Measures of single examples turn dropout off, and refuse batch statistics, under which an example has no gradient of its
own. ``micro_batches`` takes any net as it trains: with its dropout, and with batch statistics of each micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from helpers.engine import stack
from helpers.engine.stack import Stack
from helpers.measure import kernels
from helpers.measure.gradients import deterministic, mean_gradient
from helpers.problems import Solution
from helpers.problems.problem import call

_CHUNK = 1_000  # examples a pass over the training set, so that memory is flat in their number
_GRADIENT_BYTES = 2**26  # of the gradients that `torch.func` holds at a time, example by example


def statistics(s: Stack, inputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of tr Σ, the variance of one example's gradient, and of |G|²: two float64 ``(replicas,)``.

    Unbiased for examples drawn independently (McCandlish 2018, appendix A.1, with batches of 1 and n), so |G|² may come
    out below 0. The gradient noise scale is their ratio, best of averages over several calls: a mean of ratios is
    biased. All replicas take the same examples. Raises ValueError for fewer than two, and as ``of_examples`` does.
    """
    n = len(tree_leaves(targets)[0])
    if n < 2:
        raise ValueError(f"{n} examples; a variance needs at least two")
    norms, gradient, _ = of_examples(s, inputs, targets)
    mean = sum(g.reshape(len(g), -1).square().sum(1).cpu().double() for g in gradient.values())
    return (norms.mean(1) - mean) * n / (n - 1), (n * mean - norms.mean(1)) / (n - 1)


@dataclass(frozen=True)
class Noise:
    """Of a training set at fixed weights: tr Σ, |G|² and the mean loss.

    ``gradient`` is G by name, float64 ``(1, *shape)``; ``squared_norms`` are the examples' own, float64 ``(N,)``.
    """

    trace: float
    squared_gradient: float
    loss: float
    gradient: dict[str, torch.Tensor]
    squared_norms: torch.Tensor

    @property
    def gradient_noise_scale(self) -> float:
        """B_simple = tr Σ / |G|² (McCandlish 2018, eq. 2.9); inf where the gradient is 0."""
        return self.trace / self.squared_gradient if self.squared_gradient else math.inf


def exact(solution: Solution) -> Noise:
    """tr Σ and |G|² over the training set, from each example's gradient; sums in float64, memory flat in N."""
    s, dataset = stack.at(solution).train(), solution.problem.dataset
    squares, loss = [], 0.0
    gradient = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in s.parameters.items()}
    # One by one where a minibatch may pad its examples.
    chunks = torch.arange(dataset.num_train, device=dataset.device).split(_CHUNK if dataset.in_memory else 1)
    for part in chunks:
        norms, mean, losses = of_examples(s, *dataset.batch(part))
        share = len(part) / dataset.num_train
        squares, loss = [*squares, norms[0]], loss + losses.item() * share
        for name, total in gradient.items():
            total.add_(mean[name].cpu(), alpha=share)  # converted as it is added, entry by entry
    squared_gradient = sum(g.reshape(len(g), -1).square().sum(1) for g in gradient.values()).item()
    norms = torch.cat(squares)
    return Noise(norms.mean().item() - squared_gradient, squared_gradient, loss, gradient, norms)


def variance_of_mean(trace: float, batch_size: int, population: int | None = None) -> float:
    """E|G_B − G|² of a minibatch of B: tr Σ/B, and with a ``population`` of N, none drawn twice, × (N − B)/(N − 1)."""
    return trace / batch_size * (1.0 if population is None else (population - batch_size) / (population - 1))


class TwoBatch(NamedTuple):
    """Estimates from the gradients of small and of big minibatches; the standard error is that of the ratio."""

    trace: float
    squared_gradient: float
    gradient_noise_scale: float
    standard_error: float


def two_batch(
    small_squares: Sequence[float], big_squares: Sequence[float], small: int, big: int, *, paired: bool = False
) -> TwoBatch:
    """tr Σ and |G|², unbiased, from the squared norms of minibatch gradients of two sizes.

    McCandlish 2018, appendix A.1, with averages over the draws in place of single norms. The standard error of the
    ratio is the delta method's. Where |G|² does not stand out of the noise, the ratio is inf and its error NaN.

    small_squares, big_squares: squared norms, of at least two draws each. small, big: examples of a minibatch.
    paired: the draws of the two sizes belong together, pair by pair; else all are independent.
    Raises ValueError unless 1 <= small < big, with two draws of each.
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
    slopes = [per_trace + ratio * small * per_gradient, -per_trace - ratio * big * per_gradient]
    slopes = [slope / squared_gradient for slope in slopes]
    if paired:
        combined = slopes[0] * draws[0] + slopes[1] * draws[1]
        variance = combined.var(ddof=1) / len(combined)
    else:
        variance = sum(slope**2 * d.var(ddof=1) / len(d) for slope, d in zip(slopes, draws))
    return TwoBatch(trace, squared_gradient, ratio, math.sqrt(variance))


def micro_batches(
    solution: Solution, *, batch_size: int, micro_batch_size: int, draws: int, seed: int = 0
) -> pd.DataFrame:
    """Estimate tr Σ, |G|² and the noise scale of any net, from gradients of micro-batches and of their means.

    The net is measured as it trains: with dropout, and under batch normalisation with the statistics of each
    micro-batch, whose size is then part of the answer.

    batch_size: examples of a draw, with replacement; a multiple of the micro-batch size, at least twice that.
    micro_batch_size: examples of a micro-batch. draws: at least 2; the standard error falls with their root.
    Returns one row, a ``TwoBatch``. Raises ValueError for sizes that do not fit.
    """
    count, rest = divmod(batch_size, micro_batch_size) if micro_batch_size >= 1 else (0, 0)
    if rest or count < 2:
        raise ValueError(
            f"batch_size is {batch_size!r} with micro_batch_size {micro_batch_size!r}; expected a multiple of the "
            "micro-batch size, at least twice that"
        )
    s, dataset, rng = stack.at(solution).train(), solution.problem.dataset, np.random.default_rng([seed, batch_size])
    small, big = [], []
    with torch.random.fork_rng([dataset.device] if dataset.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(draws):
            total = {name: torch.zeros_like(p) for name, p in s.parameters.items()}
            squares = []
            for indices in rng.integers(0, dataset.num_train, (count, micro_batch_size)):
                _, gradient = mean_gradient(s, *dataset.batch(torch.from_numpy(indices).to(dataset.device)))
                squares.append(_squared_norm(gradient.values()))
                for name, g in gradient.items():
                    total[name].add_(g, alpha=1 / count)
            small.append(np.mean(squares))
            big.append(_squared_norm(total.values()))
    return pd.DataFrame([two_batch(small, big, micro_batch_size, batch_size, paired=True)])


def scale(solution: Solution, *, seed: int = 0) -> pd.DataFrame:
    """``exact`` for ``sweep.measure``: one row, no draw in it, so ``seed`` changes nothing."""
    found = exact(solution)
    row = {"trace": found.trace, "squared_gradient": found.squared_gradient, "train_loss": found.loss}
    return pd.DataFrame([{**row, "gradient_noise_scale": found.gradient_noise_scale}])


def minibatches(
    solution: Solution, *, batch_sizes: Sequence[int], draws: int, draw_size: int, replace: bool, seed: int = 0
) -> pd.DataFrame:
    """Gradients of minibatches drawn from the training set, at fixed weights.

    batch_sizes: sizes to draw. draws: minibatches of each size, or as many as ``draw_size`` examples make.
    replace: draw the examples of a minibatch with replacement. A draw is a function of (seed, size, its number).
    Returns one row a minibatch: ``batch_size``, ``squared_norm`` |G_B|² and ``squared_distance`` |G_B − G|² from the
    gradient over the whole set. Raises ValueError for a size that cannot be drawn.
    """
    s, dataset = stack.at(solution).train(), solution.problem.dataset
    limit = draw_size if replace else min(draw_size, dataset.num_train)
    if not all(1 <= b <= limit for b in batch_sizes):
        raise ValueError(f"batch_sizes is {list(batch_sizes)!r}; expected whole numbers from 1 to {limit}")
    drawn = {b: _drawn(dataset.num_train, b, min(draws, draw_size // b), replace, seed) for b in batch_sizes}
    if kernels.has_gram(s):
        kernel = kernels.gram(s, dataset.train_inputs, dataset.train_targets)
        lengths = {b: kernels.lengths_by_gram(kernel, chosen) for b, chosen in drawn.items()}
    else:
        whole = {name: g.to(dataset.device, s.parameters[name].dtype) for name, g in exact(solution).gradient.items()}
        with deterministic(s):
            lengths = {b: _lengths(s, whole, chosen) for b, chosen in drawn.items()}
    frames = [
        pd.DataFrame({"batch_size": b, "squared_norm": n, "squared_distance": d}) for b, (n, d) in lengths.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _drawn(population: int, batch_size: int, draws: int, replace: bool, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, batch_size])
    if replace:
        return rng.integers(0, population, (draws, batch_size))
    return np.stack([rng.choice(population, batch_size, replace=False, shuffle=False) for _ in range(draws)])


def _lengths(s: Stack, whole: dict[str, torch.Tensor], chosen: np.ndarray) -> tuple[list[float], list[float]]:
    """|G_B|² and |G_B − G|² of the minibatches ``chosen`` ``(draws, batch)``, where G is ``whole``."""
    norms, distances = [], []
    for indices in torch.from_numpy(chosen).to(s.problem.dataset.device):
        _, gradient = mean_gradient(s, *s.problem.dataset.batch(indices))
        norms.append(_squared_norm(gradient.values()))
        distances.append(_squared_norm([g - whole[name] for name, g in gradient.items()]))
    return norms, distances


def _squared_norm(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)


Part = tuple[dict[str, torch.Tensor], torch.Tensor]  # gradients (replicas, k, *shape), losses (replicas, k)


def of_examples(s: Stack, inputs: Any, targets: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Squared gradient norm of each example, float64 ``(replicas, n)``; their mean's gradient by name, and mean loss.

    Raises ValueError under batch normalisation in train mode, naming the layer.
    """
    s.refuse_batch_statistics("the gradient noise of single examples")
    norms, mean, total, n = [], {}, 0.0, len(tree_leaves(targets)[0])
    with deterministic(s):
        if s.closed_form:
            return kernels.examples(s, inputs, targets)
        if s.kernel is not None:
            fresh = [s.problem.net.module(0) for _ in range(s.replicas)]
            s = stack.Modules(s.problem, fresh, range(s.replicas)).load(s.state()).eval()
        each = _vmapped if n > 1 and _vmap_agrees(s, inputs, targets) else _one_by_one
        for gradients, losses in each(s, inputs, targets):
            norms.append(sum(g.reshape(*losses.shape, -1).square().sum(2).cpu().double() for g in gradients.values()))
            mean = {name: mean.get(name, 0.0) + g.sum(1) / n for name, g in gradients.items()}
            total = total + losses.sum(1).cpu().double() / n
    return torch.cat(norms, dim=1), mean, total


def _one_by_one(s: Stack, inputs: Any, targets: Any) -> Iterator[Part]:
    """Gradients of one example at a time, by a backward pass each: for any net."""
    for i in range(len(tree_leaves(targets)[0])):
        losses, gradient = mean_gradient(s, *_some((inputs, targets), slice(i, i + 1)))
        yield {name: g.unsqueeze(1) for name, g in gradient.items()}, losses.unsqueeze(1)


def _vmapped(s: Stack, inputs: Any, targets: Any) -> Iterator[Part]:
    """Gradients of as many examples at a time as fit into ``_GRADIENT_BYTES``, by ``torch.func``."""

    def loss(parameters: dict[str, torch.Tensor], module: nn.Module, x: Any, y: Any) -> torch.Tensor:
        x, y = tree_map(lambda t: t.unsqueeze(0), (x, y))
        outputs = call(lambda *args, **named: torch.func.functional_call(module, parameters, args, named), x)
        return s.problem.example_losses(outputs, y).squeeze(0)

    gradients = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, None, 0, 0))
    replicas = [{name: leaf.detach() for name, leaf in s.leaves(i).items()} for i in range(s.replicas)]
    chunk = max(1, _GRADIENT_BYTES // sum(p.numel() * p.element_size() for p in replicas[0].values()))
    for start in range(0, len(tree_leaves(targets)[0]), chunk):
        some = _some((inputs, targets), slice(start, start + chunk))
        found, losses = zip(*(gradients(own, module, *some) for own, module in zip(replicas, s.roots)))
        yield {name: torch.stack([g[name] for g in found]) for name in replicas[0]}, torch.stack(losses)


def _some(values: Any, part: slice) -> Any:
    return tree_map(lambda t: t[part], values)


def _vmap_agrees(s: Stack, inputs: Any, targets: Any) -> bool:
    """Whether ``torch.func`` can differentiate this net, and agrees with backward passes of two single examples."""
    if any(isinstance(m, nn.RNNBase) for m in s.roots[0].modules()):
        return False  # recurrent layers have no batching rule, so it would loop itself
    two = _some((inputs, targets), slice(0, 2))
    try:
        fast, alone = (
            [torch.cat(parts, dim=1) for parts in zip(*(gradients.values() for gradients, _ in each(s, *two)))]
            for each in (_vmapped, _one_by_one)
        )
    except Exception:  # whatever it cannot do: data-dependent control flow, missing rules, writing in place
        return False
    return _squared_norm([f - a for f, a in zip(fast, alone)]) <= 1e-6 * _squared_norm(alone)
