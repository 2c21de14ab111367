import math
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import Net, Problem, Training, problems
from helpers.engine.order import epoch_order
from helpers.live.session import TRANSITIONS, Session
from helpers.live.settings import LIVE
from helpers.live.trace import MEASURES, Curve, Run
from helpers.measure import noise

BLOBS = problems.named("blobs", "brownlee_mlp")
DIGITS = problems.named("digits", "brownlee_mlp")
IMAGES = problems.named("digits", "plain_cnn")
POINTS, TEST_POINTS = BLOBS.dataset.train_inputs, BLOBS.dataset.test_inputs
PATIENCE = 60  # seconds after which a test fails instead of hanging


@pytest.fixture
def start():
    """Starts sessions, and closes them after the test."""
    opened, threads = [], torch.get_num_threads()

    def new(given=BLOBS, **settings):
        opened.append(Session(given, **({"batch_size": 8, "lr": 0.05} | settings)))
        return opened[-1]

    yield new
    for one in opened:
        one.close()
    torch.set_num_threads(threads)


def settle(s):
    s.wait(PATIENCE)
    return s


def rehearse(s, until, script=None):
    """Train to ``until`` examples; ``script``: examples seen → (control, value), or several of them."""
    acts = {
        at: lambda moves=moves: [s.move(*m) for m in ([moves] if isinstance(moves, tuple) else moves)]
        for at, moves in (script or {}).items()
    }
    s.rehearse(acts, until)
    return settle(s)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def of(s, run="this run"):
    """A run's history without the row before its first step."""
    return s.history.query("run == @run").dropna(subset="minibatch_loss").reset_index(drop=True)


def same(a, b):
    return all(torch.equal(w, b.weights()[name]) for name, w in a.weights().items())


def companion_threads():
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("companion-"))


# A run and its history

SWITCH = {200: ("batch_size", 48)}  # 25 steps of 8, then of 48 but for the 12 that end the first epoch
SIZES = [8] * 25 + [48] * 6 + [12] + [48] * 3


def test_a_session_starts_paused_at_the_initial_weights(start):
    s = start(seed=3)
    training = s.runs[0].training
    assert (s.playing, s.error, training.steps, s.previous) == (False, "", 0, None)
    assert same(training, Training(BLOBS, seeds=[3]))
    row = s.history
    assert len(row) == 1 and row["steps"][0] == 0 and math.isnan(row["minibatch_loss"][0])
    accuracy = training.evaluate()[1].item()
    assert row["test_accuracy"][0] == pytest.approx(accuracy, abs=1e-12)


def test_the_history_has_a_row_per_step(start):
    frame = of(rehearse(start(), 640, SWITCH))
    assert frame["steps"].tolist() == list(range(1, 36))
    assert frame["minibatch_size"].tolist() == SIZES
    assert frame["examples_seen"].tolist() == np.cumsum(SIZES).tolist()
    assert frame["seconds"].is_monotonic_increasing and frame["seconds"].iloc[0] > 0
    assert list(frame.columns) == ["steps", "examples_seen", "seconds", *(f"{n}_now" for n in LIVE), "minibatch_size",
                                   "minibatch_loss", *MEASURES, "run"]  # fmt: skip


def test_the_history_has_every_steps_loss(start):
    s, by_hand = rehearse(start(), 640, SWITCH), Training(BLOBS, batch_size=8, lr=0.05)
    by_hand.advance(steps=25, record=False).batch_size = 48
    expected = by_hand.advance(steps=10, record=False).take_losses()[1][:, 0]
    assert of(s)["minibatch_loss"].tolist() == expected.tolist()


