"""Gradient norms: along the write-up's *walk*, and at *frozen* weights; and what becomes of gradients that go stale.

Walk and frozen are two protocols. Both split one draw of examples into minibatches of a size, add up the minibatches'
mean gradients, each weighted by its share of the draw, and take the norm of the sum (Shen 2018, "orthogonality"). The
walk takes an SGD step after each minibatch; frozen does not, so there the sum cannot depend on the split.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from helpers.engine import kernels as models
from helpers.problems import data

# |g| beyond which the write-up's histograms of single gradient entries differ most between sizes 2 and 1024.
TAIL = 0.0082
_STACK_BYTES = 4e6  # of weights walked side by side: more fall out of a CPU's cache and take longer, not less
_HELD = 32  # examples whose gradients a lazy walk holds as factors: fewer make a slow product, more are read too often
_GRAM_EXAMPLES = 4_096  # of a draw: with more, their inner products cost more than MNIST's 784 weights a unit


def draw(num_examples: int, draw_size: int, seed: int, trial: int) -> torch.Tensor:
    """The examples of a trial, drawn with replacement: int64 ``(draw_size,)``, a function of (seed, trial) alone."""
    rng = np.random.default_rng([seed, trial, 1])
    return torch.from_numpy(rng.integers(0, num_examples, draw_size))


def share(batch: int, total: int) -> float:
    """The factor that undoes the 1/B of a minibatch's mean: its weight in the mean over ``total`` examples."""
    return batch / total


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy averaged over examples, per replica: ``(replicas, examples, classes)`` → ``(replicas,)``."""
    return models.example_losses(logits, targets).mean(1)


def walk(
    dataset: data.Dataset,
    model: str,
    weights: Mapping[str, torch.Tensor],
    *,
    batch_sizes: Sequence[int],
    trials: Sequence[int],
    draw_size: int = 1024,
    lr: float = 0.01,
    seed: int = 0,
    layers: str = "last",
) -> pd.DataFrame:
    """The write-up's protocol (Shen 2018): an SGD step with ``lr`` after each minibatch, weights reset for each size.

    ``weights``: one replica's, with its replica axis of length 1. Each trial draws ``draw_size`` examples, the same for
    every size; trials run side by side as replicas. ``layers="last"`` records the last layer's weight alone, as he did;
    ``"all"`` every parameter, each in a column, and the whole network's norm. Returns one row per (batch_size, trial):
    ``gradient_norm`` and ``tail_fraction`` (entries beyond ``TAIL``) of the last layer's weight.
    """
    recorded = _recorded(weights, layers)
    for batch_size in batch_sizes:
        check_split(batch_size, draw_size)
    net = models.restored(model, dataset, weights)
    large = dataset.device.type == "cpu" and net.multiply_adds >= models.BATCHED_BELOW
    if net.closed_form and large and draw_size <= _GRAM_EXAMPLES:
        draws = ((trial, draw(dataset.num_train, draw_size, seed, trial)) for trial in trials)
        return pd.DataFrame(
            [row for one in draws for row in _walk_lazily(*one, net, dataset, batch_sizes, lr, recorded)]
        )
    bytes_each = sum(w.numel() * w.element_size() for w in weights.values())
    side_by_side = len(trials) if dataset.device.type != "cpu" else max(1, int(_STACK_BYTES // bytes_each))
    rows = []
    for start in range(0, len(trials), side_by_side):
        chunk = list(trials[start : start + side_by_side])
        indices = torch.stack([draw(dataset.num_train, draw_size, seed, t) for t in chunk]).to(dataset.device)
        net = models.restored(model, dataset, weights, len(chunk))
        for batch_size in batch_sizes:
            net.restore(weights)
            total = {
                name: torch.zeros_like(p) for name, p in net.named_parameters() if name in (*recorded, "head.bias")
            }
            for minibatch in indices.split(batch_size, dim=1):
                inputs, targets = dataset.train_inputs[minibatch], dataset.train_targets[minibatch]
                _step_and_add(net, inputs, targets, lr, total, share(minibatch.shape[1], draw_size))
            rows += _rows({name: total[name] for name in recorded}, batch_size, chunk)
    return pd.DataFrame(rows)


class _Held:
    """A linear layer that holds its last updates as factors, inputs and output gradients δ of up to ``held`` examples.

    The inputs lie below the weights, so that one product makes both an input's outputs and its inner products with
    them; a 1 in ``shift``, below the biases, stands for the bias's own.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, held: int):
        self.width, self.delta = len(bias), bias.new_empty(held, len(bias))
        self.stack = torch.cat([weight, weight.new_zeros(held, weight.shape[1])])
        self.shift = torch.cat([bias, bias.new_ones(held)])
        self.weight, self.given = self.stack[: self.width], self.stack[self.width :]

    def forward(self, before: int, a: torch.Tensor, alpha: float) -> torch.Tensor:
        """Outputs of the inputs ``a``, of which each held update, the first ``before``, has ``alpha`` times its own."""
        if not before:
            return models.product(a, self.weight, self.shift[: self.width])
        # With all held rows, filled or not: oneDNN makes a kernel for each new shape.
        out, held = models.product(a, self.stack, self.shift).split_with_sizes([self.width, len(self.delta)], 1)
        return torch.addmm(out, held[:, :before], self.delta[:before], alpha=alpha)

    def backward(self, before: int, delta: torch.Tensor, alpha: float) -> torch.Tensor:
        """The gradient by the inputs, of the same weights."""
        by_input = models.product(delta, self.weight.t())
        if before:
            by_input.addmm_(delta @ self.delta[:before].t(), self.given[:before], alpha=alpha)
        return by_input

    def add(self, weight: torch.Tensor, bias: torch.Tensor, count: int, alpha: float) -> None:
        """Add ``alpha`` times the first ``count`` examples' gradients to tensors of the weight's and bias's shape."""
        weight.add_(models.product(self.delta[:count].t(), self.given[:count].t()), alpha=alpha)
        bias.add_(self.delta[:count].sum(0), alpha=alpha)


