import base64
import gc
import html
import io
import itertools
import math
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from helpers import Dataset, Net, Problem, Training, problems
from helpers.live import controls, settings
from helpers.live import lab as live
from helpers.live.lab import Lab
from helpers.live.view import advice

BLOBS = problems.named("blobs", "brownlee_mlp")
BLOBS_WIDE = problems.named("blobs", "shen_mlp")
DIGITS = problems.named("digits", "brownlee_mlp")
IMAGES = problems.named("digits", "plain_cnn")
PATIENCE = 60  # seconds after which a test fails instead of hanging


@pytest.fixture(autouse=True)
def nobody_watches(monkeypatch):
    """As under papermill."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delenv("SERVER_SOFTWARE", raising=False)


@pytest.fixture
def start():
    """Starts labs, and closes them after the test."""
    opened, threads = [], torch.get_num_threads()

    def new(given=(BLOBS, DIGITS), **settings):
        opened.append(Lab(given, **settings))
        return opened[-1]

    yield new
    for one in opened:
        one.close()
    torch.set_num_threads(threads)


def settle(lab):
    """Wait until its wishes are met, and draw what came of them."""
    lab.session.wait(PATIENCE)
    lab.draw()
    return lab


def until(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def main(lab):
    return lab.session.runs[0].training


def status(lab):
    return lab.children[-3].value


def figure(lab):
    return lab.children[-2].value


def exported(lab):
    return lab.children[-1].value


def svgs(lab):
    """The drawings that are whole SVG texts of their own: aria-label → element."""
    found = re.findall(r"<svg(?=[^>]*role=\"img\").*?</svg>(?=<svg|<div|</div>)", figure(lab), re.S)
    return {e.get("aria-label"): e for e in map(ET.fromstring, found)}


def marks(lab, panel="Loss"):
    (element,) = [e for label, e in svgs(lab).items() if label.startswith(panel)]
    return sum(e.get("class") == "companion-mark" for e in element.iter("line"))


def companion_threads():
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("companion-"))


def shown(lab):
    """The controls on show."""
    return [w for row in lab.children[:-3] for w in row.children]


# Controls


@pytest.mark.parametrize(
    ("control", "value", "builds"),
    [("batch_size", 32, 1), ("lr", 0.1, 1), ("momentum", 0.5, 1), ("optimizer", "adam", 2)],
)  # fmt: skip
def test_a_control_sets_what_it_is_called(start, control, value, builds):
    lab = start()
    getattr(lab, control).value = value
    settle(lab)
    assert lab.session.settings[control] == value and lab.session.builds == builds
    if builds == 1:
        assert getattr(main(lab), control) == value
    assert getattr(lab, control).value == value


def test_one_dropdown_chooses_the_problem(start):
    lab = start([BLOBS, BLOBS_WIDE, BLOBS])
    assert lab.problem.options == ("brownlee_mlp on blobs", "shen_mlp on blobs", "brownlee_mlp on blobs (2)")
    lab.problem.value = "shen_mlp on blobs"
    assert settle(lab).session.problem is BLOBS_WIDE and lab.session.builds == 2
    lab = start({"small": BLOBS, "wide": BLOBS_WIDE})
    assert lab.problem.options == ("small", "wide") and lab.problem in shown(lab)
    lab.problem.value = "wide"
    assert settle(lab).session.problem is BLOBS_WIDE


GIVEN = {
    "a name": "blobs",
    "names": ["blobs"],
    "none": [],
    "an empty dict": {},
    "None": None,
    "a number": [BLOBS, 3],
    "a dict": {"a": "blobs"},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_anything_but_problems_is_refused_in_a_line(given):
    unraised = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", unraised.append)
        with pytest.raises(TypeError, match=r"expected a Problem, a list of them, or a dict .* problems\.named\("):
            Lab(given)
        gc.collect()
    assert unraised == [] and companion_threads() == []


def test_controls_begin_with_the_settings_given(start):
    lab = start([problems.named("digits", "plain_cnn", num_train=300), BLOBS], batch_size=100, lr=0.042, momentum=0.3,
                seed=5)  # fmt: skip
    assert (lab.problem.value, lab.batch_size.value) == ("plain_cnn on digits", 100)
    assert (lab.lr.value, lab.momentum.value, lab.optimizer.value) == (0.042, 0.3, "sgd")
    assert (main(lab).seeds, main(lab).dataset.num_train, main(lab).batch_size) == ((5,), 300, 100)
    assert lab.problem.options == ("plain_cnn on digits", "brownlee_mlp on blobs")


def test_play_pause_step_and_reset_do_so(start):
    lab = start()
    assert (lab.play.disabled, lab.pause.disabled) == (False, True)
    lab.play.click()
    until(lambda: main(lab).steps > 5)
    lab.draw()
    assert (lab.play.disabled, lab.pause.disabled) == (True, False)
    lab.pause.click()
    steps = main(settle(lab)).steps
    assert (lab.play.disabled, lab.pause.disabled) == (False, True)
    lab.step.click()
    assert main(settle(lab)).steps == steps + 1
    lab.reset.click()
    settle(lab)
    assert main(lab).steps == 0 and lab.session.previous.training.steps == steps + 1


def test_pinning_sets_a_second_run_with_a_batch_size_of_its_own(start):
    lab = start()
    assert lab.pinned_batch_size.disabled
    lab.pinned_batch_size.value = 32
    assert len(settle(lab).session.runs) == 1
    lab.pin.value = True
    settle(lab)
    assert [run.training.batch_size for run in lab.session.runs] == [8, 32]
    assert not lab.pinned_batch_size.disabled
    lab.pinned_batch_size.value = 16
    assert settle(lab).session.runs[1].training.batch_size == 16
    lab.pin.value = False
    assert len(settle(lab).session.runs) == 1 and lab.pinned_batch_size.disabled


def test_the_pace_is_kept_when_training_starts_over(start):
    lab = start(epochs_per_second=1.0)
    assert settle(lab).session.epochs_per_second == lab.pace.value == 1
    lab.pace.value = 5.0
    assert settle(lab).session.epochs_per_second == 5
    lab.problem.value = "brownlee_mlp on digits"
    settle(lab)
    assert settle(lab).session.epochs_per_second == lab.pace.value == 5
    lab.pace.value = 0.0
    assert settle(lab).session.epochs_per_second == 0


def test_the_x_axis_is_what_one_chooses(start):
    lab = start()
    for name in ("steps", "seconds", "examples_seen"):
        lab.axis.value = name
        lab.draw()
        assert f"against {name.replace('_', ' ')}" in figure(lab)


def test_a_small_lab_leaves_out_the_choices_and_the_picture(start):
    lab = settle(start(small=True))
    left_out = (lab.problem, lab.optimizer, lab.momentum, lab.pin, lab.pinned_batch_size, lab.pace)
    assert not {id(w) for w in left_out} & {id(w) for w in shown(lab)}
    assert lab.batch_size in shown(lab) and lab.play in shown(lab) and lab.export in shown(lab)
    large = start()
    assert {id(w) for w in (large.problem, large.pin, large.pace)} < {id(w) for w in shown(large)}
    assert len(svgs(lab)) == 3 and len(svgs(settle(large))) == 5  # without gradient norm and regions


def test_batch_sizes_offered_are_powers_of_two_and_the_full_batch(start):
    lab = start([DIGITS, BLOBS], batch_size=1024)
    assert lab.batch_size.options[-2:] == (("1,024", 1024), ("full (1,297)", 1297))
    lab.problem.value = "brownlee_mlp on blobs"
    settle(lab)
    assert [size for _, size in lab.batch_size.options] == [*(2**k for k in range(9)), 500]
    assert lab.batch_size.options[-1] == ("full (500)", 500)
    assert lab.batch_size.value == lab.session.settings["batch_size"] == main(lab).batch_size == 500


def test_a_full_batch_that_was_chosen_for_the_pinned_run_does_not_outlive_its_data(start):
    lab = start()
    lab.pinned_batch_size.value = 500  # full; not pinned
    lab.problem.value = "brownlee_mlp on digits"
    settle(lab)
    assert lab.error == "" and lab.batch_size.options[-1] == ("full (1,297)", 1297)
    assert lab.pinned_batch_size.options[-1] == ("full (1,297)", 1297)


def test_momentum_is_for_sgd_alone(start):
    lab = start(momentum=0.9)
    lab.optimizer.value = "adam"
    settle(lab)
    assert (lab.momentum.value, lab.momentum.disabled, lab.session.settings["momentum"]) == (0, True, 0)
    lab.optimizer.value = "sgd"
    assert not settle(lab).momentum.disabled


def test_what_follows_a_start_over_is_no_move_of_the_user(start):
    lab = start([IMAGES, BLOBS], batch_size=1024, momentum=0.5)
    lab.pin.value = True
    lab.problem.value = "brownlee_mlp on blobs"
    settle(lab)
    assert settle(lab).session.builds == 2
    assert [m.name for m in lab.session.runs[0].moves] == []
    assert lab.error == lab.session.error == ""


def test_a_setting_is_added_by_a_row_of_settings_and_a_row_of_controls(start, monkeypatch):
    decay = settings.Setting(0.0, lambda value, *_: float(value))
    row = controls.setting("weight_decay", 3, "weight decay", widgets.FloatSlider, lambda _, value: {"value": value})
    monkeypatch.setitem(settings.SETTINGS, "weight_decay", decay)
    monkeypatch.setattr(controls, "CONTROLS", (*controls.CONTROLS, row))
    lab = start()
    lab.weight_decay.value = 0.5
    settle(lab)
    assert lab.weight_decay in shown(lab) and lab.session.builds == 2
    lab.rehearse({}, 40, timeout=PATIENCE)
    plain = Training(BLOBS, lr=0.05, batch_size=8, weight_decay=0.5).advance(steps=5, record=False)
    assert all(w.equal(plain.weights()[name]) for name, w in main(lab).weights().items())
    assert "weight_decay=0.5" in lab.code()


# Any problem


class Transformer(torch.nn.Module):
    """One causal layer with tied embeddings."""

    def __init__(self, words=11, width=16):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(words, width), torch.nn.Embedding(8, width)
        self.mix, self.back, self.norm = (
            torch.nn.Linear(width, 3 * width),
            torch.nn.Linear(width, width),
            torch.nn.LayerNorm(width),
        )

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        q, k, v = self.mix(self.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        x = x + self.back(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x @ self.words.weight.T


class Pictures:
    """A map-style dataset of coloured images."""

    def __init__(self, size):
        self.images = torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.images[index].mean() > 0)


def own_problems():
    x, tokens = torch.randn(80, 5, generator=torch.Generator().manual_seed(0)), torch.arange(80 * 9).view(80, 9) % 11
    nn, above, line = torch.nn, (x[:, 0] > 0).long(), x[:, :1] - x[:, 1:2]

    def split(x, y):
        return Dataset.of(x[:60], y[:60], x[60:], y[60:])

    def perceptron():
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))

    def convolutions():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

    return {
        "classes": Problem(split(x, above), perceptron),
        "tokens": Problem(split(tokens[:, :-1], tokens[:, 1:]), Transformer),
        "regression": Problem(split(x[:, :2], line), lambda: nn.Linear(2, 1), F.mse_loss),
        "map-style": Problem(Dataset.of_map(Pictures(50), Pictures(30)), convolutions),
        "no test set": Problem(Dataset.of(x[:, :2], above), lambda: nn.Linear(2, 2)),
    }


@pytest.mark.parametrize(
    ("name", "measured", "picture"),
    [("classes", "Test accuracy", None), ("tokens", "Test accuracy", None), ("regression", "Test loss", None),
     ("map-style", "Test accuracy", "Misclassified now"), ("no test set", None, None)],
)  # fmt: skip
def test_any_problem_plays_is_drawn_and_repeats(start, name, measured, picture):
    problem = own_problems()[name]
    lab = start(problem, batch_size=4, optimizer="adam", lr=0.01)
    lab.rehearse({40: 10}, 120, timeout=PATIENCE)
    assert (lab.error, lab.session.error) == ("", "") and main(lab).batch_size == 10
    labels = [label.split(",")[0] for label in svgs(lab)]
    assert labels[1] == measured if measured else len(labels) == 3
    assert [text in figure(lab) for text in ("Misclassified now", "Decision regions")] == [bool(picture), False]
    assert ("No noise scale: " in figure(lab)) == (name == "map-style")  # for its batch normalisation
    assert np.isfinite(lab.history["gradient_noise_scale"]).any() or name == "map-style"
    assert lab.figure() is not None
    found = {"problem": problem}
    exec(lab.code(), found)
    assert all(w.equal(found["training"].weights()[name]) for name, w in main(lab).weights().items())


# One lab at a time


def test_a_new_lab_closes_the_one_before(start):
    first = start()
    first.play.click()
    second = start(small=True)
    assert (first.session.state, second.session.state) == ("closed", "ready")
    assert companion_threads() == ["companion-ticker", "companion-trainer"]
    second.close()
    second.close()
    assert companion_threads() == []


@pytest.mark.slow
def test_a_process_that_leaves_a_lab_playing_ends_well():
    code = """
