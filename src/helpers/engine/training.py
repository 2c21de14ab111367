"""Training: the one engine. A sweep, a switch and a live slider all advance the same object.

Paired randomness: initial weights depend on the seed, the order of an epoch on (seed, epoch), and a minibatch is the
next ``batch_size`` entries of that order. So runs at two batch sizes see the same examples in the same order, equal
``examples_seen`` compares, and a change of batch size mid-epoch neither skips nor repeats an example.
"""

from __future__ import annotations

import copy
import functools
import math
import numbers
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from helpers.engine import kernels as models
from helpers.measure import memory
from helpers.problems import data

# Raise this when a change alters results: what the store holds under an older number is computed again.
NUMERICS = 4

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Schedule:
    """A setting as a function of the epoch, as a value: ``points`` (epoch, value), in steps or joined by lines."""

    points: tuple[tuple[float, float], ...]
    linear: bool = False

    def __call__(self, epoch: float) -> float:
        before = [point for point in self.points if point[0] <= epoch]
        (start, value), after = before[-1], self.points[len(before) :]
        if not self.linear or not after:
            return value
        (end, target) = after[0]
        return value + (target - value) * (epoch - start) / (end - start)

    def __str__(self) -> str:
        return ("~" if self.linear else "→").join(f"{value:g}@{epoch:g}" for epoch, value in self.points)

    def until(self, epoch: float) -> Schedule | float:
        """The part before ``epoch``; a plain number where it is constant there."""
        points = tuple(point for point in self.points if point[0] < epoch)
        if self.linear and len(points) < len(self.points):
            return Schedule((*points, (epoch, self(epoch))), linear=True)
        return points[0][1] if len(points) == 1 else Schedule(points, self.linear)


def schedule(points: Mapping[float, float], *, linear: bool = False) -> Schedule:
    """``{0: 1024, 30: 64}`` → a schedule: from each epoch on, that value. Raises ValueError unless it begins at 0."""
    ordered = tuple(sorted(points.items()))
    if not ordered or ordered[0][0] != 0:
        raise ValueError(f"a schedule begins at epoch 0; this one has {dict(points)}")
    return Schedule(ordered, linear)


def check_batch_size(value: object, num_train: int) -> int:
    """``value`` as an int, or ValueError unless it is a whole number from 1 to the size of the training set."""
    return _check_examples("batch_size", value, num_train)


def _check_examples(name: str, value: object, num_train: int) -> int:
    if not isinstance(value, numbers.Real) or not 1 <= value <= num_train or value != int(value):
        raise ValueError(f"{name} is {value!r}; expected a whole number from 1 to {num_train} (the training set)")
    return int(value)


def check_lr(value: object) -> float:
    """``value`` as a float, or ValueError unless it is finite and above 0."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"lr is {value!r}; expected a finite number above 0")
    return float(value)


def check_optimizer(name: str, momentum: float) -> None:
    """ValueError unless it is one of ``OPTIMIZERS``, with a momentum from 0 to below 1 that only sgd may have."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose one of: {', '.join(OPTIMIZERS)}")
    if not isinstance(momentum, numbers.Real) or not 0 <= momentum < 1 or (momentum and name != "sgd"):
        raise ValueError(f"momentum is {momentum!r} with {name}; expected 0 to below 1, and with sgd alone")


