"""A chart as SVG text, cheap enough to be made anew several times a second, in the colours of JupyterLab's theme.

Text and lines take the theme's CSS variables, so light and dark follow by themselves. Matplotlib draws what is kept
(see plots); its own redraw takes a hundred times as long.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import seaborn as sns
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

INK, FAINT = "var(--jp-ui-font-color1, #222)", "var(--jp-border-color2, #ccc)"
# (line, dash) of a run: told apart by dash too.
RUNS = {
    "previous": ("var(--jp-ui-font-color3, #999)", ""),
    "this run": ("var(--jp-brand-color1, #1976d2)", ""),
    "pinned": ("var(--jp-warn-color1, #e65100)", "5 3"),
}
CLASSES = sns.color_palette("colorblind")
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 52, 14, 26, 24
_FONT = 'font-family="var(--jp-ui-font-family, sans-serif)" font-size="11"'
_SHORT = EngFormatter(sep="")
PANEL = "flex: 1 1 370px; max-width: 620px; min-width: 0"  # two beside each other in a notebook, one on a phone


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
    marks: Sequence[tuple[float, str]] = (),
    log: bool = False,
    percent: bool = False,
    height: int = 190,
) -> str:
    """Curves of thinned bins (see ``session.Curve``) against their column ``axis``, with the spread of each bin.

    ``marks``: (x, label), a vertical line each. A label that would touch the one before it takes its place.
    """
    width, tall = _WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    arrays = {name: np.array(bins, dtype=float).reshape(-1, 7) for name, bins in curves.items()}
    arrays = {name: a for name, a in arrays.items() if len(a)}
    right = max((a[-1, axis] for a in arrays.values()), default=0) or 1.0
    low, high = _limits([a for a in arrays.values()], log, percent)
    scale = (lambda v: np.log10(np.maximum(v, 1e-12))) if log else (lambda v: v)
    y0, y1 = scale(np.array([low, high]))

    def points(x: np.ndarray, y: np.ndarray) -> list[str]:
        across, down = x / right * width, tall - (scale(y) - y0) / (y1 - y0) * tall
        return [f"{a:.1f},{d:.1f}" for a, d in zip(across.tolist(), np.clip(down, -tall, 2 * tall).tolist())]

    drawn = []
    for name, a in arrays.items():
        line, dash = RUNS[name]
        x, mean = a[:, axis], a[:, 4] / a[:, 3]
        if (a[:, 3] > 1).any():
            band = points(x, a[:, 6]) + points(x[::-1], a[::-1, 5])
            drawn.append(f'<polygon points="{" ".join(band)}" fill="{line}" fill-opacity=".3"/>')
        drawn.append(
            f'<polyline class="companion-curve" data-run="{name}" points="{" ".join(points(x, mean))}" fill="none" '
            f'stroke="{line}" stroke-width="1.5" stroke-dasharray="{dash}"/>'
        )
    texts, last = [], -math.inf
    for x, label in reversed(list(marks)):
        at = x / right * width
        drawn.append(
            f'<line class="companion-mark" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{tall}" stroke="{INK}" stroke-dasharray="2 2"/>'
        )
        if abs(at - last) > 7 * len(label) + 4:
            anchor = "end" if at > width - 6 * len(label) else "start"
            texts.append(f'<text x="{_LEFT + at + (-3 if anchor == "end" else 3):.1f}" y="{_TOP + 10}" fill="{INK}" '
                         f'text-anchor="{anchor}">{escape(label)}</text>')  # fmt: skip
            last = at
    ticks = []
    for value in _ticks(low, high, log):
        y = _TOP + tall - float((scale(np.array(value)) - y0) / (y1 - y0)) * tall
        label = f"{100 * value:.3g} %" if percent else f"{value:g}"
        ticks.append(f'<line x1="{_LEFT}" x2="{_LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>'
                     f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="{INK}">{label}</text>')  # fmt: skip
    for value in _ticks(0, right, False):
        ticks.append(f'<text x="{_LEFT + value / right * width:.1f}" y="{height - 8}" text-anchor="middle" fill="{INK}">'
                     f"{_SHORT(value)}</text>")  # fmt: skip
    now = ", ".join(f"{name} {number(a[-1, 4] / a[-1, 3])}" for name, a in arrays.items())
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}: {now}" {_FONT} '
        f'style="{PANEL}"><text x="{_LEFT}" y="14" font-weight="600" fill="{INK}">'
        f'{escape(title)}</text>{"".join(ticks)}<svg x="{_LEFT}" y="{_TOP}" width="{width}" height="{tall}" '
        f'overflow="hidden">{"".join(drawn)}</svg>{"".join(texts)}</svg>'
    )


def _limits(arrays: Sequence[np.ndarray], log: bool, percent: bool) -> tuple[float, float]:
    if not arrays:
        return (0.1, 10.0) if log else (0.0, 1.0)
    lows, highs = (np.concatenate([a[:, column] for a in arrays]) for column in (5, 6))
    if percent:  # what comes after the first rise is what one looks at
        return max(0.0, math.floor(10 * float(np.quantile(lows, 0.2)) - 1) / 10), 1.0
    if not log:
        return min(0.0, float(lows.min())), float(highs.max()) or 1.0
    high = float(highs.max())
    low = max(float(np.quantile(lows, 0.05)), high / 1e5, 1e-9)  # single examples can have a loss of nearly 0
    return low / 1.1, max(high, 2 * low) * 1.1


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return [float(v) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high * 1.0001]
    for factors in ((1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= 7:
            break
    return found


def gauge(batch_size: int, noise_scale: float, limit: int) -> str:
    """The batch size in use and the noise scale beside it, on one logarithmic ruler from 1 to ``limit``."""
    width, top = _WIDTH - 40, max(limit, 2)

    def at(value: float) -> float:
        return 15 + width * min(max(math.log2(max(value, 1)) / math.log2(top), 0.0), 1.0)

    ticks = [2**k for k in range(0, int(math.log2(top)) + 1, 2 if top > 600 else 1)]
    ruler = "".join(f'<text x="{at(t):.1f}" y="66" text-anchor="middle" fill="{INK}">{t:g}</text>' for t in ticks)
    known = not math.isnan(noise_scale)
    low, high = sorted((at(batch_size), at(noise_scale if known else batch_size)))
    line = RUNS["this run"][0]
    scale = number(noise_scale) + (" (off the ruler)" if known and noise_scale > top else "")
    middle = "start" if at(noise_scale if known else 1) < _WIDTH / 2 else "end"
    noise = (
        f'<line x1="{at(noise_scale):.1f}" x2="{at(noise_scale):.1f}" y1="26" y2="50" stroke="{INK}" stroke-width="3"/>'
        f'<text x="{at(noise_scale):.1f}" y="14" text-anchor="{middle}" fill="{INK}">noise scale B_simple ≈ {scale}</text>'
        if known else ""
    )  # fmt: skip
    below = "start" if at(batch_size) < _WIDTH / 2 else "end"
    return (
        f'<svg viewBox="0 0 {_WIDTH} 92" role="img" aria-label="Batch size {batch_size}, noise scale {number(noise_scale)}" '
        f'{_FONT}>'
        f'<line x1="15" x2="{15 + width}" y1="50" y2="50" stroke="{INK}"/>'
        f'<rect x="{low:.1f}" width="{high - low:.1f}" y="34" height="16" fill="{line}" fill-opacity=".3"/>{noise}'
        f'<path d="M{at(batch_size):.1f} 50 l-6 -14 h12 z" fill="{line}"/>{ruler}'
        f'<text x="{at(batch_size):.1f}" y="84" text-anchor="{below}" fill="{line}">batch size {batch_size:,}</text></svg>'
    )


def regions(classes: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> str:
    """Decision regions as the network has them now (``(side, side)``, top row first), under the training examples."""
    low, high = inputs.min(0) - 1, inputs.max(0) + 1
    shades = np.array(CLASSES)
    image = _png(np.uint8(255 * shades[classes % len(CLASSES)]))
    at = (inputs - low) / (high - low) * [280, -280] + [0, 280]
    dots = "".join(
        f'<path d="{"".join(f"M{x:.0f} {y:.0f}h0" for x, y in at[targets == c].tolist())}" stroke="{to_hex(shades[c])}" '
        'stroke-width="4" stroke-linecap="round"/>'
        for c in np.unique(targets)
    )
    return (
        f'<svg viewBox="0 -22 280 302" role="img" aria-label="Decision regions" {_FONT} style="flex: 0 1 280px; min-width: 0">'
        f'<text y="-8" font-weight="600" fill="{INK}">Decision regions now</text><image width="280" height="280" opacity=".3" '
        f'preserveAspectRatio="none" style="image-rendering: pixelated" href="{image}"/>{dots}</svg>'
    )


def digits(images: np.ndarray, is_: Sequence[int], read: Sequence[int]) -> str:
    """Examples that are classified wrongly now, each with its class and the one it was taken for."""
    tiles = []
    for image, truth, guess in zip(images, is_, read):
        grey = np.uint8(255 * (image - image.min()) / max(float(np.ptp(image)), 1e-6))
        tiles.append(
            f'<figure style="margin: 0; text-align: center"><img alt="a {truth} read as {guess}" width="48" height="48" '
            f'style="image-rendering: pixelated" src="{_png(grey)}"><figcaption>{truth} → {guess}</figcaption></figure>'
        )
    return (
        '<div style="flex: 1 1 300px"><b>Misclassified now (is → read as)</b><div style="display: flex; flex-wrap: wrap; '
        f'gap: 6px; line-height: 1.4">{"".join(tiles) or "none of those asked"}</div></div>'
    )


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