import time
from helpers import Lab, problems
lab = Lab(problems.named("blobs", "brownlee_mlp"))
lab.play.click()
while lab.session.runs[0].training.steps < 50:
    time.sleep(0.01)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Rehearsals


def test_where_nobody_watches_a_rehearsal_moves_the_slider_and_waits(start):
    lab = start()
    lab.rehearse({400: 64, 800: 16}, 1200, timeout=PATIENCE)
    assert lab.session.idle and main(lab).examples_seen == 1208
    # Of 64 there are 464, 500 (the epoch ends), 564, ... 820; of 16 there are 996, 1000 (another ends), ... 1208.
    assert [(m.value, m.examples_seen) for m in lab.session.runs[0].moves] == [(64, 400), (16, 820)]
    assert lab.batch_size.value == main(lab).batch_size == 16
    assert f'data-steps="{main(lab).steps}"' in figure(lab)


def test_a_rehearsal_moves_to_sizes_that_are_no_powers_of_two(start):
    lab = start()
    lab.rehearse({400: 100}, 1000, timeout=PATIENCE)
    assert lab.batch_size.value == main(lab).batch_size == 100


def test_a_rehearsal_that_takes_too_long_times_out(start):
    lab = start(epochs_per_second=1.0)
    with pytest.raises(TimeoutError, match="still training"):
        lab.rehearse({}, 100_000, timeout=0.05)


