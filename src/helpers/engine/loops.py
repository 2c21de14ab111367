"""Many steps of a small perceptron in one compiled loop, where operators would take longer to call than to compute.

A replica goes through all the steps before the next one starts: its weights stay in the cache, and its bits do not
depend on the replicas beside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from helpers.engine import compiled
from helpers.engine.optimizers import Adam, Descent
from helpers.engine.stack import Kernel
from helpers.problems.problem import squared_error


@torch.no_grad()
def descend(
    stack: Kernel, optimizer: Descent | Adam, order: torch.Tensor, sizes: np.ndarray, rates: np.ndarray
) -> torch.Tensor:
    """Take a step for each of ``sizes``: move the weights and the optimizer's state, and leave the last gradient.

    order: the examples of all these steps, one after the other: int64 ``(replicas, examples)``.
    rates: each step's learning rates ``(steps, replicas)``.
    Returns mean losses ``(steps, replicas)``.
    """
    shapes, (inputs, targets) = _shapes(stack), stack.problem.dataset.tensors("train")
    widths = [shapes[0][2], *(out for _, out, _ in shapes)]
    weights = [0, *itertools.accumulate((given + 1) * out for _, out, given in shapes)]
    params, (rule, kinds, betas, decay) = _packed(shapes, stack.parameters), _rule(optimizer)
    (replicas, count), collected = params.shape, len(kinds) + (len(kinds) > 1)  # Adam's step has a gradient of its own
    scratch = (int(sizes.max()) * width for width in (*widths, *widths[1:-1]))
    units = [*itertools.accumulate(scratch, initial=(2 + collected) * count)]
    net = np.array([widths, weights, units[: len(widths)], [0, *units[len(widths) : -1], units[len(shapes)]]])
    moments = params.new_zeros(replicas, collected, count)
    state, done = optimizer.state() if kinds else {}, 0
    for i, kind in enumerate(kinds if state else ()):
        moments[:, i] = _packed(shapes, {name: state[f"{name}/{kind}"] for name in stack.parameters})
        done = int(state.get("head.weight/step", (0,))[0])
    gradient, losses = torch.zeros_like(params), params.new_empty(len(sizes), replicas)
    arrays = (params, moments, gradient, inputs.flatten(1), targets, order.contiguous(), losses)
    params_, moments_, gradient_, x, y, order_, losses_ = (t.detach().numpy() for t in arrays)
    memory = np.empty(units[-1], np.float32), *(np.empty(n, np.int64) for n in (sizes.max(), compiled.BLOCK))
    compiled.descend(
        params_, moments_, gradient_, net, x, y, order_, sizes, rates.astype(np.float32),
        stack.problem.loss is squared_error, rule, np.array(betas), decay, done, *memory, losses_,
    )  # fmt: skip
    for name, value in _unpacked(shapes, params).items():
        stack.parameters[name].copy_(value)
    for i, kind in enumerate(kinds):
        state |= {f"{name}/{kind}": value.contiguous() for name, value in _unpacked(shapes, moments[:, i]).items()}
    if rule >= compiled.ADAM:
        state |= {f"{name}/step": torch.full((replicas,), float(done + len(sizes))) for name in stack.parameters}
    if kinds:
        optimizer.load(state)
    stack.keep(functools.partial(_unpacked, shapes, gradient))
    return losses


def _rule(optimizer: Descent | Adam) -> tuple[int, tuple[str, ...], tuple[float, float], float]:
    """The kind of update, the names of its moments, their decay rates, and the weights'."""
    if isinstance(optimizer, Descent):
        kinds = ("velocity",) if optimizer.momentum or optimizer.weight_decay else ()
        return len(kinds), kinds, (optimizer.momentum, 0.0), optimizer.weight_decay
    options = optimizer.options
    kind = compiled.ADAMW if options["decoupled_weight_decay"] else compiled.ADAM
    return kind, ("exp_avg", "exp_avg_sq"), (options["beta1"], options["beta2"]), options["weight_decay"]


def _shapes(stack: Kernel) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of each layer."""
    names = [*(f"layers.{i}" for i in range(len(stack.kernel.layers))), "head"]
    return [(name, *stack.parameters[f"{name}.weight"].shape[1:]) for name in names]


def _packed(shapes: Sequence[tuple[str, int, int]], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tensors of the parameters' names as one ``(replicas, parameters)``, narrow layers by inputs."""
    parts = []
    for name, _, given in shapes:
        weight = tensors[f"{name}.weight"]
        parts += [(weight.mT if given < compiled.NARROW else weight).flatten(1), tensors[f"{name}.bias"]]
    return torch.cat(parts, 1)


def _unpacked(shapes: Sequence[tuple[str, int, int]], packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that ``_packed`` put together; they share its memory."""
    found = {}
    parts = packed.split([size for _, out, given in shapes for size in (out * given, out)], 1)
    for (name, out, given), weight, bias in zip(shapes, parts[::2], parts[1::2]):
        by_inputs = given < compiled.NARROW
        weight = weight.unflatten(1, (given, out) if by_inputs else (out, given))
        found |= {f"{name}.weight": weight.mT if by_inputs else weight, f"{name}.bias": bias}
    return found
