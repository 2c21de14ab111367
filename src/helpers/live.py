"""The live lab: sliders that change the batch size of a model while it trains, and its curves as they grow.

Two threads: the session's trainer, and a ticker that draws at a fixed rate whatever the speed of training. No cell
stays busy meanwhile: that would keep the sliders waiting. Drawing is one SVG text in an ``ipywidgets.HTML``: it needs no
JavaScript of ours, no network, follows the theme, and works wherever ipywidgets do.
"""

from __future__ import annotations

import atexit
import base64
import io
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from html import escape

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from helpers import chart, models, plots
from helpers.chart import number
from helpers.session import AXES, Session
from helpers.training import OPTIMIZERS

DRAWS_PER_SECOND = 6
_PACES = {"1 epoch a second": 1.0, "5 epochs a second": 5.0, "25 epochs a second": 25.0, "as fast as it goes": None}
_RATES = [float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 1.5, 2, 3, 5, 7)] + [10.0]
_AXES = {"examples seen": "examples_seen", "steps": "steps", "seconds": "seconds"}
_STATIC = "<p>Here stand live controls when the notebook runs; the picture below shows what they did.</p>"

_open: Lab | None = None  # one lab a kernel: whoever runs its cell again wants the new one alone


class Lab(widgets.VBox):
    """Controls and curves of one live session; display it, and press play.

    ``datasets`` are those to choose from, the first is loaded. Settings as for ``Session``. ``small`` leaves out the
    choices of data, model and optimizer, and the picture. A new lab closes the one before. ``session`` is the engine's
    side: ``lab.session.history`` has every step.
    """

    def __init__(
        self,
        datasets: Sequence[str] = ("blobs", "digits"),
        model: str = "brownlee_mlp",
        *,
        batch_size: int = 8,
        lr: float = 0.05,
        momentum: float = 0.0,
        optimizer: str = "sgd",
        num_train: int | None = None,
        seed: int = 0,
        epochs_per_second: float | None = None,
        small: bool = False,
    ):
        global _open
        if _open is not None:
            _open.close()
        self.session = Session(
            dataset=datasets[0], model=model, batch_size=batch_size, lr=lr, momentum=momentum, optimizer=optimizer,
            num_train=num_train, seed=seed,
        )  # fmt: skip
        self.error = ""  # of the drawing; the session has its own
        self._small, self._builds, self._following = small, 0, False
        self._on_pause: list[Callable[[], None]] = []
        self._stop, self._drawing, self._was_playing = threading.Event(), threading.Lock(), False
        self._speed = (time.monotonic(), 0, 0.0)
        super().__init__(self._controls(datasets, epochs_per_second))
        self.add_class("companion-lab")
        _open = self
        self._set_pace()
        self._ticker = threading.Thread(target=self._tick, name="companion-ticker", daemon=True)
        self._ticker.start()

    # Controls: each leaves a wish with the session and returns at once.

    def _controls(self, datasets: Sequence[str], epochs_per_second: float | None) -> list[widgets.Widget]:
        s, wide = self.session.settings, {"description_width": "96px"}
        box = widgets.Layout(width="340px", max_width="98%")
        self.play, self.pause, self.step, self.reset, self.export = (
            widgets.Button(description=name, icon=icon, tooltip=tip, disabled=True, layout=widgets.Layout(width="96px"))
            for name, icon, tip in [
                ("Play", "play", "Train"),
                ("Pause", "pause", "Stop after this step"),
                ("Step", "step-forward", "One update of the weights"),
                ("Reset", "refresh", "Start over: same initial weights, same order of examples; this run turns grey"),
                ("Export", "download", "Figure, history and code of this session"),
            ]
        )
        self.batch_size, self.pinned_batch_size = (
            widgets.SelectionSlider(options=self._sizes(), value=s["batch_size"], description=name, style=wide, layout=box)
            for name in ("batch size", "pinned batch")
        )
        self.pinned_batch_size.disabled = True
        # Not a FloatLogSlider: a browser rounds its value to the next step and sends that back unasked.
        self.lr = widgets.SelectionSlider(options=[(f"{lr:g}", lr) for lr in sorted({*_RATES, s["lr"]})], value=s["lr"],
                                          description="learning rate", style=wide, layout=box)  # fmt: skip
        self.momentum = widgets.FloatSlider(value=s["momentum"], min=0, max=0.99, step=0.01, description="momentum",
                                            disabled=s["optimizer"] != "sgd", style=wide, layout=box)  # fmt: skip
        self.pin = widgets.ToggleButton(description="Pin a second run", icon="thumb-tack", tooltip="From here on, a second "
                                        "run with a batch size of its own, fed the same examples", disabled=True)  # fmt: skip
        self.dataset, self.model, self.optimizer, self.axis, self.pace = (
            widgets.Dropdown(options=options, value=value, description=name, style=wide, layout=box)
            for name, options, value in [
                ("dataset", list(datasets), s["dataset"]),
                ("model", self._models(), s["model"]),
                ("optimizer", OPTIMIZERS, s["optimizer"]),
                ("curves against", _AXES, "examples_seen"),
                ("pace", _PACES, epochs_per_second),
            ]
        )
        self._status, self._figure, self._exported = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._follow()
        self.play.on_click(lambda _: self._by_hand(self.session.play))
        self.pause.on_click(lambda _: self._by_hand(self.session.pause))
        self.step.on_click(lambda _: self._by_hand(self.session.step))
        self.reset.on_click(lambda _: self._by_hand(self.session.reset))
        self.export.on_click(lambda _: self._show_export())
        for name in ("batch_size", "lr", "momentum", "optimizer", "dataset", "model"):
            getattr(self, name).observe(lambda change, name=name: self._moved(name, change["new"]), "value")
        self.pin.observe(lambda _: self._pinned(), "value")
        self.pinned_batch_size.observe(lambda _: self._pinned(), "value")
        self.pace.observe(lambda _: self._set_pace(), "value")
        rows = [[self.play, self.pause, self.step, self.reset, self.pin, self.export], [self.batch_size, self.lr]]
        if self._small:
            rows = [[self.play, self.pause, self.step, self.reset, self.export], [self.batch_size, self.lr], [self.axis]]
        else:
            rows += [[self.pinned_batch_size, self.momentum], [self.dataset, self.model], [self.optimizer, self.pace], [self.axis]]
        flow = widgets.Layout(flex_flow="row wrap")
        return [*(widgets.HBox(row, layout=flow) for row in rows), self._status, self._figure, self._exported]

    def _sizes(self) -> list[tuple[str, int]]:
        full = self.session.dataset.num_train
        wanted = self.session.settings["batch_size"], self.session.pinned_batch_size or 1
        sizes = sorted({*(2**k for k in range(full.bit_length())), *wanted} - {full})
        return [(f"{size:,}", size) for size in sizes] + [(f"full ({full:,})", full)]

    def _models(self) -> list[str]:
        return [name for name in models.MODELS if name != "plain_cnn" or len(self.session.dataset.input_shape) == 3]

    def _by_hand(self, act: Callable[..., None], *values: object) -> None:
        if threading.current_thread() is not self.session.thread:  # a rehearsal moves the slider from there
            self.session.forget_script()
        act(*values)

    def _moved(self, name: str, value: object) -> None:
        if not self._following:
            self._by_hand(self.session.move, name, value)

    def _pinned(self) -> None:
        self.pinned_batch_size.disabled = not self.pin.value
        self._moved("pinned_batch_size", self.pinned_batch_size.value if self.pin.value else None)

    def _set_pace(self) -> None:
        pace = self.pace.value
        self.session.move("examples_per_second", pace and pace * self.session.dataset.num_train)

    def _follow(self) -> None:
        """Training has started over: the controls show what it started with."""
        session, self._following = self.session, True
        s = session.settings
        try:
            for slider, value in [(self.batch_size, s["batch_size"]),
                                  (self.pinned_batch_size, session.pinned_batch_size or self.pinned_batch_size.value)]:  # fmt: skip
                if slider.options != tuple(self._sizes()):
                    slider.options = self._sizes()
                slider.value = min(value, session.dataset.num_train)
            self.model.options = self._models()
            self.model.value, self.dataset.value = s["model"], s["dataset"]
            self.momentum.value, self.momentum.disabled = s["momentum"], s["optimizer"] != "sgd"
        finally:
            self._following = False
        self._builds = session.builds

    # What one sees.

    def _tick(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                self.draw()
                finished = self._was_playing and self.session.idle
                self._was_playing = self.session.playing or (self._was_playing and not finished)
                for callback in self._on_pause if finished else ():
                    callback()
            except Exception as error:
                self.error = "".join(traceback.format_exception(error)[-3:]).strip()
            due = max(due + 1 / DRAWS_PER_SECOND, time.monotonic() + 0.01)
            self._stop.wait(due - time.monotonic())

    def draw(self) -> None:
        """Draw the session as it is now; the ticker calls this."""
        with self._drawing:
            session = self.session
            if session.builds != self._builds:
                self._follow()
                self._set_pace()
            ready = bool(session.builds)
            for button, disabled in [(self.play, not ready or session.playing), (self.pause, not session.playing),
                                     (self.step, not ready), (self.reset, not ready and not session.error),
                                     (self.export, not ready), (self.pin, not ready)]:  # fmt: skip
                if button.disabled != disabled:
                    button.disabled = disabled
            self._status.value = self._say()
            if session.runs:
                self._figure.value = self._svg()

    def _say(self) -> str:
        session = self.session
        error = session.error or self.error
        if error:
            last = error.splitlines()[-1]
            return (f'<div role="alert" class="companion-error" style="color: var(--jp-error-color1, #c62828); line-height: 1.4">'
                    f"<b>Training stopped: {escape(last)}</b><pre style='white-space: pre-wrap'>{escape(error)}</pre>"
                    "Reset starts over.</div>")  # fmt: skip
        if not session.runs:
            return '<div role="status">Getting ready: the first optimizer of a process takes some seconds.</div>'
        run = session.runs[0]
        state = "Playing" if session.playing else "Paused" if run.training.steps else "Ready"
        if any(r.diverged for r in session.runs):
            state = "Diverged: the loss is no longer finite. Lower the learning rate and reset"
        moved = run.moves[-1] if run.moves else None
        since = f", {moved.name.replace('_', ' ')} moved at step {moved.steps:,}" if moved and moved.steps else ""
        return (f'<div role="status" class="companion-status" data-batch-size="{run.training.batch_size}">{state}. Batch size '
                f"{run.training.batch_size:,}, learning rate {run.training.lr:.3g}{since}.</div>")  # fmt: skip

    def _svg(self) -> str:
        session, axis = self.session, AXES.index(self.axis.value)
        named = session.named_runs()
        main, x_name = named["this run"], self.axis.label
        training, latest = main.training, main.latest
        began, steps, rate = self._speed
        now = time.monotonic()
        if now - began > 1 or training.steps < steps:
            rate = max(training.steps - steps, 0) / (now - began)
            self._speed = (now, training.steps, rate)
        marks = [((m.examples_seen, m.steps, m.seconds)[axis],
                  f"{m.value:,}" if m.name == "batch_size" else f"{m.name} {m.value:.2g} (batch {m.batch_size:,})")
                 for m in main.moves if m.steps]  # fmt: skip
        panels = [("minibatch_loss", f"Loss of each minibatch, against {x_name}", {"log": True}),
                  ("test_accuracy", f"Test accuracy, on {len(session._test[1]):,} examples", {"percent": True})]  # fmt: skip
        if not self._small:
            panels.append(("gradient_norm", "Gradient norm of a minibatch", {"log": True, "height": 130}))
        drawn = [
            chart.panel(title, {n: list(r.curves[y].bins) for n, r in named.items()}, axis=axis, marks=marks, **options)
            for y, title, options in panels
        ]
        ruler = chart.gauge(training.batch_size, main.noise_scale, session.dataset.num_train)
        drawn.append(f'<div style="{chart.PANEL}; line-height: 1.4">{ruler}'
                     f'<div class="companion-advice">{advice(training.batch_size, main.noise_scale)}</div></div>')  # fmt: skip
        picture = main.picture
        if "regions" in picture and not self._small:
            d = session.dataset
            drawn.append(chart.regions(picture["regions"], d.train_inputs.cpu().numpy(), d.train_targets.cpu().numpy()))
        elif "digits" in picture and not self._small:
            drawn.append(chart.digits(picture["digits"], picture["is"], picture["read"]))
        keys = "".join(
            f'<span style="white-space: nowrap"><svg width="26" height="8" aria-hidden="true"><line x2="22" y1="4" y2="4" '
            f'stroke="{chart.RUNS[n][0]}" stroke-width="2.5" stroke-dasharray="{chart.RUNS[n][1]}"/></svg>{n}'
            f"{f' (batch {named[n].training.batch_size:,})' if len(named) > 1 else ''} </span>" for n in named
        )  # fmt: skip
        seen = training.examples_seen
        facts = (f"step {training.steps:,} · {seen:,} examples · epoch {training.epoch:.2f} · {rate:,.0f} steps/s · loss "
                 f"{number(latest.get('minibatch_loss', math.nan))} · gradient norm {number(latest.get('gradient_norm', math.nan))} "
                 f"· test accuracy {100 * latest.get('test_accuracy', math.nan):.1f} %")  # fmt: skip
        return (
            f'<div class="companion-chart" data-steps="{training.steps}" style="color: {chart.INK}; line-height: 1.5"><div>{keys}'
            f'</div><div style="display: flex; flex-wrap: wrap; gap: 4px 16px">{"".join(drawn)}</div><div>{facts}</div></div>'
        )

    # What one keeps.

    def rehearse(self, batch_sizes: Mapping[int, int], until: int, *, timeout: float = 600) -> None:
        """Play by itself: move the slider to ``batch_sizes[n]`` at n examples seen, and pause at ``until``.

        In a browser this returns at once, the lab plays on, and whoever touches a control takes over. Where nobody
        watches (papermill, nbconvert) it waits, and raises what failed in the thread; TimeoutError after ``timeout`` s.
        """

        def set_slider(size: int) -> None:
            self.batch_size.value = size

        self._was_playing = True  # however soon it ends
        self.session.rehearse({at: lambda size=size: set_slider(size) for at, size in batch_sizes.items()}, until)
        if not in_browser():
            self.session.wait(timeout)
            self.draw()

    def keep(self, made: Callable[[], object]) -> None:
        """Display what ``made()`` returns here, and anew whenever training pauses: what a saved notebook keeps of the lab.

        Called from a thread, so its figures are not pyplot's.
        """
        handle = display(made(), display_id=True)
        if handle is not None:  # None outside IPython
            self._on_pause.append(lambda: handle.update(made()))

    def curves(self) -> pd.DataFrame:
        """The thinned curves as drawn, for ``plots.session``: ``run``, ``measure``, the axes, mean, low, high."""
        return pd.concat([curve.frame().assign(run=name, measure=measure) for name, run in self.session.named_runs().items()
                          for measure, curve in run.curves.items()], ignore_index=True)  # fmt: skip

    def moves(self) -> pd.DataFrame:
        """The moves of this run, a row each: see ``session.Move``."""
        return pd.DataFrame([vars(m) for m in self.session.runs[0].moves if m.steps], columns=list(AXES) + ["name", "value", "batch_size"])

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
        """What this run shows, in a line: how the spread of the loss changed with the last move of the batch size."""
        stretches = self.session.runs[0].stretches()
        long = stretches[stretches["steps"] >= 8]
        if len(long) > 1 and long["batch_size"].iloc[-1] != long["batch_size"].iloc[-2]:
            a, b = long.iloc[-2], long.iloc[-1]
            return (f"Batch {a.batch_size:,.0f} → {b.batch_size:,.0f}: from step to step the loss varies by "
                    f"{b.spread_first:.2g} instead of {a.spread_last:.2g}")  # fmt: skip
        if len(long):
            return f"Batch {long['batch_size'].iloc[-1]:,.0f}: from step to step the loss varies by {long['spread_last'].iloc[-1]:.2g}"
        return "Nothing trained yet: press play"

    def code(self) -> str:
        """The cell that repeats this session without a slider."""
        return self.session.code()

    def _show_export(self) -> None:
        png = io.BytesIO()
        self.figure().savefig(png, format="png")
        frame = self.history
        links = [("figure (PNG)", "live_lab.png", "image/png", png.getvalue())]
        if len(frame) <= 200_000:
            links.append((f"history ({len(frame):,} rows, CSV)", "live_lab.csv", "text/csv", frame.to_csv(index=False).encode()))
        anchors = " · ".join(
            f'<a download="{name}" href="data:{kind};base64,{base64.b64encode(content).decode()}">{text}</a>'
            for text, name, kind, content in links
        )
        self._exported.value = (
            f'<div class="companion-export" style="line-height: 1.5">{anchors} · in a cell, the lab\'s <code>.history</code> is the '
            f"DataFrame, <code>.figure()</code> the figure. This cell repeats the session without a slider:"
            f'<pre style="user-select: all">{escape(self.code())}</pre></div>'
        )

    def close(self) -> None:
        """End both threads and take the widgets away."""
        global _open
        self._stop.set()
        self.session.close()
        if threading.current_thread() is not self._ticker:
            self._ticker.join()
        if _open is self:
            _open = None
        self.close_all_of(self)
        super().close()

    @staticmethod
    def close_all_of(box: widgets.Box) -> None:
        for child in box.children:
            if isinstance(child, widgets.Box):
                Lab.close_all_of(child)
            child.close()

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": _STATIC} if isinstance(bundle, dict) else bundle


def advice(batch_size: int, noise_scale: float) -> str:
    """What the noise scale says of the batch size, in plain words.

    In theory (McCandlish 2018, eq. 2.11: each size at its best rate) batch B needs E ∝ 1 + B/B_simple examples and
    S ∝ 1 + B_simple/B steps.
    """
    if math.isnan(noise_scale):
        return ""
    if math.isinf(noise_scale):
        return "Noise dominates: the gradient hardly stands out of it. A batch 4× larger would cost almost no extra examples."
    share = batch_size / noise_scale
    examples, steps = (1 + 4 * share) / (1 + share), (1 + 1 / share) / (1 + 1 / (4 * share))
    costs = f"{100 * (examples - 1):.0f} % more examples, {steps:.1f}× fewer steps"
    if share < 1 / 16:
        return f"Noise dominates: a batch 4× larger would cost almost no extra examples ({costs})."
    if share < 4:
        return f"Noise and gradient balance: a batch 4× larger would trade one for the other ({costs})."
    fewer = 1 - (1 + share / 4) / (1 + share)
    return f"The gradient is nearly exact already: a batch 4× smaller would need {100 * fewer:.0f} % fewer examples, and {(1 + 4 / share) / (1 + 1 / share):.1f}× the steps."


def in_browser() -> bool:
    """Whether somebody may be watching: this kernel belongs to a JupyterLab or Voilà page, not to a headless run."""
    return "JPY_SESSION_NAME" in os.environ or os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


@atexit.register
def _close_open() -> None:
    # A thread that is inside torch while the interpreter goes down takes the process with it.
    if _open is not None:
        _open.close()