def test_the_history_says_which_settings_each_step_was_taken_with(start):
    script = {80: ("lr", 0.01), 160: [("batch_size", 16), ("momentum", 0.5)], 240: ("lr", 0.2)}
    frame = of(rehearse(start(), 320, script))
    assert frame["batch_size_now"].tolist() == [8] * 20 + [16] * 10
    assert frame["lr_now"].tolist() == [0.05] * 10 + [0.01] * 10 + [0.01] * 5 + [0.2] * 5
    assert frame["momentum_now"].tolist() == [0.0] * 20 + [0.5] * 10


def test_measures_are_in_the_rows_of_the_steps_they_were_taken_at(start):
    s, by_hand = rehearse(start(batch_size=50), 4000), Training(BLOBS, batch_size=50, lr=0.05)
    measured = s.history.dropna(subset="test_accuracy").set_index("steps")
    assert measured.index.tolist() == [*range(0, 81, 2)]  # at 40 places, and before the first step
    for step in range(81):
        if step in measured.index:
            loss, accuracy = by_hand.evaluate()
            assert measured["test_loss"][step] == pytest.approx(loss.item(), rel=1e-5)
            assert measured["test_accuracy"][step] == pytest.approx(accuracy.item(), abs=1e-12)
            norm = pytest.approx(by_hand.gradient_norm().item(), nan_ok=True)
            assert measured["gradient_norm"][step] == norm
        by_hand.step()


def test_accuracy_is_measured_on_the_same_draw_of_the_test_set(start):
    first, second = (start(test_examples=100) for _ in range(2))
    assert first.test.size == second.test.size == 100
    assert all(torch.equal(a, b) for one, two in zip(first.test.batches, second.test.batches) for a, b in zip(one, two))
    drawn = torch.cat([inputs for inputs, _ in first.test.batches])
    assert len({tuple(x) for x in drawn.tolist()} & {tuple(x) for x in TEST_POINTS.tolist()}) == 100
    assert start(test_examples=10_000).test.size == 500


def test_the_noise_scale_is_a_ratio_of_decaying_sums(start):
    s = start()
    fresh = Run(s.runs[0].training, s.settings)
    assert math.isnan(fresh.noise.value) and fresh.history().empty
    weights, found = [], []
    for _ in range(3):
        training = s.runs[0].training
        probe = torch.randint(500, (128,), generator=torch.Generator().manual_seed(training.steps))
        found.append(noise.statistics(training.stack, *BLOBS.dataset.batch(probe)))
        weights = [0.9 * w for w in weights] + [1.0]
        variance, squared = (sum(w * pair[i].item() for w, pair in zip(weights, found)) for i in (0, 1))
        assert s.runs[0].noise.value == pytest.approx(variance / squared if squared > 0 else math.inf, rel=1e-6)
        s.step()
        settle(s)
    s.runs[0].noise._sums = np.array([1.0, 2.0, -0.1])
    assert s.runs[0].noise.value == math.inf


def test_the_picture_of_the_plane_is_its_decision_regions_top_row_first(start):
    s = rehearse(start(lr=0.1), 2000)
    regions, training = s.runs[0].picture["regions"], s.runs[0].training
    low, high = POINTS.min(0).values - 1, POINTS.max(0).values + 1
    corners = torch.stack([torch.stack([x[0], y[1]]) for y in (high, low) for x in (low, high)])
    classes = training.stack.outputs(corners)[0].argmax(1).tolist()
    assert regions.shape == (60, 60)
    assert [regions[0, 0], regions[0, -1], regions[-1, 0], regions[-1, -1]] == classes
    assert len(set(classes)) > 1


def test_the_picture_of_images_is_what_is_misclassified_now(start):
    s = start(IMAGES, batch_size=32)
    found = rehearse(s, 320).runs[0].picture["mistakes"]
    inputs, targets = (torch.cat(part) for part in zip(*s.test.batches))
    guesses = s.runs[0].training.stack.outputs(inputs)[0].argmax(1)
    wrong = (guesses != targets).nonzero()[:12, 0]
    assert [(truth, guess) for _, truth, guess in found] == list(zip(targets[wrong].tolist(), guesses[wrong].tolist()))
    assert len(found) == 12
    np.testing.assert_array_equal([image for image, _, _ in found], inputs[wrong, 0])


