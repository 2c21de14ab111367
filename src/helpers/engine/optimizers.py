"""Optimizers of a stack: SGD and Adam, all replicas in one update; any other of torch's with one instance a replica."""

from __future__ import annotations

import abc
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from helpers.engine.stack import Stack

OPTIMIZERS = ("sgd", "adam", "adamw")
Rate = float | tuple[float, ...]  # one for all replicas, or one a replica


def check_optimizer(optimizer: object, momentum: object) -> None:
    """Raise ValueError for an unknown optimizer, or a momentum outside [0, 1) or with any but ``"sgd"``."""
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {optimizer!r}; choose one of: {', '.join(OPTIMIZERS)}, or a torch.optim class"
        )
    if not isinstance(optimizer, str) and not callable(optimizer):
        raise ValueError(f"optimizer is {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}, a class or a factory")
    if not isinstance(momentum, numbers.Real) or not 0 <= momentum < 1 or (momentum and optimizer != "sgd"):
        name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "this optimizer")
        raise ValueError(f"momentum is {momentum!r} with {name}; expected 0 to below 1, and with sgd alone")


def make(
    optimizer: str | Callable,
    stack: Stack,
    *,
    lr: Rate,
    momentum: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> Descent | SGD | Adam | PerReplica:
    """Build an optimizer for a stack.

    optimizer: a name of ``OPTIMIZERS``; a ``torch.optim`` class, called with (parameters, lr=lr); or a factory, called
        with one replica's parameters.
    """
    if not isinstance(optimizer, str):
        return PerReplica(stack, optimizer, lr)
    # The fused kernels read and write each weight once a step; at small batches a step is bound by just that.
    fused = stack.problem.dataset.device.type in ("cpu", "cuda") and all(
        p.is_floating_point() for p in stack.parameters.values()
    )
    if optimizer != "sgd":
        return Adam(stack.replicas, fused, betas, weight_decay, decoupled=optimizer == "adamw")
    return SGD(stack.replicas, fused, momentum, weight_decay) if stack.apart else Descent(momentum, weight_decay)


def _add(p: torch.Tensor, value: torch.Tensor, alpha: Rate) -> None:
    """p ← p + alpha·value; where rates differ, one replica after the other, each with the bits that it has alone."""
    if not isinstance(alpha, tuple):
        p.add_(value, alpha=alpha)
        return
    for own, its_value, its_alpha in zip(p.unbind(), value.unbind(), alpha):
        own.add_(its_value, alpha=its_alpha)


class Descent:
    """SGD as torch's: v ← momentum·v + g + decay·w, w ← w − lr·v. Plain, the gradient goes straight into w."""

    def __init__(self, momentum: float, weight_decay: float):
        self.momentum, self.weight_decay = momentum, weight_decay
        self._velocity: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Forget the velocity that has built up."""
        self._velocity = {}

    @torch.no_grad()
    def step(self, stack: Stack, lr: Rate, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        """Update every replica. ``gradients``: to use in place of the stack's own, which may be factors."""
        factors = stack.factors if gradients is None else ()
        found = {} if factors else stack.gradients() if gradients is None else gradients
        down = tuple(-rate for rate in lr) if isinstance(lr, tuple) else -lr
        plain = not (self.momentum or self.weight_decay)
        if not plain:
            self._decay_velocity(stack.parameters)
        into, alpha = (stack.parameters, down) if plain else (self._velocity, 1.0)
        for each in factors:
            each.add_to(into, alpha)
        for name, gradient in found.items():
            _add(into[name], gradient, alpha)
        for name, velocity in self._velocity.items() if not plain else ():
            _add(stack.parameters[name], velocity, down)

    def _decay_velocity(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, p in parameters.items():
            if name not in self._velocity:
                self._velocity[name] = torch.zeros_like(p)
            self._velocity[name].mul_(self.momentum)
            if self.weight_decay:
                self._velocity[name].add_(p, alpha=self.weight_decay)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{name}/velocity": v for name, v in self._velocity.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self._velocity = {name.removesuffix("/velocity"): value for name, value in state.items()}


class _OfLeaves(abc.ABC):
    """torch's own update of the leaves of every replica: those of one rate in one call."""

    def __init__(self, replicas: int, **options: object):
        self.options = {"maximize": False, **options}
        self._state: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in range(replicas)]  # name → key → tensor

    @abc.abstractmethod
    def _start(self, leaf: torch.Tensor) -> dict[str, torch.Tensor]:
        """A leaf's state before its first step."""

    @abc.abstractmethod
    def _update(self, leaves: list[torch.Tensor], gradients: list[torch.Tensor], states: list[dict], lr: float) -> None:
        """Move leaves of one rate, and their states, by a step."""

    @torch.no_grad()
    def step(self, stack: Stack, lr: Rate, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        """Update every replica. ``gradients``: to use in place of the stack's own."""
        if gradients is None and not stack.apart:
            gradients = stack.gradients()
        rows = []
        for replica, states in enumerate(self._state):
            for name, leaf in stack.leaves(replica).items():
                gradient = leaf.grad if gradients is None or name not in gradients else gradients[name][replica]
                if gradient is not None:  # used in this step
                    if not states.get(name):
                        states[name] = self._start(leaf)
                    rows.append((leaf, gradient, states[name]))
            if rows and (isinstance(lr, tuple) or replica == len(self._state) - 1):
                self._update(*map(list, zip(*rows)), lr[replica] if isinstance(lr, tuple) else lr)
                rows = []

    def state(self) -> dict[str, torch.Tensor]:
        """By name and key, each with its replica axis; zeros where a replica has not used a leaf yet."""
        each = [{f"{n}/{key}": v for n, own in states.items() for key, v in own.items()} for states in self._state]
        every = {path: torch.zeros_like(v) for found in each for path, v in found.items()}
        return {path: torch.stack([found.get(path, zeros) for found in each]) for path, zeros in every.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for replica, states in enumerate(self._state):
            states.clear()
            for path, value in state.items():
                name, _, key = path.rpartition("/")
                states.setdefault(name, {})[key] = value[replica].clone()


class SGD(_OfLeaves):
    """SGD where each replica's leaves hold its gradient; else ``Descent`` takes fewer steps over the weights."""

    def __init__(self, replicas: int, fused: bool, momentum: float, weight_decay: float):
        super().__init__(replicas, fused=fused, weight_decay=weight_decay)
        self.momentum = momentum

    def forget(self) -> None:
        """Forget the velocity that has built up."""
        for states in self._state:
            states.clear()

    def _start(self, leaf: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"velocity": torch.zeros_like(leaf)} if self.momentum else {}

    def _update(self, leaves: list[torch.Tensor], gradients: list[torch.Tensor], states: list[dict], lr: float) -> None:
        velocities = [own.get("velocity") for own in states]
        options = {"momentum": self.momentum, "dampening": 0.0, "nesterov": False, **self.options}
        sgd(leaves, gradients, velocities, lr=lr, **options)


class Adam(_OfLeaves):
    """Adam, or with ``decoupled`` weight decay AdamW."""

    def __init__(self, replicas: int, fused: bool, betas: tuple[float, float], weight_decay: float, decoupled: bool):
        own = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "amsgrad": False, "decoupled_weight_decay": decoupled}
        super().__init__(replicas, fused=fused, weight_decay=weight_decay, **own)

    def _start(self, leaf: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = {key: torch.zeros_like(leaf) for key in ("exp_avg", "exp_avg_sq")}
        return {**moments, "step": torch.zeros((), device=leaf.device if self.options["fused"] else "cpu")}

    def _update(self, leaves: list[torch.Tensor], gradients: list[torch.Tensor], states: list[dict], lr: float) -> None:
        first, second, steps = ([own[key] for own in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        adam(leaves, gradients, first, second, [], steps, lr=lr, **self.options)


class PerReplica:
    """One torch optimizer a replica: no seed's update depends on another's, and rates may differ."""

    def __init__(self, stack: Stack, kind: Callable, lr: Rate):
        self._names = list(stack.parameters)
        self._optimizers = []
        for replica in range(stack.replicas):
            own, rate = list(stack.leaves(replica).values()), lr[replica] if isinstance(lr, tuple) else lr
            takes_lr = isinstance(kind, type) or "lr" in inspect.signature(kind).parameters
            optimizer = kind(own, lr=rate) if takes_lr else kind(own)
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"the optimizer factory made a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
                )
            self._optimizers.append(optimizer)
        # A factory may give its groups different rates: their ratios stay when the rate moves.
        first = self._optimizers[0].param_groups[0]["lr"]
        self._ratios = [float(group["lr"]) / float(first) for group in self._optimizers[0].param_groups]

    @property
    def options(self) -> Mapping[str, object]:
        """The options of a replica's first group of parameters, such as ``betas``."""
        return self._optimizers[0].param_groups[0]

    def step(self, stack: Stack, lr: Rate, gradients: Mapping[str, torch.Tensor] | None = None) -> None:
        found = stack.gradients() if gradients is None and not stack.apart else gradients
        for replica, optimizer in enumerate(self._optimizers):
            for name, leaf in stack.leaves(replica).items() if found is not None else ():
                leaf.grad = found[name][replica] if name in found else None
            for group, ratio in zip(optimizer.param_groups, self._ratios):
                group["lr"] = (lr[replica] if isinstance(lr, tuple) else lr) * ratio
            try:
                optimizer.step()
            except TypeError as error:
                if "closure" not in str(error):
                    raise
                raise ValueError(
                    f"{type(optimizer).__name__} evaluates the loss itself, which training here does not give it"
                ) from error

    def _state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {}
        for position, p in enumerate(parameters):
            for key, value in optimizer.state[p].items():
                if not isinstance(value, torch.Tensor | int | float):
                    raise TypeError(
                        f"{type(optimizer).__name__} keeps {key!r} as a {type(value).__name__}, which cannot be stored"
                    )
                state[f"{position}/{key}"] = torch.as_tensor(value)
        return state

    def state(self) -> dict[str, torch.Tensor]:
        states = [self._state_of(optimizer) for optimizer in self._optimizers]
        return {path: torch.stack([state[path] for state in states]) for path in states[0]}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for replica, optimizer in enumerate(self._optimizers):
            parameters: Sequence = [p for group in optimizer.param_groups for p in group["params"]]
            for path, value in state.items():
                position, _, key = path.partition("/")
                optimizer.state[parameters[int(position)]][key] = value[replica]


@torch.no_grad()
def clipped(gradients: Mapping[str, torch.Tensor], most: float) -> dict[str, torch.Tensor]:
    """Scale each replica's gradient down to a norm of at most ``most``, as ``torch.nn.utils.clip_grad_norm_``."""
    squares = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients.values()]
    norm = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * scale.view(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
