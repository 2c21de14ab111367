"""The lab in view: its status, its curves and pictures, and its export, as HTML text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

import pandas as pd
from IPython.core.pylabtools import print_figure
from matplotlib.figure import Figure

from helpers.live import chart
from helpers.live.chart import number, tag
from helpers.live.session import Session
from helpers.live.trace import AXES, Move, Run

_SCORES = {"test_accuracy": "Test accuracy", "test_loss": "Test loss"}


def status(session: Session, error: str) -> str:
    """The state in a line, or an alert; ``error`` is the lab's own."""
    if session.error:
        return _alert("Training stopped", session.error, "Reset starts over.")
    if error:
        return _alert("The lab could not draw or save its output", error,
                      "Training goes on; correct the cell and run it again.")  # fmt: skip
    run = session.runs[0]
    state = session.state.capitalize()
    if session.state == "diverged":
        state += ": the loss is no longer finite. Lower the learning rate and reset"
    since = ""
    if run.moves and run.moves[-1].steps:
        name = run.moves[-1].name.replace("lr", "learning rate").replace("_", " ")
        since = f", {name} moved at step {run.moves[-1].steps:,}"
    now = f"Batch size {run.training.batch_size:,}, learning rate {run.training.lr:.3g}{since}."
    return tag("div", f"{state}. {now}", role="status", class_="companion-status")


def _alert(title: str, error: str, way_out: str) -> str:
    first = tag("b", escape(f"{title}: {error.splitlines()[-1]}"))
    text = tag("pre", escape(error), style="white-space: pre-wrap")
    red = "color: var(--jp-error-color1, #c62828); line-height: 1.4"
    return tag("div", first, text, way_out, role="alert", class_="companion-error", style=red)


def figure(session: Session, axis: str, *, small: bool) -> str:
    """Every curve against ``axis``, the gauge of the noise scale with its advice, the picture and the facts."""
    named = session.named_runs()
    main = named["this run"]
    drawn = _panels(session, named, axis, small)
    gauge = chart.gauge(main.training.batch_size, main.noise.value, session.dataset.num_train)
    drawn.append(tag("div", gauge, tag("div", escape(advised(main)), class_="companion-advice"), style=chart.PANEL))
    picture = {} if small else main.picture
    if "regions" in picture:
        inputs, targets = (t.cpu().numpy() for t in session.dataset.tensors("train"))
        drawn.append(chart.regions(picture["regions"], inputs, targets))
    elif "mistakes" in picture:
        drawn.append(chart.mistakes(picture["mistakes"]))
    return tag(
        "div", _legend(named), tag("div", *drawn, style="display: flex; flex-wrap: wrap; gap: 4px 16px"),
        tag("div", _facts(main)), class_="companion-chart", data_steps=main.training.steps,
        style=f"color: {chart.INK}; line-height: 1.5",
    )  # fmt: skip


def _panels(session: Session, named: Mapping[str, Run], axis: str, small: bool) -> list[str]:
    main, score = named["this run"], named["this run"].score
    own = [move for move in named["pinned"].moves if move not in main.moves] if "pinned" in named else []
    moves = [*((move, "this run") for move in main.moves), *((m, "pinned") for m in own if m.name == "batch_size")]
    marks = [(getattr(move, axis), _label(move), run) for move, run in moves if move.steps]
    panels = [("minibatch_loss", f"Loss of each minibatch, against {axis.replace('_', ' ')}", {"log": True})]
    if session.test.size:
        scale = {"percent": True} if score == "test_accuracy" else {"log": True}
        panels.append((score, f"{_SCORES[score]}, on {session.test.size:,} examples", scale))
    if not small:
        panels.append(("gradient_norm", "Gradient norm of a minibatch", {"log": True, "height": 130}))
    return [
        chart.panel(title, {n: list(run.curves[y].bins) for n, run in named.items() if y in run.curves},
                    axis=AXES.index(axis), marks=marks, **options)
        for y, title, options in panels
    ]  # fmt: skip


