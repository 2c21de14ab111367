import math

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import data, gradients, sweeps
from helpers.store import Store, key_of
from helpers.training import Training, schedule

BLOBS = {"dataset": "blobs", "model": "brownlee_mlp", "batch_size": 100, "lr": 0.05, "epochs": 2}
SHEN = {"dataset": "digits", "num_train": 100, "model": "shen_mlp", "batch_size": 50, "epochs": 1}


@pytest.fixture
def trained(monkeypatch):
    """Each job's settings, seeds, and whether it went on from a trunk, as the jobs run."""
    real, jobs = sweeps._train, []

    def spy(s, seeds, snapshots, branch_at, trunk):
        jobs.append((s, list(seeds), trunk is not None))
        return real(s, seeds, snapshots, branch_at, trunk)

    monkeypatch.setattr(sweeps, "_train", spy)
    return jobs


def seeds_of(jobs):
    return sorted(seed for _, seeds, _ in jobs for seed in seeds)


def not_again(*arguments):
    raise AssertionError("computed again")


def assert_same(a, b):
    """Equal to the bit, but for the time it took."""
    a, b = (frame.drop(columns="seconds").reset_index(drop=True) for frame in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def stored(store=None):
    """The keys of the entries in the store."""
    folder = (store or Store()).folder
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []


# The grid and the frame


def test_a_grid_varies_lists_and_sets_the_rest():
    betas = (0.9, 0.99)
    grid = sweeps.grid({"lr": 0.5, "model": "shen_mlp"}, batch_size=[8, 16], lr=[0.1, 0.2], betas=betas)
    assert [(s["batch_size"], s["lr"]) for s in grid] == [(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.2)]
    assert all(s["model"] == "shen_mlp" and s["betas"] == betas for s in grid)
    assert sweeps.grid(lr=0.1) == [{"lr": 0.1}]


def test_the_frame_is_tidy():
    switch = schedule({0: 100, 1: 25})
    frame = sweeps.run(sweeps.grid(BLOBS, batch_size=[50, switch], lr=[0.05, 0.1]), [0, 3])
    assert len(frame) == 4 * 2 * 3
    runs = frame.groupby(["batch_size", "lr", "seed"])
    assert len(runs) == 8
    assert frame.groupby("run").ngroups == 8
    for (batch_size, _, _), one in runs:
        assert one["epochs"].tolist() == [0, 1, 2]  # the axis, and not the setting
        assert one["steps"].tolist() == ([0, 10, 20] if batch_size == 50 else [0, 5, 25])
        assert one["run"].nunique() == 1
    assert set(frame["batch_size"]) == {50, "100@0→25@1"}
    assert set(frame["dataset"]) == {"blobs"}
    assert {"optimizer", "momentum", "test_accuracy", "distance_from_init", "diverged_at"} <= set(frame.columns)


def test_a_sweep_is_training_and_nothing_else():
    frame = sweeps.run([BLOBS | {"momentum": 0.9}], 3)
    dataset = data.load("blobs")
    training = Training(dataset, "brownlee_mlp", seeds=range(3), batch_size=100, lr=0.05, momentum=0.9)
    history = training.advance(epochs=2).history
    for column in ("train_loss", "test_loss", "test_accuracy", "minibatch_loss"):
        np.testing.assert_allclose(frame[column], history[column], rtol=1e-5)


def test_more_records_where_asked():
    frame = sweeps.run([BLOBS | {"record_steps": (1, 7)}], 1)
    assert frame["steps"].tolist() == [0, 1, 5, 7, 10]


# The same result, and no work twice


def test_results_are_the_same_to_the_bit_in_one_process_and_in_two(tmp_path, monkeypatch):
    real, here = sweeps._one_thread, []
    monkeypatch.setattr(sweeps, "_one_thread", lambda: here.append(1) or real())
    monkeypatch.setattr(sweeps, "_WORTH_WORKERS", 0.0)
    settings = [*sweeps.grid(BLOBS, batch_size=[50, 100]), SHEN]
    one = sweeps.run(settings, 2, jobs=1, store=Store(tmp_path / "a"))
    again = sweeps.run(settings, 2, jobs=1, store=Store(tmp_path / "b"))
    assert here
    here.clear()
    two = sweeps.run(settings, 2, jobs=2, store=Store(tmp_path / "c"))
    assert not here  # the jobs ran elsewhere
    assert_same(one, again)
    assert_same(one, two)


def test_what_the_store_has_is_not_computed_again(monkeypatch):
    settings = sweeps.grid(BLOBS, batch_size=[50, 100])
    first = sweeps.run(settings, 2)
    monkeypatch.setattr(sweeps, "_train", not_again)
    second = sweeps.run([s | {"batch_size": float(s["batch_size"])} for s in settings], [0, 1])
    assert_same(first, second.astype({"batch_size": int}))


def test_one_setting_said_in_two_ways_is_one_run():
    frame = sweeps.run([BLOBS, BLOBS | {"lr": 0.05, "num_train": 500, "batch_size": 100.0}], 1)
    assert frame["run"].nunique() == len(stored()) == 1


def test_each_setting_is_part_of_the_key():
    changes = [
        {}, {"batch_size": 50}, {"lr": 0.1}, {"optimizer": "adam"}, {"momentum": 0.9}, {"weight_decay": 0.1},
        {"epochs": 1}, {"num_train": 400}, {"num_train": 400, "subset_seed": 1}, {"record_steps": (1,)},
        {"batch_size": schedule({0: 100, 1: 50})}, {"optimizer": "adam", "betas": (0.8, 0.9)},
    ]  # fmt: skip
    frame = sweeps.run([BLOBS | change for change in changes], 1)
    assert frame["run"].nunique() == len(changes) == len(stored())


def test_more_seeds_of_a_large_network_compute_only_the_new_ones(trained):
    two = sweeps.run([SHEN], 2)
    trained.clear()
    four = sweeps.run([SHEN], 4)
    assert seeds_of(trained) == [2, 3]
    assert_same(two, four.query("seed < 2"))


def test_asking_for_snapshots_of_a_run_stored_without_them_trains_it_again(trained):
    without = sweeps.run([BLOBS], 1)
    with_snapshots = sweeps.run([BLOBS], 1, snapshots=[0, 2])
    assert len(trained) == 2
    assert_same(without, with_snapshots)
    names = {name.split("/")[0] for name in Store().arrays(with_snapshots["run"].iloc[0])}
    assert names == {"0", "2"}
    sweeps.run([BLOBS], 1, snapshots=[2])
    assert len(trained) == 2


def test_snapshots_are_the_weights_after_that_epoch():
    key = sweeps.run([BLOBS], [4], snapshots=[0, 1])["run"].iloc[0]
    training = Training(data.load("blobs", device="cpu"), "brownlee_mlp", seeds=[4], batch_size=100, lr=0.05)
    arrays = Store().arrays(key)
    for epoch in (0, 1):
        for name, w in training.weights().items():
            np.testing.assert_allclose(arrays[f"{epoch}/weights/{name}"], w, rtol=1e-5, atol=1e-6)
        training.advance(epochs=1)


def test_an_interrupted_sweep_keeps_the_finished_jobs(monkeypatch, trained):
    settings, spy = sweeps.grid(BLOBS, lr=[0.1, 0.2, 0.3]), sweeps._train

    def interrupted(*arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return spy(*arguments)

    monkeypatch.setattr(sweeps, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweeps.run(settings, 1)
    assert len(stored()) == 2
    assert all(Store().has(key) for key in stored())
    monkeypatch.setattr(sweeps, "_train", spy)
    sweeps.run(settings, 1)
    assert [s["lr"] for s, _, _ in trained] == [0.1, 0.2, 0.3]


# Branches


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"optimizer": "adam"}, {"lr": schedule({0: 0.01, 4: 0.1}, linear=True)}],
    ids=["sgd", "momentum", "adam", "linear lr"],
)
def test_branches_equal_runs_trained_straight_through_to_the_bit(tmp_path, trained, options):
    base = BLOBS | {"epochs": 4, **options}
    settings = [base, base | {"batch_size": schedule({0: 100, 2: 30})}]
    branched = sweeps.run(settings, 2, branch_at=2)
    assert [(s["epochs"], on_trunk) for s, _, on_trunk in trained] == [(2, False), (4, True), (4, True)]
    straight = sweeps.run(settings, 2, store=Store(tmp_path / "straight"))
    assert_same(branched, straight)