def test_what_fails_in_a_rehearsal_is_raised_where_nobody_watches(start):
    lab = start()
    main(lab).step = lambda: [][0]
    with pytest.raises(IndexError):
        lab.rehearse({}, 1000, timeout=PATIENCE)


@pytest.mark.parametrize("name", ["JPY_SESSION_NAME", "SERVER_SOFTWARE"])
def test_in_a_browser_a_rehearsal_returns_at_once_and_plays_on(start, monkeypatch, name):
    monkeypatch.setenv(name, "voila/0.5")
    assert live.in_browser()
    lab = start(epochs_per_second=1.0)
    lab.rehearse({8: 64}, 100_000)  # minutes
    assert main(lab).examples_seen < 50_000
    until(lambda: main(lab).batch_size == 64)
    assert lab.batch_size.value == 64
    assert lab.session.playing


def test_only_a_page_counts_as_a_browser(monkeypatch):
    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn/21")
    assert not live.in_browser()


@pytest.mark.parametrize(
    "touch",
    [lambda lab: setattr(lab.lr, "value", 0.1), lambda lab: setattr(lab.batch_size, "value", 4),
     lambda lab: lab.play.click(), lambda lab: setattr(lab.pin, "value", True)],
    ids=["lr", "batch size", "play", "pin"],
)  # fmt: skip
def test_whoever_touches_a_control_takes_over_from_the_rehearsal(start, monkeypatch, touch):
    monkeypatch.setenv("JPY_SESSION_NAME", "10_live_lab.ipynb")
    lab = start(epochs_per_second=1.0)
    lab.rehearse({5000: 64}, 6000)  # ten seconds from now
    touch(lab)
    lab.pace.value = 0.0
    until(lambda: main(lab).examples_seen > 7000)
    assert lab.session.playing
    assert 64 not in [m.value for m in lab.session.runs[0].moves]
    assert lab.batch_size.value in (4, 8)