def _label(move: Move) -> str:
    if move.name == "batch_size":
        return f"{move.value:,}"
    return f"{move.name} {move.value:.2g} (batch {move.batch_size:,})"


def _legend(named: Mapping[str, Run]) -> str:
    keys = []
    for name, run in named.items():
        ink, dash = chart.RUNS[name]
        line = tag("line", x2=22, y1=4, y2=4, stroke=ink, stroke_width=2.5, stroke_dasharray=dash)
        size = f" (batch {run.training.batch_size:,})" if len(named) > 1 else ""
        sample = tag("svg", line, width=26, height=8, aria_hidden="true")
        keys.append(tag("span", sample, name, size, style="white-space: nowrap"))
    return tag("div", " ".join(keys))


def _facts(run: Run) -> str:
    """The run's position, its speed (without drawing and measuring) and its latest measures, in a line."""
    training, score = run.training, run.latest.get(run.score, math.nan)
    shown = f"{100 * score:.1f} %" if run.score == "test_accuracy" else number(score)
    loss, gradient = (run.latest.get(name, math.nan) for name in ("minibatch_loss", "gradient_norm"))
    speed = training.steps / training.seconds if training.steps else 0
    return (
        f"step {training.steps:,} · {training.examples_seen:,} examples · epoch {training.epoch:.2f} · {speed:,.0f} "
        f"steps/s · loss {number(loss)} · gradient norm {number(gradient)} · {_SCORES[run.score].lower()} {shown}"
    )


def advised(run: Run) -> str:
    """The advice for a run as it is now, or the reason why there is none."""
    if run.noise.refusal:
        return f"No noise scale: {run.noise.refusal}"
    return advice(run.training.batch_size, run.noise.value)


def advice(batch_size: int, noise_scale: float) -> str:
    """Say in plain words how the batch size compares with the noise scale; nothing where there is none (NaN).

    In theory (McCandlish 2018, eq. 2.11: each size at its best rate) batch B needs E ∝ 1 + B/B_simple examples and
    S ∝ 1 + B_simple/B steps.
    """
    if math.isnan(noise_scale):
        return ""
    if math.isinf(noise_scale):
        return "Noise dominates: the gradient hardly stands out. A batch 4× larger would cost almost no extra examples."
    share = batch_size / noise_scale
    other = share * 4 if share < 4 else share / 4
    more, steps = 100 * ((1 + other) / (1 + share) - 1), (1 + 1 / other) / (1 + 1 / share)
    if share >= 4:
        costs = f"{-more:.0f} % fewer examples, and {steps:.1f}× the steps"
        return f"The gradient is nearly exact already: a batch 4× smaller would need {costs}."
    costs = f"{more:.0f} % more examples, {1 / steps:.1f}× fewer steps"
    if share < 1 / 16:
        return f"Noise dominates: a batch 4× larger would cost almost no extra examples ({costs})."
    return f"Noise and gradient balance: a batch 4× larger would trade one for the other ({costs})."


def png(drawing: Figure) -> bytes:
    """Return a figure as a PNG file, at the style's own size and resolution."""
    return print_figure(drawing, bbox_inches=None, dpi=None)


def export(drawing: Figure, history: pd.DataFrame, code: str) -> str:
    """Links to the figure and, where it is not too long, the history; and the code."""
    links = [tag("a", "figure (PNG)", download="live_lab.png", href=chart.address("image/png", png(drawing)))]
    if len(history) <= 200_000:
        href = chart.address("text/csv", history.to_csv(index=False).encode())
        links.append(tag("a", f"history ({len(history):,} rows, CSV)", download="live_lab.csv", href=href))
    return tag(
        "div", " · ".join(links), " · in a cell: ", tag("code", "lab.history"), " is the DataFrame, ",
        tag("code", "lab.figure()"), " the figure. This cell repeats the session without a slider:",
        tag("pre", escape(code), style="user-select: all"), class_="companion-export", style="line-height: 1.5",
    )  # fmt: skip