def test_stretches_of_equal_settings_have_the_spread_of_their_loss_at_both_ends(start):
    s = rehearse(start(), 4000, {2000: ("batch_size", 40)})
    found, frame = s.runs[0].stretches(), of(s)
    assert found[["batch_size", "steps"]].values.tolist() == [[8, 252], [40, 52]]  # an epoch ends with 4, or with 20
    for row, losses in zip(found.itertuples(), (frame["minibatch_loss"][:252], frame["minibatch_loss"][252:])):
        for spread, part in ((row.spread_first, losses[:100]), (row.spread_last, losses[-100:])):
            differences = np.diff(part)
            assert spread == pytest.approx(math.sqrt(differences.var(ddof=1) / 2))


# Moves


def test_a_scripted_move_acts_at_exactly_that_number_of_examples(start):
    s = rehearse(start(), 640, {200: ("batch_size", 16), 201: ("lr", 0.01)})
    first, second = s.runs[0].moves
    assert (first.name, first.value, first.steps, first.examples_seen) == ("batch_size", 16, 25, 200)
    assert (second.name, second.value, second.steps, second.examples_seen) == ("lr", 0.01, 26, 216)
    for move in (first, second):
        assert move.asked_steps <= move.steps and move.asked_at <= move.acted_at
        assert move.batch_size == 16
    assert of(s)["minibatch_size"].tolist()[24:27] == [8, 16, 16]
    assert of(s)["lr_now"].tolist()[24:27] == [0.05, 0.05, 0.01]


def test_a_move_while_it_plays_acts_on_a_step_not_before_it_was_asked(start):
    s = start()
    s.play()
    for size in (32, 4, 16):
        before = s.runs[0].training.steps
        until(lambda before=before: s.runs[0].training.steps > before + 5)
        s.move("batch_size", size)
    until(lambda: s.runs[0].moves and s.runs[0].moves[-1].value == 16)
    s.pause()
    settle(s)
    moves = s.runs[0].moves
    assert [m.value for m in moves] == [32, 4, 16]
    sizes = of(s)["minibatch_size"]
    starts = of(s)["examples_seen"] - sizes
    for move, end in zip(moves, [*(m.steps for m in moves[1:]), s.runs[0].training.steps]):
        assert 0 < move.asked_steps <= move.steps
        for taken, seen in zip(sizes[move.steps : end], starts[move.steps : end]):
            assert taken == min(move.value, 500 - seen % 500)


def test_of_several_moves_before_one_step_the_last_acts(start):
    s = start()
    for size in (16, 32, 64):
        s.move("batch_size", size)
    s.step()
    assert of(settle(s))["minibatch_size"].tolist() == [64]
    assert [(m.value, m.steps) for m in s.runs[0].moves] == [(64, 0)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", 501), ("batch_size", 1.5), ("batch_size", "8"), ("batch_size", None),
     ("pinned_batch_size", 0), ("pinned_batch_size", 501), ("lr", 0), ("lr", math.nan), ("lr", "x"), ("momentum", 1),
     ("momentum", -0.1), ("momentum", None), ("optimizer", "lion"), ("problem", "cifar"), ("problem", "x on blobs"),
     ("epochs_per_second", None), ("epochs_per_second", -1), ("epochs_per_second", math.nan),
     ("epochs_per_second", "fast"), ("seed", 3), ("nonsense", 1)],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_at_once(start, name, value):
    s = start()
    before = dict(s.settings)
    with pytest.raises(ValueError, match=r".+"):
        s.move(name, value)
    settle(s)
    assert (s.settings, s.error, s.builds) == (before, "", 1)


