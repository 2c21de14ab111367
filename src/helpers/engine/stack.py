"""A stack: one replica of a network a seed, whose weights lie in tensors with a leading replica axis.

Built-in nets have a fast path (``kernels``); any other ``nn.Module`` is a replica as it is (``modules``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from helpers.engine import kernels
from helpers.engine.modules import Modules, Stack
from helpers.problems import Problem, Solution

_SEEDS_BELOW = 20_000  # parameters of a replica
_SHARING_BELOW = 250_000  # parameters of a replica; more take longer to multiply than their minibatch to copy


def build(problem: Problem, seeds: Sequence[int]) -> Stack:
    """Make a stack at its initial weights, one replica a seed. Raises ValueError where net and data do not fit."""
    problem.check()
    return _stack(problem, [problem.net.module(seed) for seed in seeds], seeds)


def at(solution: Solution, replicas: int = 1, dtype: torch.dtype | None = None) -> Stack:
    """Make a stack whose replicas all have a solution's weights, perhaps in another ``dtype``."""
    modules = [solution.problem.net.module(0).to(dtype) for _ in range(replicas)]
    stack = _stack(solution.problem, modules, range(replicas))
    stack.load(solution.weights)
    return stack


def num_parameters(problem: Problem) -> int:
    """Count the weights and biases of one replica."""
    return sum(p.numel() for p in problem.net.module(0).parameters())


def seeds_pay(problem: Problem) -> bool:
    """Whether seeds on a CPU are trained as one stack: tiny perceptrons, of which an evaluation is mostly overhead."""
    module = problem.net.module(0)
    return _fast_path(problem, module) is kernels.MLP and not module.norms and num_parameters(problem) < _SEEDS_BELOW


def sharing_pays(problem: Problem) -> bool:
    """Whether replicas of one seed train faster side by side on a CPU, with the bits of each alone.

    They share the copy of each minibatch, a tenth of a step that operators take, and one start of the compiled loop.
    """
    kernel = _fast_path(problem, problem.net.module(0))
    return kernel is kernels.MLP and _SEEDS_BELOW <= num_parameters(problem) < _SHARING_BELOW


def _stack(problem: Problem, modules: Sequence[nn.Module], seeds: Sequence[int]) -> Stack:
    if len(modules) > 1 and len({id(module) for module in modules}) < len(modules):
        raise ValueError("the net's factory returns the same module each time; expected a fresh one for each seed")
    if any(isinstance(p, UninitializedParameter) for p in modules[0].parameters()):
        raise ValueError("a lazy layer has no weights before its first call; call the module once in its factory")
    fast = _fast_path(problem, modules[0])
    return Modules(problem, modules, seeds) if fast is None else Kernel(problem, modules, fast)


def _fast_path(problem: Problem, module: nn.Module) -> type[kernels.Model] | None:
    return kernels.fast_path(module, problem.loss) if problem.dataset.in_memory else None


class Kernel(Stack):
    """A stack on the hand-written fast path."""

    def __init__(self, problem: Problem, modules: Sequence[nn.Module], fast: type[kernels.Model]):
        self.problem, self.replicas = problem, len(modules)
        self.kernel = fast(len(modules), modules[0])
        self.kernel.restore({n: torch.stack([m.state_dict()[n] for m in modules]) for n in modules[0].state_dict()})
        self.kernel.to(problem.dataset.device, next(modules[0].parameters()).dtype)
        self.parameters = dict(self.kernel.named_parameters())
        self._leaves: list[dict[str, torch.Tensor]] = []
        self._kept: Callable[[], dict[str, torch.Tensor]] | None = None  # the last gradient, of a compiled loop

    def looped(self, batch_size: int) -> bool:
        net, head = self.kernel, self.kernel.head.weight
        if not self.closed_form or not head.is_cpu or head.dtype != torch.float32:
            return False
        activations = batch_size * (head.shape[1] + sum(layer.weight.shape[2] for layer in (*net.layers, net.head)))
        return net.multiply_adds < kernels.LOOPED_BELOW and activations < kernels.LOOPED_ACTIVATIONS

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that hold the replicas."""
        return [self.kernel]

    @property
    def chunk(self) -> int:
        return self.kernel.evaluation_chunk if self.problem.dataset.device.type == "cpu" else 10_000

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a minibatch ``(replicas, n)``; replicas of one order share a single copy."""
        once = indices[:1] if indices.stride(0) == 0 else indices
        return tuple(t.expand(len(indices), *t.shape[1:]) for t in self.problem.dataset.batch(once))

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, each with its replica axis."""
        return dict(self.kernel.state_dict())

    def load(self, state: Mapping[str, torch.Tensor]) -> Kernel:
        """Copy a ``state`` into the replicas; a single replica's goes to every one."""
        self.kernel.restore(state)
        return self

    def autograd_leaves(self) -> list[torch.Tensor]:
        """The tensors to differentiate ``losses`` by."""
        return list(self.parameters.values())

    def stacked(self, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients by ``autograd_leaves``, as name → ``(replicas, *shape)``."""
        return dict(zip(self.parameters, gradients))

    def gradients(self) -> dict[str, torch.Tensor]:
        """The last step's gradient by name, ``(replicas, *shape)``; empty before the first."""
        if self._kept is not None:
            return self._kept()
        if not self.factors:
            return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        found = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for factors in self.factors:
            factors.add_to(found, alpha=1.0)
        return found

    def clear(self) -> None:
        """Forget the last gradient."""
        self.factors, self._kept = (), None
        for p in self.parameters.values():
            p.grad = None

    def keep(self, gradient: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Take a function that gives the last gradient, should it be asked for."""
        self.factors, self._kept = (), gradient

    def backpropagate(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Leave the gradient as ``factors``, in closed form; returns the mean losses ``(replicas,)``."""
        self._kept = None
        losses, self.factors = self.kernel.backpropagate(inputs, targets, self.problem.loss)
        return losses

    def backward(self, inputs: Any, targets: Any, share: float = 1.0, step: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """Add ``share`` times the gradient of each replica's mean loss; returns these losses, ``(replicas,)``.

        step: number of the step and of the micro-batch in it, which seed dropout.
        """
        logits = self.kernel.differentiable_once(inputs) if self.by_hand else self.kernel(inputs)
        losses = kernels.example_losses(logits, targets, self.problem.loss).mean(1)
        (losses.sum() if share == 1 else losses.sum() * share).backward()
        return losses.detach()

    def losses(self, inputs: Any, targets: Any, *, shared: bool = True) -> torch.Tensor:
        """Each example's loss ``(replicas, n)``; records a graph. ``shared``: all replicas take the same inputs."""
        if shared:
            inputs, targets = inputs.expand(self.replicas, *inputs.shape), targets.expand(self.replicas, -1)
        return kernels.example_losses(self.kernel(inputs), targets, self.problem.loss)

    def outputs(self, inputs: Any) -> torch.Tensor:
        """Outputs of every replica for the same inputs: ``(replicas, n, ...)``."""
        return self.kernel(inputs.expand(self.replicas, *inputs.shape))

    def evaluate(self, inputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over examples of the loss and of the score (NaN where there is none): float64 ``(replicas,)``."""
        logits, y = self.outputs(inputs), targets.expand(self.replicas, -1)
        losses = kernels.example_losses(logits, y, self.problem.loss).sum(1)
        return losses.cpu().double(), (logits.argmax(-1) == y).sum(1).cpu().double()
