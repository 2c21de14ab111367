import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from helpers.live import chart

HOSTILE = "<script>alert('1 & 2')</script> \"quoted\""
WIDTH, TALL = 394, 140  # of a panel's drawing area: 460 - 52 - 14, and 190 - 26 - 24


def bins(values, spread=0.0, count=1):
    """A bin every 10 examples (1 step, 0.5 seconds) whose mean is the value."""
    return [(10 * i, i, i / 2, count, count * v, v - spread, v + spread) for i, v in enumerate(values, start=1)]


def parsed(svg):
    """The elements of an SVG text that must be well-formed."""
    return ET.fromstring(svg)


def points(svg, run="this run"):
    """The corners of a run's curve."""
    (line,) = [e for e in parsed(svg).iter("polyline") if e.get("data-run") == run]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def texts(svg):
    return [e.text for e in parsed(svg).iter("text")]


def pixels(source):
    """The image in a data address."""
    kind, content = source.split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.array(image)


# Parts


def test_a_tag_escapes_its_attributes_and_leaves_its_body():
    element = chart.tag("p", "<b>x</b>", stroke_width=2, class_="c", title=HOSTILE)
    assert element.startswith('<p stroke-width="2" class="c" title="&lt;script&gt;')
    assert element.endswith("><b>x</b></p>")
    assert parsed(element).get("title") == HOSTILE


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.4, "12,345"), (100, "100"), (-1234.5, "-1,234"), (99.96, "100"), (0.0123456, "0.0123"), (1.2e-5, "1.2e-05"),
     (0, "0"), (math.nan, "–"), (math.inf, "∞")],
)  # fmt: skip
def test_a_number_reads_as_on_a_chart(value, text):
    assert chart.number(value) == text


# Panels


def test_a_hostile_title_and_label_stay_text():
    svg = chart.panel(HOSTILE, {"this run": bins([1, 2])}, axis=0, marks=[(10, HOSTILE, "this run")])
    assert "<script" not in svg
    assert texts(svg).count(HOSTILE) == 2
    assert parsed(svg).get("aria-label") == f"{HOSTILE}: this run 2"


@pytest.mark.parametrize(("axis", "xs"), [(0, [10, 20, 40]), (1, [1, 2, 4]), (2, [0.5, 1, 2])])
def test_points_are_where_a_linear_panel_has_them(axis, xs):
    values = bins([1.0, 4.0, 3.0, 2.0])
    svg = chart.panel("loss", {"this run": [values[0], values[1], values[3]]}, axis=axis)
    assert points(svg) == [(WIDTH * x / xs[-1], TALL * (1 - y / 4)) for x, y in zip(xs, [1, 4, 2])]


def test_points_are_where_a_logarithmic_panel_has_them():
    # Of 21 values the 5 % quantile is the second smallest, 1; so the panel goes from 1/1.1 to 110, and 10 lies halfway.
    found = points(chart.panel("loss", {"this run": bins([1, 1] + [10] * 18 + [100])}, axis=0, log=True))
    edge = TALL * math.log10(1.1) / math.log10(121)
    assert found[10] == (pytest.approx(WIDTH * 11 / 21, abs=0.06), pytest.approx(TALL / 2, abs=0.06))
    assert found[-1] == (WIDTH, pytest.approx(edge, abs=0.06))
    assert found[0] == (pytest.approx(WIDTH / 21, abs=0.06), pytest.approx(TALL - edge, abs=0.06))


def test_a_curve_is_the_mean_of_its_bins_with_their_spread_around_it():
    svg = chart.panel("loss", {"this run": bins([2.0, 6.0], spread=2.0, count=4)}, axis=0)
    assert points(svg) == [(WIDTH / 2, TALL * 0.75), (WIDTH, TALL * 0.25)]
    (band,) = parsed(svg).iter("polygon")
    corners = [tuple(map(float, corner.split(","))) for corner in band.get("points").split()]
    assert corners == [(WIDTH / 2, TALL / 2), (WIDTH, 0), (WIDTH, TALL / 2), (WIDTH / 2, TALL)]


def test_percent_panels_end_at_100_percent_and_begin_below_what_comes_after_the_rise():
    svg = chart.panel("accuracy", {"this run": bins([0.1] + [0.8] * 9)}, axis=0, percent=True)
    assert points(svg)[-1][1] == pytest.approx(TALL * (1 - 0.1 / 0.3), abs=0.06)  # from 70 to 100
    assert [t for t in texts(svg) if t.endswith("%")] == ["70 %", "80 %", "90 %", "100 %"]


def test_every_run_has_a_curve_and_a_dash_of_its_own():
    svg = chart.panel("loss", {name: bins([1, 2]) for name in chart.RUNS}, axis=0)
    lines = {e.get("data-run"): e.get("stroke") + e.get("stroke-dasharray") for e in parsed(svg).iter("polyline")}
    assert set(lines) == set(chart.RUNS)
    assert len(set(lines.values())) == 3


def test_every_mark_is_drawn_where_its_move_acted():
    marks = [(20, "8", "this run"), (60, "64", "pinned")]
    svg = chart.panel("loss", {"this run": bins([1] * 8)}, axis=0, marks=marks)
    lines = [e for e in parsed(svg).iter("line") if e.get("class") == "companion-mark"]
    assert sorted(float(e.get("x1")) for e in lines) == [pytest.approx(WIDTH / 4, abs=0.06), 0.75 * WIDTH]
    assert all(e.get("x1") == e.get("x2") for e in lines)
    assert {"8", "64"} <= set(texts(svg))