@torch.no_grad()
def _walk_lazily(
    trial: int,
    indices: torch.Tensor,
    net: models.MLP,
    dataset: data.Dataset,
    batch_sizes: Sequence[int],
    lr: float,
    recorded: Sequence[str],
) -> list[dict[str, float]]:
    """``walk`` of the one trial that drew ``indices``, where updates are put off until many of them are one product.

    A step moves a layer with inputs a and output gradients δ by −lr/B·δᵀa. The first layer's weights are never moved:
    its outputs at the start are one product for all sizes, and a step moves those of an example x by −lr/B·(x·a + 1)δ,
    the inner products of inputs being known too. The others hold their updates (``_Held``). Weights that will be reset
    are not moved at all.
    """
    count, x = len(indices), dataset.train_inputs[indices].flatten(1)
    one_hot = torch.nn.functional.one_hot(dataset.train_targets[indices], dataset.num_classes).to(x.dtype)
    first, *others = [(layer.weight[0], layer.bias[0]) for layer in (*net.layers, net.head)]
    names = [*(f"layers.{i}" for i in range(len(net.layers))), "head"]
    gram, at_start = models.product(x, x).add_(1), models.product(x, *first)
    rows = []
    for size in batch_sizes:
        held, alpha, outputs = max(1, _HELD // size) * size, -lr / size, at_start.clone()
        layers, delta = [_Held(*one, held) for one in others], x.new_empty(count, len(first[1]))
        total = {n: torch.zeros_like(p) for n, p in net.named_parameters() if n in (*recorded, "head.bias")}
        for begin, start in ((start - start % held, start) for start in range(0, count, size)):
            stop, before = min(start + size, count), start - begin
            now, activations = slice(before, before + stop - start), []
            out = outputs[start:stop].addmm_(gram[start:stop, begin:start], delta[begin:start], alpha=alpha)
            for layer in layers:
                activations.append(torch.clamp_min(out, 0, out=layer.given[now]))
                out = layer.forward(before, activations[-1], alpha)
            deltas = [delta[start:stop], *(layer.delta[now] for layer in layers)]
            back = torch.sub(out.softmax(1), one_hot[start:stop], out=deltas.pop())
            if stop == count and len(recorded) == 1:
                deltas.clear()  # only the head's gradient is asked for, and nothing will move
            while deltas:
                by_input = layers[len(deltas) - 1].backward(before, back, alpha)
                back = torch.ops.aten.threshold_backward.grad_input(
                    by_input, activations[len(deltas) - 1], 0, grad_input=deltas.pop()
                )
            if stop - begin < held and stop < count:
                continue
            for name, layer in zip(names[1:], layers):
                if f"{name}.weight" in recorded:
                    layer.add(total[f"{name}.weight"][0], total[f"{name}.bias"][0], stop - begin, 1 / count)
                if stop < count:
                    layer.add(layer.weight, layer.shift[: layer.width], stop - begin, alpha)
            outputs[stop:].addmm_(gram[stop:, begin:stop], delta[begin:stop], alpha=alpha)
        if f"{names[0]}.weight" in recorded:
            total[f"{names[0]}.weight"][0].addmm_(delta.t(), x, alpha=1 / count)
            total[f"{names[0]}.bias"][0].add_(delta.sum(0), alpha=1 / count)
        rows += _rows({name: total[name] for name in recorded}, size, [trial])
    return rows


def _step_and_add(
    net: models.Model, inputs: torch.Tensor, targets: torch.Tensor, lr: float, total: dict[str, torch.Tensor], by: float
) -> None:
    """Move the weights by −lr·gradient of the minibatch, and what ``total`` has of it by ``by``·gradient."""
    named = dict(net.named_parameters())
    if net.closed_form:
        for factors in net.backpropagate(inputs, targets)[1]:
            if f"{factors.layer}.weight" in total:
                factors.add_to(total, alpha=by)
            factors.add_to(named, alpha=-lr)
        return
    found = torch.autograd.grad(mean_loss(net(inputs), targets).sum(), list(named.values()))
    with torch.no_grad():
        for (name, p), gradient in zip(named.items(), found):
            if name in total:
                total[name].add_(gradient, alpha=by)
            p.sub_(gradient, alpha=lr)


def frozen(
    dataset: data.Dataset,
    model: str,
    weights: Mapping[str, torch.Tensor],
    *,
    batch_sizes: Sequence[int],
    trials: Sequence[int],
    draw_size: int = 1024,
    seed: int = 0,
    layers: str = "last",
) -> pd.DataFrame:
    """The same draws and sums as ``walk``, with the weights left alone; same columns.

    With ``layers="last"`` also ``minibatch_noise``: the root mean square distance between a minibatch's gradient and
    the gradient over the whole training set. All minibatches of a size are one stack of replicas that share weights.
    """
    recorded = _recorded(weights, layers)
    net = models.restored(model, dataset, weights)
    full = _full_gradient(dataset, net) if layers == "last" else None
    rows = []
    for trial in trials:
        indices = draw(dataset.num_train, draw_size, seed, trial).to(dataset.device)
        for batch_size in batch_sizes:
            total: dict[str, torch.Tensor] = {}
            squared_distance = count = 0
            whole = draw_size - draw_size % check_split(batch_size, draw_size)
            parts = [indices[:whole].view(-1, batch_size), indices[whole:].view(1, -1)]
            for minibatches in (part for part in parts if part.numel()):
                for name, gradient in _minibatch_gradients(dataset, net, minibatches, recorded):
                    scaled = gradient.sum(0, keepdim=True) * share(minibatches.shape[1], draw_size)
                    total[name] = total[name] + scaled if name in total else scaled
                    if full is not None and minibatches.shape[1] == batch_size:
                        squared_distance += float((gradient - full).cpu().double().square().sum())
                        count += len(gradient)
            row = _rows(total, batch_size, [trial])
            if full is not None:
                row[0]["minibatch_noise"] = (squared_distance / count) ** 0.5
            rows += row
    return pd.DataFrame(rows)


def staleness(
    dataset: data.Dataset,
    model: str,
    weights: Mapping[str, torch.Tensor],
    *,
    batch_size: int,
    counts: Sequence[int],
    base_rates: Sequence[float],
    seed: int = 0,
) -> pd.DataFrame:
    """How far n SGD steps of size m end from one step over the same nm examples (Masters & Luschi 2018, eq. 7–9).

    Steps are w − η̃ Σ∇ℓ, summed over examples, so both move by the same if gradients do not change on the way: the
    large batch is the small one with stale gradients. One row per count n and base rate η̃: ``relative_distance``, of
    the end points, in units of the large step. In float64, because small rates move weights by little.
    """
    inputs, targets = dataset.train_inputs.double(), dataset.train_targets
    order = draw(dataset.num_train, batch_size * max(counts), seed, 0).to(dataset.device)
    net = models.restored(model, dataset, weights, dtype=torch.float64)
    origin = {name: p.detach().clone() for name, p in net.named_parameters()}

    def descend(rate: float) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Where so many small steps end, from the start, and the sum of their gradients."""
        net.restore(origin)
        total = {name: torch.zeros_like(p) for name, p in origin.items()}
        ends = {}
        for n, minibatch in enumerate(order.split(batch_size), 1):
            _step_and_add(net, inputs[minibatch][None], targets[minibatch][None], rate * batch_size, total, batch_size)
            if n in counts:
                moved = torch.cat([(p.detach() - origin[name]).flatten() for name, p in net.named_parameters()])
                ends[n] = moved, torch.cat([t.flatten() for t in total.values()])
        return ends

    at_start = {n: gradient for n, (_, gradient) in descend(0.0).items()}
    small = {rate: descend(rate) for rate in base_rates}
    rows = []
    for n, rate in itertools.product(counts, base_rates):
        large = -rate * at_start[n]
        distance = float((small[rate][n][0] - large).norm() / large.norm())
        rows.append({"count": n, "base_rate": rate, "relative_distance": distance})
    return pd.DataFrame(rows)


def _recorded(weights: Mapping[str, torch.Tensor], layers: str) -> list[str]:
    if layers not in ("last", "all"):
        raise ValueError(f"layers is {layers!r}; expected 'last' or 'all'")
    return ["head.weight"] if layers == "last" else list(weights)


def check_split(batch_size: int, draw_size: int) -> int:
    """``batch_size``, or ValueError unless it is from 1 to the size of a draw."""
    if not 1 <= batch_size <= draw_size:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number from 1 to {draw_size} (the draw)")
    return batch_size


def _minibatch_gradients(dataset: data.Dataset, net: models.Model, minibatches: torch.Tensor, recorded: list[str]):
    """Yields (name, gradient ``(k, *parameter)``) of each minibatch's mean loss; ``minibatches`` is ``(n, batch)``."""
    if recorded == ["head.weight"]:
        with torch.no_grad():
            features = net.features(dataset.train_inputs[minibatches.reshape(1, -1)])
        weight = net.head.weight.detach().expand(len(minibatches), -1, -1).requires_grad_()
        logits = torch.baddbmm(net.head.bias.detach().unsqueeze(1), features.view(*minibatches.shape, -1), weight.mT)
        loss = mean_loss(logits, dataset.train_targets[minibatches]).sum()
        yield "head.weight", torch.autograd.grad(loss, weight)[0]
        return
    for minibatch in minibatches.unsqueeze(1):
        loss = mean_loss(net(dataset.train_inputs[minibatch]), dataset.train_targets[minibatch]).sum()
        yield from zip(recorded, torch.autograd.grad(loss, [dict(net.named_parameters())[n] for n in recorded]))


def _full_gradient(dataset: data.Dataset, net: models.Model) -> torch.Tensor:
    """The last layer's gradient of the mean loss over the training set, in chunks: ``(1, classes, features)``."""
    chunks = torch.arange(dataset.num_train, device=dataset.device).split(2_000)
    gradients = [
        gradient.cpu().double() * share(len(chunk), dataset.num_train)
        for chunk in chunks
        for _, gradient in _minibatch_gradients(dataset, net, chunk.unsqueeze(0), ["head.weight"])
    ]
    return torch.stack(gradients).sum(0).float().to(dataset.device)


def _rows(total: Mapping[str, torch.Tensor], batch_size: int, trials: Sequence[int]) -> list[dict[str, float]]:
    squared = {name: g.flatten(1).cpu().double().square().sum(1) for name, g in total.items()}
    last = total["head.weight"].flatten(1)
    tail = (last.abs() > TAIL).float().mean(1)
    rows = []
    for i, trial in enumerate(trials):
        row = {"batch_size": batch_size, "trial": trial, "gradient_norm": squared["head.weight"][i].sqrt().item()}
        row["tail_fraction"] = tail[i].item()
        if len(total) > 1:
            row["network_gradient_norm"] = sum(squared.values())[i].sqrt().item()
            row |= {f"gradient_norm/{name}": value[i].sqrt().item() for name, value in squared.items()}
        rows.append(row)
    return rows