class Training:
    """A model on a dataset, one replica per seed, trained together; ``batch_size`` and ``lr`` may change at any time.

    ``optimizer``: ``"sgd"`` (with ``momentum``), ``"adam"`` or ``"adamw"`` (with ``betas``). ``batch_size`` and ``lr``
    are numbers or a ``Schedule`` over epochs. ``norm`` and ``norm_batch_size``: see ``models.build``; ``loss``: see
    ``models.example_losses``. ``micro_batch_size``: a step's gradient is accumulated over micro-batches of so many
    examples, to save memory; where memory does not suffice, it is halved until it does, with a warning.
    ``measures(model, initial_weights)`` adds columns to the history: a mapping of name → ``(replicas,)``. Raises
    ValueError for settings that cannot be trained.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        model: str = "shen_mlp",
        *,
        seeds: Sequence[int] = (0,),
        batch_size: int | Schedule = 64,
        lr: float | Schedule = 0.01,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        norm: str = "none",
        norm_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        loss: str = "cross_entropy",
        measures: Callable[[models.Model, dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None,
    ):
        if not seeds:
            raise ValueError("no seeds; expected at least one, for example seeds=[0]")
        check_optimizer(optimizer, momentum)
        models.check_loss(loss)
        self.loss = loss
        self.dataset, self.seeds, self.optimizer = dataset, tuple(int(seed) for seed in seeds), optimizer
        self.norm, self.norm_batch_size, self.micro_batch_size = norm, norm_batch_size, micro_batch_size
        shape = (dataset.input_shape, dataset.num_classes)
        self.model = models.build(model, *shape, self.seeds, dataset.device, norm, norm_batch_size)
        self.initial_weights = self.weights()
        self.steps = self.examples_seen = 0
        self.seconds = 0.0
        self._measures = measures
        self._records: list[dict[str, object]] = []
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._diverged_at = torch.full((self.model.replicas,), math.nan, dtype=torch.float64)
        self._order_epoch, self._order = -1, torch.empty(0)
        self._factors: list[models.Factors] = []  # the last step's gradient, where the model gives it in closed form
        self._betas, self._weight_decay = betas, weight_decay
        self._parameters = dict(self.model.named_parameters())
        self._velocity: dict[str, torch.Tensor] = {}  # of SGD with momentum: what has built up of each parameter
        self.batch_size, self.lr, self.momentum = batch_size, lr, momentum

    @functools.cached_property
    def _adam(self) -> torch.optim.Optimizer:
        """Built when first needed: the first optimizer of a process takes more than a second, and SGD does without."""
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        # The fused kernels read and write each weight once a step; at small batches a step is bound by just that.
        fused = self.dataset.device.type in ("cpu", "cuda")
        return kind(self._parameters.values(), betas=self._betas, weight_decay=self._weight_decay, fused=fused)

    @property
    def batch_size(self) -> int:
        """Examples a step takes now; the last minibatch of an epoch may be shorter. Takes a number or a Schedule."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | Schedule) -> None:
        values = [v for _, v in value.points] if isinstance(value, Schedule) else [value]
        checked = [check_batch_size(v, self.dataset.num_train) for v in values]
        self._batch_schedule = value if isinstance(value, Schedule) else None
        self._batch_size = checked[0] if self._batch_schedule is None else int(value(self.epoch))

    @property
    def micro_batch_size(self) -> int | None:
        """Examples that are in memory at a time; a minibatch's gradient is summed over them. None: all of them."""
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, value: int | None) -> None:
        name = "micro_batch_size"
        self._micro_batch_size = None if value is None else _check_examples(name, value, self.dataset.num_train)

    @property
    def lr(self) -> float:
        """The learning rate of the next step. Takes a number or a Schedule."""
        return self._lr

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        for v in [v for _, v in value.points] if isinstance(value, Schedule) else [value]:
            check_lr(v)
        self._lr_schedule = value if isinstance(value, Schedule) else None
        self._lr = float(value(self.epoch) if isinstance(value, Schedule) else value)

    @property
    def momentum(self) -> float:
        """The momentum of the next step; 0 forgets what has built up. Only sgd may have any."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        check_optimizer(self.optimizer, value)
        self._momentum = float(value)
        if not value:
            self._velocity = {}

    @property
    def epoch(self) -> float:
        """Passes over the training set so far, fractions included."""
        return self.examples_seen / self.dataset.num_train

    def next_indices(self) -> torch.Tensor:
        """The examples of the next minibatch: int64 ``(replicas, batch)``, each replica in its own seed's order."""
        epoch, cursor = divmod(self.examples_seen, self.dataset.num_train)
        if epoch != self._order_epoch:
            order = [data.epoch_order(self.dataset.num_train, seed, epoch) for seed in self.seeds]
            self._order_epoch, self._order = epoch, torch.stack(order).to(self.dataset.device)
        return self._order[:, cursor : cursor + self._batch_size]

    def step(self) -> None:
        """One update of every replica."""
        if self._batch_schedule is not None:
            self._batch_size = int(self._batch_schedule(self.epoch))
        if self._lr_schedule is not None:
            self._lr = self._lr_schedule(self.epoch)
        started = time.perf_counter()
        indices = self.next_indices()
        if not self.model.training:
            self.model.train()
        losses = self._backward(indices)
        self._update()
        self._losses.append((indices.shape[1], losses))
        self.steps += 1
        self.examples_seen += indices.shape[1]
        self.seconds += time.perf_counter() - started

    def _update(self) -> None:
        if self.optimizer == "sgd":
            self._descend()
            return
        for p in self._parameters.values() if self._factors else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        gradients = {name: p.grad for name, p in self._parameters.items()}
        for factors in self._factors:
            factors.add_to(gradients, alpha=1.0)
        for group in self._adam.param_groups:
            group["lr"] = self._lr
        self._adam.step()

    @torch.no_grad()
    def _descend(self) -> None:
        """SGD, as torch's: v ← momentum·v + g + decay·w, w ← w − lr·v; plain, g goes straight into the weights."""
        plain = not (self._momentum or self._weight_decay)
        into, alpha = (self._parameters, -self._lr) if plain else (self._velocity, 1.0)
        for name, p in self._parameters.items() if not plain else ():
            if name not in into:
                into[name] = torch.zeros_like(p)
            into[name].mul_(self._momentum)
            if self._weight_decay:
                into[name].add_(p, alpha=self._weight_decay)
        for factors in self._factors:
            factors.add_to(into, alpha)
        for name, p in self._parameters.items():
            if not self._factors:
                into[name].add_(p.grad, alpha=alpha)
            if not plain:
                p.sub_(into[name], alpha=self._lr)

    def _backward(self, indices: torch.Tensor) -> torch.Tensor:
        """Leaves the minibatch's gradient in the weights or as factors, and returns its mean loss ``(replicas,)``.

        What does not fit in memory is started over in micro-batches half the size, and they stay at that.
        """
        statistics = [(b, b.clone()) for b in self.model.buffers()] if self.norm == "batch" else []
        self._factors = []
        while True:
            size = min(self._micro_batch_size or indices.shape[1], indices.shape[1])
            try:
                # Under a count of what autograd keeps, autograd's way.
                if self.model.closed_form and size == indices.shape[1] and not memory.Saved.entered:
                    losses, self._factors = self.model.backpropagate(*self._examples(indices), self.loss)
                    return losses
                for p in self.model.parameters():
                    p.grad = None
                return self._accumulate(indices, size, statistics)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not memory.exhausted(error):
                    raise
                reason = str(error).split("\n")[0]
            # Outside of `except`, whose error would keep alive what did fit.
            self._micro_batch_size = size // 2
            self._warn_of_micro_batches(size, reason)

    def _examples(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets ``(replicas, examples, …)``."""
        flat = indices.reshape(-1)
        inputs = self.dataset.train_inputs.index_select(0, flat).unflatten(0, indices.shape)
        return inputs, self.dataset.train_targets.index_select(0, flat).view(indices.shape)

    def _accumulate(self, indices: torch.Tensor, size: int, statistics: list[tuple]) -> torch.Tensor:
        # Batch statistics are of the micro-batch. Split as ghost batches are, it holds whole ones where their size
        # divides its own; and each starts from the running statistics before the step, which move by the mean move.
        batch, moved = indices.shape[1], [torch.zeros_like(before) for _, before in statistics]
        split = models.parts(batch, size) if statistics else size
        total: torch.Tensor | float = 0.0
        for part in (indices,) if size == batch else indices.split(split, dim=1):
            for running, before in statistics:
                running.copy_(before)
            share = part.shape[1] / batch
            inputs, targets = self._examples(part)
            losses = models.example_losses(self.model(inputs), targets, self.loss).mean(1)
            (losses.sum() if share == 1 else losses.sum() * share).backward()
            total = losses.detach() if share == 1 else total + losses.detach() * share
            for mean, (running, _) in zip(moved, statistics):
                mean.add_(running, alpha=share)
        for (running, _), mean in zip(statistics, moved):
            running.copy_(mean)
        return total

    def _warn_of_micro_batches(self, size: int, reason: str) -> None:
        new = self._micro_batch_size
        same = "the gradients are the same sums"
        if self.norm == "batch" and (self.norm_batch_size is None or new % self.norm_batch_size):
            same = f"but batch statistics are now over at most {new} examples, so the gradients differ"
        warnings.warn(
            f"step {self.steps + 1}: {size} examples at once do not fit in memory ({reason}); from here on "
            f"micro_batch_size is {new}: {same}", stacklevel=4,
        )  # fmt: skip

    def advance(
        self,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        record: bool = True,
        record_steps: Sequence[int] = (),
    ) -> Training:
        """Advance by epochs or by steps. ``record``: evaluate before the first step and at the end of each epoch.

        ``record_steps``: evaluate after these steps in any case, counted from the start of training.
        """
        if (epochs is None) == (steps is None):
            raise ValueError("advance() takes either epochs or steps")
        if record and not self._records:
            self.record()
        end = math.inf if epochs is None else self.examples_seen + round(epochs * self.dataset.num_train)
        last_step = math.inf if steps is None else self.steps + steps
        while self.examples_seen < end and self.steps < last_step:
            self.step()
            if (record and self.examples_seen % self.dataset.num_train == 0) or self.steps in record_steps:
                self.record()
        return self

    def record(self) -> None:
        """Evaluate on the training and test set, and add a row per replica to the history."""
        if self.dataset.device.type != "cpu":
            started = time.perf_counter()
            float(self._losses[-1][1][0]) if self._losses else None  # waits for the device
            self.seconds += time.perf_counter() - started
        train_loss, train_accuracy = self.evaluate(self.dataset.train_inputs, self.dataset.train_targets)
        test_loss, test_accuracy = self.evaluate(self.dataset.test_inputs, self.dataset.test_targets)
        sizes, losses = self.take_losses()
        running = (losses * sizes[:, None]).sum(0) / sizes.sum()  # averaged by examples; NaN before the first step
        self._diverged_at = torch.where(
            self._diverged_at.isnan() & ~train_loss.isfinite(), float(self.steps), self._diverged_at
        )
        row = {
            "steps": self.steps, "epochs": self.epoch, "examples_seen": self.examples_seen, "seconds": self.seconds,
            "batch_size_now": self.batch_size, "lr_now": self.lr,
            "minibatch_loss": running, "train_loss": train_loss, "train_accuracy": train_accuracy,
            "test_loss": test_loss, "test_accuracy": test_accuracy,
            "generalization_gap": train_accuracy - test_accuracy, "diverged_at": self._diverged_at.clone(),
        }  # fmt: skip
        if self._measures is not None:
            with torch.no_grad():
                measured = self._measures(self.model, self.initial_weights)
            row |= {name: value.cpu().double() for name, value in measured.items()}
        self._records.append(row)

    @property
    def latest(self) -> dict[str, object]:
        """The last record: axes as numbers, measures ``(replicas,)``. IndexError before the first."""
        return self._records[-1]

    def take_losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes ``(steps,)`` and losses ``(steps, replicas)`` of the minibatches since the last record or call.

        They are handed out once: the next record averages what comes after. Notes the step of a divergence.
        """
        if not self._losses:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, self.model.replicas, dtype=torch.float64)
        sizes = torch.tensor([size for size, _ in self._losses], dtype=torch.float64)
        losses = torch.stack([loss for _, loss in self._losses]).cpu().double()
        first_step = self.steps - len(self._losses) + 1
        bad = ~losses.isfinite()
        at = torch.where(bad.any(0), (first_step + bad.int().argmax(0)).double(), math.nan)
        self._diverged_at = torch.where(self._diverged_at.isnan(), at, self._diverged_at)
        self._losses.clear()
        return sizes, losses

    def branch(self) -> Training:
        """A copy that goes on by itself, from the same weights, optimizer state and place in the data."""
        return copy.deepcopy(self, {id(self.dataset): self.dataset})  # the examples themselves are shared

    @property
    def diverged_at(self) -> torch.Tensor:
        """The first step whose loss was not finite, else NaN, as of the last record or ``take_losses``."""
        return self._diverged_at.clone()

    def gradient_norm(self) -> torch.Tensor:
        """Euclidean norm of the last step's minibatch gradient: float64 ``(replicas,)``; NaN before the first step."""
        gradients = self._gradients().values()
        if not gradients:
            return torch.full((self.model.replicas,), math.nan, dtype=torch.float64)
        return sum(g.flatten(1).norm(dim=1).cpu().double() ** 2 for g in gradients).sqrt()

    def _gradients(self) -> dict[str, torch.Tensor]:
        """The last step's gradient by name; empty before the first."""
        if not self._factors:
            return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        found = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for factors in self._factors:
            factors.add_to(found, alpha=1.0)
        return found

    def minibatch_gradient(self) -> dict[str, torch.Tensor]:
        """The gradient of the next minibatch's mean loss at the weights as they are, by name; nothing moves."""
        branch = self.branch()
        branch.step()
        return branch._gradients()

    @torch.inference_mode()
    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and accuracy (0 to 1) of every replica over a set of examples: two float64 ``(replicas,)``."""
        self.model.eval()
        loss = torch.zeros(self.model.replicas, dtype=torch.float64)
        correct = torch.zeros_like(loss)
        chunk = self.model.evaluation_chunk if inputs.is_cpu else 10_000
        for x, y in zip(inputs.split(chunk), targets.split(chunk)):
            logits = self.model(x.expand(self.model.replicas, *x.shape))
            y = y.expand(self.model.replicas, -1)
            loss += models.example_losses(logits, y, self.loss).sum(1).cpu().double()
            correct += (logits.argmax(-1) == y).sum(1).cpu().double()
        return loss / len(targets), correct / len(targets)

    @torch.inference_mode()
    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """What every replica makes of a set of examples: ``(replicas, examples, classes)``."""
        self.model.eval()
        chunks = inputs.split(self.model.evaluation_chunk if inputs.is_cpu else 10_000)
        return torch.cat([self.model(x.expand(self.model.replicas, *x.shape)) for x in chunks], dim=1)

    @property
    def history(self) -> pd.DataFrame:
        """One row per record and replica: ``seed``, the axes (steps, epochs, examples_seen, seconds) and the measures.

        Accuracies are 0 to 1. ``diverged_at`` is the first step whose loss was not finite, else NaN. ``seconds`` are of
        training alone, of the whole stack (``replicas`` of them).
        """
        frames = []
        for replica, seed in enumerate(self.seeds):
            rows = [{k: v[replica].item() if torch.is_tensor(v) else v for k, v in r.items()} for r in self._records]
            frames.append(pd.DataFrame(rows).assign(seed=seed, replicas=self.model.replicas))
        return pd.concat(frames, ignore_index=True)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights by name, each with its replica axis."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, running statistics and optimizer state by name, on the CPU, each with its replica axis.

        What ``resume`` takes.
        """
        state = {f"weights/{name}": t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        for name, p in self._parameters.items():
            built_up = {"velocity": self._velocity[name]} if name in self._velocity else {}
            for key, value in (built_up if self.optimizer == "sgd" else self._adam.state[p]).items():
                value = value.detach().cpu().clone()
                state[f"optimizer/{name}/{key}"] = value.expand(self.model.replicas) if value.ndim == 0 else value
        return state

    def resume(self, state: Mapping[str, torch.Tensor], history: pd.DataFrame) -> None:
        """Go on from a ``state`` and the ``history`` that led to it (as those two gave them, for the same seeds)."""
        groups = [history[history["seed"] == seed].drop(columns=["seed", "replicas"]) for seed in self.seeds]
        shared = ("steps", "epochs", "examples_seen", "seconds", "batch_size_now", "lr_now")
        self._records = [
            {k: groups[0][k].iloc[i] if k in shared else torch.tensor([float(g[k].iloc[i]) for g in groups],
                                                                     dtype=torch.float64) for k in groups[0]}
            for i in range(len(groups[0]))
        ]  # fmt: skip
        last = self._records[-1]
        self.steps, self.examples_seen, self.seconds = int(last["steps"]), int(last["examples_seen"]), last["seconds"]
        self._diverged_at = last["diverged_at"].clone()
        self.model.restore({name: state[f"weights/{name}"] for name in self.model.state_dict()})
        with torch.no_grad():
            for name, p in self._parameters.items():
                prefix = f"optimizer/{name}/"
                for key in [k for k in state if k.startswith(prefix)]:
                    value = state[key].to(p.device, copy=True)  # the state given stays as it is
                    if self.optimizer == "sgd":
                        self._velocity[name] = value
                    else:
                        self._adam.state[p][key.removeprefix(prefix)] = value if value.ndim > 1 else value[0]
        # A schedule is read at the epoch it goes on from.
        self.batch_size, self.lr = self._batch_schedule or self.batch_size, self._lr_schedule or self.lr