def test_a_finished_branch_is_not_computed_again(monkeypatch):
    settings = [BLOBS | {"epochs": 3, "lr": schedule({0: 0.05, 1: 0.1})}]
    first = sweeps.run(settings, 1, branch_at=1)
    monkeypatch.setattr(sweeps, "_train", not_again)
    assert_same(first, sweeps.run(settings, 1, branch_at=1))


def test_a_run_that_ends_before_the_branch_is_not_computed_again(monkeypatch):
    first = sweeps.run([BLOBS], 1, branch_at=3)
    monkeypatch.setattr(sweeps, "_train", not_again)
    assert_same(first, sweeps.run([BLOBS], 1, branch_at=3))


def test_snapshots_from_before_the_branch_are_kept_too():
    key = sweeps.run([BLOBS | {"epochs": 3}], 1, snapshots=[0, 1, 3], branch_at=2)["run"].iloc[0]
    assert Store().has(key, [f"{epoch}/weights/head.weight" for epoch in (0, 1, 3)])


# Processes


@pytest.mark.parametrize(("given", "variable", "expected"), [(None, "1", 1), (None, "2", 2), (3, "2", 3), (1, "2", 1)])
def test_jobs_are_those_asked_for_else_of_companion_jobs(monkeypatch, given, variable, expected):
    asked, real = [], joblib.parallel_config

    def spy(backend, n_jobs=1, **options):
        asked.append((backend, n_jobs))
        return real("sequential")

    monkeypatch.setattr(sweeps, "_WORTH_WORKERS", 0.0)
    monkeypatch.setattr(joblib, "parallel_config", spy)
    monkeypatch.setenv("COMPANION_JOBS", variable)
    sweeps.run(sweeps.grid(BLOBS, lr=[0.1, 0.2, 0.3, 0.4]), 1, jobs=given)
    assert asked == [("sequential", 1) if expected == 1 else ("loky", expected)]