def test_a_momentum_is_refused_where_the_optimizer_has_none(start):
    s = start(optimizer="adam")
    with pytest.raises(ValueError, match="with sgd alone"):
        s.move("momentum", 0.5)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 501}, {"batch_size": None}, {"lr": -1}, {"momentum": 1}, {"optimizer": "lion"},
     {"momentum": 0.5, "optimizer": "adam"}, {"epochs_per_second": -1}],
)  # fmt: skip
def test_settings_that_cannot_be_trained_start_no_thread(start, settings):
    with pytest.raises(ValueError, match=r".+"):
        start(**settings)
    assert companion_threads() == []


# The code that repeats it


def repeat(s):
    """Run the cell of a session."""
    found = {}
    exec(s.code(), found)
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_cell_repeats_the_run_to_the_bit(start, optimizer):
    script = {200: ("batch_size", 48), 333: [("lr", 0.02), ("batch_size", 5)], 700: ("lr", 0.1)}
    s = rehearse(start(optimizer=optimizer, lr=0.01, seed=2), 1300, script)
    found = repeat(s)["training"]
    assert (found.steps, found.examples_seen) == (s.runs[0].training.steps, s.runs[0].training.examples_seen)
    assert same(found, s.runs[0].training)


def test_the_cell_repeats_moves_before_the_first_step_and_of_momentum(start):
    s = start(momentum=0.3)
    for name, value in [("batch_size", 16), ("lr", 0.02), ("momentum", 0.9), ("lr", 0.03)]:
        s.move(name, value)
    rehearse(settle(s), 900, {200: ("momentum", 0.5), 400: ("momentum", 0.0), 600: ("momentum", 0.8)})
    found = repeat(s)["training"]
    assert found.batch_size == 16 and found.lr == 0.03
    assert same(found, s.runs[0].training)


def test_the_cell_repeats_a_pinned_run_too(start):
    s = start(momentum=0.5)
    s.move("lr", 0.03)
    script = {200: ("batch_size", 48), 333: ("pinned_batch_size", 10), 400: [("lr", 0.02), ("momentum", 0.8)],
              600: ("batch_size", 4), 700: ("pinned_batch_size", 25)}  # fmt: skip
    rehearse(s, 1000, script)
    found = repeat(s)
    for name, run in zip(("training", "pinned"), s.runs):
        assert found[name].steps == run.training.steps
        assert same(found[name], run.training)
    assert s.runs[1].training.batch_size == 25


def test_the_cell_repeats_a_run_that_was_pinned_before_the_first_step(start):
    s = start()
    s.move("pinned_batch_size", 40)
    rehearse(settle(s), 600)
    found = repeat(s)
    assert found["pinned"].batch_size == 40
    assert same(found["pinned"], s.runs[1].training)


def test_the_cell_repeats_a_momentum_that_went_through_0_between_two_steps(start):
    s = start(momentum=0.9)
    for _ in range(5):
        s.step()
    settle(s)
    for momentum in (0.0, 0.9):  # which forgets what had built up
        s.move("momentum", momentum)
    for _ in range(3):
        s.step()
    settle(s)
    assert same(repeat(s)["training"], s.runs[0].training)


def test_the_cell_repeats_moves_to_numpys_numbers(start):
    s = start()
    s.move("batch_size", np.int64(16))
    s.step()
    settle(s)
    s.move("lr", np.float64(0.02))
    s.step()
    settle(s)
    assert same(repeat(s)["training"], s.runs[0].training)


def test_the_cell_of_a_run_that_has_not_begun_is_its_initial_weights(start):
    found = repeat(start(problems.named("blobs", "brownlee_mlp", num_train=100)))["training"]
    assert found.steps == 0 and found.dataset.num_train == 100


# Starting over


def test_reset_repeats_the_losses_to_the_bit_and_keeps_the_run_as_the_previous_one(start):
    s = rehearse(start(), 400)
    first, old = of(s)["minibatch_loss"], s.runs[0]
    s.reset()
    settle(s)
    assert (s.runs[0].training.steps, s.previous, s.builds) == (0, old, 2)
    rehearse(s, 400)
    assert of(s)["minibatch_loss"].equals(first)
    assert of(s, "previous")["minibatch_loss"].equals(first)
    assert s.history["run"].unique().tolist() == ["previous", "this run"]


