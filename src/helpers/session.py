"""Session: trainings that advance in a background thread while their controls move.

A control only leaves a wish; the trainer thread takes it up between two steps and notes where it acted. So a session is
its settings and its moves, and repeats without the thread to the bit. Nothing here draws.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from helpers import data, gradients, models
from helpers.training import Training, check_batch_size, check_lr, check_optimizer

AXES = ("examples_seen", "steps", "seconds")
LIVE = ("batch_size", "lr", "momentum")  # act at the next step; any other setting starts over
_BURST = 0.02  # seconds of steps between two looks at the clock
_MEASURING = 1 / 10  # of the time goes into measures, more only where one takes longer than a tenth of a second
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
        if len(self.bins) > self.LENGTH:
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
        found = gradients.noise_statistics(training.model, dataset.train_inputs[probe], dataset.train_targets[probe])
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


MEASURES = ("test_loss", "test_accuracy", "gradient_norm", "gradient_noise_scale")


class Session:
    """A run, perhaps a pinned one beside it, and the previous one, in the hands of one trainer thread.

    ``examples_per_second``: the pace, None for as fast as it goes. ``test_examples`` of the test set, drawn once, are
    what accuracy is measured on. Raises ValueError for settings that cannot be trained, DataError for data that cannot
    be had. What fails in the thread is in ``error``, and raised by ``wait``.
    """

    def __init__(
        self,
        *,
        dataset: str,
        model: str,
        batch_size: int,
        lr: float,
        momentum: float = 0.0,
        optimizer: str = "sgd",
        num_train: int | None = None,
        seed: int = 0,
        examples_per_second: float | None = None,
        test_examples: int = 1000,
    ):
        self.settings: dict[str, object] = {
            "dataset": dataset, "num_train": num_train, "model": model, "seed": seed, "optimizer": optimizer,
            "batch_size": batch_size, "lr": lr, "momentum": momentum,
        }  # fmt: skip
        self.pinned_batch_size: int | None = None
        self.examples_per_second, self.test_examples = examples_per_second, test_examples
        self.runs: tuple[Run, ...] = ()
        self.previous: Run | None = None
        self.error = ""
        self.playing = self.closed = False
        self._failure: BaseException | None = None
        self._wishes: deque[tuple[str, object, int, float]] = deque()
        self._script: deque[tuple[float, Callable[[], None]]] = deque()
        self._changed, self._idle = threading.Condition(), False
        self._next_measure = 0.0  # by the clock
        self._measure_every: float | None = None  # by examples, in a rehearsal
        self.dataset = self._load(dataset)
        self.builds = 0  # how often training has started over
        self._check(**{name: self.settings[name] for name in ("batch_size", "lr", "momentum", "model")})
        self._threads_before = torch.get_num_threads()
        self.threads = max(1, self._threads_before - 1)
        # Here, not in the thread: the first optimizer of a process takes seconds, and play should act at once.
        self._start_over()
        self.thread = threading.Thread(target=self._work, name="companion-trainer", daemon=True)
        self.thread.start()

    # What a control calls, from any thread: leaves a wish and returns.

    def move(self, name: str, value: object) -> None:
        """Set batch_size, lr or momentum from the next step on; optimizer, model or dataset start over with it.

        Raises ValueError for a value that cannot be.
        ``pinned_batch_size`` sets beside it a second run, which branches off here and is fed the same examples; None
        ends it. ``examples_per_second`` is the pace.
        """
        self._check(**{name: value})
        self._wish(name, value)

    def play(self) -> None:
        self._wish("playing", True)

    def pause(self) -> None:
        """Stop after the step that is under way."""
        with self._changed:
            self.playing = False
            self._changed.notify_all()

    def step(self) -> None:
        """Take one step; a pinned run follows as far as it is behind."""
        self._wish("step", None)

    def reset(self) -> None:
        """Start over from the same weights and the same order of examples; this run becomes the previous one."""
        self._wish("reset", None)

    def rehearse(self, script: Mapping[float, Callable[[], None]], until: float) -> None:
        """Play until so many examples are seen; on the way call what ``script`` has at numbers of examples seen.

        Measures are taken at 40 places, not by the clock: the same rehearsal gives the same history.
        """
        acts = sorted(script.items(), key=lambda item: item[0])
        self._script = deque([*acts, (until, self.pause), (until, self.forget_script)])
        self._measure_every = until / 40
        self.play()

    def forget_script(self) -> None:
        """The user has taken over."""
        self._script, self._measure_every = deque(), None

    def wait(self, timeout: float | None = None) -> None:
        """Block until all wishes are met and nothing plays; raises what failed in the thread, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._idle or self.closed, timeout):
                raise TimeoutError(f"still training after {timeout:g} s")
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread, after the step that is under way."""
        with self._changed:
            self.playing, self.closed = False, True
            self._changed.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    @property
    def num_test(self) -> int:
        """How many test examples accuracy is measured on."""
        return len(self._test[1])

    @property
    def idle(self) -> bool:
        """Whether the thread waits for a wish."""
        return self._idle

    @property
    def history(self) -> pd.DataFrame:
        """``Run.history`` of every run, told apart by the column ``run``: this one, pinned, previous."""
        return pd.concat([run.history().assign(run=name) for name, run in self.named_runs().items()], ignore_index=True)

    def named_runs(self) -> dict[str, Run]:
        """The runs there are: the previous one first, so that it is drawn below the others."""
        found = {"previous": self.previous} | dict(zip(("this run", "pinned"), self.runs))
        return {name: run for name, run in found.items() if run is not None}

    def code(self) -> str:
        """A cell that repeats the session (the pinned run too) without a slider."""
        names = ("training", "pinned")
        head = "import torch\n\nfrom helpers import data\nfrom helpers.training import Training\n\n"
        head += f"torch.set_num_threads({self.threads})  # as the session had: sums are the same to the bit\n\n"
        return head + "\n\n".join(run.code(name) for name, run in zip(names, self.runs))

    # The rest happens in the trainer thread.

    def _check(self, **values: object) -> None:
        for name, value in values.items():
            if name in ("batch_size", "pinned_batch_size") and value is not None:
                check_batch_size(value, self.dataset.num_train)
            elif name == "lr":
                check_lr(value)
            elif name == "momentum":
                check_optimizer(self.settings["optimizer"], value)
            elif name == "optimizer":
                check_optimizer(value, 0.0)
            elif name == "model" and value not in models.MODELS:
                raise ValueError(f"unknown model {value!r}; choose one of: {', '.join(models.MODELS)}")
            elif name == "dataset" and value not in data.TRAIN_SIZES:
                raise ValueError(f"unknown dataset {value!r}; choose one of: {', '.join(data.TRAIN_SIZES)}")
            elif name not in (*LIVE, "pinned_batch_size", "examples_per_second", "optimizer", "model", "dataset"):
                raise ValueError(f"no control is called {name!r}")

    def _wish(self, name: str, value: object) -> None:
        with self._changed:
            if self.closed:
                raise RuntimeError("this session is closed; run its cell again")
            self._wishes.append((name, value, self.runs[0].training.steps, time.time()))
            self._idle = False
            self._changed.notify_all()

    def _work(self) -> None:
        # One core is left to the browser and to the controls: sharing all of them slows both down.
        torch.set_num_threads(self.threads)
        while not self.closed:
            try:
                self._grant_wishes()
                if self.playing:
                    self._burst()
                else:
                    self._settle()
            except Exception as error:
                self.playing, self._failure = False, error
                self.error = "".join(traceback.format_exception(error)[-3:]).strip()
                self._script = deque()
        torch.set_num_threads(self._threads_before)

    def _settle(self) -> None:
        """Nothing plays: bring the measures up to date once, then wait for a wish."""
        if self._failure is None:
            self._take(measure=any(run.training.steps != run.measured_at[1] for run in self.runs))
        with self._changed:
            if not (self._wishes or self.playing or self.closed):
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wishes or self.closed)

    def _burst(self) -> None:
        end = time.monotonic() + _BURST
        while self.playing and time.monotonic() < end:
            script = self._script  # which the user's hand may replace at any time
            while script and script is self._script and self.runs[0].training.examples_seen >= script[0][0]:
                script.popleft()[1]()
            self._grant_wishes()
            if self.playing:
                self._step()
                if self._ahead() > 0 or self._measure_due():
                    break
        self._take(measure=self._measure_due())
        if any(run.diverged for run in self.runs):
            self.pause()
        elif self.playing and (wait := self._ahead()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._wishes or self.closed or not self.playing, wait)

    def _step(self) -> None:
        """One step of the run that has seen the fewest examples, so that all see the same ones at the same time."""
        min(self.runs, key=lambda run: run.training.examples_seen).training.step()

    def _measure_due(self) -> bool:
        if self._measure_every is None:
            return time.monotonic() > self._next_measure
        main = self.runs[0]
        return main.training.examples_seen >= main.measured_at[0] + self._measure_every

    def _ahead(self) -> float:
        """Seconds by which training is ahead of its pace."""
        if self.examples_per_second is None:
            return 0.0
        now, seen = time.monotonic(), self.runs[0].training.examples_seen
        began, before = self._pace
        ahead = (seen - before) / self.examples_per_second - (now - began)
        if ahead < -0.2:  # what could not keep up is not made up for later
            self._pace = (now, seen)
        return ahead

    def _take(self, measure: bool) -> None:
        started = time.monotonic()
        for run in self.runs:
            run.take()
            if measure:
                run.measure(*self._test)
        if measure:
            took = time.monotonic() - started
            self._next_measure = time.monotonic() + min(max(0.1, took / _MEASURING), 1.0)

    def _grant_wishes(self) -> None:
        while self._wishes and not self.closed:
            name, value, steps, asked_at = self._wishes.popleft()
            stuck = self._failure is not None or any(run.diverged for run in self.runs)
            if name == "playing":
                self.playing = not stuck
            elif name == "step" and not stuck:
                self._single_step()
            elif name == "examples_per_second":
                self.examples_per_second = value
            elif name == "pinned_batch_size":
                self._pin(value, steps, asked_at)
            elif name in LIVE:
                self.settings[name] = value  # kept by a reset too
                for run in self.runs if name != "batch_size" else self.runs[:1]:
                    self._apply(run, name, value, steps, asked_at)
            elif name != "step":
                self._start_over(**({} if name == "reset" else {name: value}))
            self._pace = (time.monotonic(), self.runs[0].training.examples_seen)

    def _single_step(self) -> None:
        self.playing = False
        before = self.runs[0].training.steps
        while self.runs[0].training.steps == before:
            self._step()
        while any(run.training.examples_seen < self.runs[0].training.examples_seen for run in self.runs):
            self._step()

    def _apply(self, run: Run, name: str, value: object, asked_steps: int, asked_at: float) -> None:
        training = run.training
        setattr(training, name, value)
        move = Move(name, value, training.steps, training.examples_seen, training.seconds, training.batch_size,
                    asked_steps, asked_at, time.time())  # fmt: skip
        # Of several moves before one step only the last acts.
        run.moves = [m for m in run.moves if not (m.name == name and m.steps == training.steps)] + [move]

    def _pin(self, batch_size: int | None, steps: int = 0, asked_at: float = 0.0) -> None:
        self.pinned_batch_size = batch_size  # kept by a reset too
        main = self.runs[0]
        if batch_size is None:
            self.runs = (main,)
        elif len(self.runs) == 2:
            self._apply(self.runs[1], "batch_size", batch_size, steps, asked_at)
        else:
            main.take()
            pinned = Run(main.training.branch(), main.settings, main.moves)
            self._apply(pinned, "batch_size", batch_size, steps, asked_at or time.time())
            self.runs = (main, pinned)

    def _load(self, name: str) -> data.Dataset:
        size = data.TRAIN_SIZES.get(name, 0)
        return data.load(name, num_train=min(self.settings["num_train"] or size, size) or None)

    def _draw_test(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = np.random.default_rng(0).permutation(len(self.dataset.test_targets))[: self.test_examples]
        chosen = torch.from_numpy(np.sort(chosen)).to(self.dataset.device)
        return self.dataset.test_inputs[chosen], self.dataset.test_targets[chosen]

    def _start_over(self, **changed: object) -> None:
        """Build everything anew with ``changed`` settings; where that fails, all stays as it was."""
        settings, dataset = self.settings | changed, self.dataset
        if changed.get("dataset", dataset.name) != dataset.name:
            dataset = self._load(settings["dataset"])
        if settings["optimizer"] != "sgd":
            settings["momentum"] = 0.0
        if len(dataset.input_shape) != 3 and settings["model"] == "plain_cnn":
            settings["model"] = "brownlee_mlp"
        settings["batch_size"] = min(settings["batch_size"], dataset.num_train)
        training = Training(
            dataset, settings["model"], seeds=[settings["seed"]],
            **{name: settings[name] for name in (*LIVE, "optimizer")},
        )  # fmt: skip
        for run in self.runs:
            run.take()
        comparable = all(settings[k] == self.settings[k] for k in ("dataset", "model", "num_train", "seed"))
        if not comparable:
            self.previous = None
        elif self.runs and self.runs[0].training.steps:
            self.previous = self.runs[0]
        self.settings, self.dataset, self.error, self._failure = settings, dataset, "", None
        self._test = self._draw_test()
        run = Run(training, settings | {"dataset": dataset.name, "num_train": dataset.num_train})
        run.measure(*self._test)  # before anybody sees it
        self.runs, pinned = (run,), self.pinned_batch_size
        if pinned is not None:
            self._pin(min(pinned, dataset.num_train))
        self._pace, self._next_measure = (time.monotonic(), 0), 0.0
        self.builds += 1