def test_torchs_threads_are_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sweeps.run([BLOBS], 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# What is refused, and what is not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 8}, "unknown setting 'batchsize'; choose from: .*batch_size"),
        ({"dataset": "cifar"}, "unknown dataset 'cifar'"),
        ({"model": "resnet"}, "unknown model 'resnet'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 501}, "batch_size is 501; expected a whole number from 1 to 500"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": schedule({0: 10, 1: 501})}, "batch_size is 501"),
        ({"num_train": 400, "batch_size": 401}, "batch_size is 401"),
        ({"num_train": 501}, "num_train is 501"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": schedule({0: 0.1, 1: -0.1})}, "lr is -0.1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": 0.9, "optimizer": "adam"}, "with sgd alone"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_anything_starts(change, message):
    with pytest.raises(ValueError, match=message):
        sweeps.run([BLOBS, BLOBS | change], 1)
    assert stored() == []


@pytest.mark.parametrize("seeds", [0, [], [1, 1], [-1]])
def test_impossible_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="expected a number of seeds, at least 1, or distinct seeds"):
        sweeps.run([BLOBS], seeds)
    assert stored() == []


def test_divergence_is_a_result(trained):
    settings = sweeps.grid(BLOBS, batch_size=50, lr=[0.05, 1e3])
    frame = sweeps.run(settings, 2)
    bad, good = frame.query("lr == 1000"), frame.query("lr == 0.05")
    assert len(bad) == len(good) == 6
    assert bad.query("epochs == 2")["diverged_at"].between(1, 10).all()
    assert bad.query("epochs == 2")["test_loss"].isna().all()
    assert good["diverged_at"].isna().all()
    assert good["test_loss"].notna().all()
    assert_same(frame, sweeps.run(settings, 2))
    assert len(trained) == 2  # and one that is kept


