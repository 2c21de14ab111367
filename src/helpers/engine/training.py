"""Training: the one engine. A sweep, a switch and a live slider all advance the same object.

Paired randomness: initial weights depend on the seed, the order of an epoch on (seed, epoch), and a minibatch is the
next ``batch_size`` entries of that order. So runs at two batch sizes see the same examples in the same order, equal
``examples_seen`` compares, and a change of batch size mid-epoch neither skips nor repeats an example.
"""

from __future__ import annotations

import copy
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from helpers.engine import optimizers, stack
from helpers.engine.history import History
from helpers.engine.micro import MicroBatches
from helpers.engine.optimizers import check_optimizer
from helpers.engine.order import Order
from helpers.engine.schedules import (
    Schedule,
    at_epoch,
    check_above,
    check_batch_size,
    check_examples,
    check_lr,
    values_of,
)  # fmt: skip
from helpers.problems import Problem

# Raise this when a change alters results: what the store holds under an older number is computed again.
NUMERICS = 5
_AT_ONCE = 500  # steps of a compiled loop, which no signal interrupts

Measures = Callable[[stack.Stack, dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class Training:
    """A problem, one replica a seed, trained together; ``batch_size`` and ``lr`` may change at any time.

    problem: data, network and loss.
    seeds: of the replicas; a seed may stand twice, with two rates.
    batch_size: examples a step, or a ``Schedule`` over epochs.
    lr: learning rate, a ``Schedule``, or one of these a replica.
    optimizer: ``"sgd"`` (with ``momentum``), ``"adam"`` or ``"adamw"`` (with ``betas``), a ``torch.optim`` class, or a
        factory that takes one replica's parameters.
    clip_norm: the most that the norm of a replica's gradient may be; longer ones are scaled down.
    micro_batch_size: examples in memory at a time; a step's gradient is summed over them. Where memory does not
        suffice it is halved until it does, with a warning.
    measures: adds columns to the history: (stack, initial weights) → name → ``(replicas,)``.
    closed_form: gradients of built-in nets in the fastest way, of perceptrons in closed form; False for autograd's, so
        that its memory counts.
    Raises ValueError for settings that cannot be trained.

    >>> from helpers import problems
    >>> training = Training(problems.named("blobs", "brownlee_mlp"), seeds=[0, 1], batch_size=32, lr=0.1)
    >>> training.advance(epochs=2).epoch
    2.0
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seeds: Sequence[int] = (0,),
        batch_size: int | Schedule = 64,
        lr: float | Schedule | Sequence[float | Schedule] = 0.01,
        optimizer: str | Callable = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        micro_batch_size: int | None = None,
        measures: Measures | None = None,
        closed_form: bool = True,
    ):
        if not isinstance(problem, Problem):
            raise TypeError(
                f"Training takes a Problem, not a {type(problem).__name__}; make one: Problem(dataset, net, loss)"
            )
        if not len(seeds):
            raise ValueError("no seeds; expected at least one, for example seeds=[0]")
        check_optimizer(optimizer, momentum)
        if clip_norm is not None:
            check_above("clip_norm", clip_norm)
        if not isinstance(weight_decay, numbers.Real) or not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay is {weight_decay!r}; expected a finite number from 0 on")
        self.problem, self.dataset, self.optimizer = problem, problem.dataset, optimizer
        self.seeds, self.clip_norm = tuple(int(seed) for seed in seeds), clip_norm
        self.stack = stack.build(problem, self.seeds)
        self.initial_weights = self.weights()
        self.steps = self.examples_seen = 0
        self.seconds = 0.0
        self._measures = measures
        self._history = History(len(self.seeds))
        self._order = Order(self.dataset.num_train, self.seeds, self.dataset.device)
        self._micro = MicroBatches(None)
        self.stack.by_hand = closed_form
        self.batch_size, self.lr, self.micro_batch_size = batch_size, lr, micro_batch_size
        self._optimizer = optimizers.make(
            optimizer, self.stack, lr=self._lr, momentum=momentum, betas=betas, weight_decay=weight_decay
        )
        self._momentum = float(momentum)

    # Settings that may change at any time.

    @property
    def batch_size(self) -> int:
        """Examples a step takes now; the last minibatch of an epoch may be shorter. Takes a number or a Schedule."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | Schedule) -> None:
        checked = [check_batch_size(v, self.dataset.num_train) for v in values_of(value)]
        self._batch_schedule = value if isinstance(value, Schedule) else None
        self._batch_size = checked[0] if self._batch_schedule is None else int(value(self.epoch))

    @property
    def micro_batch_size(self) -> int | None:
        """Examples that are in memory at a time; None: the whole minibatch."""
        return self._micro.size

    @micro_batch_size.setter
    def micro_batch_size(self, value: int | None) -> None:
        self._micro.size = None if value is None else check_examples("micro_batch_size", value, self.dataset.num_train)

    @property
    def lr(self) -> float | tuple[float, ...]:
        """The learning rate of the next step, or each replica's. Takes a number, a Schedule, or one a replica."""
        return self._lr

    @lr.setter
    def lr(self, value: float | Schedule | Sequence[float | Schedule]) -> None:
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(value)
            if len(value) != len(self.seeds):
                raise ValueError(f"lr has {len(value)} rates for {len(self.seeds)} replicas; expected one a replica")
        for v in values_of(value):
            check_lr(v)
        every = value if isinstance(value, tuple) else (value,)
        self._lr_schedule = value if any(isinstance(each, Schedule) for each in every) else None
        self._lr = at_epoch(value, self.epoch)

    @property
    def momentum(self) -> float:
        """The momentum of the next step; 0 forgets what has built up. Only sgd may have any."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        check_optimizer(self.optimizer, value)
        self._momentum = float(value)
        if isinstance(self._optimizer, optimizers.Descent | optimizers.SGD):
            self._optimizer.momentum = self._momentum
            if not value:
                self._optimizer.forget()

    @property
    def epoch(self) -> float:
        """Passes over the training set so far, fractions included."""
        return self.examples_seen / self.dataset.num_train

    # Advancing.

    def next_indices(self) -> torch.Tensor:
        """Return the examples of the next minibatch: int64 ``(replicas, batch)``, each in its seed's order."""
        return self._order.next(self.examples_seen, self._batch_size)

    def step(self) -> None:
        """Update every replica once."""
        self._advance(1)

    def _advance(self, most: float) -> None:
        """Take at most so many steps, within an epoch: a single one, or many in a compiled loop."""
        if self._batch_schedule is not None:
            self._batch_size, most = int(self._batch_schedule(self.epoch)), 1
        started, looped = time.perf_counter(), self._looped
        left = self.dataset.num_train - self.examples_seen % self.dataset.num_train
        count = math.ceil(min(most if looped else 1, _AT_ONCE, left / self._batch_size))
        sizes = np.minimum(self._batch_size, left - self._batch_size * np.arange(count))
        rates = [self._lr] * count
        if self._lr_schedule is not None:
            seen = self.examples_seen + self._batch_size * np.arange(count)
            rates = [at_epoch(self._lr_schedule, int(each) / self.dataset.num_train) for each in seen]
            self._lr = rates[-1]
        self._history.add_losses(sizes, self._loop(sizes, rates) if looped else self._update())
        self.steps += count
        self.examples_seen += int(sizes.sum())
        self.seconds += time.perf_counter() - started

    @property
    def _looped(self) -> bool:
        whole = (self._micro.size or self._batch_size) >= self._batch_size
        of_ours = isinstance(self._optimizer, optimizers.Descent | optimizers.Adam)
        return self.stack.looped(self._batch_size) and whole and of_ours and self.clip_norm is None

    def _loop(self, sizes: np.ndarray, rates: Sequence) -> torch.Tensor:
        from helpers.engine import loops  # here, since numba takes half a second to import

        indices = self._order.next(self.examples_seen, int(sizes.sum()))
        each = np.broadcast_to(np.reshape(rates, (len(sizes), -1)), (len(sizes), len(self.seeds)))
        return loops.descend(self.stack, self._optimizer, indices, sizes, each)

    def _update(self) -> torch.Tensor:
        losses = self._micro.gradient(self.stack.train(), self.next_indices(), self.steps)
        clipped = None if self.clip_norm is None else optimizers.clipped(self.stack.gradients(), self.clip_norm)
        self._optimizer.step(self.stack, self._lr, clipped)
        return losses.unsqueeze(0)

    def advance(
        self,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        record: bool = True,
        record_steps: Sequence[int] = (),
    ) -> Training:
        """Advance by epochs or by steps.

        record: evaluate before the first step and at the end of each epoch.
        record_steps: evaluate after these steps in any case, counted from the start of training.
        """
        if (epochs is None) == (steps is None):
            raise ValueError("advance() takes either epochs or steps")
        if record and not self._history.rows:
            self.record()
        end = math.inf if epochs is None else self.examples_seen + round(epochs * self.dataset.num_train)
        last_step = math.inf if steps is None else self.steps + steps
        while self.examples_seen < end and self.steps < last_step:
            due = min((step for step in record_steps if step > self.steps), default=math.inf)
            self._advance(min(min(due, last_step) - self.steps, (end - self.examples_seen) / self._batch_size))
            if (record and self.examples_seen % self.dataset.num_train == 0) or self.steps in record_steps:
                self.record()
        return self

    def branch(self) -> Training:
        """Return a copy that goes on by itself, from the same weights, optimizer state and place in the data."""
        shared = (self.problem, self.dataset)
        return copy.deepcopy(self, {id(one): one for one in shared})  # the examples themselves are shared

    # Evaluation and history.

    def record(
        self,
        splits: Sequence[str] = ("train", "test"),
        known: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """Evaluate, and add a row a replica to the history; what is not evaluated is NaN in it.

        splits: to evaluate. known: what ``evaluate`` would return, by split, where it is known already.
        """
        if self.dataset.device.type != "cpu":
            started = time.perf_counter()
            self._history.wait()
            self.seconds += time.perf_counter() - started
        evaluated = {}
        for split in splits:
            losses, accuracies = known[split] if known else self.evaluate(split)
            evaluated |= {f"{split}_loss": losses, f"{split}_accuracy": accuracies}
        measured = {}
        if self._measures is not None:
            with torch.no_grad():
                measured = self._measures(self.stack, self.initial_weights)
        lr = torch.tensor(self._lr, dtype=torch.float64) if isinstance(self._lr, tuple) else self._lr
        axes = {"steps": self.steps, "epochs": self.epoch, "examples_seen": self.examples_seen,
                "seconds": self.seconds, "batch_size_now": self.batch_size, "lr_now": lr}  # fmt: skip
        self._history.add(axes, evaluated, measured)

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean loss and accuracy (0 to 1; NaN where there is none) over a split: two float64 ``(replicas,)``."""
        count = self.dataset.size(split)
        if not count:
            return torch.full((2, len(self.seeds)), math.nan, dtype=torch.float64).unbind()
        self.stack.eval()
        loss = torch.zeros(len(self.seeds), dtype=torch.float64)
        correct = torch.zeros_like(loss)
        for inputs, targets in self._chunks(split, count):
            losses, scores = self.stack.evaluate(inputs, targets)
            loss, correct = loss + losses, correct + scores
        return loss / count, correct / count

    def _chunks(self, split: str, count: int):
        if self.dataset.in_memory:
            inputs, targets = self.dataset.tensors(split)
            return zip(inputs.split(self.stack.chunk), targets.split(self.stack.chunk))
        return (self.dataset.batch(part, split) for part in torch.arange(count).split(self.stack.chunk))

    @property
    def latest(self) -> dict[str, object]:
        """The last record: axes as numbers, measures ``(replicas,)``. IndexError before the first."""
        return self._history.rows[-1]

    def take_losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sizes ``(steps,)`` and losses ``(steps, replicas)`` of the minibatches since the last record or call.

        They are handed out once: the next record averages what comes after. Notes the step of a divergence.
        """
        return self._history.take_losses(self.steps)

    @property
    def diverged_at(self) -> torch.Tensor:
        """The first step whose loss was not finite, else NaN, as of the last record or ``take_losses``."""
        return self._history.diverged_at.clone()

    @property
    def history(self) -> pd.DataFrame:
        """One row per record and replica: ``seed``, the axes (steps, epochs, examples_seen, seconds) and the measures.

        Accuracies are 0 to 1. ``diverged_at`` is the first step whose loss was not finite, else NaN. ``seconds`` are of
        training alone, of the whole stack (``replicas`` of them).
        """
        return self._history.frame(self.seeds)

    def gradient_norm(self) -> torch.Tensor:
        """Euclidean norm of the last step's minibatch gradient: float64 ``(replicas,)``; NaN before the first step."""
        gradients = self.stack.gradients().values()
        if not gradients:
            return torch.full((len(self.seeds),), math.nan, dtype=torch.float64)
        return sum(g.reshape(len(g), -1).norm(dim=1).cpu().double() ** 2 for g in gradients).sqrt()

    def minibatch_gradient(self) -> dict[str, torch.Tensor]:
        """The gradient of the next minibatch's mean loss at the weights as they are, by name; nothing moves."""
        branch = self.branch()
        branch.step()
        return branch.stack.gradients()

    # State.

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights by name, each with its replica axis."""
        return self.stack.weights()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, buffers and optimizer state by name, on the CPU, each with its replica axis: for ``resume``."""
        state = {f"weights/{name}": value for name, value in self.stack.state().items()}
        state |= {f"optimizer/{name}": value for name, value in self._optimizer.state().items()}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> Training:
        """Copy in the weights, buffers and optimizer state of a ``state``; those of one replica go to every one."""
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimizer": {}}
        for name, value in state.items():
            kind, _, rest = name.partition("/")
            value = value.expand(len(self.seeds), *value.shape[1:])
            parts[kind][rest] = value.to(self.dataset.device, copy=True, memory_format=torch.contiguous_format)
        self.stack.load(parts["weights"])
        self._optimizer.load(parts["optimizer"])
        return self

    def resume(self, state: Mapping[str, torch.Tensor], history: pd.DataFrame) -> None:
        """Go on from a ``state`` and the ``history`` that led to it (as those two gave them, for the same seeds)."""
        records = len(history) // len(self.seeds)
        history = history.drop(columns=["seed", "replicas"])
        last = self._history.resume([history[i : i + records] for i in range(0, len(history), records)])
        self.steps, self.examples_seen, self.seconds = int(last["steps"]), int(last["examples_seen"]), last["seconds"]
        self.load(state)
        # A schedule is read at the epoch it goes on from.
        self.batch_size, self.lr = self._batch_schedule or self.batch_size, self._lr_schedule or self.lr
