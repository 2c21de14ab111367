"""A chart as SVG text, cheap enough to be made anew several times a second, in the colours of JupyterLab's theme.

Text and lines take the theme's CSS variables, so light and dark follow by themselves. Matplotlib, whose
redraw takes a hundred times as long, draws the figures that are kept (see plots).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
import seaborn as sns
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from PIL import Image

INK, FAINT = "var(--jp-ui-font-color1, #222)", "var(--jp-border-color2, #ccc)"
# (line, dash) of a run: told apart by dash too.
RUNS = {
    "previous": ("var(--jp-ui-font-color3, #999)", ""),
    "this run": ("var(--jp-brand-color1, #1976d2)", ""),
    "pinned": ("var(--jp-warn-color1, #e65100)", "5 3"),
}
CLASSES = sns.color_palette("colorblind", 100)  # ten colours, in turn
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 52, 14, 26, 24
_WIDE = _WIDTH - _LEFT - _RIGHT  # of a panel's drawing area
_FONT = {"font_family": "var(--jp-ui-font-family, sans-serif)", "font_size": 11}
_SHORT = EngFormatter(sep="")
PANEL = "flex: 1 1 410px; max-width: 620px; min-width: 0"  # two beside each other in a notebook, one on a phone


def tag(name: str, *body: str, **attributes: object) -> str:
    """An element: attributes escaped (``stroke_width`` for stroke-width, ``class_`` for class), body as it is."""
    written = "".join(f' {k.strip("_").replace("_", "-")}="{escape(str(v))}"' for k, v in attributes.items())
    return f"<{name}{written}>{''.join(body)}</{name}>"


def number(value: float) -> str:
    """A number as a reader wants it on a chart: 12,345, 0.012, 1.2e-05; ∞ and – where there is none."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def panel(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, ...]]],
    *,
    axis: int,
    marks: Sequence[tuple[float, str, str]] = (),
    log: bool = False,
    percent: bool = False,
    height: int = 190,
) -> str:
    """Curves of thinned bins (see ``trace.Curve``) against their column ``axis``, with the spread of each bin.

    marks: (x, label, run), a vertical line each; where labels would overlap, the later one is written.
    """
    arrays = {name: np.array(bins, dtype=float).reshape(-1, 7) for name, bins in curves.items() if len(bins)}
    right = max((a[-1, axis] for a in arrays.values()), default=0) or 1.0
    low, high = _limits(list(arrays.values()), log, percent)
    tall = height - _TOP - _BOTTOM
    scale = (lambda v: np.log10(np.maximum(v, 1e-12))) if log else np.asarray
    bottom, top = scale(np.array([low, high]))

    def down(y: np.ndarray | float) -> np.ndarray:
        return np.clip(tall - (scale(y) - bottom) / (top - bottom) * tall, -tall, 2 * tall)

    drawn = [part for name, a in arrays.items() for part in _curve(name, a, a[:, axis] / right * _WIDE, down)]
    lines, texts = _marks([(x / right * _WIDE, label, run) for x, label, run in marks], tall)
    for value in _ticks(low, high, log):
        y, label = _TOP + float(down(value)), f"{100 * value:.3g} %" if percent else f"{value:g}"
        texts.append(tag("line", x1=_LEFT, x2=_LEFT + _WIDE, y1=f"{y:.1f}", y2=f"{y:.1f}", stroke=FAINT))
        texts.append(tag("text", label, x=_LEFT - 5, y=f"{y + 4:.1f}", text_anchor="end", fill=INK))
    for value in _ticks(0, right, log=False):
        x = f"{_LEFT + value / right * _WIDE:.1f}"
        texts.append(tag("text", _SHORT(value), x=x, y=height - 8, text_anchor="middle", fill=INK))
    now = ", ".join(f"{name} {number(a[-1, 4] / a[-1, 3])}" for name, a in arrays.items())
    return tag(
        "svg", tag("text", escape(title), x=_LEFT, y=14, font_weight=600, fill=INK), *texts,
        tag("svg", *drawn, *lines, x=_LEFT, y=_TOP, width=_WIDE, height=tall, overflow="hidden"),
        viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=f"{title}: {now}", style=PANEL, **_FONT,
    )  # fmt: skip


def _curve(name: str, bins: np.ndarray, x: np.ndarray, down: Callable[[np.ndarray], np.ndarray]) -> list[str]:
    def points(x: np.ndarray, y: np.ndarray) -> str:
        return " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(x.tolist(), down(y).tolist()))

    ink, dash = RUNS[name]
    line = tag("polyline", class_="companion-curve", data_run=name, points=points(x, bins[:, 4] / bins[:, 3]),
               fill="none", stroke=ink, stroke_width=1.5, stroke_dasharray=dash)  # fmt: skip
    if (bins[:, 3] == 1).all():
        return [line]
    band = points(x, bins[:, 6]) + " " + points(x[::-1], bins[::-1, 5])
    return [tag("polygon", points=band, fill=ink, fill_opacity=0.3), line]


def _marks(marks: Sequence[tuple[float, str, str]], tall: int) -> tuple[list[str], list[str]]:
    lines, texts, free = [], [], math.inf  # free: to the left of it no label stands yet
    for x, label, run in sorted(marks, reverse=True):
        ink, long = INK if run == "this run" else RUNS[run][0], 6.5 * len(label)
        lines.append(tag("line", class_="companion-mark", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=0, y2=tall, stroke=ink,
                         stroke_dasharray="2 2"))  # fmt: skip
        left = x + long > _WIDE  # of its line, where there is no room at the right
        if x + (0 if left else long) < free:
            at, anchor = (x - 3, "end") if left else (x + 3, "start")
            texts.append(tag("text", escape(label), y=_TOP + 10, fill=ink, x=f"{_LEFT + at:.1f}", text_anchor=anchor))
            free = x - (long if left else 0)
    return lines, texts


