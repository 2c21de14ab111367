"""Contract: is a batch's gradient the combination of its parts' gradients? By computing, not by reading the code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from helpers.advice.subject import Subject
from helpers.measure.gradients import cast
from helpers.problems import Problem
from helpers.problems.problem import call

EXACT, WEIGHTED, SUM, IMPOSSIBLE = "exact", "weighted", "sum", "impossible"
_MOST = 64  # examples of the batch that is taken apart


@dataclass(frozen=True)
class Contract:
    """What a batch is to its parts.

    accumulation: "exact", "weighted" (by tokens or class weights), "sum" (the loss is not averaged) or "impossible".
    cause: the layer, or the loss, in which an example depends on its company; "" where it does not.
    deviation: the mean of the parts' gradients off the batch's, relative; computed in ``precision``.
    deterministic: the same batch gives the same gradient twice, dropout layers off.
    by_example: the loss gives a value an example. dropout, tied: names of layers, of parameters that are one tensor.
    uneven: items differ in length.
    """

    accumulation: str
    cause: str
    deviation: float
    precision: str
    deterministic: bool
    by_example: bool
    dropout: tuple[str, ...]
    tied: tuple[str, ...]
    uneven: bool

    @property
    def sentence(self) -> str:
        """The contract in words."""
        return {
            EXACT: f"gradient accumulation is exact (to {self.deviation:.0e}, {self.precision})",
            WEIGHTED: "gradient accumulation is exact only when weighted by tokens (or class weights): a plain mean of "
            f"micro-batches is off by {100 * self.deviation:.1f} %",
            SUM: "the loss is a sum, so its gradient grows with the batch; the advice is for its mean over examples",
            IMPOSSIBLE: "gradient accumulation is impossible: an example depends on the others in its batch, in "
            f"{self.cause}",
        }[self.accumulation]

    def as_trained(self, problem: Problem) -> Problem:
        """The problem with its loss as the user's loop takes it."""
        if self.by_example:
            return problem
        return problem.without_example_losses(summed=self.accumulation == SUM)


def check(subject: Subject, seconds: float) -> Contract:
    """Take a batch apart into two unequal parts, and compare gradients; takes a few steps' time, whatever ``seconds``.

    Raises ValueError for a loss that is not finite and for a net whose batch dimension is fixed. Exceptions of the
    user's own code pass.
    """
    problem, device = subject.problem, subject.problem.dataset.device
    n = min(max(subject.batch_size, 12), _MOST, subject.num_train)
    whole = torch.arange(n, device=device)
    few = max(n // 3, min(2, n // 2))
    parts = whole.split([few, n - few])
    module = _module(subject)
    by_example = _try(module, problem, subject.batch_size, len(parts[0]))
    module, dtype = _in_double(module, problem, whole)
    loss, gradient = _gradient(module, problem, whole, dtype)
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of the first {n} examples is {loss.item()} at the weights given; expected a number")
    off = _distance(_gradient(module, problem, whole, dtype)[1], gradient)
    if off > 1e-3:  # random numbers outside of dropout layers: only evaluation is free of them
        for layer in module.eval().modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.train()
        loss, gradient = _gradient(module, problem, whole, dtype)
    (first_loss, first), (second_loss, second) = (_gradient(module, problem, part, dtype) for part in parts)
    share = len(parts[0]) / n
    between = first - second
    by_weight = float((gradient - second).dot(between) / between.dot(between).clamp(min=1e-300))
    combined = {
        EXACT: share * first + (1 - share) * second,
        SUM: first + second,
        WEIGHTED: by_weight * first + (1 - by_weight) * second,
    }
    deviations = {kind: _distance(g, gradient) for kind, g in combined.items()}
    enough = 1e-7 if dtype == torch.float64 else 1e-3
    weighs = abs(by_weight * first_loss + (1 - by_weight) * second_loss - loss) <= enough * abs(loss)
    if not (0 < by_weight < 1 and weighs):  # one weight, fitted to a gradient of few parameters, proves nothing
        deviations[WEIGHTED] = float("inf")
    kind = next((kind for kind, by in deviations.items() if by <= enough), IMPOSSIBLE)
    cause = (_mixing_layer(module, problem, whole, parts[0], dtype) or "the loss") if kind == IMPOSSIBLE else ""
    return Contract(
        kind, cause, deviations[EXACT], str(dtype).removeprefix("torch."), off <= 1e-3,
        by_example and kind != WEIGHTED, _dropout(module), _tied(module), _uneven(problem, whole),
    )  # fmt: skip


def _module(subject: Subject) -> nn.Module:
    """A module of its own at the weights given, as it trains but for dropout layers."""
    module = subject.problem.net.module(0)
    module.load_state_dict({name.removeprefix("weights/"): value[0] for name, value in subject.state.items()
                            if name.startswith("weights/")}, strict=False)  # fmt: skip
    module = module.to(subject.problem.dataset.device).train()
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()
    return module


@torch.no_grad()
def _try(module: nn.Module, problem: Problem, batch_size: int, part: int) -> bool:
    """Whether the loss gives a value an example; the net is tried at the batch size, then at a part of it."""
    copied, data = copy.deepcopy(module), problem.dataset
    indices = torch.arange(max(batch_size, 2), device=data.device)
    inputs, targets = data.batch(indices)
    outputs = call(copied, inputs)
    losses = problem.loss(outputs, targets) if not problem.has_example_losses else problem.own_loss(outputs, targets)
    try:
        call(copied, data.batch(indices[:part])[0])
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the net takes batches of {len(indices)} examples and not of {part} ({reason}): its batch dimension is "
            f"fixed, as in x.view({len(indices)}, -1); write x.flatten(1), or x.view(len(x), -1)"
        ) from error
    return problem.has_example_losses or (losses.dim() > 0 and len(losses) == len(indices))