# What one sees


def test_it_says_what_it_does_in_a_status(start):
    lab = settle(start())
    assert 'role="status"' in status(lab) and "Ready. Batch size 8, learning rate 0.05." in status(lab)
    lab.rehearse({400: 64}, 1000, timeout=PATIENCE)
    assert "Paused. Batch size 64, learning rate 0.05, batch size moved at step 50." in status(lab)
    lab.play.click()
    until(lambda: lab.session.playing)
    lab.draw()
    assert "Playing. Batch size 64" in status(lab)


def test_curves_and_marks_are_drawn_for_every_run(start):
    lab = settle(start())
    assert marks(lab) == 0
    lab.rehearse({400: 64}, 1000, timeout=PATIENCE)
    assert marks(lab) == marks(lab, "Test accuracy") == marks(lab, "Gradient norm") == 1
    assert "64" in [e.text for e in svgs(lab)[next(n for n in svgs(lab) if n.startswith("Loss"))].iter("text")]
    lab.reset.click()
    lab.pin.value = True
    lab.rehearse({}, 500, timeout=PATIENCE)
    for label, element in svgs(lab).items():
        if label.startswith(("Loss", "Test", "Gradient")):
            runs = [e.get("data-run") for e in element.iter("polyline")]
            assert runs == ["previous", "this run", "pinned"]
    assert all(f"<text{rest}" not in figure(lab) for rest in (">nan", ">inf"))
    assert all(f">{name} (batch " in re.sub(r"</svg>", ">", figure(lab)) for name in ("previous", "this run", "pinned"))