def test_reset_keeps_the_settings_that_were_moved_and_the_pinned_run(start):
    s = start()
    for name, value in [("batch_size", 16), ("lr", 0.01), ("pinned_batch_size", 50)]:
        s.move(name, value)
    rehearse(settle(s), 200)
    s.reset()
    settle(s)
    assert [(r.training.batch_size, r.training.lr, r.training.steps) for r in s.runs] == [(16, 0.01, 0), (50, 0.01, 0)]


def test_a_run_without_a_step_is_no_previous_one(start):
    s = rehearse(start(), 80)
    old = s.runs[0]
    for _ in range(2):
        s.reset()
        settle(s)
    assert s.previous is old


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [("optimizer", "adam", True), ("problem", "brownlee_mlp on digits", False)],
)
def test_the_previous_run_stays_where_the_two_compare(start, name, value, kept):
    s = rehearse(start([BLOBS, DIGITS]), 80)
    s.reset()
    rehearse(settle(s), 80)
    old = s.runs[0]
    s.move(name, value)
    settle(s)
    assert s.settings[name] == value and s.runs[0].training.steps == 0
    assert s.previous is (old if kept else None)


def test_changing_the_data_clips_batch_sizes(start):
    s = start([DIGITS, BLOBS], batch_size=1024)
    s.move("pinned_batch_size", 1000)
    s.move("problem", "brownlee_mlp on blobs")
    settle(s)
    assert (s.settings["batch_size"], s.pinned_batch_size) == (500, 500)
    assert [r.training.batch_size for r in s.runs] == [500, 500]
    assert s.runs[0].training.problem is s.problem is BLOBS


def test_an_optimizer_without_momentum_starts_without(start):
    s = start(momentum=0.9)
    s.move("optimizer", "adam")
    settle(s)
    assert s.settings["momentum"] == 0 and s.runs[0].training.optimizer == "adam"


# Steps, and a second run beside it


def test_the_step_button_steps_once(start):
    s = start()
    for steps in (1, 2, 3):
        s.step()
        settle(s)
        assert s.runs[0].training.steps == steps and not s.playing
    assert s.history["steps"].tolist() == [0, 1, 2, 3]
    assert s.history["test_accuracy"].notna().all()  # up to date whenever it rests


def test_a_step_while_it_plays_pauses_it(start):
    s = start()
    s.play()
    until(lambda: s.runs[0].training.steps > 5)
    s.step()
    settle(s)
    assert not s.playing


def test_a_step_with_a_pinned_run_lets_that_catch_up(start):
    s = start(batch_size=40)
    s.move("pinned_batch_size", 16)
    for seen in ([40, 48], [80, 80], [120, 128]):
        s.step()
        settle(s)
        assert [run.training.examples_seen for run in s.runs] == seen