def _in_double(module: nn.Module, problem: Problem, whole: torch.Tensor) -> tuple[nn.Module, torch.dtype]:
    double = copy.deepcopy(module).double()
    try:
        _gradient(copy.deepcopy(double), problem, whole, torch.float64)
    except Exception:  # float32 in the user's code, or an operator without a float64 form
        return module, torch.float32
    return double, torch.float64


def _gradient(
    module: nn.Module, problem: Problem, indices: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = cast(problem.dataset.batch(indices), dtype)
    loss = problem.own_loss(call(module, inputs), targets)
    trained = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in found])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


@torch.no_grad()
def _mixing_layer(
    module: nn.Module, problem: Problem, whole: torch.Tensor, part: torch.Tensor, dtype: torch.dtype
) -> str | None:
    """The first layer whose outputs for the examples of ``part`` change with the company they are in."""
    recorded: list[list[tuple[str, torch.Tensor]]] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: recorded[-1].append((name, out)))
        for name, layer in module.named_modules()
    ]
    for indices in (whole, part):
        recorded.append([])
        call(module, cast(problem.dataset.batch(indices), dtype)[0])
    for hook in hooks:
        hook.remove()
    for (name, among), (_, alone) in zip(*recorded):
        if not isinstance(among, torch.Tensor) or among[: len(part)].shape != alone.shape:
            continue
        if not torch.allclose(among[: len(part)], alone, rtol=1e-4, atol=1e-6):
            return f"{name} ({type(module.get_submodule(name)).__name__})" if name else "the net's own forward"
    return None


def _dropout(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        name for name, layer in module.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p
    )


def _tied(module: nn.Module) -> tuple[str, ...]:
    once = {name for name, _ in module.named_parameters()}
    return tuple(name for name, _ in module.named_parameters(remove_duplicate=False) if name not in once)


def _uneven(problem: Problem, some: Sequence[torch.Tensor]) -> bool:
    def shapes(index: torch.Tensor) -> tuple:
        return tuple(leaf.shape for leaf in tree_leaves(problem.dataset.batch(index[None])) if torch.is_tensor(leaf))

    return not problem.dataset.in_memory and len({shapes(index) for index in some}) > 1