def test_the_facts_are_of_the_run_that_trains(start):
    lab = start()
    lab.rehearse({}, 600, timeout=PATIENCE)
    training, latest = main(lab), lab.session.runs[0].latest
    text = re.sub("<.*?>", " ", figure(lab))
    # An epoch of 500 ends with a minibatch of 4.
    assert (training.steps, training.examples_seen) == (76, 604)
    assert "step 76 · 604 examples · epoch 1.21 ·" in text
    assert f"test accuracy {100 * latest['test_accuracy']:.1f} %" in text


def test_the_picture_is_there_for_points_and_for_images(start):
    lab = settle(start())
    assert "Decision regions now" in svgs(lab)
    lab.problem.value = "brownlee_mlp on digits"
    settle(lab)
    assert "Decision regions now" not in svgs(lab)
    assert "Misclassified now" in figure(lab) and len(re.findall(r"<img [^>]*a \d read as \d", figure(lab))) == 12


def test_a_failure_in_the_thread_is_an_alert_whose_text_is_escaped(start):
    lab = start()

    def boom():
        raise ValueError("<script>alert('1')</script> & co")

    main(lab).step = boom
    lab.play.click()
    with pytest.raises(ValueError, match="script"):
        lab.session.wait(PATIENCE)
    lab.draw()
    assert 'role="alert"' in status(lab) and "<script" not in status(lab)
    assert "Training stopped: ValueError: <script>alert('1')</script> & co" in html.unescape(status(lab))
    ET.fromstring(status(lab))
    lab.reset.click()
    settle(lab)
    assert 'role="status"' in status(lab) and "alert" not in status(lab)


def test_a_problem_that_cannot_be_trained_is_an_alert_and_reset_goes_back(start):
    lab = start([BLOBS, Problem(DIGITS.dataset, Net(lambda: torch.nn.Linear(3, 3), key="wide"))])
    lab.problem.value = "wide on digits"
    with pytest.raises(ValueError, match="the net cannot take this data"):
        lab.session.wait(PATIENCE)
    lab.draw()
    assert "the net cannot take this data" in status(lab)
    lab.reset.click()
    assert settle(lab).problem.value == "brownlee_mlp on blobs"
    assert "Ready" in status(lab)


