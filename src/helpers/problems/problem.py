"""A problem: data, a network and a loss, as objects. A solution: a problem and one replica's weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedParameter

from helpers.problems import fingerprint
from helpers.problems.dataset import Dataset, Tensors
from helpers.problems.net import Net

_PROBE = 32  # training examples that a new problem is tried on


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the squared distance of each example's outputs to its one-hot target (Cohen 2021)."""
    return (outputs - F.one_hot(targets, outputs.shape[-1])).square().sum(-1) / 2


LOSSES: dict[str, Callable] = {"cross_entropy": F.cross_entropy, "squared": squared_error}


class Problem:
    """Data, a network and a loss.

    dataset: a ``Dataset``.
    net: a ``Net``, or a function that makes a module.
    loss: takes (outputs, targets). One that takes ``reduction="none"``, as torch's do, is asked for each example's
        loss; any other returns one loss an example, ``(n, ...)``, whose further axes are averaged.
    names: the built-in names it came from (see ``named``); they stand for it in keys and columns.
    Raises TypeError for arguments of another kind.

    >>> data = Dataset.of(torch.randn(8, 2), torch.tensor([0, 1] * 4))
    >>> Problem(data, Net(lambda: nn.Linear(2, 2))).check()
    """

    def __init__(self, dataset: Dataset, net: Net | Callable[[], nn.Module], loss: Callable = F.cross_entropy, *,
                 names: Mapping[str, object] | None = None):  # fmt: skip
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}; make one with Dataset.of(x, y) or Dataset.of_map(...)"
            )
        if not callable(loss):
            raise TypeError(f"loss is {loss!r}; expected a function of (outputs, targets)")
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise ValueError(
                f"the loss {type(loss).__name__} has weights, which would not be trained; make it part of the net"
            )
        self.dataset, self.loss, self.names = dataset, loss, dict(names or {})
        self.net = net if isinstance(net, Net) else Net(net)
        self._own_mean, self._one_each = _one_loss_each(loss)
        self._checked = False

    @property
    def num_train(self) -> int:
        return self.dataset.num_train

    @property
    def content(self) -> dict[str, object]:
        """The problem as part of a result's key: content of data, net and loss."""
        return {"data": self.dataset.fingerprint, "net": self.net.content, "loss": fingerprint.of(self.loss)}

    @property
    def loss_name(self) -> str:
        inner = self.loss.func if isinstance(self.loss, functools.partial) else self.loss
        return getattr(inner, "__name__", type(inner).__name__)

    def example_losses(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Each example's loss ``(n,)``; further axes, such as tokens, are averaged.

        Raises ValueError for a loss that returns anything but one loss an example.
        """
        try:
            losses, n = self._one_each(_class_axis_first(outputs, targets, self.loss), targets), _length(targets)
        except IndexError as error:
            raise ValueError(f"a label is none of the net's outputs ({error}); expected 0 to outputs − 1") from error
        if not isinstance(losses, torch.Tensor) or not losses.dim() or len(losses) != n:
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else repr(losses)
            raise ValueError(
                f"the loss {self.loss_name} returned {got} for {n} examples, perhaps a sum or a mean; expected one "
                "loss an example: take reduction='none', or return a tensor whose first axis counts examples"
            )
        return losses if losses.dim() == 1 else losses.flatten(1).mean(1)

    def mean_loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """The mean of ``example_losses``; by the loss itself, as a plain loop takes it, where that is the same."""
        if self.averages_labels and isinstance(outputs, torch.Tensor) and outputs.shape[:-1] == targets.shape:
            with contextlib.suppress(IndexError):  # a label out of range, which ``example_losses`` explains
                if targets.dim() == 1:
                    return self.loss(outputs, targets)
                return self.loss(outputs.flatten(0, -2), targets.flatten())
        return self.example_losses(outputs, targets).mean()

    @functools.cached_property
    def averages_labels(self) -> bool:
        """Whether the loss is torch's cross-entropy with each label counting the same: none is weighted or ignored."""
        if self.loss is not F.cross_entropy:
            own = isinstance(self.loss, nn.CrossEntropyLoss) and self._own_mean
            if not own or self.loss.weight is not None or self.loss.ignore_index >= 0:
                return False
        labels = self.dataset.train_targets if isinstance(self.dataset, Tensors) else None
        return labels is not None and not labels.is_floating_point() and int(labels.min()) >= 0

    def own_loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """The loss of a minibatch as a training loop takes it, one number; where the loss gives several, their mean."""
        return self.loss(_class_axis_first(outputs, targets, self.loss), targets).mean()

    def without_example_losses(self, summed: bool = False) -> Problem:
        """The problem for a loss of minibatches alone: each example's loss is its minibatch's, and so is their mean.

        summed: the loss is a sum over examples, not a mean.
        """
        return Problem(self.dataset, self.net, functools.partial(_of_minibatch, self.loss, summed))

    @property
    def has_example_losses(self) -> bool:
        """Whether the loss takes ``reduction="none"``."""
        return self._one_each is not self.loss

    def example_scores(self, outputs: Any, targets: Any) -> torch.Tensor | None:
        """The share of each example's targets that the largest output names ``(n,)``; None without classes."""
        while isinstance(outputs, list | tuple) and outputs:
            outputs = outputs[0]
        if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
            return None
        if targets.is_floating_point() or targets.dtype == torch.bool or outputs.dim() != targets.dim() + 1:
            return None
        right = outputs.argmax(-1 if outputs.shape[:-1] == targets.shape else 1) == targets
        return right.double() if right.dim() == 1 else right.flatten(1).double().mean(1)

    def require_accuracy(self) -> None:
        """Raise ValueError where there is no test accuracy: no test examples, or outputs that name no class."""
        if not self.dataset.size("test"):
            raise ValueError(f"{self.dataset.name} has no test examples, so there is no test accuracy to compare")
        first = torch.zeros(1, dtype=torch.long, device=self.dataset.device)
        inputs, targets = self.dataset.batch(first, "test")
        with torch.no_grad():
            outputs = call(self.net.module(0).to(self.dataset.device).eval(), inputs)
        if self.example_scores(outputs, targets) is None:
            raise ValueError(
                f"outputs of {_shape(outputs)} name no class for targets of {_shape(targets)}, so there is no accuracy "
                "to compare"
            )

    def check(self) -> None:
        """Try the net and the loss on a few examples; raises ValueError with the reason where they do not fit."""
        if self.names or self._checked:  # a built-in fits by construction
            return
        few = min(_PROBE, self.dataset.num_train)
        inputs, targets = self.dataset.batch(torch.arange(few, device=self.dataset.device))
        module = self.net.module(0).to(self.dataset.device).eval()
        self._check_factory(module, self.net.module(0))
        try:
            with torch.no_grad():
                outputs = call(module, inputs)
        except Exception as error:
            whole = isinstance(inputs, torch.Tensor) and not inputs.is_floating_point()
            hint = "; whole numbers are taken for token ids: give images as x.float()" if whole else ""
            raise ValueError(
                f"the net cannot take this data, inputs of {_shape(inputs)}: {_first_line(error)}{hint}"
            ) from error
        self._check_loss(outputs, targets)
        self._checked = True

    @staticmethod
    def _check_factory(module: nn.Module, again: nn.Module) -> None:
        if module is again:
            raise ValueError("the net's factory returns the same module each time; expected a fresh one for each seed")
        pairs = zip(module.parameters(), again.parameters())
        lazy = any(isinstance(p, UninitializedParameter) for p in module.parameters())
        if not lazy and not all(torch.equal(p.cpu(), q) for p, q in pairs):
            raise ValueError(
                "the net's initial weights differ from call to call with the same seed; draw them with torch's own "
                "generator, for numpy's and Python's are not seeded here"
            )

    @torch.no_grad()
    def _check_loss(self, outputs: Any, targets: Any) -> None:
        if isinstance(outputs, torch.Tensor) and isinstance(self.dataset, Tensors):
            every = self.dataset.train_targets
            scored = self.example_scores(outputs, targets) is not None
            if scored and self.loss in LOSSES.values() and outputs.dim() == 2:
                low, high = int(every.min()), int(every.max())
                if low < 0 or high >= outputs.shape[1]:
                    raise ValueError(
                        f"labels are {low} to {high}, but the net has {outputs.shape[1]} outputs: expected labels from "
                        f"0 to {outputs.shape[1] - 1}; torch.unique(y, return_inverse=True) renumbers them"
                    )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Using a target size")  # torch would broadcast one over the other
                raw = _class_axis_first(outputs, targets, self.loss)
                own = self.loss(raw, targets) if self._own_mean else self._one_each(raw, targets)
        except (RuntimeError, IndexError, TypeError, AttributeError, ValueError, UserWarning) as error:
            raise ValueError(
                f"the loss {self.loss_name} cannot take outputs of {_shape(outputs)} with targets of {_shape(targets)}"
                f": {_first_line(error)}; give a loss=lambda outputs, targets: ... that returns one loss an example"
            ) from error
        losses = self.example_losses(outputs, targets)
        if self._own_mean and not torch.allclose(own, losses.mean(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"the loss {self.loss_name} averages to {float(own):.6g}, but the mean over its examples is "
                f"{float(losses.mean()):.6g}: class weights, or targets that it ignores, weigh examples by the company "
                "they keep. Give loss=lambda outputs, targets: ... that returns one loss an example"
            )


def call(module: nn.Module, inputs: Any) -> Any:
    """Call a module on a minibatch: a tuple as positional arguments, a dict as keyword arguments."""
    if isinstance(inputs, tuple):
        return module(*inputs)
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


@dataclass(frozen=True)
class Solution:
    """A problem, and one replica's parameters (and buffers) by name, each with a replica axis of 1."""

    problem: Problem
    weights: Mapping[str, torch.Tensor]


def _one_loss_each(loss: Callable) -> tuple[bool, Callable]:
    """Whether the loss averages by itself, and the function that gives each example's."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        each = copy.deepcopy(loss)
        each.reduction = "none"
        return loss.reduction == "mean", each
    try:
        parameter = inspect.signature(loss).parameters.get("reduction")
    except (TypeError, ValueError):
        parameter = None
    if parameter is None:
        return False, loss
    return parameter.default == "mean", functools.partial(loss, reduction="none")


def _class_axis_first(outputs: Any, targets: Any, loss: Callable) -> Any:
    """Outputs ``(n, tokens, classes)`` as torch's cross-entropy wants them: ``(n, classes, tokens)``."""
    inner = loss.func if isinstance(loss, functools.partial) else loss
    if inner is not F.cross_entropy and not isinstance(inner, nn.CrossEntropyLoss):
        return outputs
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)) or targets.dim() < 2:
        return outputs
    last = outputs.shape[:-1] == targets.shape
    return outputs.movedim(-1, 1) if last and not targets.is_floating_point() else outputs


def _of_minibatch(loss: Callable, summed: bool, outputs: Any, targets: Any) -> torch.Tensor:
    n = _length(targets)
    return (loss(_class_axis_first(outputs, targets, loss), targets).mean() / (n if summed else 1)).expand(n)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _length(targets: Any) -> int:
    while isinstance(targets, list | tuple | dict):
        targets = next(iter(targets.values())) if isinstance(targets, dict) else targets[0]
    return len(targets)


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shape(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_shape, value)) + ")"
    return type(value).__name__
