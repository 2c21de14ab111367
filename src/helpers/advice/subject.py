"""The training that is advised on: what to train, how, and from which weights. Nothing of the user's is touched.

Every phase trains copies: modules that the net's factory makes anew, loaded with the weights given.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from helpers.engine.optimizers import check_optimizer
from helpers.engine.schedules import check_batch_size, check_lr
from helpers.engine.training import Training
from helpers.problems import DataError, Dataset, Net, Problem

_STACK_BYTES = 2**27  # of the weights of copies side by side; gradients and optimizer state come on top
HELD_OUT = 1_000  # most examples that a held-out loss is read on


@dataclass(frozen=True)
class Subject:
    """A training at hand.

    problem: with a held-out part of the data as its test set.
    state: weights, buffers and optimizer state, one replica's, as ``Training.state`` gives them.
    workers: processes that load data beside the training; 0 where a step waits for its minibatch.
    """

    problem: Problem
    optimizer: str | Callable
    batch_size: int
    lr: float
    state: Mapping[str, torch.Tensor]
    workers: int = 0

    def training(
        self, batch_size: int | None = None, lr: float | Sequence[float] | None = None, orders: Sequence[int] = (0,)
    ) -> Training:
        """A copy to train, one replica an order of the data, all from the same weights and optimizer state."""
        return Training(
            self.problem, seeds=orders, batch_size=batch_size or self.batch_size, lr=lr or self.lr,
            optimizer=self.optimizer,
        ).load(self.state)  # fmt: skip

    def at_initialisation(self) -> Subject:
        """The same training at the net's own initial weights."""
        return replace(self, state=_state(self.problem.net.module(0), None))

    @property
    def together(self) -> int:
        """How many copies may train side by side: their weights take ``_STACK_BYTES`` at most."""
        one = sum(v.numel() * v.element_size() for name, v in self.state.items() if name.startswith("weights/"))
        return max(1, _STACK_BYTES // one)

    @property
    def num_train(self) -> int:
        """Training examples, without those held out."""
        return self.problem.num_train

    @functools.cached_property
    def rule(self) -> str:
        """How the rate follows the batch: "√" where a first step forgets the gradient's length, else "linear"."""
        fresh = replace(self, state={name: v for name, v in self.state.items() if name.startswith("weights/")})
        steps, norm = [], None
        for share in (1.0, 0.1):
            training = fresh.training(max(self.batch_size, 2))
            training.clip_norm = norm and norm * share
            training.step()
            norm = float(training.gradient_norm()[0])
            moved = (p.detach().cpu() - self.state[f"weights/{name}"] for name, p in training.stack.parameters.items())
            steps.append(sum(float(move.square().sum()) for move in moved) ** 0.5)
        return "√" if steps[1] > 0.3 * steps[0] else "linear"

    @property
    def decay_rates(self) -> dict[str, float]:
        """Momentum and β of the optimizer, by name, where it has any."""
        if isinstance(self.optimizer, str):
            return {} if self.optimizer == "sgd" else {"β₁": 0.9, "β₂": 0.999}
        group = self.training()._optimizer.options
        named = dict(zip(("β₁", "β₂"), group.get("betas", ()))) | {"momentum": group.get("momentum", 0.0)}
        return {name: float(value) for name, value in named.items() if value}


def subject(problem: Problem, optimizer: str | Callable, batch_size: int, lr: float, weights: object,
            workers: int = 0) -> Subject:  # fmt: skip
    """Check what is advised on. Raises TypeError or ValueError, in one line, for what cannot be trained."""
    if not isinstance(problem, Problem):
        raise TypeError(f"advise takes a Problem, not a {type(problem).__name__}: Problem(dataset, net, loss)")
    check_batch_size(batch_size, problem.num_train)
    check_lr(lr)
    check_optimizer(optimizer, 0.0)
    problem = _with_held_out(problem)
    if problem.num_train < 2:
        raise ValueError("1 training example: a batch size is a choice from 2 examples on")
    module = problem.net.module(0)
    on_meta = next((name for name, p in module.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(
            f"{on_meta} is on the meta device, so it has no values; make the net on a real device in its factory, or "
            "call to_empty() and initialise it there"
        )
    batch_size = min(batch_size, problem.num_train)  # of all but those held out
    return Subject(problem, optimizer, batch_size, float(lr), _state(module, weights), workers)


def _state(module: nn.Module, weights: object) -> dict[str, torch.Tensor]:
    """The state that ``weights`` gives: a Training, a Solution's weights, a state_dict, or None for the net's own."""
    if isinstance(weights, Training):
        return {name: value[:1] for name, value in weights.state().items()}
    own = module.state_dict()
    given = dict(own if weights is None else weights)
    if any(name.startswith("weights/") for name in given):
        return {name: value.detach().cpu()[:1].clone() for name, value in given.items()}
    if not set(own) >= set(given) >= {name for name, _ in module.named_parameters()}:
        differ = ", ".join(sorted(set(own) ^ set(given))[:3])
        raise ValueError(f"these weights are of another net: {differ} on one side alone")
    with_axis = {name: v if v.dim() > own[name].dim() else v.unsqueeze(0) for name, v in given.items()}
    return {f"weights/{name}": value.detach().cpu()[:1].clone() for name, value in with_axis.items()}


def _with_held_out(problem: Problem) -> Problem:
    """The problem with at most ``HELD_OUT`` test examples; where there are none, a tenth of the training examples."""
    data, order = problem.dataset, torch.randperm(problem.num_train, generator=torch.Generator().manual_seed(0))
    if data.num_test:
        chosen = torch.randperm(data.num_test, generator=torch.Generator().manual_seed(0))[:HELD_OUT]
        data = data.select(torch.arange(data.num_train), chosen) if data.num_test > HELD_OUT else data
    elif problem.num_train > 1:
        held_out = min(max(problem.num_train // 10, 1), HELD_OUT)
        data = data.select(order[held_out:], order[:held_out], "train")
    return Problem(data, problem.net, problem.loss)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, loss: Callable) -> tuple:
    """A training loop's problem, optimizer factory, batch size, rate, state and loading processes.

    Raises DataError for a loader whose examples cannot be asked for by number.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            f"a {type(loader.dataset).__name__} gives its examples in one order alone, and advice compares batch sizes "
            "on the same ones; keep some: advise.from_loop(model, optimizer, "
            "DataLoader(list(itertools.islice(dataset, 10_000)), batch_size=64), loss)"
        )
    if loader.batch_size is None:
        raise DataError("the loader has a batch sampler, and advice draws its own batches: give batch_size=... instead")
    device = next(model.parameters()).device
    data = Dataset.of_map(loader.dataset, collate_fn=loader.collate_fn, key="loop", device=device)
    held = copy.deepcopy(model).cpu()
    for p in held.parameters():
        p.grad = None
    problem = Problem(data, Net(lambda: copy.deepcopy(held), key=type(model).__name__), loss)

    trained = {id(p): i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    kind = type(optimizer)
    groups = [({k: v for k, v in group.items() if k != "params"}, [trained[id(p)] for p in group["params"]])
              for group in optimizer.param_groups]  # fmt: skip

    def again(parameters) -> torch.optim.Optimizer:
        own = list(parameters)
        return kind([{**options, "params": [own[i] for i in at]} for options, at in groups])

    state = {f"weights/{name}": value.detach().cpu()[None].clone() for name, value in model.state_dict().items()}
    for position, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            if value is not None:
                state[f"optimizer/{position}/{key}"] = torch.as_tensor(value).detach().cpu()[None].clone()
    lr = float(optimizer.param_groups[0]["lr"])
    return problem, again, min(loader.batch_size, data.num_train), lr, state, loader.num_workers


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put Python's, numpy's and torch's random generators back to where they were."""
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's, kept
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002