def test_a_divergence_is_said_and_how_to_go_on(start):
    lab = start(batch_size=50, lr=1000.0)
    lab.play.click()
    settle(lab)
    assert "Diverged: the loss is no longer finite. Lower the learning rate and reset" in status(lab)
    lab.lr.value = 0.05
    lab.reset.click()
    assert "Ready" in status(settle(lab))


def test_the_page_has_its_static_text_where_no_widgets_live(start):
    assert "the picture below shows the session" in start()._repr_mimebundle_()["text/html"]


# In words


def costs(share):
    """E and S of a batch of ``share`` noise scales, but for a factor."""
    return 1 + share, 1 + 1 / share


@pytest.mark.parametrize(
    ("batch_size", "scale", "beginning"),
    [(1, 1000, "Noise dominates"), (8, 200, "Noise dominates"), (64, 1024, "Noise and gradient balance"),
     (64, 64, "Noise and gradient balance"), (255, 64, "Noise and gradient balance")],
)  # fmt: skip
def test_advice_weighs_a_batch_4_times_larger(batch_size, scale, beginning):
    text = advice(batch_size, scale)
    assert text.startswith(beginning) and "a batch 4× larger" in text
    more, fewer = re.search(r"\((\d+) % more examples, ([\d.]+)× fewer steps\)", text).groups()
    (e, s), (e4, s4) = costs(batch_size / scale), costs(4 * batch_size / scale)
    assert float(more) == pytest.approx(100 * (e4 / e - 1), abs=0.51)
    assert float(fewer) == pytest.approx(s / s4, abs=0.051)


@pytest.mark.parametrize(("batch_size", "scale"), [(256, 64), (500, 20), (1000, 0.5)])
def test_advice_weighs_a_batch_4_times_smaller_where_the_gradient_is_nearly_exact(batch_size, scale):
    text = advice(batch_size, scale)
    assert text.startswith("The gradient is nearly exact already: a batch 4× smaller would need")
    fewer, more = re.search(r"(\d+) % fewer examples, and ([\d.]+)× the steps", text).groups()
    (e, s), (e4, s4) = costs(batch_size / scale), costs(batch_size / scale / 4)
    assert float(fewer) == pytest.approx(100 * (1 - e4 / e), abs=0.51)
    assert float(more) == pytest.approx(s4 / s, abs=0.051)


def test_there_is_no_advice_without_a_noise_scale_and_no_number_where_it_is_infinite():
    assert advice(8, math.nan) == ""
    assert advice(8, math.inf).startswith("Noise dominates: the gradient hardly stands out.")


def test_the_finding_compares_the_spread_of_the_loss_before_and_after_the_last_move(start):
    lab = start()
    assert lab.finding() == "Nothing trained yet: press play"
    lab.rehearse({}, 400, timeout=PATIENCE)

    def spread(part):
        return math.sqrt(np.diff(part).var(ddof=1) / 2)

    def losses():
        return lab.history.query("run == 'this run'")["minibatch_loss"].dropna().to_numpy()

    assert lab.finding() == f"Batch 8: from step to step the loss varies by {spread(losses()):.2g}"
    lab.rehearse({2000: 64}, 6000, timeout=PATIENCE)
    steps = lab.session.runs[0].moves[0].steps
    before, after = losses()[:steps][-100:], losses()[steps:][:100]
    assert lab.finding() == (
        f"Batch 8 → 64: from step to step the loss varies by {spread(after):.2g} instead of {spread(before):.2g}"
    )


# What one keeps


def test_moves_and_curves_are_frames(start):
    lab = start()
    lab.pin.value = True
    lab.rehearse({400: 64}, 1000, timeout=PATIENCE)
    lab.lr.value = 0.1
    settle(lab)
    columns = ["examples_seen", "steps", "name", "value"]
    now = [main(lab).examples_seen, main(lab).steps, "lr", 0.1]
    assert lab.moves()[columns].values.tolist() == [[400, 50, "batch_size", 64], now]
    curves = lab.curves()
    assert set(zip(curves["run"], curves["measure"])) == {
        (run, measure)
        for run in ("this run", "pinned")
        for measure in ("minibatch_loss", "test_accuracy", "gradient_norm")
    }
    assert (curves["low"] <= curves["mean"] + 1e-12).all() and (curves["mean"] <= curves["high"] + 1e-12).all()
    assert start().moves().empty


