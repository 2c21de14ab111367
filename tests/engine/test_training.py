import functools
import math
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from oracles import mlp_gradient, mlp_loss, one_replica, squared_norm

from helpers import Dataset, Net, Problem, Training, problems, schedule
from helpers.engine.order import epoch_order
from helpers.engine.schedules import Schedule
from helpers.measure import geometry
from helpers.problems import LOSSES, nets

BLOBS = problems.load("blobs", device="cpu")
DIGITS = problems.load("digits", device="cpu")


def plane(num_train):
    """A dataset of points in the plane, in two classes."""
    x = torch.randn(num_train, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return Dataset.of(x, y, x[:10], y[:10], name="plane", device="cpu")


def train(dataset=BLOBS, model="brownlee_mlp", *, loss="cross_entropy", norm="none", norm_batch_size=None, **settings):
    options = {"norm": norm, "norm_batch_size": norm_batch_size}
    net = functools.partial(nets.NETS[model], dataset.input_shape, dataset.num_classes, **options)
    if dataset.train_inputs.dtype == torch.float64:
        return Training(Problem(dataset, Net(lambda: net().double()), LOSSES[loss]), **settings)
    return Training(Problem(dataset, Net(net), LOSSES[loss]), **settings)


def minibatch(training, replica=0):
    """Inputs and targets of the next step, in float64."""
    indices = training.next_indices()[replica]
    return training.dataset.train_inputs[indices].double().numpy(), training.dataset.train_targets[indices].numpy()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    return history.drop(columns="seconds")


# Steps and epochs


@pytest.mark.parametrize(("batch_size", "steps"), [(64, 938), (256, 235), (1024, 59)])
def test_an_epoch_of_60000_examples_takes_the_write_ups_number_of_steps(batch_size, steps):
    training = train(plane(60_000), batch_size=batch_size).advance(epochs=1, record=False)
    assert (training.steps, training.examples_seen) == (steps, 60_000)


def test_the_short_last_minibatch_is_kept():
    training, seen = train(plane(10), batch_size=4), []
    for _ in range(4):
        seen.append(training.examples_seen)
        training.step()
    assert seen == [0, 4, 8, 10]


@pytest.mark.parametrize("batch_sizes", [(8, 32), (7, 500)])
def test_runs_at_two_batch_sizes_see_the_same_examples_in_the_same_order(batch_sizes):
    seen = []
    for batch_size in batch_sizes:
        training, mine = train(seeds=[3, 4], batch_size=batch_size), []
        while training.epoch < 2:
            mine.append(training.next_indices())
            training.step()
        seen.append(torch.cat(mine, dim=1))
    assert torch.equal(*seen)
    assert not torch.equal(seen[0][0], seen[0][1])  # another seed, another order
    assert not torch.equal(seen[0][:, :500], seen[0][:, 500:])  # another epoch, another order


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 37), min_size=1, max_size=12))
def test_changing_the_batch_size_neither_skips_nor_repeats_an_example(sizes):
    training, seen = train(plane(37), seeds=[5], batch_size=1), []
    while training.epoch < 2:
        training.batch_size = sizes[training.steps % len(sizes)]
        seen += training.next_indices()[0].tolist()
        training.step()
    assert seen == [*epoch_order(37, 5, 0).tolist(), *epoch_order(37, 5, 1).tolist()]


def test_advance_takes_epochs_or_steps():
    training = train(batch_size=100)
    assert training.advance(steps=3, record=False).steps == 3
    assert training.advance(epochs=1, record=False).epoch == pytest.approx(1.6)
    for bad in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(ValueError, match="either epochs or steps"):
            training.advance(**bad)


# Updates against explicit float64 arithmetic