def test_a_pinned_run_is_fed_the_same_examples_in_lockstep(start):
    s, fed = start(batch_size=8), {}
    s.move("pinned_batch_size", 20)
    settle(s)
    gaps = []
    for run in s.runs:
        step, mine = run.training.step, fed.setdefault(run, [])

        def spy(training=run.training, step=step, mine=mine):
            mine.extend(training.next_indices()[0].tolist())
            step()
            gaps.append(abs(s.runs[0].training.examples_seen - s.runs[1].training.examples_seen))

        run.training.step = spy
    rehearse(s, 1200)
    one, two = fed.values()
    n = min(len(one), len(two))
    assert n >= 1180 and one[:n] == two[:n]
    assert one[:500] == epoch_order(500, 0, 0).tolist()
    assert max(gaps) <= 20


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"optimizer": "adam", "lr": 0.005}], ids=["sgd", "adam"])
def test_a_pinned_run_equals_one_trained_straight_through(start, settings):
    s = rehearse(start(**settings), 1000, {200: ("pinned_batch_size", 50)})
    straight = Training(BLOBS, batch_size=8, **({"lr": 0.05} | settings)).advance(steps=25)
    straight.batch_size = 50
    main, pinned = s.runs
    straight.advance(steps=pinned.training.steps - 25, record=False)
    assert same(straight, pinned.training)
    assert of(s, "pinned")["steps"].tolist() == list(range(26, pinned.training.steps + 1))
    assert of(s, "pinned")["batch_size_now"].eq(50).all() and of(s)["batch_size_now"].eq(8).all()
    without = rehearse(start(**settings), 1000)
    assert same(without.runs[0].training, main.training)  # the pinned one does not touch it


def test_lr_moves_both_runs_and_each_batch_size_its_own(start):
    s = start()
    for name, value in [("pinned_batch_size", 50), ("lr", 0.02), ("batch_size", 4), ("pinned_batch_size", 60)]:
        s.move(name, value)
    settle(s)
    assert [(r.training.batch_size, r.training.lr) for r in s.runs] == [(4, 0.02), (60, 0.02)]


def test_unpinning_ends_the_second_run(start):
    s = rehearse(start(), 300, {100: ("pinned_batch_size", 50)})
    assert list(s.named_runs()) == ["this run", "pinned"]
    s.move("pinned_batch_size", None)
    settle(s)
    assert list(s.named_runs()) == ["this run"] and s.pinned_batch_size is None
    s.reset()
    assert len(settle(s).runs) == 1


# What goes wrong


def boom():
    raise OSError("no <b>luck</b>")


def test_what_fails_in_the_thread_is_in_error_and_raised_by_wait_until_a_reset(start):
    s = rehearse(start(), 80)
    s.runs[0].training.step = boom
    s.play()
    for _ in range(2):
        with pytest.raises(OSError, match="luck"):
            s.wait(PATIENCE)
    assert s.error.splitlines()[-1] == "OSError: no <b>luck</b>" and not s.playing
    for control in (s.play, s.step):
        control()
        with pytest.raises(OSError, match="luck"):
            s.wait(PATIENCE)
        assert (s.runs[0].training.steps, s.playing) == (10, False)
    s.reset()
    assert settle(s).error == ""
    assert rehearse(s, 80).runs[0].training.steps == 10


def test_a_rehearsal_that_fails_is_forgotten(start):
    s = start()
    s.rehearse({40: boom, 80: lambda: s.move("batch_size", 64)}, 100_000)
    with pytest.raises(OSError, match="luck"):
        s.wait(PATIENCE)
    s.reset()
    settle(s)
    s.play()
    until(lambda: s.runs[0].training.examples_seen > 400)
    s.pause()
    settle(s)
    assert s.runs[0].moves == []
    assert s._measure_every is None  # by the clock again


def test_a_problem_that_cannot_be_trained_leaves_the_session_as_it_was(start):
    wide = Problem(BLOBS.dataset, Net(lambda: torch.nn.Linear(3, 3), key="wide"))
    s = rehearse(start([BLOBS, wide]), 80)
    run, settings = s.runs[0], dict(s.settings)
    s.move("problem", "wide on blobs")
    with pytest.raises(ValueError, match="the net cannot take this data"):
        s.wait(PATIENCE)
    assert "cannot take this data" in s.error
    assert (s.runs, s.settings, s.problem, s.builds) == ((run,), settings, BLOBS, 1)
    s.reset()
    assert rehearse(settle(s), 80).error == ""


