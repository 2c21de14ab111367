"""Hand-written fast paths of the measures, for the built-in nets' kernels; every other net takes the general path.

A linear layer's gradient is the product of its inputs a and output gradients δ. So norms, inner products and pending
updates follow from these factors, and the gradient itself is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from helpers.engine import kernels as engine
from helpers.engine.stack import Stack

_LAZY_FROM = 20_000  # parameters: a smaller net takes its steps faster
_HELD = 32  # examples whose gradients a lazy walk holds as factors: fewer make a slow product, more are read too often
_GRAM_EXAMPLES = 4_096  # of a draw: with more, their inner products cost more than MNIST's 784 weights a unit
_GRAM_BYTES = 2**29  # of a Gram matrix; beyond some 8,000 examples minibatches are measured one by one


@torch.no_grad()
def descend(stack: Stack, inputs: torch.Tensor, targets: torch.Tensor, lr: float, total: dict, share: float) -> None:
    """Step by −lr times the minibatch's gradient, and add ``share`` times the gradient to ``total``."""
    for factors in stack.kernel.backpropagate(inputs, targets, stack.problem.loss)[1]:
        if f"{factors.layer}.weight" in total:
            factors.add_to(total, alpha=share)
        factors.add_to(stack.parameters, alpha=-lr)


def walks_lazily(stack: Stack, draw_size: int) -> bool:
    """Whether ``walk_lazily`` applies, and pays: to large perceptrons with cross-entropy on a CPU."""
    usable = stack.closed_form and stack.problem.loss is F.cross_entropy and stack.problem.dataset.device.type == "cpu"
    return usable and stack.kernel.multiply_adds >= _LAZY_FROM and draw_size <= _GRAM_EXAMPLES


