"""Gradient norms: along the write-up's *walk*, and at *frozen* weights; and the effect of stale gradients.

Walk and frozen are two protocols. Both split one draw of examples into minibatches of a size, add up the minibatches'
mean gradients, each weighted by its share of the draw, and take the norm of the sum (Shen 2018, "orthogonality"). The
walk takes an SGD step after each minibatch. Frozen does not, so its sum cannot depend on the split.

Every measure takes a solution of any problem. Dropout is off, so that a measure is a function of the weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from helpers.engine import stack
from helpers.engine.stack import Stack
from helpers.measure import geometry, kernels
from helpers.problems import Solution

# |g| beyond which the write-up's histograms of single gradient entries differ most between sizes 2 and 1024.
TAIL = 0.0082
_STACK_BYTES = 4e6  # of weights walked side by side: more fall out of a CPU's cache and take longer, not less
_CHUNK = 2_000  # examples a pass over the training set


def draw(num_examples: int, draw_size: int, seed: int, trial: int) -> torch.Tensor:
    """Draw a trial's examples with replacement: int64 ``(draw_size,)``, a function of (seed, trial) alone."""
    rng = np.random.default_rng([seed, trial, 1])
    return torch.from_numpy(rng.integers(0, num_examples, draw_size))


def mean_gradient(
    s: Stack, inputs: Any, targets: Any, *, shared: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each replica's mean loss ``(replicas,)``, and its gradient by name ``(replicas, *shape)``.

    shared: all replicas take the same inputs; else one minibatch a replica.
    """
    losses = s.losses(inputs, targets, shared=shared).mean(1)
    found = torch.autograd.grad(losses.sum(), s.autograd_leaves(), allow_unused=True, materialize_grads=True)
    return losses.detach(), s.stacked(found)


@contextlib.contextmanager
def deterministic(s: Stack) -> Iterator[None]:
    """Turn dropout off, use running statistics, and choose operators that can be differentiated twice and batched."""
    # cuDNN differentiates recurrent nets once, and in train mode only.
    recurrent, nothing = any(isinstance(m, torch.nn.RNNBase) for m in s.roots[0].modules()), contextlib.nullcontext()
    training = s.roots[0].training
    s.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False) if recurrent else nothing:
            yield
    finally:
        s.train(training)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Convert the floating tensors among inputs or targets to ``dtype``."""
    return tree_map(lambda t: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t, values)


def walk(solution: Solution, *, batch_sizes: Sequence[int], trials: Sequence[int], draw_size: int = 1024,
         lr: float = 0.01, seed: int = 0, layers: str = "last") -> pd.DataFrame:  # fmt: skip
    """The write-up's protocol (Shen 2018): an SGD step after each minibatch; the weights are reset for each size.

    batch_sizes: sizes to split a draw into. trials: numbers of the draws; each size splits the same ones.
    draw_size: examples a draw. lr: learning rate of the steps.
    layers: ``"last"`` records the last layer's weight alone, as Shen did: of any module, its last parameter with at
        least two axes. ``"all"`` records every parameter, each in a column, and the norm of the whole gradient.
    Returns one row per (batch_size, trial): ``gradient_norm`` and ``tail_fraction`` (entries beyond ``TAIL``) of the
    last layer's weight. Raises ValueError under batch normalisation.
    """
    s, dataset = _measured(solution, "walk"), solution.problem.dataset
    last, recorded = _recorded(s, solution, layers, batch_sizes, draw_size)
    draws = {trial: draw(dataset.num_train, draw_size, seed, trial).to(dataset.device) for trial in trials}
    if kernels.walks_lazily(s, draw_size):
        lazily = ((t, kernels.walk_lazily(s, indices, batch_sizes, lr, recorded)) for t, indices in draws.items())
        return pd.DataFrame(
            [row for t, totals in lazily for b, total in zip(batch_sizes, totals) for row in _rows(total, last, b, [t])]
        )
    added = {*recorded, f"{last.rpartition('.')[0]}.bias"}  # a kernel adds a layer's weight and bias together
    size = sum(p[0].numel() * p.element_size() for p in s.parameters.values())
    together = len(trials) if dataset.device.type != "cpu" else max(1, int(_STACK_BYTES // size))
    together = together if s.kernel is not None else 1  # replicas are modules, and gain nothing from each other
    rows = []
    for start in range(0, len(trials), together):
        chunk = list(trials[start : start + together])
        indices, s = torch.stack([draws[trial] for trial in chunk]), stack.at(solution, len(chunk))
        for batch_size in batch_sizes:
            s.load(solution.weights)
            total = {name: torch.zeros_like(p) for name, p in s.parameters.items() if name in added}
            with deterministic(s):
                for minibatch in indices.split(batch_size, dim=1):
                    _descend(s, *s.batch(minibatch), lr, total, minibatch.shape[1] / draw_size)
            rows += _rows({name: total[name] for name in recorded}, last, batch_size, chunk)
    return pd.DataFrame(rows)


def _descend(s: Stack, inputs: Any, targets: Any, lr: float, total: dict[str, torch.Tensor], by: float) -> None:
    """Step by −lr times each replica's minibatch gradient, and add ``by`` times the gradient to ``total``."""
    if s.closed_form:
        return kernels.descend(s, inputs, targets, lr, total, by)
    _, gradient = mean_gradient(s, inputs, targets, shared=False)
    with torch.no_grad():
        for name, g in gradient.items():
            if name in total:
                total[name].add_(g, alpha=by)
            s.parameters[name].sub_(g, alpha=lr)


def frozen(solution: Solution, *, batch_sizes: Sequence[int], trials: Sequence[int], draw_size: int = 1024,
           seed: int = 0, layers: str = "last") -> pd.DataFrame:  # fmt: skip
    """The same draws and sums as ``walk``, at fixed weights; same columns.

    With ``layers="last"`` also ``minibatch_noise``: the root mean square distance between a minibatch's gradient and
    the gradient over the whole training set.
    """
    s, dataset = _measured(solution, "frozen"), solution.problem.dataset
    last, recorded = _recorded(s, solution, layers, batch_sizes, draw_size)
    rows = []
    with deterministic(s):
        full = _full_gradient(s, last) if layers == "last" else None
        for trial, batch_size in itertools.product(trials, batch_sizes):
            indices = draw(dataset.num_train, draw_size, seed, trial).to(dataset.device)
            total: dict[str, torch.Tensor] = {}
            squared_distance = count = 0
            whole = draw_size - draw_size % batch_size
            parts = [indices[:whole].view(-1, batch_size), indices[whole:].view(1, -1)]
            for minibatches in (part for part in parts if part.numel()):
                for name, gradient in _minibatch_gradients(s, minibatches, recorded):
                    scaled = gradient.sum(0, keepdim=True) * (minibatches.shape[1] / draw_size)
                    total[name] = total[name] + scaled if name in total else scaled
                    if full is not None and minibatches.shape[1] == batch_size:
                        squared_distance += float((gradient - full).cpu().double().square().sum())
                        count += len(gradient)
            row = _rows(total, last, batch_size, [trial])
            if full is not None:
                row[0]["minibatch_noise"] = (squared_distance / count) ** 0.5
            rows += row
    return pd.DataFrame(rows)


def staleness(
    solution: Solution, *, batch_size: int, counts: Sequence[int], base_rates: Sequence[float], seed: int = 0
) -> pd.DataFrame:
    """How far n SGD steps of size m end from one step over the same nm examples (Masters & Luschi 2018, eq. 7–9).

    Steps are w − η̃ Σ∇ℓ, summed over examples, so both move by the same if gradients do not change on the way: the
    large batch is the small one with stale gradients.

    batch_size: m. counts: values of n. base_rates: values of η̃.
    Returns one row per count and rate: ``relative_distance`` of the end points, in units of the large step. Computes in
    float64, because small rates hardly move the weights.
    """
    s, dataset = _measured(solution, "staleness", torch.float64), solution.problem.dataset
    order = draw(dataset.num_train, batch_size * max(counts), seed, 0).to(dataset.device)
    origin = s.weights()

    def descend(rate: float) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """End points of so many small steps from the start, and the sums of their gradients."""
        s.load(solution.weights)
        total = {name: torch.zeros_like(p) for name, p in origin.items()}
        ends = {}
        for n, minibatch in enumerate(order.split(batch_size), 1):
            _descend(s, *cast(s.batch(minibatch[None]), torch.float64), rate * batch_size, total, batch_size)
            if n in counts:
                moved = torch.cat([(p.detach() - origin[name]).flatten() for name, p in s.parameters.items()])
                ends[n] = moved, torch.cat([t.flatten() for t in total.values()])
        return ends

    with deterministic(s):
        at_start = {n: gradient for n, (_, gradient) in descend(0.0).items()}
        small = {rate: descend(rate) for rate in base_rates}
    rows = []
    for n, rate in itertools.product(counts, base_rates):
        large = -rate * at_start[n]
        distance = float((small[rate][n][0] - large).norm() / large.norm())
        rows.append({"count": n, "base_rate": rate, "relative_distance": distance})
    return pd.DataFrame(rows)


def _measured(solution: Solution, what: str, dtype: torch.dtype | None = None) -> Stack:
    s = stack.at(solution, dtype=dtype).train()
    s.refuse_batch_statistics(what)
    return s


def _recorded(
    s: Stack, solution: Solution, layers: str, batch_sizes: Sequence[int], draw_size: int
) -> tuple[str, list[str]]:
    """Check the arguments; returns the name of the last layer's weight, and the names of all that are recorded."""
    check_splits(batch_sizes, draw_size)
    if layers not in ("last", "all"):
        raise ValueError(f"layers is {layers!r}; expected 'last' or 'all'")
    names = [name for name in solution.weights if name in s.parameters]
    matrices = [name for name, p in s.parameters.items() if p.dim() > 2]  # with the replica axis
    last = "head.weight" if s.kernel is not None else (matrices or names)[-1]
    return last, [last] if layers == "last" else names


def check_splits(batch_sizes: Sequence[int], draw_size: int) -> None:
    """Raise ValueError unless every size is from 1 to the size of a draw."""
    for size in batch_sizes:
        if not 1 <= size <= draw_size:
            raise ValueError(f"batch_size is {size!r}; expected a whole number from 1 to {draw_size} (the draw)")


def _minibatch_gradients(s: Stack, minibatches: torch.Tensor, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, gradients ``(k, *parameter)``) of the mean losses of ``minibatches`` ``(n, batch)``."""
    if s.kernel is not None and len(names) == 1:
        yield names[0], kernels.head_gradients(s, minibatches)
        return
    for minibatch in minibatches:
        _, gradient = mean_gradient(s, *s.problem.dataset.batch(minibatch))
        yield from ((name, gradient[name]) for name in names)


def _full_gradient(s: Stack, last: str) -> torch.Tensor:
    """The last layer's gradient of the mean loss over the training set, in chunks: ``(1, *parameter)``."""
    dataset, total = s.problem.dataset, []
    for chunk in torch.arange(dataset.num_train, device=dataset.device).split(s.chunk if s.kernel is None else _CHUNK):
        ((_, gradient),) = _minibatch_gradients(s, chunk.unsqueeze(0), [last])
        total.append(gradient.cpu().double() * (len(chunk) / dataset.num_train))
    return torch.stack(total).sum(0).float().to(dataset.device)


def _rows(
    total: Mapping[str, torch.Tensor], last: str, batch_size: int, trials: Sequence[int]
) -> list[dict[str, float]]:
    squared = geometry.squared_norms(total)
    tail = (total[last].reshape(len(total[last]), -1).abs() > TAIL).float().mean(1)
    rows = []
    for i, trial in enumerate(trials):
        row = {"batch_size": batch_size, "trial": trial, "gradient_norm": squared[last][i].sqrt().item()}
        row["tail_fraction"] = tail[i].item()
        if len(total) > 1:
            row["network_gradient_norm"] = sum(squared.values())[i].sqrt().item()
            row |= {f"gradient_norm/{name}": value[i].sqrt().item() for name, value in squared.items()}
        rows.append(row)
    return rows
