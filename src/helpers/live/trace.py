"""Trace: what a live training leaves behind: every step's loss, thinned curves, measures, and the moves that acted."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from helpers.engine.training import Training
from helpers.measure import noise

AXES = ("examples_seen", "steps", "seconds")
MEASURES = ("test_loss", "test_accuracy", "gradient_norm", "gradient_noise_scale")
LIVE = ("batch_size", "lr", "momentum")  # act at the next step; any other setting starts over
_PROBE = 128  # examples of one estimate of the noise scale
_GRID = 60  # points a side at which decision regions are asked for


@dataclass(frozen=True)
class Move:
    """A control that moved: from ``steps`` on ``name`` had ``value``. ``asked_at`` and ``acted_at`` are Unix times."""

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
        """A value at (examples_seen, steps, seconds); one that is not finite leaves no trace."""
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
    """One training of a session: every step's loss, the measures along the way, and the moves that acted on it."""

    _STEP = np.dtype([("size", "i4"), ("loss", "f4"), ("seconds", "f8")])

    def __init__(self, training: Training, settings: Mapping[str, object], moves: Iterable[Move] = ()):
        self.training, self.settings, self.moves = training, dict(settings), list(moves)
        self.curves = {name: Curve() for name in ("minibatch_loss", "test_accuracy", "gradient_norm")}
        self.latest: dict[str, float] = {}
        self.measured_at = (-1, -1, 0.0)  # examples_seen, steps, seconds
        self.picture: dict[str, object] = {}
        self._measures: list[dict[str, float]] = []
        self._noise = np.zeros(3)  # weight, tr Σ, |G|²: decaying sums
        # Every step is kept for the export; beyond some megabytes on disk, so that a long run does not fill the memory.
        self._steps = tempfile.SpooledTemporaryFile(max_size=2**22)  # noqa: SIM115 (the run holds it open)
        self._start = self._taken = (training.examples_seen, training.steps, training.seconds)
        self._lock = threading.Lock()

    def take(self) -> None:
        """Keep the losses of the steps since the last call."""
        sizes, losses = self.training.take_losses()
        if not len(sizes):
            return
        examples, steps, seconds = self._taken
        self._taken = (self.training.examples_seen, self.training.steps, self.training.seconds)
        block = np.empty(len(sizes), self._STEP)
        block["size"], block["loss"] = sizes, losses[:, 0]
        block["seconds"] = np.linspace(seconds, self._taken[2], len(sizes) + 1)[1:]
        with self._lock:
            self._steps.write(block.tobytes())
        curve = self.curves["minibatch_loss"]
        for size, loss, now in block.tolist():
            examples, steps = examples + size, steps + 1
            curve.add((examples, steps, now), loss)
        self.latest["minibatch_loss"] = loss

    @property
    def diverged(self) -> bool:
        return bool(self.training.diverged_at.isfinite())

    @property
    def noise_scale(self) -> float:
        """The running estimate of B_simple = tr Σ / |G|²; inf where |G|² does not stand out of the noise."""
        weight, variance, squared = self._noise
        return math.nan if not weight else variance / squared if squared > 0 else math.inf

    def measure(self, test_inputs: torch.Tensor, test_targets: torch.Tensor) -> None:
        """Test loss and accuracy, gradient norm and noise scale now, and what the picture shows."""
        training, dataset = self.training, self.training.dataset
        logits = training.logits(test_inputs)[0]
        wrong = (logits.argmax(1) != test_targets).nonzero()[:, 0]
        probe = torch.randint(dataset.num_train, (_PROBE,), generator=torch.Generator().manual_seed(training.steps))
        probe = probe.to(dataset.device)
        found = noise.noise_statistics(training.model, dataset.train_inputs[probe], dataset.train_targets[probe])
        if torch.stack(found).isfinite().all():
            self._noise = 0.9 * self._noise + np.array([1.0, *(value.item() for value in found)])
        self.latest |= {
            "test_loss": F.cross_entropy(logits, test_targets).item(),
            "test_accuracy": 1 - len(wrong) / len(test_targets),
            "gradient_norm": training.gradient_norm().item(), "gradient_noise_scale": float(self.noise_scale),
        }  # fmt: skip
        at = (training.examples_seen, training.steps, training.seconds)
        self.measured_at = at
        for name in ("test_accuracy", "gradient_norm"):
            self.curves[name].add(at, self.latest[name])
        if not (self._measures and self._measures[-1]["steps"] == training.steps):
            self._measures.append(dict(zip(AXES, at)) | {name: self.latest[name] for name in MEASURES})
        if dataset.input_shape == (2,):
            self.picture = {"regions": self._regions()}
        elif len(dataset.input_shape) == 3:
            chosen = wrong[:12]
            self.picture = {"digits": test_inputs[chosen, 0].cpu().numpy(), "is": test_targets[chosen].tolist(),
                            "read": logits.argmax(1)[chosen].tolist()}  # fmt: skip

    def _regions(self) -> np.ndarray:
        points = self.training.dataset.train_inputs
        low, high = points.min(0).values - 1, points.max(0).values + 1
        x, y = (torch.linspace(float(low[i]), float(high[i]), _GRID, device=points.device) for i in (0, 1))
        grid = torch.stack(torch.meshgrid(x, y.flip(0), indexing="xy"), -1).view(-1, 2)  # the first row is the top
        return self.training.logits(grid)[0].argmax(1).view(_GRID, _GRID).cpu().numpy()

    def history(self) -> pd.DataFrame:
        """One row per step, with the settings it was taken with; measures (NaN between) in the rows they belong to."""
        with self._lock:
            self._steps.seek(0)
            block = np.frombuffer(self._steps.read(), self._STEP)  # which leaves it at its end, for the next block
        moves = list(self.moves)
        examples, steps, _ = self._start
        frame = pd.DataFrame({
            "steps": steps + 1 + np.arange(len(block)),
            "examples_seen": examples + block["size"].cumsum(dtype=np.int64), "seconds": block["seconds"],
            "minibatch_size": block["size"], "minibatch_loss": block["loss"].astype(float),
        })  # fmt: skip
        for name in LIVE:
            its = [m for m in moves if m.name == name]
            values = np.array([self.settings[name], *(m.value for m in its)])
            frame[f"{name}_now"] = values[np.searchsorted([m.steps for m in its], frame["steps"], side="left")]
        measures = pd.DataFrame(list(self._measures), columns=[*AXES, *MEASURES], dtype=float)
        before = measures[measures["steps"] == steps].drop(columns="steps").assign(steps=steps)
        frame = frame.merge(measures.drop(columns=["examples_seen", "seconds"]), on="steps", how="left")
        frame = pd.concat([before, frame], ignore_index=True) if len(before) else frame
        return frame[["steps", "examples_seen", "seconds", *(f"{n}_now" for n in LIVE), "minibatch_size",
                      "minibatch_loss", *MEASURES]]  # fmt: skip

    def stretches(self) -> pd.DataFrame:
        """One row per stretch of steps with the same controls: these, ``steps``, ``spread_first`` and ``spread_last``.

        Spread: standard deviation of the minibatch loss without its trend, from the differences of neighbours; over the
        first and the last 100 steps, so that two stretches are compared where they meet.
        """

        def spread(loss: pd.Series) -> float:
            return loss.diff().std() / math.sqrt(2)

        frame = self.history().dropna(subset="minibatch_loss")
        now = [f"{name}_now" for name in LIVE]
        number = (frame[now].diff() != 0).any(axis=1).cumsum()
        groups = frame.groupby(number)
        found = groups[now].first().set_axis(list(LIVE), axis=1).astype({"batch_size": int})
        return found.assign(
            steps=groups.size(), spread_first=groups["minibatch_loss"].agg(lambda loss: spread(loss[:100])),
            spread_last=groups["minibatch_loss"].agg(lambda loss: spread(loss[-100:])),
        ).reset_index(drop=True)  # fmt: skip

    def code(self, name: str = "training") -> str:
        """Python that repeats this run without a slider, to the bit on the same machine."""
        s, moves = self.settings, list(self.moves)
        start = {n: s[n] for n in LIVE} | {m.name: m.value for m in moves if m.steps == 0}
        lines = [
            f"dataset = data.load({s['dataset']!r}, num_train={s['num_train']!r})",
            f"{name} = Training(dataset, {s['model']!r}, seeds=[{s['seed']}], optimizer={s['optimizer']!r}, "
            + ", ".join(f"{n}={v!r}" for n, v in start.items()) + ")",
        ]  # fmt: skip
        done = 0
        for move in [m for m in moves if m.steps]:
            if move.steps > done:
                lines.append(f"{name}.advance(steps={move.steps - done}, record=False)")
            lines.append(f"{name}.{move.name} = {move.value!r}")
            done = move.steps
        if self.training.steps > done:
            lines.append(f"{name}.advance(steps={self.training.steps - done}, record=False)")
        return "\n".join([*lines, f"{name}.record()", f"{name}.history"])