@torch.no_grad()
def walk_lazily(
    stack: Stack, indices: torch.Tensor, batch_sizes: Sequence[int], lr: float, recorded: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """The sums of ``gradients.walk`` over the examples ``indices``, one dict a batch size.

    A step moves a layer by −lr/B·δᵀa. The first layer's weights are never moved: its outputs at the start are one
    product for all sizes, and a step moves those of an example x by −lr/B·(x·a + 1)δ, where the inner products of
    inputs are known too. The other layers hold their updates (``_Held``) until many are one product.
    """
    net, dataset, count = stack.kernel, stack.problem.dataset, len(indices)
    x = dataset.train_inputs[indices].flatten(1)
    one_hot = F.one_hot(dataset.train_targets[indices], len(net.head.bias[0])).to(x.dtype)
    first, *others = [(layer.weight[0], layer.bias[0]) for layer in (*net.layers, net.head)]
    names = [*(f"layers.{i}" for i in range(len(net.layers))), "head"]
    gram, at_start = engine.product(x, x).add_(1), engine.product(x, *first)
    totals = []
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
        totals.append({name: total[name] for name in recorded})
    return totals


class _Held:
    """A linear layer that holds its pending updates as factors, inputs and δ of up to ``held`` examples.

    The inputs lie below the weights, so that one product gives both outputs and inner products with them; a 1 in
    ``shift``, below the biases, stands for the bias's own.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, held: int):
        self.width, self.delta = len(bias), bias.new_empty(held, len(bias))
        self.stack = torch.cat([weight, weight.new_zeros(held, weight.shape[1])])
        self.shift = torch.cat([bias, bias.new_ones(held)])
        self.weight, self.given = self.stack[: self.width], self.stack[self.width :]

    def forward(self, before: int, a: torch.Tensor, alpha: float) -> torch.Tensor:
        """Layer outputs for ``a``, including the first ``before`` pending updates, each scaled by ``alpha``."""
        if not before:
            return engine.product(a, self.weight, self.shift[: self.width])
        # With all held rows, filled or not: oneDNN makes a kernel for each new shape.
        out, held = engine.product(a, self.stack, self.shift).split_with_sizes([self.width, len(self.delta)], 1)
        return torch.addmm(out, held[:, :before], self.delta[:before], alpha=alpha)

    def backward(self, before: int, delta: torch.Tensor, alpha: float) -> torch.Tensor:
        """The gradient with respect to the inputs, at the same weights."""
        by_input = engine.product(delta, self.weight.t())
        if before:
            by_input.addmm_(delta @ self.delta[:before].t(), self.given[:before], alpha=alpha)
        return by_input

    def add(self, weight: torch.Tensor, bias: torch.Tensor, count: int, alpha: float) -> None:
        """Add ``alpha`` times the first ``count`` examples' gradients to tensors of the weight's and bias's shape."""
        weight.add_(engine.product(self.delta[:count].t(), self.given[:count].t()), alpha=alpha)
        bias.add_(self.delta[:count].sum(0), alpha=alpha)


def head_gradients(stack: Stack, minibatches: torch.Tensor) -> torch.Tensor:
    """The head's weight gradients ``(k, *weight)`` of ``minibatches`` ``(k, batch)``, as one stack of replicas."""
    net, (inputs, targets) = stack.kernel, stack.problem.dataset.batch(minibatches)
    with torch.no_grad():
        features = net.features(inputs.flatten(0, 1).unsqueeze(0))
    weight = net.head.weight.detach().expand(len(minibatches), -1, -1).requires_grad_()
    logits = torch.baddbmm(net.head.bias.detach().unsqueeze(1), features.view(*minibatches.shape, -1), weight.mT)
    loss = engine.example_losses(logits, targets, stack.problem.loss).mean(1).sum()
    return torch.autograd.grad(loss, weight)[0]


@torch.no_grad()
def examples(
    stack: Stack, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """``noise.of_examples`` of a perceptron: squared norms are Σ (‖a‖² + 1)·‖δ‖² over layers (Goodfellow 2015)."""
    n, mean = len(targets), {name: torch.zeros_like(p) for name, p in stack.parameters.items()}
    norms = torch.zeros(stack.replicas, n, dtype=torch.float64)
    inputs, targets = (t.expand(stack.replicas, *t.shape) for t in (inputs, targets))
    losses, layers = stack.kernel.backpropagate(inputs, targets, stack.problem.loss)
    for factors in layers:
        factors.add_to(mean, alpha=1.0)
        of_a, of_delta = (torch.linalg.vector_norm(t, dim=-1).cpu().double() for t in (factors.given, factors.delta))
        norms[factors.replica] += (of_a.square() + 1) * (of_delta * n).square()  # of each example's loss, not the mean
    return norms, mean, losses.cpu().double()


@torch.no_grad()
def curvature(
    stack: Stack, inputs: torch.Tensor, targets: torch.Tensor
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The product of the mean loss's Hessian with a direction, as a function of the direction by name.

    By Pearlmutter's R-operator, for one replica of a perceptron: the derivative, along the direction, of the passes
    forward and back. The passes themselves are made once.
    """
    _, found = stack.kernel.backpropagate(inputs[None], targets[None], stack.problem.loss)
    layers = [(f.layer, f.delta.flatten(0, -2), f.given.flatten(0, -2)) for f in reversed(found)]
    weights = [stack.parameters[f"{name}.weight"][0].detach() for name, *_ in layers]
    label, examples = targets.unsqueeze(1), len(targets)
    softmax = None
    if stack.problem.loss is F.cross_entropy:
        softmax = (layers[-1][1] * examples).scatter_add_(1, label, torch.ones_like(label, dtype=inputs.dtype))

    @torch.no_grad()
    def product(direction: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        along = [(direction[f"{name}.weight"][0], direction[f"{name}.bias"][0]) for name, *_ in layers]
        moved, by_name, moving = [], {}, None  # derivatives of each layer's inputs (but the fixed first), and outputs
        for (_, _, a), weight, by in zip(layers, weights, along):
            out = engine.product(a, *by)
            if moving is not None:
                moved.append(torch.ops.aten.threshold_backward(moving, a, 0))
                out += engine.product(moved[-1], weight)
            moving = out
        if softmax is not None:
            moving = moving - moving.gather(1, label)  # no rounding of a difference where an example is fitted
            moving = softmax * (moving - (softmax * moving).sum(1, keepdim=True))
        moving = moving / examples
        for i in reversed(range(len(layers))):
            name, delta, a = layers[i]
            of_weight = engine.product(moving.t(), a.t())
            by_name[f"{name}.bias"] = moving.sum(0)
            if i:
                of_weight += engine.product(delta.t(), moved[i - 1].t())
                moving = engine.product(moving, weights[i].t()) + engine.product(delta, along[i][0].t())
                moving = torch.ops.aten.threshold_backward(moving, a, 0)
            by_name[f"{name}.weight"] = of_weight
        return {name: by_name[name] for name in stack.parameters}

    return product


def has_gram(stack: Stack) -> bool:
    """Whether ``gram`` applies, and fits in memory."""
    return stack.closed_form and 8 * stack.problem.num_train**2 <= _GRAM_BYTES


@torch.no_grad()
def gram(stack: Stack, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Inner products of the gradients of every two examples' losses, for one replica: float64 ``(n, n)``.

    Summed over linear layers: (aᵢ·aⱼ + 1)·(δᵢ·δⱼ), the empirical neural tangent kernel of the loss.
    """
    kernel = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for factors in stack.kernel.backpropagate(inputs[None], targets[None], stack.problem.loss)[1]:
        delta, a = factors.delta.flatten(0, -2) * len(inputs), factors.given.flatten(0, -2)  # of losses, not their mean
        kernel += ((a @ a.T).add_(1) * (delta @ delta.T)).cpu()
    return kernel


def lengths_by_gram(kernel: torch.Tensor, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|G_B|² and |G_B − G|² of the minibatches ``chosen`` ``(draws, batch)``, float64."""
    batch, population = chosen.shape[1], len(kernel)
    with_mean, squares = kernel.mean(1), []
    # Summing each minibatch's own part takes B² look-ups. A product with the count of each example takes N², some 300
    # times as fast each.
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
