"""One style, one colour per batch size. Functions take a frame and axes, and return the axes; none computes or shows.

A figure's title states its finding, its caption says data and n, and theory is a thin dark line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BAND = "line: median over seeds; band: the central 95 % of them"
LABELS = {
    "epochs": "epochs", "steps": "steps", "seconds": "training seconds (one core)", "examples_seen": "examples seen",
    "test_accuracy": "test accuracy", "train_accuracy": "train accuracy", "test_loss": "test loss",
    "train_loss": "train loss", "minibatch_loss": "minibatch loss",
    "generalization_gap": "generalisation gap (train − test accuracy)",
    "distance_from_init": "distance from initial weights ‖w − w₀‖", "weight_norm": "radius ‖w‖",
    "gradient_norm": "gradient norm", "batch_size": "batch size", "measured_batch_size": "batch size",
    "minibatch_noise": "noise of a minibatch's gradient", "tail_fraction": "P(|g| > 0.0082)", "lr": "learning rate",
}  # fmt: skip


def use_style() -> None:
    """Set the companion's style for all figures of this process."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    mpl.rcParams.update({
        "figure.figsize": (8.0, 4.6), "figure.dpi": 100, "savefig.dpi": 120, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 11,
        "axes.formatter.min_exponent": 5, "legend.frameon": False, "legend.fontsize": 10, "lines.linewidth": 1.8,
        "svg.hashsalt": "companion",
    })  # fmt: skip


def colour(batch_size: float) -> tuple[float, ...]:
    """The colour of a batch size, the same in every figure: dark violet for 1 to light green for 1024 and more."""
    return mpl.colormaps["viridis"](0.87 * float(np.clip(np.log2(batch_size) / 10, 0, 1)))