def test_the_figure_has_the_finding_above_and_a_line_for_the_move(start):
    lab = start()
    lab.rehearse({400: 64}, 2000, timeout=PATIENCE)
    lab.axis.value = "steps"
    fig = lab.figure()
    assert isinstance(fig, Figure) and fig.get_suptitle() == lab.finding()
    assert fig.axes[1].get_xlabel() == "steps"
    assert [line.get_xdata()[0] for line in fig.axes[0].get_lines() if line.get_linestyle() == ":"] == [50]


def test_export_has_the_picture_the_history_and_the_code(start):
    lab = start(batch_size=4)
    lab.rehearse({40: 16}, 100, timeout=PATIENCE)
    assert exported(lab) == ""
    lab.export.click()
    text = exported(lab)
    assert html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", text, re.S)[1]) == lab.code() == lab.session.code()
    assert "training.batch_size = 16" in text
    assert ET.fromstring(text) is not None
    links = {e.get("download"): e.get("href").split(",")[1] for e in ET.fromstring(text).iter("a")}
    with Image.open(io.BytesIO(base64.b64decode(links["live_lab.png"]))) as image:
        assert image.format == "PNG" and min(image.size) > 300
    frame = pd.read_csv(io.BytesIO(base64.b64decode(links["live_lab.csv"])))
    pd.testing.assert_frame_equal(frame, lab.history)


class Handle:
    """Stands for IPython's display handle."""

    def __init__(self):
        self.shown, self.updates = [], []

    def display(self, what, **options):
        self.shown.append((what, options))
        return self

    def update(self, what):
        self.updates.append(what)


def test_what_is_kept_is_made_anew_whenever_training_pauses(start, monkeypatch):
    lab, handle = start(), Handle()
    monkeypatch.setattr(live, "display", handle.display)
    lab.keep(lambda: main(lab).steps)
    assert handle.shown == [(0, {"display_id": True})]
    for _ in range(2):
        before = len(handle.updates)
        lab.play.click()
        drawn = set()
        until(lambda drawn=drawn: len(drawn) > 3 or drawn.add(figure(lab)))  # the ticker has seen it play
        assert len(handle.updates) == before
        lab.pause.click()
        until(lambda before=before: len(handle.updates) > before)
        assert handle.updates[before:] == [main(lab).steps]


def test_what_is_kept_is_made_anew_after_the_shortest_rehearsal(start, monkeypatch):
    lab, handle = start(), Handle()
    monkeypatch.setattr(live, "display", handle.display)
    lab.keep(lambda: main(lab).steps)
    begin = lab.session.rehearse

    def late(*given):
        end = time.monotonic() + 0.5  # in which the ticker draws
        while not handle.updates and time.monotonic() < end:
            time.sleep(0.005)
        begin(*given)

    monkeypatch.setattr(lab.session, "rehearse", late)
    lab.rehearse({}, 40, timeout=PATIENCE)
    until(lambda: handle.updates[-1:] == [5], 5)


def test_a_figure_that_is_kept_is_shown_as_a_picture(start, monkeypatch):
    lab, handle = start(), Handle()
    monkeypatch.setattr(live, "display", handle.display)
    lab.keep(lab.figure)
    ((image, _),) = handle.shown
    assert image.data.startswith(b"\x89PNG")


def test_what_cannot_be_made_is_an_alert_and_the_lab_goes_on(start, monkeypatch):
    lab, handle, results = start(), Handle(), {1: "shown", 3: "shown again"}  # the second time there is none
    calls = itertools.count(1)
    monkeypatch.setattr(live, "display", handle.display)
    lab.keep(lambda: results[next(calls)])
    lab.rehearse({}, 400, timeout=PATIENCE)
    until(lambda: 'role="alert"' in status(lab))
    assert "The lab could not draw or save its output: KeyError" in status(lab)
    assert "correct the cell" in status(lab)
    lab.step.click()
    settle(lab)
    assert 'role="status"' in status(lab) and main(lab).steps == 51
