"""Timing side by side: A B A B, one unmeasured warm-up each; and what both sides must agree on."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

# Makes ready what is not timed (data, a fresh network, an empty store), and returns the call that is.
Side = Callable[[], Callable[[], object]]


class Mismatch(AssertionError):
    """Two sides of a row do not reach the same result: their times compare nothing."""


class Skipped(Exception):
    """A row that cannot run here; the message says what it lacks."""


@dataclass(frozen=True)
class Line:
    """A line of the table: one value a pair, in ``unit``, against its target. ``ours``, ``theirs``: seconds a pair."""

    row: str
    case: str
    against: str
    values: list[float]
    target: float
    unit: str = "×"
    at_least: bool = True  # the target is a lower bound; else an upper one
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    note: str = ""
    limit: float | None = None  # the most that could be reached, measured too; report.py says how
    error: float = 0.0  # standard error of the value; a target within two of it counts as reached

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool:
        """Whether the median reaches the target."""
        short = self.target - self.median if self.at_least else self.median - self.target
        return short <= 2 * self.error


def interleave(
    title: str, sides: Mapping[str, Side], pairs: int, check: Callable[[dict], str] = lambda results: ""
) -> tuple[dict[str, list[float]], str]:
    """Seconds of each side, ``pairs`` of them, and what ``check`` found equal: every round's results go through it."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tqdm(total=(pairs + 1) * len(sides), desc=title, file=sys.stderr, leave=False, mininterval=1.0) as bar:
        for number in range(pairs + 1):
            results = {}
            for name, prepare in sides.items():
                call = prepare()
                started = time.perf_counter()
                results[name] = call()
                elapsed = time.perf_counter() - started
                if number:
                    seconds[name].append(elapsed)
                bar.update()
            checked = check(results)
    return seconds, checked


def compare(
    row: str,
    case: str,
    sides: Mapping[str, Side],
    targets: Mapping[str, float],
    pairs: int,
    check: Callable[[dict], str],
    note: str = "",
    scaled: Mapping[str, tuple[float, str]] | None = None,
) -> list[Line]:
    """A line for each name in ``targets``: how often the first side's seconds, ours, go into that one's.

    ``scaled``: where only a part is run, by how much to multiply its seconds, and from what, in words.
    """
    scaled = scaled or {}
    measured, checked = interleave(f"{row}, {case}", sides, pairs, check)
    seconds = {name: [s * scaled.get(name, (1.0,))[0] for s in each] for name, each in measured.items()}
    first, lines = next(iter(sides)), []
    for name, target in targets.items():
        ratios = [b / a for a, b in zip(seconds[first], seconds[name])]
        texts = [f"{prefix}scaled from {scaled[n][1]}" for n, prefix in ((name, ""), (first, "ours ")) if n in scaled]
        against, about = "; ".join([name, *texts]), "; ".join(filter(None, [note, checked]))
        lines.append(Line(row, case, against, ratios, target, ours=seconds[first], theirs=seconds[name], note=about))
    return lines


def same(what: str, ours: object, theirs: object, *, within: float, relative: bool = False) -> str:
    """What was found equal, in words. Raises Mismatch where the two, numbers or arrays, differ by more."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    apart = float(np.max(np.abs(a - b) / (np.abs(b) if relative else 1.0)))
    found = f"{what} {a.mean():.4g} and {b.mean():.4g}, {apart:.1g}{' (relative)' if relative else ''} apart at most"
    if not apart <= within:
        raise Mismatch(f"ours and theirs differ: {found}, where {within:g} is allowed")
    return f"{found} ({within:g} allowed)"
