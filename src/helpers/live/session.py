"""Session: trainings that advance in a background thread while their controls move.

A control only leaves a wish; the trainer thread takes it up between two steps and notes where it acted. So a session is
its settings and its moves, and repeats without the thread to the bit. Nothing here draws.
"""

from __future__ import annotations

import math
import numbers
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from helpers.engine import kernels as models
from helpers.engine.training import OPTIMIZERS, Training, check_batch_size, check_lr, check_optimizer
from helpers.live.trace import LIVE, Move, Run
from helpers.problems import data

_BURST = 0.02  # seconds of steps between two looks at the clock
_MEASURING = 1 / 16  # of the time goes into measures, more only where one takes longer than a tenth of a second


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
        self._pauses = 0
        self._failure: BaseException | None = None
        self._wishes: deque[tuple[str, object, int, float]] = deque()
        self._script: deque[tuple[float, Callable[[], None]]] = deque()
        self._changed, self._idle = threading.Condition(), False
        self._next_measure = 0.0  # by the clock
        self._measure_every: float | None = None  # by examples, in a rehearsal
        self.dataset = self._load(dataset)
        self.builds = self.plays = 0  # how often training has started over, and been played or stepped
        self.settings |= {name: self._checked(name, self.settings[name]) for name in (*LIVE, "optimizer", "model")}
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
        self._wish(name, self._checked(name, value))

    def play(self) -> None:
        self._wish("playing", self._pauses)

    def pause(self) -> None:
        """Stop after the step that is under way."""
        with self._changed:
            self.playing, self._pauses = False, self._pauses + 1  # which also cancels a play that is not yet granted
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
        head = "import torch\n\nfrom helpers.problems import data\nfrom helpers.engine.training import Training\n\n"
        head += f"torch.set_num_threads({self.threads})  # as the session had: sums are the same to the bit\n\n"
        return head + "\n\n".join(run.code(name) for name, run in zip(names, self.runs))

    # The rest happens in the trainer thread.

    def _checked(self, name: str, value: object) -> object:
        """``value`` as a setting of that name takes it, or ValueError."""
        if name == "batch_size" or (name == "pinned_batch_size" and value is not None):
            return check_batch_size(value, self.dataset.num_train)
        if name == "lr":
            return check_lr(value)
        if name == "momentum":
            check_optimizer(self.settings["optimizer"], value)
            return float(value)
        if name == "examples_per_second" and value is not None:
            if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
                raise ValueError(f"examples_per_second is {value!r}; expected a finite number above 0, or None")
            return value
        if name in ("pinned_batch_size", "examples_per_second"):
            return None
        choices = {"optimizer": OPTIMIZERS, "model": tuple(models.MODELS), "dataset": tuple(data.TRAIN_SIZES)}
        if name not in choices:
            raise ValueError(f"no control is called {name!r}")
        if value not in choices[name]:
            raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(choices[name])}")
        return value

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
                self.forget_script()
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
            self.forget_script()
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
            self._next_measure = time.monotonic() + min(max(0.1, took / _MEASURING), 1.5)

    def _grant_wishes(self) -> None:
        while self._wishes and not self.closed:
            name, value, steps, asked_at = self._wishes.popleft()
            stuck = self._failure is not None or any(run.diverged for run in self.runs)
            if name == "playing":
                with self._changed:
                    self.playing = not stuck and value == self._pauses
                self.plays += self.playing
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
        self.playing, self.plays = False, self.plays + 1
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
        # Of several moves before one step only the last acts; but a momentum of 0 forgets what had built up.
        run.moves = [m for m in run.moves if not (m.name == name and m.steps == training.steps and m.value)] + [move]

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
