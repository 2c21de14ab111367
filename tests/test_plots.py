import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from helpers import plots

SIZES = [2**i for i in range(11)]


@pytest.fixture(autouse=True)
def never_shown(monkeypatch):
    """A figure is never shown, and closed after the test."""
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show() was called"))
    plots.use_style()
    yield
    plt.close("all")


def histories(batch_sizes=(8, 64), seeds=5):
    """Seeds whose accuracy is (seed² + epoch) / batch size, in seconds that differ from seed to seed."""
    rows = [
        {"batch_size": b, "seed": s, "epochs": e, "test_accuracy": (s**2 + e) / b, "seconds": e + s}
        for b in batch_sizes
        for s in range(seeds)
        for e in range(4)
    ]
    return pd.DataFrame(rows)


def a_figure():
    ax = plots.curves(histories(), "test_accuracy")
    ax.set_title("Smaller is steeper")
    ax.legend()
    return ax


def test_batch_sizes_from_1_to_1024_have_distinct_colours():
    colours = np.array([plots.colour(b) for b in SIZES])
    assert min(np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]) > 0.02
    assert np.array_equal(colours, [plots.colour(float(b)) for b in SIZES])


def test_a_batch_size_has_its_colour_in_every_figure():
    for others in ((64,), (8, 64), (64, 8, 1024)):
        lines = {line.get_label(): line for line in plots.curves(histories(others), "test_accuracy").get_lines()}
        assert to_rgba(lines["batch 64"].get_color()) == to_rgba(plots.colour(64))
        at_end = histories(others).query("epochs == 3")
        dots = plots.against_batch_size(at_end, "test_accuracy").collections[0]
        expected = [to_rgba(plots.colour(b), alpha=0.7) for b in at_end["batch_size"]]
        np.testing.assert_allclose(dots.get_facecolors(), expected)


def test_curves_draw_the_median_over_seeds_and_a_band():
    ax = plots.curves(histories(), "test_accuracy")
    assert [line.get_label() for line in ax.get_lines()] == ["batch 8", "batch 64"]
    for batch_size, line, band in zip((8, 64), ax.get_lines(), ax.collections):
        epochs = np.arange(4)
        np.testing.assert_array_equal(line.get_xdata(), epochs)
        np.testing.assert_allclose(line.get_ydata(), (4 + epochs) / batch_size)  # of 0, 1, 4, 9, 16; the mean is 6
        low, high = (np.quantile([0, 1, 4, 9, 16], q) for q in (0.025, 0.975))
        corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices}
        for epoch in epochs:
            for edge in (low, high):
                assert (epoch, round((edge + epoch) / batch_size, 9)) in corners
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epochs", "test accuracy")


def test_curves_against_seconds_take_the_mean_time_of_a_record():
    line = plots.curves(histories(), "test_accuracy", x="seconds").get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), np.arange(4) + 2.0)


def test_curves_may_be_told_apart_by_anything_with_labels_and_colours():
    frame = histories().assign(model="cnn")
    ax = plots.curves(frame, "test_accuracy", by="model", labels={"cnn": "a CNN"}, colours={"cnn": "red"})
    assert [line.get_label() for line in ax.get_lines()] == ["a CNN"]
    assert to_rgba(ax.get_lines()[0].get_color()) == to_rgba("red")


def test_against_batch_size_draws_a_dot_a_row_and_a_line_through_the_medians():
    frame = histories((8, 64, 512)).query("epochs == 0")
    ax = plots.against_batch_size(frame, "test_accuracy", label="median")
    dots = ax.collections[0].get_offsets()
    np.testing.assert_allclose(dots, frame[["batch_size", "test_accuracy"]])
    line = ax.get_lines()[0]
    np.testing.assert_allclose(line.get_xydata(), [(8, 4 / 8), (64, 4 / 64), (512, 4 / 512)])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "64", "512"]
    assert ax.get_xlabel() == "batch size"


def test_theory_takes_points_or_a_function():
    ax = plt.subplots()[1]
    plots.theory(ax, [1, 4], [1.0, 2.0], "points")
    plots.theory(ax, [1, 4], np.sqrt, "function")
    for line in ax.get_lines():
        np.testing.assert_allclose(line.get_xydata(), [(1, 1), (4, 2)])


