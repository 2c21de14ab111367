"""Memory: bytes of a whole training by batch size, predicted from small batches and proven in a process of its own."""

from __future__ import annotations

import functools
import time
import warnings
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace

import psutil
import torch
from torch.utils._pytree import tree_leaves

from helpers.advice.interval import number
from helpers.advice.subject import Subject
from helpers.engine.micro import exhausted
from helpers.engine.training import Training
from helpers.measure import memory
from helpers.problems import Problem

MARGIN = 0.1  # of the budget, kept free
_LOOKED_AT = 1_000  # items whose length is read to find the longest
_IN_OPTIMIZER = "in the optimizer's step"
_TRIES = 5  # between the largest batch that ran and the smallest that did not


class DoesNotFit(ValueError):
    """Not even one example fits into memory; the message says where it ran out."""


@dataclass(frozen=True)
class Memory:
    """What fits.

    budget: bytes that are free. train, evaluate: bytes by batch size of a step, with all that training holds, and of an
    evaluation batch. saved: bytes an example that autograd keeps, counted exactly; 0 for gradients in closed form.
    predicted: largest batch within the budget, margin kept. proven: the largest that ran, which took ``proven_bytes``.
    limit: the smallest batch that ran out of memory, and in which part of a training; None where none did.
    """

    budget: float
    train: memory.Line
    evaluate: memory.Line
    saved: int
    predicted: int
    proven: int
    proven_bytes: int
    limit: tuple[int, str] | None
    num_train: int

    @property
    def fits(self) -> int:
        """The largest batch that fits, as far as it was tried or can be predicted."""
        return self.proven if self.limit else max(self.predicted, self.proven)

    @property
    def sentence(self) -> str:
        """What fits, in words."""
        if self.limit:
            return f"batches fit up to {self.proven:,} (proven); {self.limit[0]:,} ran out of memory in {self.limit[1]}"
        fit = f"batches fit up to {self.predicted:,}"
        if self.predicted >= self.num_train:
            fit = f"all {self.num_train:,} examples fit"
        bytes_ = f"{number(max(self.proven_bytes / 1e6, 0.1))} MB"
        kept = f"{100 * MARGIN:.0f} % of {self.budget / 1e9:.3g} GB is kept free"
        return f"{fit} (predicted), proven at {self.proven:,} with {bytes_}; {kept}"


