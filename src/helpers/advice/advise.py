"""The phases in turn, with progress and what time is left; an interrupt keeps and reports what is known."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers.advice import answer, contract, critical, memory, noise, rate, speed
from helpers.advice import subject as subjects
from helpers.advice.answer import Answer
from helpers.advice.interval import number
from helpers.advice.subject import Subject
from helpers.engine.micro import exhausted
from helpers.problems import Problem

VERSION = 1  # of advice.json
QUICK, GROWTH = 5, 30  # minutes from which on branches are trained, and a pilot run is followed
_ALWAYS_OPEN = (
    "final generalisation and other seeds", "training later than the weights measured", "other hardware",
)  # fmt: skip
_INITIAL, _WARM, _GIVEN = "critical at initialisation", "critical after warm-up", "critical at the weights given"


@dataclass(frozen=True)
class Advice:
    """Advice on a batch size, with the measurements behind it.

    phases: what each phase found, by name. missing: why a phase found nothing, by name. seconds: that each took.
    answer: None where too little is known. interrupted: whether phases were left out by an interrupt.
    """

    about: Mapping[str, object]
    phases: Mapping[str, object]
    missing: Mapping[str, str]
    seconds: Mapping[str, float]
    answer: Answer | None
    interrupted: bool = False

    @property
    def table(self) -> pd.DataFrame:
        """By batch size: what fits, and steps, examples and seconds to the same loss relative to the fewest."""
        if self.answer is None:
            raise ValueError(f"no answer: {self._why()}")
        return self.answer.table

    @property
    def growth(self) -> float | None:
        """How many times the critical batch grew from the first weights measured to the last; None where unknown."""
        found = [
            one.size.estimate for one in self.phases.values() if isinstance(one, critical.Branches) and one.size.bounded
        ]
        return found[-1] / found[0] if len(found) > 1 else None

    def _why(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.missing.items()) or "the phases were interrupted"

    def summary(self) -> list[str]:
        """The advice in ten lines or fewer."""
        return [line for line, _ in self.lines()]

    def lines(self) -> list[tuple[str, str]]:
        """Each line of the summary, and the name of the phase behind it, "" where there is none."""
        a = self.answer
        if a is None:
            return [(f"No advice: {self._why()}.", ""), *self._found(*self.phases)]
        present = self.about["batch_size"]
        decay = "".join(f"; {name} {value:.4g}" for name, value in a.decay_rates.items())
        rule = "" if a.lr.low < a.lr.high else f", by the {self.about['rule']} rule from the present one"
        source = a.critical_from.replace("critical", "branches")
        if source == "noise":
            source = f"the noise scale, which stands in for branches (within ×{answer.STAND_IN:g})"
        return [
            (f"Batch size {a.batch_size:,}: from {a.low:,} to {a.high:,} the time is within 10 % of the least.", ""),
            (f"What binds the range: {a.binding}. Without a cap B* = √(B_t · B_c) = {a.best}.", "speed"),
            (f"Learning rate {a.lr}{rule}{decay}; warm-up over {a.warm_up}.", "rate"),
            (f"The present batch of {present:,}, as micro-batches {a.micro_batch_size:,} × {a.accumulation}, "
             f"{self._relative(present)}; {self.phases['contract'].sentence}.", "contract"),
            (f"Critical batch {a.critical}, from {source}{self._ramp()}.", a.critical_from),
            *self._found("memory", "speed", "noise"),
            (f"If examples (money) count and not seconds: a batch of at most {number(max(a.examples_count, 1))} wastes "
             "10 % of them.", ""),
            (f"Not measured: {'; '.join([*(f'{n} ({r})' for n, r in self.missing.items()), *_ALWAYS_OPEN])}.", ""),
        ]  # fmt: skip

    def _found(self, *names: str) -> list[tuple[str, str]]:
        return [(f"{n.capitalize()}: {self.phases[n].sentence}.", n) for n in names if n in self.phases]

    def _relative(self, batch_size: int) -> str:
        """How much more time a size takes than the best that the caps allow, over the critical batch's interval."""
        turning, c = self.phases["speed"].turning.estimate, self.answer.critical

        def more(critical: float) -> float:
            best = min(math.sqrt(turning * critical), self.answer.cap)
            own, least = (answer.relative_time(np.array(b), turning, critical) for b in (float(batch_size), best))
            return 100 * max(float(own / least) - 1, 0)

        found = sorted(f"{more(end):.0f}" for end in {c.low, c.estimate, c.high} if 0 < end < math.inf)
        ends = sorted({min(found, key=float), max(found, key=float)}, key=float)
        return f"takes {' to '.join(ends)} % more time than the best"

    def _ramp(self) -> str:
        if self.growth is None or self.growth <= 4:
            return ""
        start = max(1, round(self.answer.batch_size / self.growth**0.5))
        return f"; it grows {self.growth:.2g}-fold, so start with {start:,}"

    def to_dict(self) -> dict[str, object]:
        """The content of ``advice.json`` (docs/advise.md); an open side of an interval is null."""
        return _plain({
            "version": VERSION, "about": self.about, "summary": self.summary(), "answer": self.answer,
            "phases": {name: {"sentence": one.sentence, **_fields(one)} for name, one in self.phases.items()},
            "not_measured": {**self.missing}, "open": _ALWAYS_OPEN, "seconds": self.seconds,
            "interrupted": self.interrupted,
        })  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write ``advice.json`` into ``folder``."""
        file = Path(folder) / "advice.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        return file


def advise(problem: Problem, *, optimizer: str | Callable = "adamw", batch_size: int = 64, lr: float = 3e-4,
           minutes: float = 10, weights: object = None, out: str | Path | None = None,
           say: Callable[[str], object] = print) -> Advice:  # fmt: skip
    """Measure which batch size to train a problem at. Nothing of the problem is changed.

    problem: a ``Problem``; without a test set a tenth of its training set is held out.
    optimizer: a name, a ``torch.optim`` class or a factory, as ``Training`` takes.
    batch_size, lr: the present ones; rates and sizes are tried around them.
    minutes: that it may take. 1: contract, memory, speed and noise, and a rough answer; from 5 on also rates and
        branches; from 30 on also along a pilot run.
    weights: to measure at: a Training, a state_dict or a Solution's weights; None for the net's initial ones.
    out: a folder for ``advice.json``; None for no file.
    say: takes each line of progress.
    Raises ValueError or TypeError, in one line, for what cannot be trained; the user's own exceptions pass.

    >>> from helpers import problems
    >>> problem = problems.named("blobs", "brownlee_mlp")
    >>> advice = advise(problem, optimizer="sgd", lr=0.1, minutes=0.05, say=lambda line: None)
    >>> advice.phases["contract"].accumulation
    'exact'
    """
    if not isinstance(minutes, int | float) or not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes!r}; expected a number above 0")
    subject = subjects.subject(problem, optimizer, batch_size, lr, weights)
    return _advise(subject, minutes, weights is not None, out, say)


def from_loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: torch.utils.data.DataLoader,
              loss: Callable, *, minutes: float = 10, out: str | Path | None = None,
              say: Callable[[str], object] = print) -> Advice:  # fmt: skip
    """``advise`` for a training loop's own objects, which stay as they are.

    model, optimizer: at the weights and state to measure. loader: a DataLoader of (inputs, targets) by number.
    loss: of (outputs, targets), a mean over the minibatch or a value an example. minutes, out, say: as ``advise``.
    """
    problem, again, batch_size, lr, state, workers = subjects.loop(model, optimizer, loader, loss)
    return _advise(subjects.subject(problem, again, batch_size, lr, state, workers), minutes, True, out, say)


advise.from_loop = from_loop


def _advise(subject: Subject, minutes: float, given: bool, out: str | Path | None, say: Callable) -> Advice:
    started, phases, missing, took, interrupted = time.perf_counter(), {}, {}, {}, False
    total = 60.0 * minutes
    device = subject.problem.dataset.device
    with subjects.generators_kept(device):
        run = _Phases(subject, given, minutes)
        try:
            for name, share, phase in run:
                left = total - (time.perf_counter() - started)
                seconds = max(min(left, total * share), 1.0)
                say(f"{name}: up to {seconds:.0f} s of the {max(left, 0):.0f} s left")
                before = time.perf_counter()
                try:
                    phases[name] = run.found[name] = phase(seconds)
                    say(f"  {phases[name].sentence}")
                except (ValueError, RuntimeError) as error:
                    if name == "contract" or isinstance(error, memory.DoesNotFit) or not _told(error):
                        raise
                    missing[name] = " ".join(str(error).split())
                    say(f"  not measured: {missing[name]}")
                took[name] = time.perf_counter() - before
        except KeyboardInterrupt:
            interrupted = True
            missing[name] = "interrupted"
            say(f"interrupted in {name}; this is what is known")
        subject = run.subject
        advice = Advice(_about(subject, minutes), phases, missing, took, answer.combine(subject, phases), interrupted)
    if out is not None:
        advice.save(out)
    return advice


def _told(error: Exception) -> bool:
    """Whether an error is a phase's own refusal, or says that memory ran out; anything else is a fault."""
    return isinstance(error, ValueError) or exhausted(error)