# Measures on trained networks


@pytest.mark.parametrize("protocol", ["walk", "frozen"])
def test_measure_applies_a_protocol_to_the_weights_after_each_epoch(monkeypatch, protocol):
    options = {"batch_sizes": [4, 32], "trials": 12, "draw_size": 32}
    frame = sweeps.measure(protocol, [BLOBS], [1, 5], epochs=[0, 2], **options)
    assert len(frame) == 2 * 2 * 2 * 12
    assert set(frame["protocol"]) == {protocol}
    assert set(frame["batch_size"]) == {100}  # of the training
    blobs = data.load("blobs", device="cpu")
    training = Training(blobs, "brownlee_mlp", seeds=[1, 5], batch_size=100, lr=0.05)
    for epoch in (0, 2):
        after = frame[frame["epoch"] == epoch].sort_values(["trial", "measured_batch_size"])
        for replica, seed in enumerate((1, 5)):
            weights = {name: w[replica : replica + 1] for name, w in training.weights().items()}
            function = getattr(gradients, protocol)
            direct = function(blobs, "brownlee_mlp", weights, seed=seed, **options | {"trials": range(12)})
            direct, mine = direct.sort_values(["trial", "batch_size"]), after[after["seed"] == seed]
            assert mine["trial"].tolist() == direct["trial"].tolist()
            assert mine["measured_batch_size"].tolist() == direct["batch_size"].tolist()
            np.testing.assert_allclose(mine["gradient_norm"], direct["gradient_norm"], rtol=1e-4)
        training.advance(epochs=2)
    monkeypatch.setattr(sweeps, "_measure", not_again)
    again = sweeps.measure(protocol, [BLOBS], [1, 5], epochs=[0, 2], **options)
    pd.testing.assert_frame_equal(frame, again)


@pytest.mark.parametrize("epoch", [3, -1])
def test_measuring_after_an_epoch_that_is_not_trained_is_refused(epoch):
    with pytest.raises(ValueError, match=f"epoch {epoch} is not within a training of 2 epochs"):
        sweeps.measure("frozen", [BLOBS], 1, epochs=[0, epoch], batch_sizes=[4], trials=1)
    assert stored() == []


def test_measuring_a_batch_larger_than_the_draw_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="batch_size is 33"):
        sweeps.measure("walk", [BLOBS], 1, epochs=[0], batch_sizes=[4, 33], trials=1, draw_size=32)
    assert stored() == []


def test_to_target_is_where_a_run_first_reaches_it():
    frame = pd.DataFrame({
        "batch_size": [8] * 4 + [64] * 4, "lr": 0.1, "seed": 0, "epochs": [0, 1, 2, 3] * 2, "steps": [0, 5, 10, 15] * 2,
        "test_accuracy": [0.1, 0.8, 0.7, 0.9, 0.1, 0.2, 0.3, 0.4],
    })  # fmt: skip
    hits = sweeps.to_target(frame, "test_accuracy", 0.8).set_index("batch_size")
    assert hits.loc[8, ["epochs", "reached"]].tolist() == [1, True]
    assert hits.loc[64, ["epochs", "reached"]].tolist() == [3, False]
    assert sweeps.to_target(frame, "test_accuracy", 0.8, axis="steps")["steps"].tolist() == [5, 15]


def test_the_key_is_that_of_what_the_entry_says_it_is():
    frame = sweeps.run([BLOBS], 1)
    checked = sweeps._checked(BLOBS)
    assert frame["run"].iloc[0] == key_of(sweeps._content(checked, 0, [0]))
    assert stored() == [frame["run"].iloc[0]]