def _limits(arrays: Sequence[np.ndarray], log: bool, percent: bool) -> tuple[float, float]:
    if not arrays:
        return (0.1, 10.0) if log else (0.0, 1.0)
    lows, highs = (np.concatenate([a[:, column] for a in arrays]) for column in (5, 6))
    if percent:  # the first rise may be cut off: the reader looks at the part after it
        return max(0.0, math.floor(10 * float(np.quantile(lows, 0.2)) - 1) / 10), 1.0
    high = float(highs.max())
    if not log:
        return min(0.0, float(lows.min())), high or 1.0
    low = max(float(np.quantile(lows, 0.05)), high / 1e5, 1e-9)  # single examples can have a loss of nearly 0
    return low / 1.1, max(high, 2 * low) * 1.1


def _ticks(low: float, high: float, log: bool) -> list[float]:
    locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    if log and high > 5 * low:
        locator = LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,))
    return [float(value) for value in locator.tick_values(low, high) if low <= value <= high * 1.0001]


def gauge(batch_size: int, noise_scale: float, limit: int) -> str:
    """The batch size in use and the noise scale beside it, on one logarithmic ruler from 1 to ``limit``."""
    width, end = _WIDTH - 40, math.log2(max(limit, 2))

    def at(value: float) -> float:
        return round(15 + width * min(math.log2(max(value, 1)) / end, 1.0), 1)

    def text(label: str, x: float, y: int, ink: str) -> str:
        return tag("text", label, x=x, y=y, text_anchor="start" if x < _WIDTH / 2 else "end", fill=ink)

    line, size, powers = RUNS["this run"][0], at(batch_size), range(0, int(end) + 1, 2 if end > 9.5 else 1)
    parts = [
        tag("line", x1=15, x2=15 + width, y1=50, y2=50, stroke=INK),
        tag("path", d=f"M{size} 50 l-6 -14 h12 z", fill=line), text(f"batch size {batch_size:,}", size, 84, line),
        *(tag("text", f"{2**k:g}", x=at(2**k), y=66, text_anchor="middle", fill=INK) for k in powers),
    ]  # fmt: skip
    if not math.isnan(noise_scale):
        noise, off = at(noise_scale), " (off the ruler)" if noise_scale > max(limit, 2) else ""
        bar = {"x": min(noise, size), "width": round(abs(noise - size), 1)}
        parts += [
            tag("rect", y=34, height=16, fill=line, fill_opacity=0.3, **bar),
            tag("line", x1=noise, x2=noise, y1=26, y2=50, stroke=INK, stroke_width=3),
            text(f"noise scale B_simple ≈ {number(noise_scale)}{off}", noise, 14, INK),
        ]
    label = f"Batch size {batch_size}, noise scale {number(noise_scale)}"
    return tag("svg", *parts, viewBox=f"0 0 {_WIDTH} 92", role="img", aria_label=label, **_FONT)


def regions(classes: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> str:
    """Decision regions as the network has them now (``(side, side)``, top row first), under the training examples."""
    low, high, side = inputs.min(0) - 1, inputs.max(0) + 1, 280
    at = (inputs - low) / (high - low) * [side, -side] + [0, side]
    dots = [
        tag("path", d="".join(f"M{x:.0f} {y:.0f}h0" for x, y in at[targets == c].tolist()), stroke=to_hex(CLASSES[c]),
            stroke_width=4, stroke_linecap="round")
        for c in np.unique(targets)
    ]  # fmt: skip
    image = tag("image", width=side, height=side, opacity=0.3, preserveAspectRatio="none",
                style="image-rendering: pixelated", href=_png(np.uint8(255 * np.array(CLASSES)[classes])))  # fmt: skip
    title = tag("text", "Decision regions now", y=-8, font_weight=600, fill=INK)
    return tag("svg", title, image, *dots, viewBox=f"0 -22 {side} {side + 22}", role="img",
               aria_label="Decision regions now", style="flex: 0 1 280px; min-width: 0", **_FONT)  # fmt: skip


def mistakes(found: Sequence[tuple[np.ndarray, int, int]]) -> str:
    """Images that are misclassified now: each with its class and the one it was taken for."""
    tiles = []
    for image, truth, guess in found:
        grey = np.uint8(255 * (image - image.min()) / max(float(np.ptp(image)), 1e-6))
        picture = tag("img", alt=f"a {truth} read as {guess}", width=48, height=48, src=_png(grey),
                      style="image-rendering: pixelated").removesuffix("</img>")  # fmt: skip
        caption = tag("figcaption", f"{truth} → {guess}")
        tiles.append(tag("figure", picture, caption, style="margin: 0; text-align: center"))
    strip = tag("div", *(tiles or ["none of those asked"]), style="display: flex; flex-wrap: wrap; gap: 6px")
    return tag("div", tag("b", "Misclassified now (is → read as)"), strip, style="flex: 1 1 300px; line-height: 1.4")


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return address("image/png", file.getvalue())


def address(kind: str, content: bytes) -> str:
    """A data address, which holds the file itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
