"""Gradient norms: along the write-up's *walk*, at *frozen* weights, and example by example; the noise scale of these.

Walk and frozen are two protocols. Both split one draw of examples into minibatches of a size, add up the minibatches'
mean gradients, each weighted by its share of the draw, and take the norm of the sum (Shen 2018, "orthogonality"). The
walk takes an SGD step after each minibatch; frozen does not, so there the sum cannot depend on the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from helpers import data, models

# |g| beyond which the write-up's histograms of single gradient entries differ most between sizes 2 and 1024.
TAIL = 0.0082
_STACK_BYTES = 4e6  # of weights walked side by side: more fall out of a CPU's cache and take longer, not less


def draw(num_examples: int, draw_size: int, seed: int, trial: int) -> torch.Tensor:
    """The examples of a trial, drawn with replacement: int64 ``(draw_size,)``, a function of (seed, trial) alone."""
    rng = np.random.default_rng([seed, trial, 1])
    return torch.from_numpy(rng.integers(0, num_examples, draw_size))


def share(batch: int, total: int) -> float:
    """The factor that undoes the 1/B of a minibatch's mean: its weight in the mean over ``total`` examples."""
    return batch / total


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy averaged over examples, per replica: ``(replicas, examples, classes)`` → ``(replicas,)``."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), reduction="none")
    return losses.view(targets.shape).mean(1)


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
    bytes_each = sum(w.numel() * w.element_size() for w in weights.values())
    side_by_side = len(trials) if dataset.device.type != "cpu" else max(1, int(_STACK_BYTES // bytes_each))
    rows = []
    for start in range(0, len(trials), side_by_side):
        chunk = list(trials[start : start + side_by_side])
        indices = torch.stack([draw(dataset.num_train, draw_size, seed, t) for t in chunk]).to(dataset.device)
        net = _load(dataset, model, weights, len(chunk))
        for batch_size in batch_sizes:
            net.restore(weights)
            optimizer = torch.optim.SGD(net.parameters(), lr=lr, fused=dataset.device.type in ("cpu", "cuda"))
            total = {name: torch.zeros_like(p) for name, p in net.named_parameters() if name in recorded}
            for minibatch in indices.split(check_split(batch_size, draw_size), dim=1):
                optimizer.zero_grad(set_to_none=True)
                mean_loss(net(dataset.train_inputs[minibatch]), dataset.train_targets[minibatch]).sum().backward()
                for name, p in net.named_parameters():
                    if name in total:
                        total[name].add_(p.grad, alpha=share(minibatch.shape[1], draw_size))
                optimizer.step()
            rows += _rows(total, batch_size, chunk)
    return pd.DataFrame(rows)


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
    net = _load(dataset, model, weights, 1)
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


def per_example_squared_norms(
    net: models.Model, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared gradient norm of each example's loss ``(replicas, n)`` and of their mean loss ``(replicas,)``, float64.

    ``inputs`` ``(n, *input_shape)`` go to every replica. One backward pass: for a linear layer with input a and output
    gradient δ the norm is (‖a‖² + 1)·‖δ‖² (Goodfellow 2015); a convolution's is that of Σ over positions of δ·patchᵀ.
    """
    layers = [m for m in net.modules() if isinstance(m, (models.Linear, models.Conv2d))]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0].detach(), out))) for layer in layers
    ]
    try:
        logits = net(inputs.expand(net.replicas, *inputs.shape))
    finally:
        for hook in hooks:
            hook.remove()
    loss = mean_loss(logits, targets.expand(net.replicas, -1)).sum()
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, [out for _, out in seen] + parameters)
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
    mean = sum(g.flatten(1).square().sum(1).cpu().double() for g in found[len(seen) :])
    return norms, mean


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


def _recorded(weights: Mapping[str, torch.Tensor], layers: str) -> list[str]:
    if layers not in ("last", "all"):
        raise ValueError(f"layers is {layers!r}; expected 'last' or 'all'")
    return ["head.weight"] if layers == "last" else list(weights)


def check_split(batch_size: int, draw_size: int) -> int:
    """``batch_size``, or ValueError unless it is from 1 to the size of a draw."""
    if not 1 <= batch_size <= draw_size:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number from 1 to {draw_size} (the draw)")
    return batch_size


def _load(dataset: data.Dataset, model: str, weights: Mapping[str, torch.Tensor], replicas: int) -> models.Model:
    net = models.build(model, dataset.input_shape, dataset.num_classes, [0] * replicas, dataset.device)
    return net.restore(weights)


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