@pytest.mark.parametrize(("xs", "labels"), [((50, 51), ["second"]), ((10, 80), ["first", "second"])])
def test_of_labels_that_would_overlap_the_later_one_is_written(xs, labels):
    marks = [(xs[0], "first", "this run"), (xs[1], "second", "this run")]
    svg = chart.panel("loss", {"this run": bins([1] * 10)}, axis=0, marks=marks)
    assert sorted(t for t in texts(svg) if t in ("first", "second")) == labels
    assert svg.count("companion-mark") == 2


def test_a_label_at_the_right_edge_is_written_to_the_left_of_its_line():
    svg = chart.panel("loss", {"this run": bins([1] * 10)}, axis=0, marks=[(100, "a long label", "this run")])
    (label,) = [e for e in parsed(svg).iter("text") if e.text == "a long label"]
    assert (label.get("text-anchor"), float(label.get("x"))) == ("end", 52 + WIDTH - 3)


@pytest.mark.parametrize("options", [{}, {"log": True}, {"percent": True}])
@pytest.mark.parametrize("curves", [{}, {"this run": []}, {"this run": bins([0.0])}])
def test_a_panel_of_nothing_or_of_a_single_0_is_well_formed(curves, options):
    svg = chart.panel("loss", curves, axis=0, **options)
    assert "nan" not in svg and "inf" not in svg
    assert len(list(parsed(svg).iter("polyline"))) == sum(map(len, curves.values()))


# The ruler


def ruler(svg):
    """Where the batch size and the noise scale stand: (x, x or None)."""
    (triangle,) = parsed(svg).iter("path")
    thick = [float(e.get("x1")) for e in parsed(svg).iter("line") if e.get("stroke-width") == "3"]
    return float(re.match(r"M([\d.]+) ", triangle.get("d"))[1]), thick[0] if thick else None


def test_batch_size_and_noise_scale_stand_on_a_logarithmic_ruler():
    svg = chart.gauge(32, 256, 1024)
    assert ruler(svg) == (15 + 420 * 5 / 10, 15 + 420 * 8 / 10)
    assert "batch size 32" in texts(svg) and "noise scale B_simple ≈ 256" in texts(svg)
    (bar,) = parsed(svg).iter("rect")
    assert (float(bar.get("x")), float(bar.get("width"))) == (225.0, 126.0)


@pytest.mark.parametrize(
    ("scale", "at", "text"),
    [(math.nan, None, None), (math.inf, 435, "≈ ∞ (off the ruler)"), (5000, 435, "≈ 5,000 (off the ruler)"),
     (0.2, 15, "≈ 0.2"), (1024, 435, "≈ 1,024")],
)  # fmt: skip
def test_a_noise_scale_off_the_ruler_stands_at_its_end(scale, at, text):
    svg = chart.gauge(1, scale, 1024)
    assert ruler(svg) == (15, at)
    assert [t.removeprefix("noise scale B_simple ") for t in texts(svg) if "noise" in t] == [text] * (text is not None)


@pytest.mark.parametrize("limit", [1, 2, 500, 60_000])
def test_the_rulers_ticks_are_powers_of_two_within_it(limit):
    ticks = [int(t) for t in texts(chart.gauge(1, math.nan, limit)) if t.isdigit()]
    assert 2 <= len(ticks) <= 10
    assert ticks[0] == 1 and max(ticks) <= max(limit, 2)


# Pictures


def test_decision_regions_are_an_image_under_the_examples():
    classes = np.zeros((60, 60), int)
    classes[:, 30:] = 1
    inputs, targets = np.array([[0.0, 0.0], [2.0, 2.0], [1.0, 0.5]]), np.array([0, 1, 1])
    root = parsed(chart.regions(classes, inputs, targets))
    (image,) = root.iter("image")
    array = pixels(image.get("href"))
    assert array.shape == (60, 60, 3)
    for column, c in ((0, 0), (59, 1)):
        np.testing.assert_array_equal(array[5, column], np.uint8(255 * np.array(chart.CLASSES[c])))
    dots = {e.get("stroke"): e.get("d") for e in root.iter("path")}
    assert list(dots.values()) == ["M70 210h0", "M210 70h0M140 175h0"]  # from -1 to 3 in x and y, upwards, is 280 wide
    for shade, c in zip(dots, (0, 1)):
        np.testing.assert_allclose(to_rgb(shade), chart.CLASSES[c], atol=1 / 255)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name != "img":  # has no end
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.text.append(text)


def test_misclassified_images_are_shown_with_what_they_are_and_were_read_as():
    images = np.random.default_rng(0).normal(size=(2, 8, 8))
    images[1] = 3.0  # without any contrast
    tags = Tags(chart.mistakes([(images[0], 4, 9), (images[1], 7, 1)]))
    first, second = [a for name, a in tags.found if name == "img"]
    assert (first["alt"], second["alt"]) == ("a 4 read as 9", "a 7 read as 1")
    assert {"4 → 9", "7 → 1"} <= set(tags.text)
    grey = pixels(first["src"])
    assert grey.shape == (8, 8) and (grey.min(), grey.max()) == (0, 255)
    np.testing.assert_array_equal(grey.argmax(), images[0].argmax())
    assert pixels(second["src"]).max() == 0


def test_where_nothing_is_misclassified_it_says_so():
    assert "none of those asked" in Tags(chart.mistakes([])).text
