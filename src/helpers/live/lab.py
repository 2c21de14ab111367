"""The live lab: sliders that change the batch size of a model while it trains, and its curves as they grow.

Two threads: the session's trainer, and a ticker that draws at a fixed rate whatever the speed of training. No cell
stays busy meanwhile: that would keep the sliders waiting. Drawing is one SVG text in an ``ipywidgets.HTML``: it needs
no JavaScript of ours and no network, follows the theme, and works wherever ipywidgets do.
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
from IPython.display import Image, display
from matplotlib.figure import Figure

from helpers import plots
from helpers.engine import kernels as models
from helpers.engine.training import OPTIMIZERS
from helpers.live import chart
from helpers.live.chart import number, tag
from helpers.live.session import Session
from helpers.live.trace import AXES, Move, Run

DRAWS_PER_SECOND = 6
_PACES = {"1 epoch a second": 1.0, "5 epochs a second": 5.0, "25 epochs a second": 25.0, "as fast as it goes": 0.0}
_RATES = [float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 1.5, 2, 3, 5, 7)] + [10.0]
_AXES = {"examples seen": "examples_seen", "steps": "steps", "seconds": "seconds"}
_NAMES = {"batch_size": "batch size", "lr": "learning rate", "momentum": "momentum"}
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
        epochs_per_second: float = 0.0,
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
        self._stop, self._drawing = threading.Event(), threading.Lock()
        self._kept = 0  # how many plays what is kept has seen
        self._sizes_asked = {batch_size}
        self._speed = (time.monotonic(), 0, 0.0)
        super().__init__(self._controls(datasets, epochs_per_second))
        self.add_class("companion-lab")
        _open = self
        self._set_pace()
        self._ticker = threading.Thread(target=self._tick, name="companion-ticker", daemon=True)
        self._ticker.start()

    # Controls: each leaves a wish with the session and returns at once.

    def _controls(self, datasets: Sequence[str], epochs_per_second: float) -> list[widgets.Widget]:
        s, wide = self.session.settings, {"description_width": "92px"}
        box = widgets.Layout(width="285px", max_width="98%")
        self.play, self.pause, self.step, self.reset, self.export = (
            widgets.Button(description=name, icon=icon, tooltip=tip, layout=widgets.Layout(width="96px"))
            for name, icon, tip in [
                ("Play", "play", "Train"),
                ("Pause", "pause", "Stop after this step"),
                ("Step", "step-forward", "One update of the weights"),
                ("Reset", "refresh", "Start over: same initial weights, same order of examples; this run turns grey"),
                ("Export", "download", "Figure, history and code of this session"),
            ]
        )
        self.batch_size, self.pinned_batch_size = (
            widgets.SelectionSlider(options=self._sizes(), value=value, description=name, style=wide, layout=box)
            for name, value in [
                ("batch size", s["batch_size"]),
                ("pinned batch", min(64, self.session.dataset.num_train)),
            ]
        )
        self.pinned_batch_size.disabled = True
        # Not a FloatLogSlider: a browser rounds its value to the next step and sends that back unasked.
        self.lr = widgets.SelectionSlider(options=[(f"{lr:g}", lr) for lr in sorted({*_RATES, s["lr"]})], value=s["lr"],
                                          description="learning rate", style=wide, layout=box)  # fmt: skip
        self.momentum = widgets.FloatSlider(
            value=s["momentum"],
            min=0,
            max=max(0.99, s["momentum"]),
            step=0.01,
            description="momentum",
            disabled=s["optimizer"] != "sgd",
            style=wide,
            layout=box,
        )
        self.pin = widgets.ToggleButton(
            description="Pin a second run",
            icon="thumb-tack",
            tooltip="From here on, a second run with a batch size of its own, fed the same examples",
        )
        paces = _PACES
        if epochs_per_second not in paces.values():
            paces = {f"{epochs_per_second:g} epochs a second": epochs_per_second} | paces
        self.dataset, self.model, self.optimizer, self.axis, self.pace = (
            widgets.Dropdown(options=options, value=value, description=name, style=wide, layout=box)
            for name, options, value in [
                ("dataset", list(datasets), s["dataset"]),
                ("model", self._models(), s["model"]),
                ("optimizer", OPTIMIZERS, s["optimizer"]),
                ("x-axis", _AXES, "examples_seen"),
                ("pace", paces, epochs_per_second),
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
            rows = [[self.play, self.pause, self.step, self.reset, self.export], [self.batch_size, self.lr, self.axis]]
        else:
            rows[1] += [self.momentum]
            rows += [[self.pinned_batch_size, self.pace, self.axis], [self.dataset, self.model, self.optimizer]]
        flow = widgets.Layout(flex_flow="row wrap")
        return [*(widgets.HBox(row, layout=flow) for row in rows), self._status, self._figure, self._exported]

    def _sizes(self) -> list[tuple[str, int]]:
        full = self.session.dataset.num_train
        used = {self.session.settings["batch_size"], self.session.pinned_batch_size or 1}
        sizes = {*(2**k for k in range(full.bit_length())), *self._sizes_asked, *used}
        return [(f"{size:,}", size) for size in sorted(sizes) if size < full] + [(f"full ({full:,})", full)]

    def _models(self) -> list[str]:
        return [name for name in models.MODELS if name != "plain_cnn" or len(self.session.dataset.input_shape) == 3]

    def _by_hand(self, act: Callable[..., None], *values: object) -> None:
        if threading.current_thread() is not self.session.thread:  # a rehearsal moves the slider from there
            self.session.forget_script()
            self.error = ""
        act(*values)

    def _moved(self, name: str, value: object) -> None:
        if not self._following:
            self._by_hand(self.session.move, name, value)

    def _pinned(self) -> None:
        self.pinned_batch_size.disabled = not self.pin.value
        self._moved("pinned_batch_size", self.pinned_batch_size.value if self.pin.value else None)

    def _set_pace(self) -> None:
        pace = self.pace.value
        self.session.move("examples_per_second", pace * self.session.dataset.num_train if pace else None)

    def _follow(self) -> None:
        """Training has started over: the controls show what it started with."""
        session, self._following = self.session, True
        s = session.settings
        try:
            pinned = session.pinned_batch_size or self.pinned_batch_size.value
            for slider, value in [(self.batch_size, s["batch_size"]), (self.pinned_batch_size, pinned)]:
                sizes = self._sizes()
                if slider.options != tuple(sizes):
                    slider.options = sizes
                slider.value = max(size for _, size in sizes if size <= value)
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
            if session.builds != self._builds:
                self._follow()
                self._set_pace()
            self.play.disabled, self.pause.disabled = session.playing, not session.playing
            self._status.value = self._say()  # first: where drawing fails, the next tick says so
            self._figure.value = self._svg()

    def _say(self) -> str:
        session = self.session
        error = session.error or self.error
        if error:
            what, way_out = (
                ("Training stopped", "Reset starts over.")
                if session.error
                else (
                    "What the lab shows or keeps could not be made",
                    "Training goes on; mend the cell and run it again.",
                )
            )
            first = tag("b", escape(f"{what}: {error.splitlines()[-1]}"))
            text = tag("pre", escape(error), style="white-space: pre-wrap")
            red = "color: var(--jp-error-color1, #c62828); line-height: 1.4"
            return tag("div", first, text, way_out, role="alert", class_="companion-error", style=red)
        run = session.runs[0]
        state = "Playing" if session.playing else "Paused" if run.training.steps else "Ready"
        if any(r.diverged for r in session.runs):
            state = "Diverged: the loss is no longer finite. Lower the learning rate and reset"
        moved = run.moves[-1] if run.moves and run.moves[-1].steps else None
        since = f", {_NAMES[moved.name]} moved at step {moved.steps:,}" if moved else ""
        now = f"Batch size {run.training.batch_size:,}, learning rate {run.training.lr:.3g}{since}."
        return tag("div", f"{state}. {now}", role="status", class_="companion-status")

    def _svg(self) -> str:
        session, axis = self.session, AXES.index(self.axis.value)
        named = session.named_runs()
        main = named["this run"]
        marks = [(getattr(m, self.axis.value), _label(m), "this run") for m in main.moves if m.steps]
        if "pinned" in named:
            marks += [(getattr(m, self.axis.value), _label(m), "pinned") for m in named["pinned"].moves
                      if m.steps and m not in main.moves and m.name == "batch_size"]  # fmt: skip
        panels = [("minibatch_loss", f"Loss of each minibatch, against {self.axis.label}", {"log": True}),
                  ("test_accuracy", f"Test accuracy, on {session.num_test:,} examples", {"percent": True})]  # fmt: skip
        if not self._small:
            panels.append(("gradient_norm", "Gradient norm of a minibatch", {"log": True, "height": 130}))
        drawn = [
            chart.panel(title, {n: list(r.curves[y].bins) for n, r in named.items()}, axis=axis, marks=marks, **options)
            for y, title, options in panels
        ]
        batch_size, scale = main.training.batch_size, main.noise_scale
        words = tag("div", advice(batch_size, scale), class_="companion-advice")
        drawn.append(tag("div", chart.gauge(batch_size, scale, session.dataset.num_train), words, style=chart.PANEL))
        dataset, picture = main.training.dataset, {} if self._small else main.picture
        if "regions" in picture:
            inputs, targets = dataset.train_inputs.cpu().numpy(), dataset.train_targets.cpu().numpy()
            drawn.append(chart.regions(picture["regions"], inputs, targets))
        elif "digits" in picture:
            drawn.append(chart.digits(picture["digits"], picture["is"], picture["read"]))
        return tag(
            "div", self._keys(named), tag("div", *drawn, style="display: flex; flex-wrap: wrap; gap: 4px 16px"),
            tag("div", self._facts(main)), class_="companion-chart", data_steps=main.training.steps,
            style=f"color: {chart.INK}; line-height: 1.5",
        )  # fmt: skip

    @staticmethod
    def _keys(named: Mapping[str, Run]) -> str:
        """The legend."""
        keys = []
        for name, run in named.items():
            ink, dash = chart.RUNS[name]
            line = tag("line", x2=22, y1=4, y2=4, stroke=ink, stroke_width=2.5, stroke_dasharray=dash)
            size = f" (batch {run.training.batch_size:,})" if len(named) > 1 else ""
            sample = tag("svg", line, width=26, height=8, aria_hidden="true")
            keys.append(tag("span", sample, name, size, style="white-space: nowrap"))
        return tag("div", " ".join(keys))

    def _facts(self, run: Run) -> str:
        """Where the run is now, in a line."""
        training, now = run.training, time.monotonic()
        began, steps, rate = self._speed
        if now - began > 1 or training.steps < steps:
            rate = max(training.steps - steps, 0) / (now - began)
            self._speed = (now, training.steps, rate)
        loss, gradient, accuracy = (
            run.latest.get(name, math.nan) for name in ("minibatch_loss", "gradient_norm", "test_accuracy")
        )
        return (
            f"step {training.steps:,} · {training.examples_seen:,} examples · epoch {training.epoch:.2f} · {rate:,.0f} "
            f"steps/s · loss {number(loss)} · gradient norm {number(gradient)} · test accuracy {100 * accuracy:.1f} %"
        )

    # What one keeps.

    def rehearse(self, batch_sizes: Mapping[int, int], until: int, *, timeout: float = 600) -> None:
        """Play by itself: move the slider to ``batch_sizes[n]`` at n examples seen, and pause at ``until``.

        In a browser this returns at once, the lab plays on, and whoever touches a control takes over. Where nobody
        watches (papermill, nbconvert) it waits, and raises what failed in the thread; TimeoutError after ``timeout`` s.
        """

        def set_slider(size: int) -> None:
            self.batch_size.value = size

        self._sizes_asked |= set(batch_sizes.values())
        with self._drawing:
            self._follow()
        self.session.rehearse({at: lambda size=size: set_slider(size) for at, size in batch_sizes.items()}, until)
        if not in_browser():
            self.session.wait(timeout)
            self.draw()

    def keep(self, made: Callable[[], object]) -> None:
        """Display what ``made()`` returns here, and anew whenever training pauses, so that a saved notebook has it.

        It is called from a thread: its figures may not be pyplot's.
        """
        handle = display(_shown(made()), display_id=True)
        if handle is not None:  # None outside IPython
            self._on_pause.append(lambda: handle.update(_shown(made())))

    def curves(self) -> pd.DataFrame:
        """The curves as drawn, for ``plots.session``: ``run``, ``measure``, the axes, mean, low, high of each bin."""
        frames = [
            curve.frame().assign(run=name, measure=measure)
            for name, run in self.session.named_runs().items()
            for measure, curve in run.curves.items()
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
        """What this run shows, in a line: how the spread of the loss changed with the last move of the batch size."""
        stretches = self.session.runs[0].stretches()
        long = stretches[stretches["steps"] >= 8]
        if len(long) > 1 and long["batch_size"].iloc[-1] != long["batch_size"].iloc[-2]:
            a, b = long.iloc[-2], long.iloc[-1]
            return (f"Batch {a.batch_size:,.0f} → {b.batch_size:,.0f}: from step to step the loss varies by "
                    f"{b.spread_first:.2g} instead of {a.spread_last:.2g}")  # fmt: skip
        if len(long):
            last = long.iloc[-1]
            return f"Batch {last.batch_size:,.0f}: from step to step the loss varies by {last.spread_last:.2g}"
        return "Nothing trained yet: press play"

    def code(self) -> str:
        """The cell that repeats this session without a slider."""
        return self.session.code()

    def _show_export(self) -> None:
        frame = self.history
        links = [("figure (PNG)", "live_lab.png", "image/png", _png(self.figure()))]
        if len(frame) <= 200_000:
            links.append(
                (f"history ({len(frame):,} rows, CSV)", "live_lab.csv", "text/csv", frame.to_csv(index=False).encode())
            )
        anchors = [
            tag("a", text, download=name, href=f"data:{kind};base64,{base64.b64encode(content).decode()}")
            for text, name, kind, content in links
        ]
        self._exported.value = tag(
            "div", " · ".join(anchors), " · in a cell: ", tag("code", "lab.history"), " is the DataFrame, ",
            tag("code", "lab.figure()"), " the figure. This cell repeats the session without a slider:",
            tag("pre", escape(self.code()), style="user-select: all"),
            class_="companion-export", style="line-height: 1.5",
        )  # fmt: skip

    def close(self) -> None:
        """End both threads and take the widgets away."""
        global _open
        self._stop.set()
        self.session.close()
        if threading.current_thread() is not self._ticker:
            self._ticker.join()
        if _open is self:
            _open = None
        for child in self.children:
            for control in getattr(child, "children", ()):
                control.close()
            child.close()
        super().close()

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": _STATIC} if isinstance(bundle, dict) else bundle


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _shown(made: object) -> object:
    # IPython draws pyplot's figures only; these are not, so that a thread may make them.
    return Image(_png(made)) if isinstance(made, Figure) else made


def _label(move: Move) -> str:
    if move.name == "batch_size":
        return f"{move.value:,}"
    return f"{move.name} {move.value:.2g} (batch {move.batch_size:,})"


def advice(batch_size: int, noise_scale: float) -> str:
    """What the noise scale says of the batch size, in plain words.

    In theory (McCandlish 2018, eq. 2.11: each size at its best rate) batch B needs E ∝ 1 + B/B_simple examples and
    S ∝ 1 + B_simple/B steps.
    """
    if math.isnan(noise_scale):
        return ""
    if math.isinf(noise_scale):
        return "Noise dominates: the gradient hardly stands out. A batch 4× larger would cost almost no extra examples."
    share = batch_size / noise_scale
    examples, steps = (1 + 4 * share) / (1 + share), (1 + 1 / share) / (1 + 1 / (4 * share))
    costs = f"{100 * (examples - 1):.0f} % more examples, {steps:.1f}× fewer steps"
    if share < 1 / 16:
        return f"Noise dominates: a batch 4× larger would cost almost no extra examples ({costs})."
    if share < 4:
        return f"Noise and gradient balance: a batch 4× larger would trade one for the other ({costs})."
    fewer = 1 - (1 + share / 4) / (1 + share)
    costs = f"{100 * fewer:.0f} % fewer examples, and {(1 + 4 / share) / (1 + 1 / share):.1f}× the steps"
    return f"The gradient is nearly exact already: a batch 4× smaller would need {costs}."


def in_browser() -> bool:
    """Whether somebody may be watching: this kernel belongs to a JupyterLab or Voilà page, not to a headless run."""
    return "JPY_SESSION_NAME" in os.environ or os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


@atexit.register
def _close_open() -> None:
    # A thread that is inside torch while the interpreter goes down takes the process with it.
    if _open is not None:
        _open.close()