class _Phases:
    """The phases in order: name, share of the time, and a function of its seconds. ``found``: results so far."""

    def __init__(self, subject: Subject, given: bool, minutes: float):
        self.subject, self.given, self.minutes = subject, given, minutes
        self.found: dict[str, object] = {}

    def __iter__(self) -> Iterator[tuple[str, float, Callable[[float], object]]]:
        long = self.minutes >= QUICK
        shares = (0.08, 0.08, 0.1) if long else (0.25, 0.2, 0.35)
        yield "contract", 0.05, self._contract
        yield "memory", shares[0], lambda seconds: memory.measure(self.subject, seconds)
        yield "speed", shares[1], lambda seconds: speed.measure(self.subject, seconds, self.most)
        yield "noise", shares[2], self._noise
        if not long:
            return
        yield "rate", 0.2, lambda seconds: rate.measure(self.subject, seconds, self._speed)
        yield from self._critical()

    @property
    def most(self) -> int:
        """Examples that fit, as far as it is known."""
        fits = self.found["memory"].fits if "memory" in self.found else self.subject.batch_size
        return min(fits, self.subject.num_train)

    @property
    def _speed(self) -> speed.Speed:
        if "speed" not in self.found:
            raise ValueError("it is planned by the speed, which was not measured")
        return self.found["speed"]

    def _contract(self, seconds: float) -> contract.Contract:
        found = contract.check(self.subject, seconds)
        self.subject = dataclasses.replace(self.subject, problem=found.as_trained(self.subject.problem))
        return found

    def _noise(self, seconds: float) -> noise.Noise:
        made = self.found["contract"]
        if made.accumulation == contract.IMPOSSIBLE:
            raise ValueError(f"an example has no gradient of its own: it depends on the others in {made.cause}")
        m = self._speed.turning.estimate if "speed" in self.found else 1
        return noise.measure(self.subject, seconds, min(max(1, round(m)), self.subject.batch_size))

    def _critical(self) -> Iterator[tuple[str, float, Callable[[float], object]]]:
        """Branches at initialisation, after warm-up, along a pilot run, and at the weights given."""
        pilot: list[object] = []
        later = 2 if self.minutes >= GROWTH else 0

        def after(examples: int) -> Callable[[float], critical.Branches]:
            def phase(seconds: float) -> critical.Branches:
                if not pilot:
                    pilot.append(self.subject.at_initialisation().training(lr=self.lr))
                while pilot[0].examples_seen < examples:
                    pilot[0].step()
                return self._branches(dataclasses.replace(self.subject, state=pilot[0].state()), seconds)

            return phase

        share = 0.5 / (2 + later + self.given)
        yield _INITIAL, share, lambda seconds: self._branches(self.subject.at_initialisation(), seconds)
        warm = self.found[_INITIAL].examples // 4 if _INITIAL in self.found else 100 * self.subject.batch_size
        yield _WARM, share, after(warm)
        for factor in (8, 64)[:later]:
            yield f"critical after {number(factor * warm)} examples", share, after(factor * warm)
        if self.given:
            yield _GIVEN, share, lambda seconds: self._branches(self.subject, seconds)

    @property
    def lr(self) -> float:
        """The best rate found at the present batch size, else the one given."""
        return self.found["rate"].best.estimate if "rate" in self.found else self.subject.lr

    def _branches(self, subject: Subject, seconds: float) -> critical.Branches:
        return critical.measure(subject, seconds, self._speed, self.lr, self.most)


def _about(subject: Subject, minutes: float) -> dict[str, object]:
    device, optimizer = subject.problem.dataset.device, subject.optimizer
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "net": subject.problem.net.name, "parameters": sum(v.numel() for n, v in subject.state.items() if n[0] == "w"),
        "dataset": subject.problem.dataset.name, "num_train": subject.num_train,
        "held_out": subject.problem.dataset.num_test, "loss": subject.problem.loss_name,
        "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "a factory"),
        "rule": subject.rule, "batch_size": subject.batch_size, "lr": subject.lr, "minutes": minutes,
        "device": where, "threads": torch.get_num_threads(),
        "machine": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip


def _fields(value: object) -> dict[str, object]:
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}


def _plain(value: object) -> object:
    """A value as JSON has it: infinities are null."""
    if dataclasses.is_dataclass(value):
        return _plain(_fields(value))
    if isinstance(value, pd.DataFrame):
        return _plain(value.to_dict("records"))
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