def measure(subject: Subject, seconds: float) -> Memory:
    """Predict the largest batch from at least three sizes, and prove it as far as ``seconds`` allow.

    The examples are the longest, repeated where there are too few. Raises DoesNotFit where not even one example does.
    """
    trials, ends = _Trials(subject), time.perf_counter() + seconds
    size = max(2, subject.batch_size // 4)  # batch statistics need two examples
    while trials.run(size) and (len(trials.bytes) < 3 or trials.drowned):
        size *= 2
        if len(trials.bytes) >= 3 and (size > subject.num_train or time.perf_counter() + 3 * trials.took > ends):
            break
    while trials.limit and len(trials.bytes) < 2 and trials.limit[0] > 1:  # the first sizes are too large
        trials.run((trials.limit[0] + max(trials.bytes, default=0)) // 2 or 1)
    if not trials.bytes:
        where = f"out of memory in {trials.limit[1]}, of {trials.budget / 1e9:.3g} GB"
        raise DoesNotFit(f"not even one example fits: {where}; take a smaller net, or an optimizer with less state")
    saved = _saved(subject, max(trials.bytes))
    train, evaluate = trials.line(0, saved), trials.line(1, 0)
    room = trials.budget * (1 - MARGIN)
    predicted = min(line.largest_batch(room) if line(1) <= room else 1 for line in (train, evaluate))
    for _ in range(_TRIES if trials.limit else 1):
        proven = max(trials.bytes)
        if trials.limit:
            size = (proven + trials.limit[0]) // 2
        else:
            affordable = proven * (ends - time.perf_counter()) / (4 * trials.took)
            size = int(min(predicted, subject.num_train, affordable))
        if size > proven:
            trials.run(size, steps=3)
    proven = max(trials.bytes)
    taken = trials.bytes[proven][0]
    return Memory(trials.budget, train, evaluate, saved, predicted, proven, taken, trials.limit, subject.num_train)


class _Trials:
    """Batch sizes that ran, with the bytes of a step and of an evaluation; and the smallest that did not, ``limit``."""

    def __init__(self, subject: Subject):
        self.device = subject.problem.dataset.device
        cuda = self.device.type == "cuda"
        self.budget = float(torch.cuda.mem_get_info(self.device)[0] if cuda else psutil.virtual_memory().available)
        self.bytes: dict[int, list[int]] = {}
        self.limit: tuple[int, str] | None = None
        self.took = 0.0
        self._subject, self._longest = subject, _longest(subject)
        weights = (value for name, value in subject.state.items() if name.startswith("weights/"))
        self._copy = sum(value.numel() * value.element_size() for value in weights)  # that Training keeps of the start

    def run(self, size: int, steps: int = 1) -> bool:
        """Whether a training of ``steps``, and an evaluation, run at this size."""
        started = time.perf_counter()
        indices = self._longest[torch.arange(size) % len(self._longest)]
        data = self._subject.problem.dataset.select(indices, indices[:0], "train")
        data.key = "trial"  # its content need not be hashed
        problem = Problem(data, self._subject.problem.net, self._subject.problem.loss)
        subject = replace(self._subject, problem=problem, state={})
        parts = {"a training step": (_train, steps), "an evaluation batch": (_evaluate, 0)}
        found = []
        for name, (function, count) in parts.items():
            try:
                found += memory.peaks([functools.partial(function, subject, size, count)], self.device)
            except (RuntimeError, MemoryError, BrokenExecutor) as error:
                if not (exhausted(error) or isinstance(error, BrokenExecutor)):
                    raise
                where = "the optimizer's state" if getattr(error, "args", ("",))[-1] == _IN_OPTIMIZER else name
                self.limit = (size, where)
                return False
        self.bytes[size] = [max(0, found[0] - self._copy), found[1]]
        self.took = time.perf_counter() - started
        return True

    @property
    def drowned(self) -> bool:
        """Whether the bytes have hardly grown yet, so that their noise would be the slope."""
        taken = [self.bytes[size][0] for size in sorted(self.bytes)]
        return taken[-1] - taken[0] < max(0.3 * taken[0], 2**25)

    def line(self, which: int, least: float) -> memory.Line:
        """Bytes by batch size; no fewer an example than ``least``, nor than one byte."""
        sizes = sorted(self.bytes)
        line = memory.fit_line([0, *sizes] if len(sizes) < 2 else sizes, [self.bytes[s][which] for s in sizes])
        return replace(line, per_example=max(line.per_example, least, 1.0), fixed=max(line.fixed, 0.0))


def _train(subject: Subject, size: int, steps: int) -> None:
    training = _training(subject, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the engine takes half the micro-batch
        for _ in range(steps):
            try:
                training.step()
            except (RuntimeError, MemoryError) as error:
                if not exhausted(error) or training.micro_batch_size is not None:
                    raise
                raise torch.OutOfMemoryError("out of memory", _IN_OPTIMIZER) from None
            if training.micro_batch_size is not None:
                raise torch.OutOfMemoryError("out of memory")


def _evaluate(subject: Subject, size: int, _: int) -> None:
    s, data = _training(subject, size).stack.eval(), subject.problem.dataset
    with torch.inference_mode():
        s.evaluate(*data.batch(torch.arange(size, device=data.device)))


def _training(subject: Subject, size: int) -> Training:
    return Training(subject.problem, batch_size=size, lr=subject.lr, optimizer=subject.optimizer)


def _saved(subject: Subject, fits: int) -> int:
    """Bytes that autograd keeps an example, by the difference of two batches of which the larger is known to fit."""
    size = max(1, min(subject.batch_size, fits // 2, subject.num_train // 2))
    kept = []
    for batch in (size, 2 * size):
        training = subject.training(batch)
        with memory.Saved(without=training.stack.parameters.values()) as saved:
            training.step()
        kept.append(saved.peak)
    return max(0, kept[1] - kept[0]) // max(size, 1)


def _longest(subject: Subject) -> torch.Tensor:
    """Training examples by falling length, of those looked at."""
    data = subject.problem.dataset
    some = torch.randperm(data.num_train, generator=torch.Generator().manual_seed(0))[:_LOOKED_AT]
    if data.in_memory:
        return some
    lengths = [sum(leaf.numel() for leaf in tree_leaves(data.batch(i[None])) if torch.is_tensor(leaf)) for i in some]
    return some[torch.tensor(lengths).argsort(descending=True, stable=True)]