def test_a_divergence_pauses_and_is_noted_at_its_step(start):
    s = start(batch_size=50, lr=1e3)
    s.play()
    settle(s)
    run, losses = s.runs[0], of(s)["minibatch_loss"]
    assert run.diverged and s.error == ""
    by_hand = Training(BLOBS, batch_size=50, lr=1e3).advance(steps=run.training.steps, record=False)
    first = int((~by_hand.take_losses()[1][:, 0].isfinite()).int().argmax()) + 1
    assert run.training.diverged_at.item() == first
    assert len(losses) >= first - 1 and losses[: first - 1].map(math.isfinite).all()  # of() drops those that are NaN
    steps = run.training.steps
    s.play()
    s.step()
    assert settle(s).runs[0].training.steps == steps
    s.move("lr", 0.05)
    s.reset()
    rehearse(settle(s), 500)
    assert not s.runs[0].diverged and of(s)["lr_now"].eq(0.05).all()


def test_a_pinned_run_that_diverges_pauses_both(start):
    s = start()
    s.move("pinned_batch_size", 16)
    settle(s)
    with torch.no_grad():
        s.runs[1].training.stack.parameters["head.weight"][:] = math.nan
    s.play()
    settle(s)
    assert [run.diverged for run in s.runs] == [False, True] and not s.playing


def test_waiting_for_what_does_not_end_times_out(start):
    s = start()
    s.play()
    with pytest.raises(TimeoutError, match=r"still training after 0.01 s"):
        s.wait(0.01)
    s.pause()
    settle(s)


def test_pause_right_after_play_leaves_it_paused(start):
    s = settle(start())
    with s._changed:  # so that the thread, which waits for a wish, sees both at once
        s.play()
        s.pause()
    s.wait(10)
    assert not s.playing and s.runs[0].training.steps == 0


# States


def test_every_transition_leads_to_a_declared_state_and_closed_is_the_end():
    states = {"ready", "playing", "paused", "diverged", "failed", "closed"}
    for acts in TRANSITIONS.values():
        assert set(acts) <= states - {"closed"} and set(acts.values()) <= states
    for event in ("fail", "start over", "close"):
        assert set(TRANSITIONS[event]) == states - {"closed"}


def test_a_session_goes_through_its_states(start):
    s = start(batch_size=50)
    found = [s.state]

    def note():
        settle(s)
        found.append(s.state)

    for act in (s.step, s.reset, s.play):
        act()
        if act != s.play:
            note()
    until(lambda: s.playing)
    s.reset()
    until(lambda: s.builds == 3)
    assert s.playing  # a reset while it plays goes on from the start
    s.pause()
    note()
    s.move("lr", 1e3)
    s.play()
    note()
    s.move("pinned_batch_size", 50)
    note()
    s.close()
    assert [*found, s.state] == ["ready", "paused", "ready", "paused", "diverged", "diverged", "closed"]


def test_unpinning_a_run_that_diverged_lets_the_other_go_on(start):
    s = start()
    s.move("pinned_batch_size", 16)
    settle(s)
    with torch.no_grad():
        s.runs[1].training.stack.parameters["head.weight"][:] = math.nan
    s.step()
    assert settle(s).state == "diverged"
    s.move("pinned_batch_size", None)
    assert settle(s).state == "paused"
    s.step()
    assert settle(s).runs[0].training.steps == 2


# The thread


def test_closing_ends_the_thread_and_its_wishes(start):
    s = start()
    assert companion_threads() == ["companion-trainer"]
    s.play()
    until(lambda: s.runs[0].training.steps > 5)
    s.close()
    s.close()
    assert companion_threads() == []
    assert not s.playing
    s.wait(PATIENCE)
    for control in (s.play, s.step, s.reset, lambda: s.move("lr", 0.1)):
        with pytest.raises(RuntimeError, match="closed"):
            control()


def test_the_threads_that_torch_uses_are_given_back(start):
    before = torch.get_num_threads()
    s = start()
    rehearse(s, 40)
    assert s.threads == max(1, before - 1)
    s.close()
    assert torch.get_num_threads() == before