def test_histograms_share_their_bins():
    frame = pd.DataFrame({"batch_size": [2] * 50 + [64] * 50, "gradient_norm": np.arange(100.0)})
    ax = plots.histograms(frame, "gradient_norm", by="batch_size", bins=10)
    labels = [text.get_text() for text in ax.legend().get_texts()]
    assert labels == ["batch 2", "batch 64"]
    for patch in ax.patches:
        xy = patch.get_xy()
        assert set(np.round(xy[:, 0], 6)) <= set(np.round(np.linspace(0, 99, 11), 6))
        assert xy[:, 1].max() == 10
    assert ax.get_xlabel() == "gradient norm"


def test_a_heat_table_writes_each_cells_text():
    frame = pd.DataFrame({"batch_size": [8, 8, 64, 64], "lr": [0.1, 0.2] * 2, "w": [1.0, 2, 3, 4], "t": list("abcd")})
    ax = plots.heat_table(frame, rows="batch_size", columns="lr", value="w", text="t")
    assert [text.get_text() for text in ax.texts] == list("abcd")
    np.testing.assert_array_equal(np.ma.getdata(ax.collections[0].get_array()).ravel(), [1, 2, 3, 4])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate", "batch size")


def rates(best=None):
    """An accuracy a cell, highest at each batch size's ``best`` rate, the rows in no order."""
    best = best or {16: 0.01, 4: 0.04, 64: 0.16}
    rows = [(b, lr, b / 10 + 50 - 10 * abs(np.log(lr / top))) for lr in (0.16, 0.01, 0.04) for b, top in best.items()]
    return pd.DataFrame(rows, columns=["batch_size", "lr", "accuracy"])


def test_a_rate_map_has_a_cell_and_its_text_at_each_size_and_rate():
    frame = rates()
    ax = plots.rate_map(frame, "accuracy", text="{:.2f}")
    table = frame.pivot(index="lr", columns="batch_size", values="accuracy")
    mesh = ax.collections[0]
    np.testing.assert_allclose(mesh.get_array(), table)
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [2, 8, 32, 128])  # half-way between sizes, in powers
    np.testing.assert_allclose(corners[:, 0, 1], [0.005, 0.02, 0.08, 0.32])
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(b, lr): f"{v:.2f}" for b, lr, v in frame.itertuples(index=False)}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["4", "16", "64"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.01", "0.04", "0.16"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("batch size", "learning rate")


def test_a_rate_map_marks_the_best_rates_and_both_rules_from_that_of_the_smallest_size():
    lines = {line.get_label(): line for line in plots.rate_map(rates(), "accuracy").get_lines()}
    np.testing.assert_allclose(lines["best rate"].get_xydata(), [(4, 0.04), (16, 0.01), (64, 0.16)])
    assert lines["best rate"].get_marker() == "o" and lines["best rate"].get_markerfacecolor() == "none"
    np.testing.assert_allclose(lines["linear rule"].get_xydata(), [(4, 0.04), (16, 0.16), (64, 0.64)])
    np.testing.assert_allclose(lines["square-root rule"].get_xydata(), [(4, 0.04), (16, 0.08), (64, 0.16)])


def test_a_rule_that_leaves_a_rate_map_does_not_stretch_it():
    ax = plots.rate_map(rates({4: 0.16, 16: 0.16, 64: 0.16}), "accuracy")
    assert max(line.get_ydata().max() for line in ax.get_lines()) > 1
    np.testing.assert_allclose(ax.get_ylim(), (0.005, 0.32))
    np.testing.assert_allclose(ax.get_xlim(), (2, 128))


def test_a_rate_map_leaves_out_a_cell_that_was_not_tried():
    frame = rates().query("not (batch_size == 4 and lr == 0.16)")
    ax = plots.rate_map(frame, "accuracy")
    assert np.ma.getmaskarray(np.ma.masked_invalid(ax.collections[0].get_array())).sum() == 1
    best = next(line for line in ax.get_lines() if line.get_label() == "best rate")
    np.testing.assert_allclose(best.get_ydata(), [0.04, 0.01, 0.16])


def test_spans_draw_a_bar_from_low_to_high_for_each_seed_beside_its_size():
    frame = pd.DataFrame({"batch_size": [8, 8, 8, 64], "low": [1.0, 2, 3, 4], "high": [5.0, 6, 8, 9]})
    ax = plots.spans(frame, "low", "high")
    bars = sorted(line.get_xydata().tolist() for line in ax.get_lines())
    at = [x for (x, _), _ in bars]
    np.testing.assert_allclose(bars, [[(x, low), (x, high)] for x, low, high in zip(at, frame["low"], frame["high"])])
    np.testing.assert_allclose(at, [8 * 2**-0.2, 8, 8 * 2**0.2, 64])
    colours = [to_rgba(line.get_color()) for line in sorted(ax.get_lines(), key=lambda line: line.get_xdata()[0])]
    assert colours == [to_rgba(plots.colour(b)) for b in (8, 8, 8, 64)]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "64"]


