"""The trace of a live training: each step's loss, thinned curves, measures, and the moves that acted on it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers.engine.training import Training
from helpers.live.probe import NoiseScale, TestDraw
from helpers.live.settings import LIVE, SETTINGS

AXES = ("examples_seen", "steps", "seconds")
MEASURES = ("test_loss", "test_accuracy", "gradient_norm", "gradient_noise_scale")


@dataclass(frozen=True)
class Move:
    """One control change: from step ``steps`` on, ``name`` equals ``value``. ``asked_at``, ``acted_at``: Unix times."""

    name: str
    value: float
    steps: int
    examples_seen: int
    seconds: float
    batch_size: int
    asked_steps: int
    asked_at: float
    acted_at: float


class Curve:
    """A curve thinned for drawing: at most ``LENGTH`` bins of equally many examples, merged in pairs as it grows."""

    LENGTH = 400

    def __init__(self):
        self.width = 1
        self.bins: list[tuple[float, ...]] = []  # (examples_seen, steps, seconds at its end; count, sum, low, high)

    def add(self, at: tuple[float, float, float], value: float) -> None:
        """Add a value at (examples_seen, steps, seconds). Values that are not finite are left out."""
        if not math.isfinite(value):
            return
        self._put(self.bins, (*at, 1, value, value, value))
        while len(self.bins) > self.LENGTH:
            self.width *= 2
            merged: list[tuple[float, ...]] = []
            for one in self.bins:
                self._put(merged, one)
            self.bins = merged

    def _put(self, bins: list[tuple[float, ...]], new: tuple[float, ...]) -> None:
        if bins and (bins[-1][0] - 1) // self.width == (new[0] - 1) // self.width:
            _, _, _, count, total, low, high = bins[-1]
            bins[-1] = (*new[:3], count + new[3], total + new[4], min(low, new[5]), max(high, new[6]))
        else:
            bins.append(new)

    def frame(self) -> pd.DataFrame:
        """Columns ``AXES``, ``mean``, ``low``, ``high``; a row a bin."""
        frame = pd.DataFrame(list(self.bins), columns=[*AXES, "count", "mean", "low", "high"], dtype=float)
        return frame.assign(mean=frame["mean"] / frame["count"]).drop(columns="count")


class Run:
    """One training of a session, with its trace. settings: at its start. moves: those before it branched off."""

    _STEP = np.dtype([("steps", "i8"), ("examples_seen", "i8"), ("seconds", "f8"), *((f"{n}_now", "f8") for n in LIVE),
                      ("minibatch_size", "f8"), ("minibatch_loss", "f8")])  # fmt: skip

    def __init__(self, training: Training, settings: Mapping[str, object], moves: Iterable[Move] = ()):
        self.training, self.settings, self.moves = training, dict(settings), list(moves)
        self.curves = {"minibatch_loss": Curve()}
        self.noise = NoiseScale()
        self.latest: dict[str, float] = {}
        self.picture: dict[str, object] = {}
        self.measured_at = (-1, -1, 0.0)  # as AXES
        self._taken = self._now()
        self._steps = [np.empty(0, self._STEP)]
        self._measures: list[tuple[float, ...]] = []

    def _now(self) -> tuple[int, int, float]:
        return self.training.examples_seen, self.training.steps, self.training.seconds

    def take(self) -> None:
        """Keep the losses of the steps since the last call; the settings must not have changed since."""
        sizes, losses = self.training.take_losses()
        if not len(sizes):
            return
        (examples, steps, seconds), self._taken = self._taken, self._now()
        block = np.empty(len(sizes), self._STEP)
        block["steps"], block["examples_seen"] = steps + 1 + np.arange(len(sizes)), examples + sizes.cumsum(0)
        block["seconds"] = np.linspace(seconds, self._taken[2], len(sizes) + 1)[1:]
        block["minibatch_size"], block["minibatch_loss"] = sizes, losses[:, 0]
        for name in LIVE:
            block[f"{name}_now"] = getattr(self.training, name)
        self._steps.append(block)
        for *at, loss in block[[*AXES, "minibatch_loss"]].tolist():
            self.curves["minibatch_loss"].add(at, loss)
        self.latest["minibatch_loss"] = loss

    def move(self, name: str, value: float, asked_steps: int, asked_at: float) -> None:
        """Set a setting from the next step on, and note the move."""
        self.take()
        training = self.training
        setattr(training, name, value)
        move = Move(name, value, training.steps, training.examples_seen, training.seconds, training.batch_size,
                    asked_steps, asked_at, time.time())  # fmt: skip
        # Of several moves before one step only the last acts; but a momentum of 0 forgets the velocity.
        self.moves = [m for m in self.moves if not (m.name == name and m.steps == move.steps and m.value)] + [move]

    @property
    def diverged(self) -> bool:
        return bool(self.training.diverged_at.isfinite())

    @property
    def score(self) -> str:
        """The name of the measure to watch: test accuracy, or test loss where there is no accuracy."""
        return "test_loss" if math.isnan(self.latest.get("test_accuracy", 0.0)) else "test_accuracy"

    def measure(self, test: TestDraw) -> None:
        """Measure test loss and accuracy, gradient norm and noise scale now, and make the picture anew."""
        self.noise.add(self.training)
        loss, accuracy, self.picture = test.evaluate(self.training.stack)
        values = (loss, accuracy, self.training.gradient_norm().item(), self.noise.value)
        self.latest |= dict(zip(MEASURES, values))
        before, self.measured_at = self.measured_at, self._now()
        for name in (self.score, "gradient_norm"):
            self.curves.setdefault(name, Curve()).add(self.measured_at, self.latest[name])
        if self.measured_at != before:
            self._measures.append((*self.measured_at, *values))

    def history(self) -> pd.DataFrame:
        """One row per step, with the settings it was taken with; measures (NaN between) in the rows they belong to."""
        kinds = [*((name, self._STEP[name]) for name in AXES), *((name, "f8") for name in MEASURES)]
        measured = pd.DataFrame(np.array(list(self._measures), kinds))
        return pd.DataFrame(np.concatenate(self._steps)).merge(measured, on=list(AXES), how="outer")

    def stretches(self) -> pd.DataFrame:
        """One row per stretch of steps with the same controls: these, ``steps``, ``spread_first`` and ``spread_last``.

        Spread: standard deviation of the minibatch loss without its trend, from differences of neighbours; over the
        first and the last 100 steps, so that two stretches are compared where they meet.
        """
        frame = self.history().dropna(subset="minibatch_loss")
        now = [f"{name}_now" for name in LIVE]
        groups = frame.groupby((frame[now].diff() != 0).any(axis=1).cumsum())
        found, loss = groups[now].first().set_axis(list(LIVE), axis=1), groups["minibatch_loss"]
        first, last = loss.agg(lambda x: x[:100].diff().std()), loss.agg(lambda x: x[-100:].diff().std())
        found = found.astype({"batch_size": int}).assign(steps=groups.size())
        return found.assign(spread_first=first / 2**0.5, spread_last=last / 2**0.5).reset_index(drop=True)

    def finding(self) -> str:
        """The finding in one line: how the spread of the loss changed with the last move of the batch size."""
        stretches = self.stretches()
        long = stretches[stretches["steps"] >= 8]
        if not len(long):
            return "Nothing trained yet: press play"
        last, before = long.iloc[-1], long.iloc[-2] if len(long) > 1 else long.iloc[-1]
        if last.batch_size == before.batch_size:
            return f"Batch {last.batch_size:,.0f}: from step to step the loss varies by {last.spread_last:.2g}"
        return (f"Batch {before.batch_size:,.0f} → {last.batch_size:,.0f}: from step to step the loss varies by "
                f"{last.spread_first:.2g} instead of {before.spread_last:.2g}")  # fmt: skip

    def code(self, name: str = "training") -> str:
        """Python that repeats this run of ``problem`` without a slider, to the bit on the same machine."""
        s, moves = self.settings, list(self.moves)
        start = {n: s[n] for n in SETTINGS} | {m.name: m.value for m in moves if m.steps == 0}
        keywords = ", ".join(f"{n}={value!r}" for n, value in start.items())
        lines = [f"{name} = Training(problem, seeds=[{s['seed']}], {keywords})"]
        done = 0
        for move in [*(m for m in moves if m.steps), None]:
            until = move.steps if move else self.training.steps
            if until > done:
                lines.append(f"{name}.advance(steps={until - done}, record=False)")
            if move:
                lines.append(f"{name}.{move.name} = {move.value!r}")
            done = until
        return "\n".join([*lines, f"{name}.record()", f"{name}.history"])