def test_the_pace_bounds_progress(start):
    s = start(epochs_per_second=0.8)
    began = time.monotonic()
    s.play()
    until(lambda: s.runs[0].training.examples_seen >= 160)
    s.pause()
    settle(s)
    assert s.runs[0].training.examples_seen <= 400 * (time.monotonic() - began) + 2 * 8


def test_the_pace_may_change_while_it_plays(start):
    s = start(epochs_per_second=2e-5)  # a step in 800 seconds
    s.play()
    until(lambda: s.runs[0].training.steps == 1)
    s.move("epochs_per_second", 0)
    until(lambda: s.runs[0].training.steps > 20)


def test_a_rehearsal_gives_the_same_history_twice(start):
    script = {200: ("batch_size", 48), 333: ("pinned_batch_size", 10), 600: [("lr", 0.02), ("batch_size", 5)]}
    first, second = (rehearse(start(batch_size=4), 2000, script) for _ in range(2))
    pd.testing.assert_frame_equal(*(s.history.drop(columns="seconds") for s in (first, second)))
    assert first.history["test_accuracy"].notna().sum() > 50
    assert [run.noise.value for run in first.runs] == [run.noise.value for run in second.runs]


def test_a_rehearsal_ends_at_the_first_step_that_reaches_its_end(start):
    assert rehearse(start(batch_size=32), 100).runs[0].training.examples_seen == 128


# What is kept


@pytest.mark.parametrize("width", [1, 37, 64, 500, 1000])
def test_a_curve_never_has_more_bins_than_it_may_and_loses_nothing(width):
    curve, values = Curve(), np.random.default_rng(0).normal(size=2_000)
    for step, value in enumerate(values, start=1):
        curve.add((step * width, step, step / 100), value)
        assert len(curve.bins) <= Curve.LENGTH
    bins = np.array(curve.bins)
    assert bins[:, 3].sum() == 2_000 and bins[:, 4].sum() == pytest.approx(values.sum())
    assert (bins[-1][:3] == (2_000 * width, 2_000, 20)).all()
    ends = bins[:, 1].astype(int)
    for first, last, one in zip([0, *ends], ends, bins):
        part = values[first:last]
        assert (one[3], one[5], one[6]) == (len(part), part.min(), part.max())
        assert one[4] == pytest.approx(part.sum())
    assert len(bins) >= Curve.LENGTH // 4


def test_what_is_not_finite_leaves_no_trace_in_a_curve():
    curve = Curve()
    for step, value in enumerate([math.nan, 1.0, math.inf, -math.inf, 3.0], start=1):
        curve.add((step, step, step), value)
    assert [one[0] for one in curve.bins] == [2, 5]
    assert [one[4] for one in curve.bins] == [1.0, 3.0]


def test_a_curves_frame_has_the_mean_of_each_bin(monkeypatch):
    monkeypatch.setattr(Curve, "LENGTH", 2)
    curve = Curve()
    for step, value in enumerate([1.0, 2.0, 6.0, 8.0], start=1):
        curve.add((step, 10 * step, 100 * step), value)
    assert curve.frame().to_dict("list") == {
        "examples_seen": [2, 4], "steps": [20, 40], "seconds": [200, 400], "mean": [1.5, 7.0], "low": [1.0, 6.0],
        "high": [2.0, 8.0],
    }  # fmt: skip
    assert Curve().frame().empty


def test_a_runs_curves_have_every_loss_and_every_measure(start):
    s = rehearse(start(), 1200)
    curves, frame = s.runs[0].curves, of(s)
    assert sum(one[3] for one in curves["minibatch_loss"].bins) == len(frame)
    assert sum(one[4] for one in curves["minibatch_loss"].bins) == pytest.approx(frame["minibatch_loss"].sum())
    for name in ("test_accuracy", "gradient_norm"):
        assert sum(one[3] for one in curves[name].bins) == s.history[name].notna().sum()