def test_dots_draw_a_dot_a_row_over_its_category():
    frame = pd.DataFrame({"solution": ["small", "large", "small", "large"], "lr": [1.0, 2, 3, 4]})
    ax = plots.dots(frame, "solution", "lr", color="red")
    found = np.concatenate([dots.get_offsets() for dots in ax.collections])
    assert {(round(x), y) for x, y in found} == {(0, 1), (1, 2), (0, 3), (1, 4)} and len(found) == 4
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["small", "large"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("solution", "learning rate")
    assert {to_rgba(c, 1) for dots in ax.collections for c in dots.get_facecolors()} == {to_rgba("red")}


def test_functions_draw_into_the_axes_given_and_return_them():
    frame = histories((8, 64)).assign(lr=0.1, text="x", x=1.0)
    end = frame.query("epochs == 3 and seed == 0")
    for draw in (
        lambda ax: plots.curves(frame, "test_accuracy", ax=ax),
        lambda ax: plots.against_batch_size(frame, "test_accuracy", ax=ax),
        lambda ax: plots.histograms(frame, "test_accuracy", by="batch_size", ax=ax),
        lambda ax: plots.heat_table(end, rows="batch_size", columns="lr", value="test_accuracy", text="text", ax=ax),
        lambda ax: plots.rate_map(rates(), "accuracy", ax=ax),
        lambda ax: plots.spans(end, "epochs", "seconds", ax=ax),
        lambda ax: plots.dots(end, "text", "test_accuracy", ax=ax),
        lambda ax: plots.scatter_classes(frame[["x", "test_accuracy"]].to_numpy(), frame["seed"].to_numpy(), ax=ax),
    ):
        ax = plt.subplots()[1]
        assert draw(ax) is ax
        assert isinstance(draw(None), Axes)
        plt.close("all")


def test_drawing_leaves_the_frame_alone():
    frame = histories()
    before = frame.copy()
    plots.curves(frame, "test_accuracy")
    plots.against_batch_size(frame, "test_accuracy")
    pd.testing.assert_frame_equal(frame, before)


def test_save_writes_a_png_with_title_and_caption_and_an_svg(tmp_path):
    figure = plots.save(a_figure(), "steeper", tmp_path, "blobs, n = 5 seeds. " + plots.BAND)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["steeper.png", "steeper.svg"]
    with Image.open(tmp_path / "figures/steeper.png") as image:
        assert image.text["Title"] == "Smaller is steeper"
        assert image.text["Description"] == "blobs, n = 5 seeds. " + plots.BAND
        assert image.size == (960, 552)
    assert "<svg" in (tmp_path / "figures/steeper.svg").read_text()
    assert "n = 5 seeds" in figure.get_supxlabel()


def test_a_title_too_long_for_its_figure_is_wrapped_there_and_whole_in_the_png(tmp_path):
    title, ax = "A finding that takes very many words " * 5, a_figure()
    ax.set_title(title.strip())
    plots.save(ax, "long", tmp_path, "n = 5")
    assert "\n" in ax.get_title(loc="left")
    with Image.open(tmp_path / "figures/long.png") as image:
        assert image.text["Title"] == title.strip()


def test_the_same_figure_is_the_same_svg_to_the_byte(tmp_path):
    for folder in ("a", "b"):
        plots.save(a_figure(), "steeper", tmp_path / folder, "n = 5")
    first, second = ((tmp_path / folder / "figures/steeper.svg").read_bytes() for folder in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    "module", ["helpers.plots", "helpers.sweep.store", "helpers.ledger.claims", "companion.run", "companion.cli"]
)
def test_modules_that_need_no_torch_import_none(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A live session


def session_frames():
    """Curves of three runs in both measures, as thinned bins, and two moves."""
    axis = np.array([100.0, 200.0, 400.0])
    frames = [
        pd.DataFrame({"run": run, "measure": measure, "examples_seen": axis, "steps": axis / 10,
                      "seconds": axis / 50, "mean": i + axis, "low": i + axis / 2, "high": i + 2 * axis})
        for i, run in enumerate(["previous", "this run", "pinned"])
        for measure in ("minibatch_loss", "test_accuracy", "gradient_norm")
    ]  # fmt: skip
    moves = [[200, 20, 4.0, "batch_size", 256, 256], [300, 30, 6.0, "lr", 0.0123, 256]]
    columns = ["examples_seen", "steps", "seconds", "name", "value", "batch_size"]
    return pd.concat(frames), pd.DataFrame(moves, columns=columns)


@pytest.mark.parametrize(("x", "at"), [("examples_seen", [200, 300]), ("steps", [20, 30]), ("seconds", [4, 6])])
def test_a_session_has_a_line_per_run_and_per_move_in_each_of_two_panels(x, at):
    curves, moves = session_frames()
    fig = plots.session(curves, moves, x=x)
    assert isinstance(fig, Figure) and len(fig.axes) == 2
    for ax, measure in zip(fig.axes, ("minibatch_loss", "test_accuracy")):
        drawn = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
        assert [line.get_label() for line in drawn] == ["previous", "this run", "pinned"]
        for line, band in zip(drawn, ax.collections):
            mine = curves.query("run == @line.get_label() and measure == @measure")
            np.testing.assert_allclose(line.get_xydata(), mine[[x, "mean"]])
            corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
            assert set(zip(mine[x], mine["low"])) | set(zip(mine[x], mine["high"])) <= corners
        marks = [line.get_xdata()[0] for line in ax.get_lines() if line.get_label().startswith("_")]
        assert marks == at
        assert ax.get_ylabel() == plots.LABELS[measure]
    assert [text.get_text() for text in fig.axes[0].texts] == [" 256", " lr 0.012"]
    assert (fig.axes[0].get_yscale(), fig.axes[1].get_xlabel()) == ("log", plots.LABELS[x])


def test_a_sessions_figure_is_not_pyplots_and_can_be_drawn_without_it(tmp_path):
    curves, moves = session_frames()
    fig = plots.session(curves.query("run == 'this run'"), moves.iloc[:0])
    assert plt.get_fignums() == []
    plots.headline(fig, "Batch 8 → 256")
    fig.savefig(tmp_path / "session.png")
    assert fig.get_suptitle() == "Batch 8 → 256" and (tmp_path / "session.png").stat().st_size > 1000


@pytest.mark.parametrize("smallest", [0.0, 1e-8])
def test_a_single_loss_of_nearly_0_does_not_stretch_a_sessions_axis(smallest):
    axis = np.arange(1.0, 101)
    losses = pd.DataFrame({"run": "this run", "measure": "minibatch_loss", "examples_seen": axis, "mean": 1.0,
                           "low": [smallest] + [0.5] * 99, "high": 2.0})  # fmt: skip
    both = pd.concat([losses, losses.assign(measure="test_accuracy", low=0.0)])
    low, high = plots.session(both, session_frames()[1].iloc[:0]).axes[0].get_ylim()
    assert 0.2 < low < 0.5 and 2 < high < 10


@pytest.mark.parametrize("sizes", [[64], [16, 64]])
def test_a_rate_map_stands_cells_without_a_value_and_single_sizes(sizes):
    frame = pd.DataFrame(
        [(b, lr, np.nan if b == 16 else lr) for b in sizes for lr in (0.1, 0.2)], columns=["batch_size", "lr", "v"]
    )
    ax = plots.rate_map(frame, "v", text="{:.1f}")
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["0.1", "0.2"]


def test_an_axis_is_logarithmic_where_something_is_above_0():
    fig, (left, right) = plt.subplots(1, 2)
    left.scatter([1, 2], [0.0, 3.0])
    right.plot([1, 2], [np.nan, np.nan])
    assert [plots.log_scale(ax).get_yscale() for ax in (left, right)] == ["log", "linear"]
    assert [plots.log_scale(ax, "x").get_xscale() for ax in (left, right)] == ["log", "linear"]
    fig.canvas.draw()


def test_a_histogram_leaves_out_values_that_are_not_finite():
    frame = pd.DataFrame({"x": [1.0, 2.0, np.inf, np.nan], "batch_size": [1, 2, 2, 2]})
    counts = [patch.get_xy() for patch in plots.histograms(frame, "x", by="batch_size", bins=2).patches]
    assert len(counts) == 2
    assert len(plots.histograms(frame[2:], "x", by="batch_size").patches) == 0


def test_a_headline_longer_than_its_figure_is_wrapped_within_it(tmp_path):
    fig, _ = plt.subplots(1, 2, figsize=(12, 4.8))
    plots.headline(fig, "Early norm: 0.616 at batch 1 and 0.895 at batch 64; " * 3)
    plots.save(fig, "01_long", tmp_path, "a caption")
    box = fig._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width
    assert "\n" not in Image.open(tmp_path / "figures/01_long.png").info["Title"]
