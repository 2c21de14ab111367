"""A session: runs that train in a background thread while their controls move.

A control only leaves a wish; the trainer thread grants it between two steps and notes where it acted. So a session is
its settings and its moves, and repeats to the bit without the thread. Nothing here draws.
"""

from __future__ import annotations

import inspect
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping

import torch

from helpers import problems
from helpers.live.runs import Problems, Runs, Wish

_BURST = 0.02  # seconds of steps between two looks at the clock
_MEASURING = 1 / 16  # share of the time for measures; half, at most, where one takes longer than a tenth of a second

# event → the states in which it acts → the state that follows
TRANSITIONS = {
    "play": {"ready": "playing", "paused": "playing"},
    "step": {"ready": "paused", "paused": "paused", "playing": "paused"},
    "pause": {"playing": "paused"},
    "diverge": {"playing": "diverged", "paused": "diverged"},
    "unpin": {"diverged": "paused"},  # where the pinned run alone had diverged
    "fail": dict.fromkeys(("ready", "playing", "paused", "diverged", "failed"), "failed"),
    "start over": dict.fromkeys(("ready", "paused", "diverged", "failed"), "ready") | {"playing": "playing"},
    "close": dict.fromkeys(("ready", "playing", "paused", "diverged", "failed"), "closed"),
}