def curves(
    frame: pd.DataFrame,
    y: str,
    *,
    x: str = "epochs",
    by: str = "batch_size",
    labels: Mapping[object, str] | None = None,
    colours: Mapping[object, object] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """``y`` against ``x``: the median over seeds, with a band; one line per value of ``by``."""
    ax = ax or plt.subplots()[1]
    for value, group in frame.groupby(by, sort=False):
        # Seeds share epochs and steps, not seconds: those are averaged record by record.
        group = group.assign(record=group.groupby("seed").cumcount())
        by_record = group.groupby("record")
        middle, low, high = (by_record[y].quantile(q) for q in (0.5, 0.025, 0.975))
        shade = (colours or {}).get(value) or colour(value)
        label = (labels or {}).get(value, f"batch {value}" if by == "batch_size" else str(value))
        ax.plot(by_record[x].mean(), middle, color=shade, label=label)
        ax.fill_between(by_record[x].mean(), low, high, color=shade, alpha=0.2, linewidth=0)
    ax.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    return ax


def against_batch_size(
    frame: pd.DataFrame,
    y: str,
    *,
    x: str = "batch_size",
    label: str | None = None,
    line_colour: str = "0.35",
    ax: Axes | None = None,
) -> Axes:
    """``y`` against batch size on a log₂ axis: a dot per row, in its size's colour, and a line through the medians."""
    ax = ax or plt.subplots()[1]
    middle = frame.groupby(x)[y].median()
    ax.plot(middle.index, middle, color=line_colour, linewidth=1.5, label=label, zorder=1)
    ax.scatter(frame[x], frame[y], c=[colour(b) for b in frame[x]], s=22, alpha=0.7, linewidths=0, zorder=2)
    return batch_size_axis(ax, sorted(frame[x].unique()), y)


def batch_size_axis(ax: Axes, batch_sizes: Sequence[float], y: str = "") -> Axes:
    """A log₂ x-axis whose ticks are the batch sizes themselves, thinned to powers of two where there are many."""
    ax.set_xscale("log", base=2)
    ticks = [b for b in batch_sizes if len(batch_sizes) <= 9 or float(np.log2(b)).is_integer()]
    ax.set_xticks(ticks, [f"{b:g}" for b in ticks], minor=False)
    ax.minorticks_off()
    ax.set(xlabel="batch size", ylabel=LABELS.get(y, y))
    return ax


def log_scale(ax: Axes, axis: str = "y") -> Axes:
    """A logarithmic ``axis``; where nothing drawn is above 0, as when every run diverged, it stays linear."""
    if np.isfinite(ax.dataLim.minposy if axis == "y" else ax.dataLim.minposx):
        ax.set(**{f"{axis}scale": "log"})
    return ax


def theory(ax: Axes, x: Sequence[float], y: Sequence[float] | Callable[[np.ndarray], np.ndarray], label: str) -> Axes:
    """What theory says, as a thin dark line."""
    values = y(np.asarray(x, dtype=float)) if callable(y) else y
    ax.plot(x, values, color="black", linewidth=0.9, linestyle="--", label=label, zorder=3)
    return ax


def histograms(frame: pd.DataFrame, y: str, *, by: str, bins: int = 30, ax: Axes | None = None) -> Axes:
    """The distribution of the finite ``y`` as a step line per value of ``by`` (a batch size), on common bins."""
    ax, frame = ax or plt.subplots()[1], frame[np.isfinite(frame[y])]
    edges = np.linspace(frame[y].min(), frame[y].max(), bins + 1)
    for value, group in frame.groupby(by):
        ax.hist(group[y], bins=edges, histtype="stepfilled", alpha=0.35, color=colour(value), label=f"batch {value}")
    ax.set(xlabel=LABELS.get(y, y), ylabel="trials")
    return ax


def heat_table(frame: pd.DataFrame, *, rows: str, columns: str, value: str, text: str, ax: Axes | None = None) -> Axes:
    """A table of cells coloured by ``value``, each with the text of its column ``text``."""
    ax = ax or plt.subplots()[1]
    values, texts = (frame.pivot(index=rows, columns=columns, values=v) for v in (value, text))
    sns.heatmap(
        values, annot=texts, fmt="", cmap="crest", ax=ax, linewidths=1.5, cbar_kws={"label": LABELS.get(value, value)}
    )
    ax.set(xlabel=LABELS.get(columns, columns), ylabel=LABELS.get(rows, rows))
    ax.tick_params(axis="y", rotation=0)
    return ax


def rate_map(frame: pd.DataFrame, value: str, *, text: str = "{:.0f}", ax: Axes | None = None) -> Axes:
    """``value`` over batch size and learning rate, as a coloured table on log axes; expects one row a cell.

    A circle marks the best rate of each size; from that of the smallest go the linear and the square-root rule.
    """
    ax = ax or plt.subplots()[1]
    table = frame.pivot(index="lr", columns="batch_size", values=value)
    edges = []
    for ticks in (np.log2(table.columns.to_numpy(dtype=float)), np.log2(table.index.to_numpy(dtype=float))):
        wider = np.pad(ticks, 1, "reflect", reflect_type="odd") if len(ticks) > 1 else ticks + np.arange(-1, 2)
        edges.append(2 ** ((wider[1:] + wider[:-1]) / 2))
    low, high = np.nanquantile(table, [0.1, 1.0])
    mesh = ax.pcolormesh(*edges, table.to_numpy(), cmap="crest", vmin=low, vmax=high, edgecolor="white", linewidth=1)
    for (row, column), v in np.ndenumerate(table.to_numpy()):
        shade = "white" if (v - low) > 0.45 * (high - low) else "black"
        at = table.columns[column], table.index[row]
        ax.text(*at, "" if np.isnan(v) else text.format(v), ha="center", va="center", fontsize=8, color=shade)
    ax.figure.colorbar(mesh, ax=ax, label=LABELS.get(value, value))
    ax.set_yscale("log", base=2)
    ax.set_yticks(table.index, [f"{v:.3g}" for v in table.index])
    batch_size_axis(ax, list(table.columns)).set(ylabel=LABELS["lr"])
    best, limits = table.dropna(axis="columns", how="all").idxmax(), ax.get_ylim()
    for power, dash, rule in ((1.0, "-", "linear rule"), (0.5, ":", "square-root rule")):
        scaled = best.iloc[0] * (best.index / best.index[0]).to_numpy() ** power
        ax.plot(best.index, scaled, dash, color="#d55e00", linewidth=1.6, label=rule)
    ax.plot(best, "o", markersize=17, markerfacecolor="none", markeredgecolor="#d55e00", label="best rate")
    ax.set_ylim(limits)
    ax.grid(False)
    return ax


def price_of_batch(table: pd.DataFrame, low: float, high: float, present: float, *, ax: Axes | None = None) -> Axes:
    """Steps, examples and seconds to the same loss against batch size, relative to the fewest, with their bands.

    ``table``: of an ``Advice``. low, high: the recommended sizes. present: the batch size in use.
    """
    ax = ax or plt.subplots()[1]
    ax.axvspan(low, max(high, low * 1.05), color="0.88", linewidth=0, label="recommended", zorder=0)
    for column, shade in (("steps", "#56b4e9"), ("examples", "#e69f00"), ("seconds", "black")):
        ax.fill_between(table.batch_size, table[f"{column}_low"], table[f"{column}_high"], color=shade, alpha=0.15,
                        linewidth=0)  # fmt: skip
        ax.plot(table.batch_size, table[column], color=shade, label=column)
    ax.axvline(present, color="0.35", linestyle=":", linewidth=1.2, label="present")
    too_large = table[table.fits == "no"].batch_size
    if len(too_large):
        ax.axvspan(too_large.min() / 2**0.5, table.batch_size.max(), facecolor="none", edgecolor="0.6", hatch="//",
                   linewidth=0, label="does not fit", zorder=0)  # fmt: skip
    ax.set(yscale="log", ylim=(0.9, max(4.0, min(table.seconds.max(), 50))))
    ax.legend(loc="upper center", ncols=2, frameon=True, framealpha=0.8, edgecolor="none")
    batch_size_axis(ax, table.batch_size.tolist()).set(ylabel="times the fewest")
    return ax


def spans(frame: pd.DataFrame, low: str, high: str, *, ax: Axes | None = None) -> Axes:
    """A bar per row from column ``low`` to ``high`` over its batch size, the seeds of a size side by side."""
    ax = ax or plt.subplots()[1]
    for batch_size, group in frame.groupby("batch_size"):
        at = batch_size * 2 ** (np.linspace(-0.2, 0.2, len(group)) if len(group) > 1 else np.zeros(1))
        ax.plot([at, at], [group[low], group[high]], "-o", color=colour(batch_size), linewidth=4, markersize=5)
    return batch_size_axis(ax, sorted(frame["batch_size"].unique()))


def dots(frame: pd.DataFrame, x: str, y: str, *, ax: Axes | None = None, **options) -> Axes:
    """A dot per row over the categories of ``x``; ``options`` of seaborn's stripplot."""
    ax = ax or plt.subplots()[1]
    sns.stripplot(frame, x=x, y=y, jitter=0.08, size=6, ax=ax, **options)
    ax.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    return ax


def scatter_classes(inputs: np.ndarray, targets: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Two-dimensional examples, a colour and a marker per class."""
    ax = ax or plt.subplots()[1]
    for c, marker in zip(np.unique(targets), "os^Dv<>"):
        chosen = inputs[targets == c]
        ax.scatter(*chosen.T, s=16, marker=marker, alpha=0.7, linewidths=0, label=f"class {c}")
    ax.set(xlabel="x₁", ylabel="x₂")
    return ax


def session(curves: pd.DataFrame, moves: pd.DataFrame, *, x: str = "examples_seen") -> Figure:
    """A live session: loss and score with the spread of each bin, and a line wherever a control moved.

    ``curves``: ``run``, ``measure``, ``x``, mean, low, high; ``moves``: ``x``, name, value, batch_size. The figure is
    not pyplot's: it may be drawn beside a cell that runs.
    """
    fig = Figure(figsize=(9, 5.6))
    panels = fig.subplots(2, sharex=True)
    styles = {"previous": ("0.65", "-"), "this run": ("#0072b2", "-"), "pinned": ("#d55e00", "--")}
    known = set(curves["measure"])
    score = next((m for m in ("test_accuracy", "test_loss") if m in known), "gradient_norm")
    for ax, measure in zip(panels, ["minibatch_loss", score]):
        for run, group in curves[curves["measure"] == measure].groupby("run", sort=False):
            shade, dash = styles[run]
            ax.fill_between(group[x], group["low"], group["high"], color=shade, alpha=0.3, linewidth=0)
            ax.plot(group[x], group["mean"], color=shade, linestyle=dash, label=run)
        for move in moves.itertuples():
            ax.axvline(getattr(move, x), color="black", linewidth=0.9, linestyle=":")
        ax.set(ylabel=LABELS[measure])
    for move in moves.itertuples():
        text = f"{move.value:g}" if move.name == "batch_size" else f"{move.name} {move.value:.2g}"
        at = (getattr(move, x), 1)
        panels[0].annotate(f" {text}", at, xycoords=("data", "axes fraction"), va="top", fontsize=9)
    # Single examples can have a loss of nearly 0: what is below nearly all of the shade is cut off.
    panels[0].set(yscale="log")
    loss = curves[curves["measure"] == "minibatch_loss"]
    if len(loss):
        panels[0].set_ylim(bottom=max(loss["low"].quantile(0.05), 1e-9) / 1.1)
    panels[1].set(xlabel=LABELS[x])
    if panels[1].lines:
        panels[1].legend(loc="lower right")
    return fig


def headline(fig: Figure, text: str) -> None:
    """The finding of a figure with several panels, above them."""
    fig.suptitle(textwrap.fill(text, int(8 * fig.get_figwidth())), x=0.01, ha="left", fontweight="bold")


def save(figure: Axes | Figure, name: str, folder: str | Path, caption: str) -> Figure:
    """Write ``figures/<name>.png`` and ``.svg`` under ``folder``, with the caption below; title and caption go into the
    PNG's own text fields, where the index page finds them."""
    fig = figure if isinstance(figure, Figure) else figure.figure
    fig.supxlabel(textwrap.fill(caption, int(15 * fig.get_figwidth())), fontsize=8.5, color="0.3", x=0.01, ha="left")
    for ax in fig.axes:  # a title may not run into its neighbour's
        width = fig.get_figwidth() * ax.get_subplotspec().get_position(fig).width if ax.get_subplotspec() else 99
        ax.set_title(textwrap.fill(ax.get_title(loc="left"), max(12, int(12.5 * width))), loc="left")
    file = Path(folder) / "figures" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    titles = [fig.get_suptitle(), *(a.get_title(loc="left") for a in fig.axes)]
    title = next((t for t in titles if t), name).replace("\n", " ")
    if engine := fig.get_layout_engine():  # once, for both files
        shown_at, fig.dpi = fig.dpi, mpl.rcParams["savefig.dpi"]
        engine.execute(fig)
        fig.dpi = shown_at
        fig.set_layout_engine("none")
    fig.savefig(file.with_name(f"{name}.png"), metadata={"Title": title, "Description": caption})
    fig.savefig(file.with_name(f"{name}.svg"), metadata={"Date": None, "Title": title})
    return fig