@pytest.mark.parametrize("dataset", [BLOBS, DIGITS], ids=["blobs", "digits"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_step_moves_the_weights_by_lr_times_the_mean_gradient(dataset, batch_size):
    training = train(dataset, seeds=[0, 1], batch_size=batch_size, lr=0.1)
    training.advance(steps=3, record=False)
    before, minibatches = training.weights(), [minibatch(training, replica) for replica in range(2)]
    training.step()
    for replica in range(2):
        old, new = (one_replica(w, replica) for w in (before, training.weights()))
        for name, g in mlp_gradient(old, *minibatches[replica]).items():
            np.testing.assert_allclose(new[name] - old[name], -0.1 * g, rtol=1e-4, atol=1e-6, err_msg=name)


def test_momentum_accumulates_the_gradients():
    training = train(batch_size=20, lr=0.05, momentum=0.9)
    w = one_replica(training.weights())
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for _ in range(3):
        gradient = mlp_gradient(w, *minibatch(training))
        for name, g in gradient.items():
            v[name] = 0.9 * v[name] + g
            w[name] -= 0.05 * v[name]
        training.step()
    for name, value in one_replica(training.weights()).items():
        np.testing.assert_allclose(value, w[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adams_first_step_moves_each_weight_by_lr_against_its_gradients_sign(optimizer):
    training = train(batch_size=50, lr=0.003, optimizer=optimizer)
    before = one_replica(training.weights())
    gradient = mlp_gradient(before, *minibatch(training))
    training.step()
    for name, after in one_replica(training.weights()).items():
        clear = np.abs(gradient[name]) > 1e-4
        assert clear.any()
        np.testing.assert_allclose((after - before[name])[clear], -0.003 * np.sign(gradient[name])[clear], rtol=1e-3)


def test_adam_follows_its_recursion_with_the_betas_given():
    training = train(batch_size=25, lr=0.01, optimizer="adam", betas=(0.8, 0.95))
    w = one_replica(training.weights())
    m, v = ({name: np.zeros_like(value) for name, value in w.items()} for _ in range(2))
    for t in (1, 2, 3):
        for name, g in mlp_gradient(w, *minibatch(training)).items():
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            w[name] -= 0.01 * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
        training.step()
    for name, value in one_replica(training.weights()).items():
        np.testing.assert_allclose(value, w[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_weight_decay_shrinks_the_weights():
    training = train(batch_size=50, lr=0.1, weight_decay=0.5)
    old = one_replica(training.weights())
    gradient = mlp_gradient(old, *minibatch(training))
    training.step()
    for name, new in one_replica(training.weights()).items():
        np.testing.assert_allclose(new, old[name] - 0.1 * (gradient[name] + 0.5 * old[name]), rtol=1e-4, atol=1e-6)


# Settings that change while it trains


def test_batch_size_and_lr_set_between_steps_act_on_the_next_one():
    training = train(batch_size=100, lr=0.1)
    training.step()
    training.batch_size, training.lr = 7, 0.02
    assert (training.batch_size, training.lr) == (7, 0.02)
    old = one_replica(training.weights())
    gradient = mlp_gradient(old, *minibatch(training))
    training.step()
    assert training.examples_seen == 107
    new = one_replica(training.weights())
    np.testing.assert_allclose(new["head.bias"] - old["head.bias"], -0.02 * gradient["head.bias"], rtol=1e-3, atol=1e-7)


def test_a_schedule_holds_each_value_from_its_epoch_on():
    switch = schedule({30: 64, 0: 1024})
    assert [switch(e) for e in (0, 29.99, 30, 99)] == [1024, 1024, 64, 64]
    assert str(switch) == "1024@0→64@30"


def test_a_linear_schedule_joins_its_points_by_lines():
    warmup = schedule({0: 0.1, 4: 0.5, 6: 0.3}, linear=True)
    np.testing.assert_allclose([warmup(e) for e in (0, 1, 4, 5, 6, 99)], [0.1, 0.2, 0.5, 0.4, 0.3, 0.3])
    assert str(warmup) == "0.1@0~0.5@4~0.3@6"


@pytest.mark.parametrize("points", [{}, {1: 64}, {-1: 8, 1: 64}])
def test_a_schedule_begins_at_epoch_0(points):
    with pytest.raises(ValueError, match="begins at epoch 0"):
        schedule(points)


@pytest.mark.parametrize("linear", [False, True], ids=["in steps", "linear"])
@pytest.mark.parametrize("end", [2, 5, 20])
def test_the_part_of_a_schedule_before_an_epoch_has_the_schedules_values(end, linear):
    whole = schedule({0: 1.0, 2: 4.0, 8: 2.0}, linear=linear)
    part = whole.until(end)
    for epoch in np.arange(0, end, 0.25):
        value = part(epoch) if isinstance(part, Schedule) else part
        assert value == pytest.approx(whole(epoch)), epoch


def test_schedules_that_agree_before_an_epoch_have_the_same_part_there():
    assert schedule({0: 1024, 2: 64}).until(2) == schedule({0: 1024, 3: 8}).until(2) == 1024
    assert schedule({0: 8, 1: 4, 3: 2}).until(3) == schedule({0: 8, 1: 4}) == schedule({0: 8, 1: 4, 5: 1}).until(4)


def test_a_scheduled_batch_size_acts_at_the_first_step_of_its_epoch():
    training, sizes = train(batch_size=schedule({0: 100, 0.5: 50, 2: 200})), []
    while training.epoch < 3:
        before = training.examples_seen
        training.step()
        sizes.append(training.examples_seen - before)
    assert sizes == [*[100] * 3, *[50] * 4, *[50] * 10, 200, 200, 100]


@pytest.mark.parametrize("linear", [False, True], ids=["in steps", "linear"])
def test_a_scheduled_lr_acts_on_each_step(linear):
    training, moved = train(batch_size=100, lr=schedule({0: 0.1, 1: 0.6}, linear=linear)), []
    for _ in range(7):
        old = one_replica(training.weights())
        gradient = mlp_gradient(old, *minibatch(training))["head.bias"]
        training.step()
        step = one_replica(training.weights())["head.bias"] - old["head.bias"]
        moved.append(-step @ gradient / (gradient @ gradient))
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6] if linear else [*[0.1] * 5, 0.6, 0.6]
    np.testing.assert_allclose(moved, expected, rtol=1e-3)


# Replicas


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adam"}])
def test_a_stack_of_seeds_equals_single_runs(options):
    stack = train(seeds=range(5), batch_size=60, **options).advance(epochs=2)
    for replica in range(5):
        single = train(seeds=[replica], batch_size=60, **options).advance(epochs=2)
        for name, w in single.weights().items():
            torch.testing.assert_close(w[0], stack.weights()[name][replica], rtol=1e-4, atol=1e-5)
        mine = stack.history.query("seed == @replica")
        np.testing.assert_allclose(mine["test_loss"], single.history["test_loss"], rtol=1e-4)


def test_a_stack_of_large_networks_equals_single_runs_to_the_bit():
    stack = train(DIGITS, "shen_mlp", seeds=[0, 1, 2]).advance(steps=4)
    for replica in range(3):
        single = train(DIGITS, "shen_mlp", seeds=[replica]).advance(steps=4)
        assert all(torch.equal(w[0], stack.weights()[name][replica]) for name, w in single.weights().items())


def test_two_runs_are_identical_to_the_bit():
    first, second = (train(seeds=[0, 1], batch_size=30, momentum=0.9).advance(epochs=2) for _ in range(2))
    assert same(first.weights(), second.weights())
    assert without_seconds(first.history).equals(without_seconds(second.history))


# Divergence


def test_divergence_is_recorded_at_the_first_step_whose_loss_is_not_finite():
    by_hand = train(batch_size=50, lr=1e3)
    while True:
        logits = by_hand.stack.kernel(BLOBS.train_inputs[by_hand.next_indices()])[0]
        loss = torch.nn.functional.cross_entropy(logits, BLOBS.train_targets[by_hand.next_indices()[0]])
        if not loss.isfinite():
            break
        by_hand.step()
    history = train(batch_size=50, lr=1e3).advance(epochs=3).history
    assert by_hand.steps > 0
    assert history["diverged_at"].isna().tolist() == [True, False, False, False]
    assert set(history["diverged_at"][1:]) == {by_hand.steps + 1}
    assert history["test_loss"][1:].isna().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_replica_that_diverges_leaves_the_others_alone(poison):
    stack, single = (train(seeds=seeds, batch_size=50, momentum=0.9) for seeds in ([0, 1], [1]))
    with torch.no_grad():
        stack.stack.kernel.layers[0].weight[0] = poison
    histories = [training.advance(epochs=2).history.query("seed == 1") for training in (stack, single)]
    assert stack.history.query("seed == 0")["diverged_at"].iloc[-1] <= 1
    assert histories[0]["diverged_at"].isna().all()
    np.testing.assert_allclose(histories[0]["test_loss"], histories[1]["test_loss"], rtol=1e-4)
    for name, w in single.weights().items():
        torch.testing.assert_close(w[0], stack.weights()[name][1], rtol=1e-4, atol=1e-5)


# What is recorded


@pytest.mark.parametrize("batch_size", [64, 300])
def test_an_epochs_loss_is_averaged_by_examples(batch_size):
    history = train(batch_size=batch_size, lr=1e-12).advance(epochs=1).history
    assert history["minibatch_loss"].iloc[-1] == pytest.approx(history["train_loss"].iloc[0], rel=1e-6)


def test_evaluate_is_the_explicit_mean_of_losses_and_hits():
    training = train(seeds=[0, 1]).advance(steps=5, record=False)
    loss, accuracy = training.evaluate("test")
    inputs, targets = BLOBS.test_inputs.double().numpy(), BLOBS.test_targets.numpy()
    for replica in range(2):
        w = one_replica(training.weights(), replica)
        hidden = np.maximum(inputs @ w["layers.0.weight"].T + w["layers.0.bias"], 0)
        predicted = (hidden @ w["head.weight"].T + w["head.bias"]).argmax(1)
        assert loss[replica].item() == pytest.approx(mlp_loss(w, inputs, targets), rel=1e-5)
        assert accuracy[replica].item() == (predicted == targets).mean()


@pytest.mark.parametrize("num_train", [2_500, 4_001])
def test_evaluate_counts_every_example_of_a_set_larger_than_a_chunk(num_train):
    dataset = plane(num_train)
    training = train(dataset)
    logits = training.stack.outputs(dataset.train_inputs)[0]
    expected = torch.nn.functional.cross_entropy(logits, dataset.train_targets).item()
    assert training.evaluate("train")[0].item() == pytest.approx(expected, rel=1e-6)
    assert num_train > 2 * training.stack.chunk


def test_evaluating_does_not_change_the_training():
    quiet, recorded = (train(batch_size=50, momentum=0.9).advance(epochs=2, record=r) for r in (False, True))
    assert same(quiet.weights(), recorded.weights())
    assert len(recorded.history) == 3


def test_the_history_has_a_row_per_record_and_replica():
    training = train(seeds=[7, 3], batch_size=200, lr=0.05, measures=geometry.distances).advance(epochs=2)
    history = training.history
    assert history["seed"].tolist() == [7] * 3 + [3] * 3
    one = history.query("seed == 7")
    assert one["epochs"].tolist() == [0, 1, 2]
    assert one["steps"].tolist() == [0, 3, 6]
    assert one["examples_seen"].tolist() == [0, 500, 1000]
    assert one["seconds"].is_monotonic_increasing
    assert set(one["batch_size_now"]) == {200}
    assert set(one["lr_now"]) == {0.05}
    assert set(one["replicas"]) == {2}
    assert one["minibatch_loss"].isna().tolist() == [True, False, False]
    gap = history["train_accuracy"] - history["test_accuracy"]
    np.testing.assert_allclose(history["generalization_gap"], gap, atol=1e-12)
    assert history["test_accuracy"].between(0, 1).all()
    assert one["distance_from_init"].iloc[0] == 0
    assert one["distance_from_init"].iloc[-1] > 0


@pytest.mark.parametrize("lr", [0.05, (0.05, 1e9, 0.1)])
def test_the_history_is_the_records_value_by_value(lr):
    training = train(seeds=[3, 1, 3], batch_size=200, lr=lr, measures=geometry.distances).advance(epochs=2)
    rows = [
        {k: v[replica].item() if torch.is_tensor(v) else v for k, v in row.items()} | {"seed": seed, "replicas": 3}
        for replica, seed in enumerate([3, 1, 3])
        for row in training._history.rows
    ]
    pd.testing.assert_frame_equal(training.history, pd.DataFrame(rows), check_exact=True)
    resumed = train(seeds=[3, 1, 3], batch_size=200, lr=lr, measures=geometry.distances)
    resumed.resume(training.state(), training.history)
    pd.testing.assert_frame_equal(training.history, resumed.history, check_exact=True)
    assert list(training.history.dtypes) == list(resumed.history.dtypes)


@pytest.mark.parametrize(("split", "other"), [("test", "train"), ("train", "test")])
def test_a_record_of_one_split_leaves_the_other_out(split, other):
    both, one = (train(seeds=[0, 1], batch_size=50) for _ in range(2))
    both.advance(steps=5, record=False).record()
    one.advance(steps=5, record=False).record([split])
    measures = [f"{split}_loss", f"{split}_accuracy"]
    assert one.history[measures].equals(both.history[measures])
    assert one.history[[f"{other}_loss", f"{other}_accuracy", "generalization_gap"]].isna().all(axis=None)
    assert one.history.diverged_at.isna().all()
    with torch.no_grad():
        one.stack.kernel.head.weight[0] = math.nan
    one.record([split])
    assert one.diverged_at.tolist() == [5, pytest.approx(math.nan, nan_ok=True)]


def test_a_record_takes_an_evaluation_that_is_known(monkeypatch):
    training = train(seeds=[0, 1])
    known = {split: training.evaluate(split) for split in ("train", "test")}
    training.record()
    monkeypatch.setattr(training, "evaluate", None)
    training.record(known=known)
    first, second = (one.reset_index(drop=True) for _, one in training.history.groupby(training.history.index % 2))
    pd.testing.assert_frame_equal(first, second)


def test_record_steps_adds_records_counted_from_the_start():
    training = train(batch_size=200).advance(steps=2, record_steps=[1, 5]).advance(steps=4, record_steps=[1, 5])
    assert training.history["steps"].tolist() == [0, 1, 3, 5, 6]


# Going on from a state


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "adam"}], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_resumed_training_continues_to_the_bit(options, unit):
    def new():
        return train(seeds=[0, 4], batch_size=schedule({0: 60, 3: 20}), lr=schedule({0: 0.1, 3: 0.05}), **options)

    through, first, resumed = new(), new(), new()
    for training in (through, first):
        training.advance(**{unit: 2}).record()
    resumed.resume(first.state(), first.history)
    assert (resumed.steps, resumed.examples_seen) == (first.steps, first.examples_seen)
    for training in (through, resumed):
        training.advance(epochs=2)
    assert same(through.weights(), resumed.weights())
    assert without_seconds(through.history).equals(without_seconds(resumed.history))


def test_a_resumed_training_remembers_which_replica_diverged_and_when():
    first, resumed = (train(seeds=[0, 1], batch_size=50) for _ in range(2))
    first.advance(steps=3)
    with torch.no_grad():
        first.stack.kernel.head.weight[0] = math.nan
    first.advance(epochs=0.7).record()
    resumed.resume(first.state(), first.history)
    last = resumed.advance(epochs=1).history.groupby("seed")["diverged_at"].last
    assert last(skipna=False).tolist() == [4, pytest.approx(math.nan, nan_ok=True)]


def test_two_trainings_may_go_on_from_one_state():
    first = train(batch_size=50, optimizer="adam").advance(epochs=1)
    state, branches = first.state(), [train(batch_size=50, optimizer="adam") for _ in range(2)]
    for branch in branches:
        branch.resume(state, first.history)
        branch.advance(epochs=1)
    assert same(branches[0].weights(), branches[1].weights())


# What is refused


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, math.nan, math.inf, 501, "64", None])
def test_a_bad_batch_size_is_refused(batch_size):
    for attempt in (batch_size, Schedule(((0, 10), (1, batch_size)))):
        with pytest.raises(ValueError, match="whole number from 1 to 500"):
            train(batch_size=attempt)


def test_a_refused_batch_size_or_lr_leaves_the_old_one():
    training = train(batch_size=50, lr=0.1)
    for name, bad in (("batch_size", 501), ("lr", 0)):
        with pytest.raises(ValueError, match=name):
            setattr(training, name, bad)
    assert (training.batch_size, training.lr) == (50, 0.1)


@pytest.mark.parametrize("lr", [0, -1, math.nan, math.inf, "x", None, True])
def test_a_bad_lr_is_refused(lr):
    for attempt in (lr, Schedule(((0, 0.1), (1, lr)))):
        with pytest.raises(ValueError, match="finite number above 0"):
            train(lr=attempt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "no seeds"),
        ({"optimizer": "lion"}, "'lion'.*sgd, adam, adamw"),
        ({"momentum": 1}, "momentum is 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": math.nan}, "momentum is nan"),
        ({"momentum": 0.9, "optimizer": "adam"}, "with sgd alone"),
        ({"lr": [0.1, 0.2]}, "lr has 2 rates for 1 replicas; expected one a replica"),
        ({"clip_norm": 0}, "clip_norm is 0; expected a finite number above 0"),
        ({"optimizer": 3}, "optimizer is 3; expected one of sgd, adam, adamw, a class or a factory"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; expected a whole number from 1 to 500"),
        ({"micro_batch_size": 2.5}, "micro_batch_size is 2.5"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_shens_network_learns_mnist(mnist_root):
    mnist = problems.load("mnist", num_train=3_000, root=mnist_root, device="cpu")
    training = train(mnist, "shen_mlp", batch_size=64, measures=geometry.distances).advance(epochs=2)
    assert training.history["test_accuracy"].iloc[-1] > 0.75
    assert training.history["weight_norm"].iloc[0] == pytest.approx(43.95, abs=0.1)


# What a live session asks of it


def heavy_ball(w, momenta, minibatches, lr):
    """SGD with a momentum for each step in float64; where it is 0, nothing builds up."""
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for momentum, (inputs, targets) in zip(momenta, minibatches):
        for name, g in mlp_gradient(w, inputs, targets).items():
            v[name] = momentum * v[name] + g
            w[name] -= lr * v[name]
        v = {name: value * (momentum > 0) for name, value in v.items()}
    return w


@pytest.mark.parametrize(
    "momenta", [[0.9, 0.9, 0.5, 0.5], [0.0, 0.0, 0.9, 0.9], [0.9, 0.9, 0.0, 0.0, 0.9, 0.9]], ids=["less", "on", "off"]
)
def test_momentum_set_between_steps_acts_on_the_next_one_and_0_forgets(momenta):
    training, minibatches = train(batch_size=20, lr=0.05, momentum=momenta[0]), []
    w = one_replica(training.weights())
    for momentum in momenta:
        training.momentum = momentum
        assert training.momentum == momentum
        minibatches.append(minibatch(training))
        training.step()
    expected = heavy_ball(w, momenta, minibatches, 0.05)
    for name, value in one_replica(training.weights()).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_momentum_set_before_the_first_step_is_momentum_given():
    given, late = train(batch_size=20, momentum=0.8), train(batch_size=20)
    late.momentum = 0.8
    assert same(given.advance(steps=5).weights(), late.advance(steps=5).weights())


@pytest.mark.parametrize("value", [1, -0.1, math.nan, math.inf])
def test_a_bad_momentum_is_refused_and_leaves_the_old_one(value):
    training = train(momentum=0.5)
    with pytest.raises(ValueError, match="momentum is"):
        training.momentum = value
    assert training.momentum == 0.5


@pytest.mark.parametrize("value", ["0.5", None])
def test_a_momentum_that_is_no_number_is_refused_as_a_bad_lr_is(value):
    with pytest.raises(ValueError, match="momentum is"):
        train().momentum = value


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_only_sgd_takes_a_momentum(optimizer):
    training = train(optimizer=optimizer)
    with pytest.raises(ValueError, match="with sgd alone"):
        training.momentum = 0.5
    training.momentum = 0
    assert training.momentum == 0


def test_take_losses_hands_each_minibatchs_loss_out_once():
    training, expected = train(seeds=[0, 1], batch_size=200, lr=0.1), []
    for _ in range(4):
        before = [one_replica(training.weights(), replica) for replica in range(2)]
        expected.append([mlp_loss(w, *minibatch(training, replica)) for replica, w in enumerate(before)])
        training.step()
    sizes, losses = training.take_losses()
    assert sizes.tolist() == [200, 200, 100, 200]  # the short one that ends the epoch
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert [tuple(t.shape) for t in training.take_losses()] == [(0,), (0, 2)]
    training.step()
    assert training.take_losses()[0].tolist() == [200]


def test_a_record_averages_what_came_after_the_losses_were_taken():
    training = train(batch_size=200).advance(steps=2, record=False)
    training.take_losses()
    w, last = one_replica(training.weights()), minibatch(training)
    training.step()
    training.record()
    assert training.history["minibatch_loss"].tolist() == [pytest.approx(mlp_loss(w, *last), rel=1e-5)]
    training.record()
    assert math.isnan(training.history["minibatch_loss"].iloc[-1])


def test_taking_losses_notes_the_step_of_a_divergence():
    training = train(seeds=[0, 1], batch_size=50).advance(steps=3, record=False)
    assert training.diverged_at.isnan().all()
    with torch.no_grad():
        training.stack.kernel.head.weight[1] = math.nan
    training.advance(steps=4, record=False)
    assert training.diverged_at.isnan().all()  # nobody has looked yet
    losses = training.take_losses()[1]
    assert losses.isfinite().tolist() == [[True, True]] * 3 + [[True, False]] * 4
    training.advance(steps=2, record=False).take_losses()
    found = training.diverged_at
    assert found.isnan().tolist() == [True, False] and found[1] == 4
    found[:] = 0
    assert training.diverged_at[1] == 4  # a copy was handed out


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adam"}], ids=["momentum", "adam"])
def test_a_branch_goes_on_to_the_bit_and_by_itself(options):
    through, trunk = (train(seeds=[0, 3], batch_size=60, **options).advance(steps=5) for _ in range(2))
    branch = trunk.branch()
    at_branch = trunk.weights()
    branch.batch_size, branch.lr = 30, 0.02
    branch.advance(steps=3, record=False)
    assert same(trunk.weights(), at_branch) and (trunk.steps, trunk.batch_size) == (5, 60)
    second = trunk.branch()
    trunk.advance(steps=2, record=False)  # which must not touch the second
    for training in (through, second):
        training.advance(steps=7, record=False).record()
    assert same(through.weights(), second.weights())
    assert without_seconds(through.history).equals(without_seconds(second.history))
    assert not same(through.weights(), branch.weights())


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adam"}], ids=["momentum", "adam"])
def test_a_branchs_changed_settings_act_as_in_a_training_that_was_changed(options):
    changed, trunk = (train(batch_size=60, **options).advance(steps=5, record=False) for _ in range(2))
    branch = trunk.branch()
    for training in (changed, branch):
        training.batch_size, training.lr = 35, 0.02
        training.advance(steps=12, record=False)
    assert (branch.steps, branch.examples_seen) == (changed.steps, changed.examples_seen)
    assert same(changed.weights(), branch.weights())


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": torch.optim.RMSprop}])
def test_a_state_of_one_replica_goes_to_every_one(options):
    one = train(seeds=[3], batch_size=25, lr=0.01, **options).advance(steps=3, record=False)
    several = train(seeds=[7, 3], batch_size=25, lr=(0.01, 0.01), **options).load(one.state())
    assert all(torch.equal(value, one.state()[name].expand_as(value)) for name, value in several.state().items())
    one.examples_seen = several.examples_seen  # the same minibatch
    one.step(), several.step()
    for name, w in several.weights().items():
        assert torch.allclose(w[1], one.weights()[name][0], atol=1e-6) and not torch.equal(w[0], w[1])


def test_a_branch_shares_the_examples_and_nothing_else():
    trunk = train(batch_size=60, momentum=0.9).advance(steps=2, record=False)
    branch = trunk.branch()
    assert branch.dataset is trunk.dataset
    assert not {p.data_ptr() for p in trunk.stack.kernel.parameters()} & {
        p.data_ptr() for p in branch.stack.kernel.parameters()
    }
    trunk.take_losses()
    assert branch.take_losses()[0].tolist() == [60, 60]


def test_gradient_norm_is_of_the_last_steps_minibatch():
    training = train(seeds=[0, 1], batch_size=30, lr=0.1)
    assert training.gradient_norm().isnan().tolist() == [True, True]
    for _ in range(3):
        before = [one_replica(training.weights(), replica) for replica in range(2)]
        norms = [squared_norm(mlp_gradient(w, *minibatch(training, r))) ** 0.5 for r, w in enumerate(before)]
        training.step()
        np.testing.assert_allclose(training.gradient_norm(), norms, rtol=1e-4)


# Gradients accumulated over micro-batches


def watch_sizes(training):
    """A list that grows by the number of examples of each pass in training, by autograd or in closed form."""
    seen = []
    training.stack.looped = lambda batch_size: False  # a compiled loop cannot be watched
    training.stack.kernel.register_forward_pre_hook(
        lambda model, given: seen.extend([given[0].shape[1]] * model.training)
    )
    if training.stack.kernel.closed_form:
        by_hand = training.stack.kernel.backpropagate

        def backpropagate(x, *rest):
            seen.append(x.shape[1])
            return by_hand(x, *rest)

        training.stack.kernel.backpropagate = backpropagate
    return seen


def train64(dataset=BLOBS, model="brownlee_mlp", **settings):
    """A training in float64."""
    double = [t.double() if t.is_floating_point() else t for t in (*dataset.tensors("train"), *dataset.tensors("test"))]
    return train(type(dataset)(dataset.name, *double), model, **settings)


def difference(gradient, reference):
    """Relative, of all parameters together: one a replica."""
    parts = {name: gradient[name] - reference[name] for name in reference}
    return geometry.weight_norm(parts) / geometry.weight_norm(reference)


EXACT = [{}, {"norm": "group"}, {"norm": "batch", "norm_batch_size": 5}]
IDS = ["none", "group", "ghost"]


@pytest.mark.parametrize("options", EXACT, ids=IDS)
@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
@pytest.mark.parametrize("micro_batch_size", [5, 10, 60, 99])
def test_accumulated_gradients_are_the_large_batchs_to_1e_12_in_float64(model, micro_batch_size, options):
    training = train64(DIGITS, model, seeds=[0, 3], batch_size=96, **options).advance(steps=2, record=False)
    reference = training.minibatch_gradient()
    training.micro_batch_size = micro_batch_size
    found = training.minibatch_gradient()
    assert found.keys() == reference.keys() == training.weights().keys()
    assert (difference(found, reference) < 1e-12).all()


@pytest.mark.parametrize("options", EXACT, ids=IDS)
def test_accumulated_gradients_are_the_large_batchs_to_1e_6_in_float32(options):
    training = train(DIGITS, "small_mlp", batch_size=256, lr=0.1, **options).advance(epochs=1, record=False)
    reference = training.minibatch_gradient()
    for micro_batch_size in [5, 40, 100] + [1, 3] * (options.get("norm") != "batch"):
        training.micro_batch_size = micro_batch_size
        assert (difference(training.minibatch_gradient(), reference) < 1e-6).all()


def test_under_batch_statistics_accumulated_gradients_are_those_of_the_micro_batches():
    training = train64(DIGITS, "small_mlp", batch_size=96, norm="batch").advance(steps=2, record=False)
    reference = training.minibatch_gradient()
    training.micro_batch_size = 32
    accumulated = training.minibatch_gradient()
    assert (difference(accumulated, reference) > 1e-2).all()
    single, parts = training.branch(), []
    single.micro_batch_size = None
    for batch in training.next_indices().split(32, dim=1):
        single.next_indices = lambda batch=batch: batch
        parts.append(single.minibatch_gradient())
    assert (difference(accumulated, {k: sum(p[k] for p in parts) / 3 for k in reference}) < 1e-12).all()


@pytest.mark.parametrize(  # not Adam with batch statistics: of gradients that are 0 it follows the rounding's sign
    "options",
    [*({"momentum": 0.9, **norm} for norm in EXACT), *({"optimizer": "adam", **norm} for norm in EXACT[:2])],
    ids=[*IDS, "adam", "adam, group"],
)
def test_a_training_in_micro_batches_is_the_large_batchs(options):
    whole, split = (train64(DIGITS, seeds=[0, 1], batch_size=190, **options) for _ in range(2))
    split.micro_batch_size = 50  # 1297 examples: minibatches of 190 and a last one of 157
    for training in (whole, split):
        training.advance(epochs=1)
    for name, t in whole.state().items():
        torch.testing.assert_close(split.state()[name], t, rtol=1e-9, atol=1e-12, msg=name)
    assert (whole.steps, whole.examples_seen) == (split.steps, split.examples_seen) == (7, 1297)
    pairs = without_seconds(whole.history), without_seconds(split.history)
    for column in pairs[0]:
        np.testing.assert_allclose(pairs[0][column], pairs[1][column], rtol=1e-9, err_msg=column)


def test_micro_batches_take_effect_between_steps_and_the_last_may_be_shorter():
    training = train(batch_size=50)
    seen = watch_sizes(training)
    for micro_batch_size in (None, 20, 1, 50, 400):
        training.micro_batch_size = micro_batch_size
        training.step()
    assert seen == [50, 20, 20, 10, *[1] * 50, 50, 50]


def test_under_batch_statistics_no_micro_batch_is_a_single_example():
    training = train(batch_size=41, norm="batch", micro_batch_size=20)
    seen = watch_sizes(training)
    training.step()
    assert seen == [20, 21]


def test_minibatch_gradient_is_of_the_next_minibatch_and_moves_nothing():
    through, training = (train(seeds=[0, 1], batch_size=30, lr=0.1, momentum=0.9) for _ in range(2))
    for t in (through, training):
        t.advance(steps=3, record=False)
    gradient, norm = training.minibatch_gradient(), training.gradient_norm()
    assert torch.equal(norm, through.gradient_norm())  # still of the last step
    for replica in range(2):
        expected = mlp_gradient(one_replica(training.weights(), replica), *minibatch(training, replica))
        for name, g in expected.items():
            np.testing.assert_allclose(gradient[name][replica], g, rtol=1e-4, atol=1e-6, err_msg=name)
    for t in (through, training):
        t.advance(epochs=1)
    assert same(through.weights(), training.weights())
    assert without_seconds(through.history).equals(without_seconds(training.history))


# Normalisation


def test_a_step_uses_batch_statistics_and_an_evaluation_the_running_ones():
    training = train64(DIGITS, "small_mlp", batch_size=40, norm="batch", lr=0.1).advance(epochs=1)
    x, y = (
        DIGITS.train_inputs[training.next_indices()[0]].double().flatten(1),
        DIGITS.train_targets[training.next_indices()[0]],
    )
    w = {name: t[0] for name, t in training.weights().items()} | {
        n: b[0].clone() for n, b in training.stack.kernel.named_buffers()
    }

    def loss(x, y, training):
        h = x @ w["layers.0.weight"].T + w["layers.0.bias"]
        running = w["norms.0.running_mean"].clone(), w["norms.0.running_var"].clone()
        affine = w["norms.0.weight"], w["norms.0.bias"]
        h = torch.nn.functional.batch_norm(h, *running, *affine, training=training).relu()
        return torch.nn.functional.cross_entropy(h @ w["head.weight"].T + w["head.bias"], y).item()

    for _ in range(2):  # evaluating leaves the running statistics alone
        evaluated = training.evaluate("test")[0].item()
        assert evaluated == pytest.approx(
            loss(DIGITS.test_inputs.double().flatten(1), DIGITS.test_targets, False), rel=1e-10
        )
    training.step()
    assert training.take_losses()[1].item() == pytest.approx(loss(x, y, True), rel=1e-10)


@pytest.mark.parametrize(
    "options", [{"norm_batch_size": 7}, {"micro_batch_size": 16}, {}], ids=["ghost", "micro", "whole"]
)
def test_running_statistics_move_once_a_step(options):
    training = train64(DIGITS, "small_mlp", batch_size=48, norm="batch", **options)
    x = DIGITS.train_inputs[training.next_indices()[0]].double().flatten(1)
    w = {name: t[0] for name, t in training.weights().items()}
    h = x @ w["layers.0.weight"].T
    sizes = {7: [7] * 6 + [6], 16: [16] * 3}.get(next(iter(options.values()), None), [48])
    mean = sum(part.mean(0) * len(part) for part in h.split(sizes)) / 48
    var = sum(part.var(0) * len(part) for part in h.split(sizes)) / 48
    training.step()
    buffers = dict(training.stack.kernel.named_buffers())
    torch.testing.assert_close(buffers["norms.0.running_mean"][0], 0.1 * mean)
    torch.testing.assert_close(buffers["norms.0.running_var"][0], 0.9 + 0.1 * var)


def test_a_branch_and_a_resumed_training_have_the_running_statistics():
    def new():
        return train(DIGITS, seeds=[0, 4], batch_size=60, norm="batch", momentum=0.9)

    through, trunk, resumed = new(), new(), new()
    for training in (through, trunk):
        training.advance(epochs=1)
    branch = trunk.branch()
    resumed.resume(trunk.state(), trunk.history)
    trunk.advance(epochs=1)  # which must not touch the others
    for training in (through, branch, resumed):
        training.advance(epochs=1)
        assert without_seconds(training.history).equals(without_seconds(through.history))
        assert same(training.state(), through.state())
    assert not {"norms.0.running_mean"} & set(through.weights())


# When memory does not suffice


def fail_above(training, limit, message="DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."):
    """A device that holds the forward pass of ``limit`` examples; more fail when the gradient is all there."""
    seen = watch_sizes(training)

    def backward(gradient):
        if seen[-1] > limit:
            raise RuntimeError(message)

    next(training.stack.kernel.layers[0].parameters()).register_hook(backward)
    if training.stack.kernel.closed_form:
        by_hand = training.stack.kernel.backpropagate

        def backpropagate(*given):
            found = by_hand(*given)
            backward(found)
            return found

        training.stack.kernel.backpropagate = backpropagate
    return training, seen


FALLBACK = [{}, {"norm": "group"}, {"norm": "batch"}, {"norm": "batch", "norm_batch_size": 6}]


@pytest.mark.parametrize("options", FALLBACK, ids=["none", "group", "batch", "ghost"])
def test_a_minibatch_that_does_not_fit_is_started_over_in_micro_batches_with_their_numbers(options):
    options = {"seeds": [0, 1], "batch_size": 96, "momentum": 0.9, **options}
    training, seen = fail_above(train(DIGITS, **options), 30)
    with pytest.warns(UserWarning, match="do not fit in memory") as caught:
        training.advance(epochs=1)
    assert training.micro_batch_size == 24
    assert seen[:6] == [96, 48, 24, 24, 24, 24]
    told = [str(w.message) for w in caught]
    assert len(told) == 2
    assert all("can't allocate memory" in t for t in told)
    assert "step 1: 96 examples at once" in told[0] and "micro_batch_size is 48" in told[0]
    assert "step 1: 48 examples at once" in told[1] and "micro_batch_size is 24" in told[1]
    differs = "batch statistics are now over at most 24 examples"
    assert (differs in told[1]) == (options.get("norm") == "batch" and "norm_batch_size" not in options)
    assert ("the same sums" in told[1]) != (differs in told[1])
    given = train(DIGITS, micro_batch_size=24, **options).advance(epochs=1)
    assert same(given.state(), training.state())
    assert without_seconds(given.history).equals(without_seconds(training.history))


def test_what_does_not_fit_as_single_examples_is_an_error():
    training, seen = fail_above(train(batch_size=5), 0)
    with (
        pytest.warns(UserWarning, match="micro_batch_size is [12]"),
        pytest.raises(RuntimeError, match="can't allocate"),
    ):
        training.step()
    assert seen == [5, 2, 1]


def test_an_error_that_is_not_of_memory_is_not_hidden():
    training, seen = fail_above(train(batch_size=40), 30, message="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        training.step()
    assert seen == [40]
    assert training.micro_batch_size is None


LITTLE_MEMORY = """
import resource, warnings
import torch
from helpers import Training, problems

torch.set_num_threads(1)
problem = problems.named("digits", "plain_cnn", device="cpu")
settings = dict(batch_size=1297, lr=0.1)
training = Training(problem, **settings)
small = training.branch()
small.micro_batch_size = 8
small.step()  # what is loaded and built once
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 6_000_000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    training.step()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
training.advance(steps=2, record=False)
given = Training(problem, micro_batch_size=training.micro_batch_size, **settings)
given.advance(steps=3, record=False)
assert 1 <= training.micro_batch_size < 1297, training.micro_batch_size
assert caught and all("do not fit in memory" in str(w.message) for w in caught)
assert all(torch.equal(w, given.weights()[name]) for name, w in training.weights().items())
assert torch.equal(training.take_losses()[1], given.take_losses()[1])
print("micro-batches of", training.micro_batch_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_training_goes_on_when_the_process_really_runs_out_of_memory():
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "micro-batches of" in done.stdout


def test_a_step_on_the_squared_loss_is_least_squares_in_the_head():
    training = train(loss="squared", batch_size=16, lr=0.01)
    x, w = BLOBS.train_inputs[training.next_indices()[0]].double(), training.weights()
    y = torch.eye(3, dtype=torch.float64)[BLOBS.train_targets[training.next_indices()[0]]]
    hidden = (x @ w["layers.0.weight"][0].double().T + w["layers.0.bias"][0].double()).relu()
    error = hidden @ w["head.weight"][0].double().T + w["head.bias"][0].double() - y
    training.step()  # the head is linear in its weights: its gradient is the closed form of least squares
    expected = w["head.weight"][0].double() - 0.01 * error.T @ hidden / 16
    np.testing.assert_allclose(training.weights()["head.weight"][0], expected, rtol=1e-4, atol=1e-6)