class Session(Runs):
    """Runs in the hands of one trainer thread.

    given: the problem, a list of problems or a dict name → problem; training begins with the first.
    epochs_per_second: the pace; 0 for as fast as it goes.
    settings: those of ``settings.SETTINGS``; ``seed``; ``test_examples``, on which the score is measured.
    Raises ValueError for settings that cannot be trained. ``error`` tells why the thread failed.
    """

    def __init__(self, given: Problems, *, epochs_per_second: float = 0.0, **settings: object):
        self.state, self.plays = "ready", 0  # how often it has been played or stepped
        self.failure: Exception | None = None
        self._wishes: deque[Wish] = deque()
        self._script: deque[tuple[float, Callable[[], None]]] = deque()
        self._changed, self.idle = threading.Condition(), False  # idle: the thread waits for a wish
        self._next_measure = 0.0  # by the clock
        self._measure_every: float | None = None  # by examples, in a rehearsal
        self._threads_before = torch.get_num_threads()
        self.threads = max(1, self._threads_before - 1)
        super().__init__(given, **settings)  # here, not in the thread: it may take seconds, and play acts at once
        self.epochs_per_second = self.checked("epochs_per_second", epochs_per_second)
        self._restart_pace()
        self.thread = threading.Thread(target=self._work, name="companion-trainer", daemon=True)
        self.thread.start()

    @property
    def playing(self) -> bool:
        return self.state == "playing"

    @property
    def error(self) -> str:
        """The last lines of the traceback, where the thread has failed."""
        return "" if self.failure is None else "".join(traceback.format_exception(self.failure)[-3:]).strip()

    def _go(self, event: str) -> bool:
        """Follow ``TRANSITIONS``, and return whether the event acts in this state."""
        with self._changed:
            acts = self.state in TRANSITIONS[event]
            self.state = TRANSITIONS[event].get(self.state, self.state)
            self._changed.notify_all()
        return acts

    # Called by controls, from any thread: each leaves a wish and returns.

    def move(self, name: str, value: object) -> None:
        """Set batch_size, lr or momentum from the next step on; optimizer or problem start over with it.

        ``pinned_batch_size`` branches off a second run, fed the same examples; None ends it. Raises ValueError for a
        bad value.
        """
        self._wish(name, self.checked(name, value))

    def play(self) -> None:
        self._wish("play")

    def pause(self) -> None:
        """Stop after the step that is under way."""
        with self._changed:
            self._wishes = deque(wish for wish in self._wishes if wish.name != "play")
            self._go("pause")

    def step(self) -> None:
        """Take one step; a pinned run follows as far as it is behind."""
        self._wish("step")

    def reset(self) -> None:
        """Start over from the same weights and the same order of examples; this run becomes the previous one."""
        self._wish("reset")

    def rehearse(self, script: Mapping[float, Callable[[], None]], until: float) -> None:
        """Play until ``until`` examples are seen. ``script``: number of examples seen → function to call there.

        Measures are taken at 40 places, not by the clock: the same rehearsal gives the same history.
        """
        acts = sorted(script.items(), key=lambda item: item[0])
        self._script = deque([*acts, (until, self.pause), (until, self.forget_script)])
        self._measure_every = until / 40
        self.play()

    def forget_script(self) -> None:
        """End the rehearsal: the user has taken over."""
        self._script, self._measure_every = deque(), None

    def wait(self, timeout: float | None = None) -> None:
        """Block until all wishes are granted and nothing plays. Raises the thread's error, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.idle or self.state == "closed", timeout):
                raise TimeoutError(f"still training after {timeout:g} s")
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread, after the step that is under way."""
        self._go("close")
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def code(self) -> str:
        """Return a cell that repeats the session, given ``problem`` where it is not built in."""
        problem = f"# problem: the one given to the lab ({self.settings['problem']})"
        if self.problem.names:
            defaults = inspect.signature(problems.named).parameters
            names = {n: v for n, v in self.problem.names.items() if n == "model" or v != defaults[n].default}
            problem = f"problem = problems.named({', '.join(f'{n}={v!r}' for n, v in names.items())})"
        threads = f"torch.set_num_threads({self.threads})  # as the session had: sums are the same to the bit"
        runs = [run.code(name) for name, run in zip(("training", "pinned"), self.runs)]
        return "\n\n".join(["import torch", "from helpers import Training, problems", threads, problem, *runs])

    def _wish(self, name: str, value: object = None) -> None:
        with self._changed:
            if self.state == "closed":
                raise RuntimeError("this session is closed; run its cell again")
            self._wishes.append(Wish(name, value, self.runs[0].training.steps, time.time()))
            self.idle = False
            self._changed.notify_all()

    # The rest happens in the trainer thread.

    def _work(self) -> None:
        # One core is left to the browser and to the controls: sharing all of them slows both down.
        torch.set_num_threads(self.threads)
        while self.state != "closed":
            try:
                self._grant_wishes()
                if self.playing:
                    self._burst()
                else:
                    self._settle()
            except Exception as error:
                self.failure = error
                self._go("fail")
                self.forget_script()
        torch.set_num_threads(self._threads_before)

    def _grant_wishes(self) -> None:
        while self.state != "closed":
            with self._changed:
                if not self._wishes:
                    return
                wish = self._wishes.popleft()
                plays = wish.name in ("play", "step") and self._go(wish.name)
                self.plays += plays
            if wish.name == "epochs_per_second":
                self.epochs_per_second = wish.value
            elif wish.name == "step" and plays:
                self.advance_main()
            elif wish.name not in ("play", "step"):
                if self.apply(wish):
                    self.failure, self._next_measure = None, 0.0
                    self._go("start over")
                elif not self.diverged:
                    self._go("unpin")
            self._restart_pace()

    def _settle(self) -> None:
        """Nothing plays: bring the measures up to date once, then wait for a wish."""
        if self.state != "failed":
            self._take_stock(measure=any(run.training.steps != run.measured_at[1] for run in self.runs))
        with self._changed:
            if not (self._wishes or self.state == "closed"):
                self.idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self.idle or self.state == "closed")

    def _burst(self) -> None:
        end = time.monotonic() + _BURST
        while self.playing and time.monotonic() < end:
            script = self._script  # which the user's hand may replace at any time
            while script and script is self._script and self.runs[0].training.examples_seen >= script[0][0]:
                script.popleft()[1]()
            self._grant_wishes()
            if self.playing:
                self.advance()
                if self._ahead() > 0 or self._measure_due():
                    break
        self._take_stock(measure=self._measure_due())
        if self.playing and (wait := self._ahead()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._wishes or not self.playing, wait)

    def _restart_pace(self) -> None:
        self._paced_from = time.monotonic(), self.runs[0].training.examples_seen

    def _ahead(self) -> float:
        """Seconds by which training is ahead of its pace."""
        if not self.epochs_per_second:
            return 0.0
        (began, before), seen = self._paced_from, self.runs[0].training.examples_seen
        ahead = (seen - before) / (self.epochs_per_second * self.dataset.num_train) - (time.monotonic() - began)
        if ahead < -0.2:  # lost time is not made up for
            self._restart_pace()
        return ahead

    def _measure_due(self) -> bool:
        if self._measure_every is None:
            return time.monotonic() > self._next_measure
        main = self.runs[0]
        return main.training.examples_seen >= main.measured_at[0] + self._measure_every

    def _take_stock(self, measure: bool) -> None:
        started = time.monotonic()
        self.take(measure)
        if measure:
            took = time.monotonic() - started
            self._next_measure = started + took + max(min(max(0.1, took / _MEASURING), 1.5), took)
        if self.diverged:
            self.forget_script()
            self._go("diverge")
