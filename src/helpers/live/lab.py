"""The live lab: sliders that change the batch size of a model while it trains, and its curves as they grow.

Two threads: the session's trainer, and a ticker that draws at a fixed rate whatever the speed of training. No cell
stays busy meanwhile, because that would keep the sliders waiting. Drawing is one SVG text in an ``ipywidgets.HTML``:
it needs no JavaScript of ours and no network, follows the theme, and works wherever ipywidgets do.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import ClassVar

import ipywidgets as widgets
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure

from helpers import plots
from helpers.live import controls, view
from helpers.live.runs import Problems
from helpers.live.session import Session
from helpers.live.trace import AXES

DRAWS_PER_SECOND = 6
_STATIC = "<p>Live controls stand here while the notebook runs; the picture below shows the session.</p>"


class Lab(widgets.VBox):
    """Controls and curves of one live session; display it, and press play.

    given: a problem, a list of problems or a dict name → problem; training begins with the first.
    settings: batch_size, lr, momentum, optimizer, seed to begin with, and epochs_per_second, the pace; see ``Session``.
    small: leave out the choices of problem and optimizer, and the picture.
    A new lab closes the one before. ``session`` is the engine's side: ``lab.session.history`` has every step.
    """

    session: Session | None = None
    _ticker: threading.Thread | None = None
    _open: ClassVar[Lab | None] = None  # one lab a kernel: whoever runs its cell again wants the new one alone

    def __init__(self, given: Problems, *, small: bool = False, **settings: object):
        Lab.close_open()
        self.session = Session(given, **settings)
        self.error = ""  # of the drawing; the session has its own
        self.builds, self.following = self.session.builds, False
        self._small, self.sizes_asked = small, {self.session.settings["batch_size"]}
        self._on_pause: list[Callable[[], None]] = []
        self._kept = 0  # plays of the session when its output was last kept
        self._stop, self._drawing = threading.Event(), threading.Lock()
        self._status, self._figure, self._exported = widgets.HTML(), widgets.HTML(), widgets.HTML()
        super().__init__([*controls.build(self, small), self._status, self._figure, self._exported])
        self.add_class("companion-lab")
        Lab._open = self
        self._ticker = threading.Thread(target=self._tick, name="companion-ticker", daemon=True)
        self._ticker.start()

    # Called by the controls: each leaves a wish with the session and returns at once.

    def by_hand(self, act: str, *values: object) -> None:
        """Call a method of the session for the user, which ends a rehearsal."""
        if threading.current_thread() is not self.session.thread:  # a rehearsal moves the slider from there
            self.session.forget_script()
            self.error = ""
        getattr(self.session, act)(*values)

    def pin_run(self) -> None:
        """Begin, move or end the pinned run."""
        self.pinned_batch_size.disabled = not self.pin.value
        self.by_hand("move", "pinned_batch_size", self.pinned_batch_size.value if self.pin.value else None)

    def show_export(self) -> None:
        """Show figure, history and code of the session below it."""
        self._exported.value = view.export(self.figure(), self.history, self.code())

    # Drawing.

    def _tick(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                self.draw()
                plays = self.session.plays
                if self.session.idle and plays != self._kept:
                    self._kept = plays
                    for callback in self._on_pause:
                        callback()
            except Exception as error:
                self.error = "".join(traceback.format_exception(error)[-3:]).strip()
            due = max(due + 1 / DRAWS_PER_SECOND, time.monotonic() + 0.01)
            self._stop.wait(due - time.monotonic())

    def draw(self) -> None:
        """Draw the session as it is now; the ticker calls this."""
        with self._drawing:
            session = self.session
            if session.builds != self.builds:
                controls.follow(self)
            self.play.disabled, self.pause.disabled = session.playing, not session.playing
            self._status.value = view.status(session, self.error)  # first: where drawing fails, the next tick says so
            self._figure.value = view.figure(session, self.axis.value, small=self._small)

    # Playing by itself, and keeping.

    def rehearse(self, batch_sizes: Mapping[int, int], until: int, *, timeout: float = 600) -> None:
        """Play by itself: move the slider to ``batch_sizes[n]`` at n examples seen, and pause at ``until``.

        In a browser this returns at once, the lab plays on, and whoever touches a control takes over. Where nobody
        watches (papermill, nbconvert) it waits, and raises the thread's error, or TimeoutError after ``timeout`` s.
        """
        self.sizes_asked |= set(batch_sizes.values())
        with self._drawing:
            controls.follow(self)
        move = functools.partial(setattr, self.batch_size, "value")
        self.session.rehearse({at: functools.partial(move, size) for at, size in batch_sizes.items()}, until)
        if not in_browser():
            self.session.wait(timeout)
            self.draw()

    def keep(self, make: Callable[[], object]) -> None:
        """Display the result of ``make()``, and update it whenever training pauses, so that a saved notebook has it.

        ``make`` is called from a thread, so its figures must not be pyplot's.
        """

        def shown() -> object:
            made = make()
            # IPython draws pyplot's figures only; these are not, so that a thread may make them.
            return Image(view.png(made)) if isinstance(made, Figure) else made

        handle = display(shown(), display_id=True)
        if handle is not None:  # None outside IPython
            self._on_pause.append(lambda: handle.update(shown()))

    def curves(self) -> pd.DataFrame:
        """The curves as drawn, for ``plots.session``: ``run``, ``measure``, the axes, mean, low, high of each bin."""
        frames = [
            curve.frame().assign(run=name, measure=measure)
            for name, run in self.session.named_runs().items()
            for measure, curve in list(run.curves.items())
        ]
        return pd.concat(frames, ignore_index=True)

    def moves(self) -> pd.DataFrame:
        """The moves of this run, a row each: see ``trace.Move``."""
        rows = [vars(m) for m in self.session.runs[0].moves if m.steps]
        return pd.DataFrame(rows, columns=[*AXES, "name", "value", "batch_size"])

    @property
    def history(self) -> pd.DataFrame:
        """Every step of every run on show: ``Session.history``."""
        return self.session.history

    def figure(self) -> Figure:
        """The session as a Matplotlib figure, in the companion's style, its finding above."""
        fig = plots.session(self.curves(), self.moves(), x=self.axis.value)
        plots.headline(fig, self.finding())
        return fig

    def finding(self) -> str:
        """The finding of this run in a line."""
        return self.session.runs[0].finding()

    def advice(self) -> str:
        """How this run's batch size compares with its noise scale, in plain words."""
        return view.advised(self.session.runs[0])

    def code(self) -> str:
        """The cell that repeats this session without a slider."""
        return self.session.code()

    def close(self) -> None:
        """End both threads and take the widgets away."""
        if self._ticker is not None:
            self._stop.set()
        if self.session is not None:
            self.session.close()
        if self._ticker not in (None, threading.current_thread()):
            self._ticker.join()
        if Lab._open is self:
            Lab._open = None
        for child in self.children:
            for control in getattr(child, "children", ()):
                control.close()
            child.close()
        super().close()

    @staticmethod
    def close_open() -> None:
        """Close the lab that is open in this kernel, if any."""
        if Lab._open is not None:
            Lab._open.close()

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": _STATIC} if isinstance(bundle, dict) else bundle


def in_browser() -> bool:
    """Whether somebody may be watching: this kernel belongs to a JupyterLab or Voilà page, not to a headless run."""
    return "JPY_SESSION_NAME" in os.environ or os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


# A thread that is inside torch while the interpreter goes down takes the process with it.
atexit.register(Lab.close_open)
