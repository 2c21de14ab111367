import functools
import itertools
import math

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import Dataset, Net, Problem, Solution, Training, problems, schedule, sweep
from helpers.measure import gradients, landscape
from helpers.problems import nets
from helpers.sweep import jobs as jobs_module
from helpers.sweep import settings as settings_module
from helpers.sweep import trainings
from helpers.sweep.store import Store, key_of

BLOBS = {"dataset": "blobs", "model": "brownlee_mlp", "batch_size": 100, "lr": 0.05, "epochs": 2}
BLOBS_PROBLEM = problems.named("blobs", "brownlee_mlp", device="cpu")
STEPS = {**BLOBS, "steps": 40, "record_steps": tuple(range(0, 40, 4))}
NET = functools.partial(nets.MLP, (1, 8, 8), 10, [300], nets.xavier_normal)  # its rates share each minibatch
RATES = {"problem": Problem(problems.load("digits", num_train=200, device="cpu"), Net(NET)), "batch_size": 40}
SHEN = {"dataset": "digits", "num_train": 100, "model": "shen_mlp", "batch_size": 50, "epochs": 1}


@pytest.fixture
def trained(monkeypatch):
    """Each job's settings, seeds, and whether it went on from a trunk, as the jobs run."""
    real, jobs = trainings._train, []

    def spy(s, seeds, snapshots, branch_at, trunk, starts):
        jobs.append((s, list(seeds), trunk is not None))
        return real(s, seeds, snapshots, branch_at, trunk, starts)

    monkeypatch.setattr(trainings, "_train", spy)
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
    grid = sweep.grid({"lr": 0.5, "model": "shen_mlp"}, batch_size=[8, 16], lr=[0.1, 0.2], betas=betas)
    assert [(s["batch_size"], s["lr"]) for s in grid] == [(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.2)]
    assert all(s["model"] == "shen_mlp" and s["betas"] == betas for s in grid)
    assert sweep.grid(lr=0.1) == [{"lr": 0.1}]


def test_the_frame_is_tidy():
    switch = schedule({0: 100, 1: 25})
    frame = sweep.run(sweep.grid(BLOBS, batch_size=[50, switch], lr=[0.05, 0.1]), [0, 3])
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
    frame = sweep.run([BLOBS | {"momentum": 0.9}], 3)
    training = Training(BLOBS_PROBLEM, seeds=range(3), batch_size=100, lr=0.05, momentum=0.9)
    history = training.advance(epochs=2).history
    for column in ("train_loss", "test_loss", "test_accuracy", "minibatch_loss"):
        np.testing.assert_allclose(frame[column], history[column], rtol=1e-5)


def test_more_records_where_asked():
    frame = sweep.run([BLOBS | {"record_steps": (1, 7)}], 1)
    assert frame["steps"].tolist() == [0, 1, 5, 7, 10]


def test_epochs_are_recorded_every_so_many_and_at_the_end():
    every = sweep.run([BLOBS | {"epochs": 5}], 1)
    for record_every, epochs in ((2, [0, 2, 4, 5]), (10**6, [0, 5])):
        frame = sweep.run([BLOBS | {"epochs": 5, "record_every": record_every}], 1)
        assert frame["epochs"].tolist() == epochs
        same = every[every["epochs"].isin(epochs)]
        assert frame["test_loss"].tolist() == same["test_loss"].tolist()
        assert frame["distance_from_init"].tolist() == same["distance_from_init"].tolist()


@pytest.mark.parametrize("record_steps", [(), (3, 5, 7, 99, 0)])
def test_a_run_of_steps_is_recorded_at_its_beginning_its_end_and_where_asked(record_steps):
    frame = sweep.run([BLOBS | {"steps": 12, "record_steps": record_steps}], 1)
    expected = [0, 3, 5, 7, 12] if record_steps else [0, 12]
    assert frame["steps"].tolist() == expected
    assert frame["epochs"].tolist() == [step / 5 for step in expected]
    training = Training(BLOBS_PROBLEM, seeds=[0], batch_size=100, lr=0.05)
    for step, test_loss in zip(expected, frame["test_loss"]):
        training.advance(steps=step - training.steps, record=False).record()
        assert test_loss == pytest.approx(training.history["test_loss"].iloc[-1], rel=1e-5)


def test_a_target_ends_a_run_at_the_first_record_that_reaches_it():
    whole = sweep.run([STEPS], 1)
    goal = whole["test_accuracy"].iloc[1:-1].max()
    first = int((whole["test_accuracy"] >= goal).idxmax())
    assert 0 < first < len(whole) - 1
    ended = sweep.run([STEPS | {"target": ("test_accuracy", goal)}], 1)
    assert ended["steps"].tolist() == whole["steps"].tolist()[: first + 1]
    assert ended["test_loss"].tolist() == whole["test_loss"].tolist()[: first + 1]
    hits = sweep.to_target(ended, "test_accuracy", goal, axis="steps")
    assert hits[["steps", "reached"]].values.tolist() == [[whole["steps"][first], True]]


@pytest.mark.parametrize("goal", [0.5, 0.6, 2.0])
def test_a_target_does_not_change_where_a_run_first_reaches_it(goal):
    at = ("test_accuracy", goal)
    whole, ended = sweep.run([STEPS], 4), sweep.run([STEPS | {"target": at}], 4)
    hits = [sweep.to_target(frame, *at, axis="steps") for frame in (whole, ended)]
    pd.testing.assert_frame_equal(*hits)
    assert hits[0]["reached"].all() == (len(ended) < len(whole)) == (goal < 2)


def test_divergence_ends_a_run_of_steps():
    frame = sweep.run([STEPS | {"lr": 1e3}], 2)
    diverged = frame["diverged_at"].notna().groupby(frame["steps"]).all()
    assert diverged.tolist() == [False] * (len(diverged) - 1) + [True]  # at its end, and not before
    assert 1 < len(diverged) < len(STEPS["record_steps"])


def test_settings_given_as_a_mapping_are_labelled_by_its_keys():
    settings = {("small", 1): BLOBS, "large": BLOBS | {"batch_size": 250}}
    frame = sweep.run(settings, 2)
    assert [label for label, _ in itertools.groupby(frame["label"])] == [("small", 1), "large"]
    sizes = {label: set(group["batch_size"]) for label, group in frame.groupby("label", sort=False)}
    assert sizes == {("small", 1): {100}, "large": {250}}
    assert_same(frame.drop(columns="label"), sweep.run(list(settings.values()), 2))


@pytest.mark.parametrize(
    "options", [{"loss": "squared", "lr": 0.002}, {"norm": "batch", "norm_batch_size": 25}, {"norm": "group"}]
)
def test_loss_and_norm_are_the_trainings(options):
    frame = sweep.run([BLOBS | options], 2)
    of_problem = {k: v for k, v in options.items() if k != "lr"}
    problem = problems.named("blobs", "brownlee_mlp", device="cpu", **of_problem)
    training = Training(problem, seeds=range(2), batch_size=100, lr=options.get("lr", 0.05))
    history = training.advance(epochs=2).history
    for column in ("train_loss", "test_loss", "minibatch_loss"):
        np.testing.assert_allclose(frame[column], history[column], rtol=1e-4)
    for name, value in options.items():
        assert set(frame[name]) == {value}


# The same result, and no work twice


def test_results_are_the_same_to_the_bit_in_one_process_and_in_two(tmp_path, monkeypatch):
    real, here = jobs_module._one_thread, []
    monkeypatch.setattr(jobs_module, "_one_thread", lambda: here.append(1) or real())
    monkeypatch.setattr(jobs_module, "_WORTH_WORKERS", 0.0)
    settings = [*sweep.grid(BLOBS, batch_size=[50, 100]), SHEN]
    one = sweep.run(settings, 2, jobs=1, store=Store(tmp_path / "a"))
    again = sweep.run(settings, 2, jobs=1, store=Store(tmp_path / "b"))
    assert here
    here.clear()
    two = sweep.run(settings, 2, jobs=2, store=Store(tmp_path / "c"))
    assert not here  # the jobs ran elsewhere
    assert_same(one, again)
    assert_same(one, two)


def test_what_the_store_has_is_not_computed_again(monkeypatch):
    settings = sweep.grid(BLOBS, batch_size=[50, 100])
    first = sweep.run(settings, 2)
    monkeypatch.setattr(trainings, "_train", not_again)
    second = sweep.run([s | {"batch_size": float(s["batch_size"])} for s in settings], [0, 1])
    assert_same(first, second.astype({"batch_size": int}))


def test_runs_of_steps_and_to_a_target_are_not_computed_again(monkeypatch):
    settings = [STEPS, STEPS | {"target": ("test_accuracy", 0.5)}, BLOBS | {"record_every": 2}]
    first = sweep.run(settings, 2)
    monkeypatch.setattr(trainings, "_train", not_again)
    assert_same(first, sweep.run(settings, 2))


def test_one_setting_said_in_two_ways_is_one_run():
    frame = sweep.run([BLOBS, BLOBS | {"lr": 0.05, "num_train": 500, "batch_size": 100.0}], 1)
    assert frame["run"].nunique() == len(stored()) == 1


def test_each_setting_is_part_of_the_key():
    changes = [
        {}, {"batch_size": 50}, {"lr": 0.1}, {"optimizer": "adam"}, {"momentum": 0.9}, {"weight_decay": 0.1},
        {"epochs": 1}, {"num_train": 400}, {"num_train": 400, "subset_seed": 1}, {"record_steps": (1,)},
        {"batch_size": schedule({0: 100, 1: 50})}, {"optimizer": "adam", "betas": (0.8, 0.9)},
        {"loss": "squared"}, {"norm": "batch"}, {"norm": "batch", "norm_batch_size": 25}, {"norm": "group"},
        {"record_every": 2}, {"steps": 4}, {"steps": 4, "target": ("test_accuracy", 0.9)},
    ]  # fmt: skip
    frame = sweep.run([BLOBS | change for change in changes], 1)
    assert frame["run"].nunique() == len(changes) == len(stored())


@pytest.mark.parametrize("setting", [SHEN, BLOBS], ids=["one by one", "side by side"])
def test_more_seeds_compute_only_the_new_ones(trained, setting):
    two = sweep.run([setting], 2)
    trained.clear()
    four = sweep.run([setting], 4)
    assert seeds_of(trained) == [2, 3]
    assert_same(two, four.query("seed < 2"))


def test_asking_for_snapshots_of_a_run_stored_without_them_trains_it_again(trained):
    without = sweep.run([BLOBS], 1)
    with_snapshots = sweep.run([BLOBS], 1, snapshots=[0, 2])
    assert len(trained) == 2
    assert_same(without, with_snapshots)
    names = {name.split("/")[0] for name in Store().arrays(with_snapshots["run"].iloc[0])}
    assert names == {"0", "2"}
    sweep.run([BLOBS], 1, snapshots=[2])
    assert len(trained) == 2


def test_snapshots_are_the_weights_after_that_epoch():
    key = sweep.run([BLOBS], [4], snapshots=[0, 1])["run"].iloc[0]
    training = Training(BLOBS_PROBLEM, seeds=[4], batch_size=100, lr=0.05)
    arrays = Store().arrays(key)
    for epoch in (0, 1):
        for name, w in training.weights().items():
            np.testing.assert_allclose(arrays[f"{epoch}/weights/{name}"], w, rtol=1e-5, atol=1e-6)
        training.advance(epochs=1)


@pytest.mark.parametrize("epoch", [0, 2])
def test_weights_are_the_trainings_after_that_epoch_one_dict_a_seed(monkeypatch, epoch):
    kept = sweep.weights(BLOBS, [4, 1], epoch)
    training = Training(BLOBS_PROBLEM, seeds=[4, 1], batch_size=100, lr=0.05)
    expected = training.advance(epochs=epoch).weights() if epoch else training.weights()
    assert len(kept) == 2
    for replica, one in enumerate(kept):
        assert one.weights.keys() == expected.keys() and one.problem.names["model"] == "brownlee_mlp"
        for name, w in one.weights.items():
            np.testing.assert_allclose(w, expected[name][replica : replica + 1], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(trainings, "_train", not_again)
    again = sweep.weights(BLOBS, [4, 1], epoch)
    assert all(torch.equal(w, b.weights[name]) for a, b in zip(kept, again) for name, w in a.weights.items())


def test_an_interrupted_sweep_keeps_the_finished_jobs(monkeypatch, trained):
    settings, spy = sweep.grid(BLOBS, lr=[0.1, 0.2, 0.3]), trainings._train

    def interrupted(*arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return spy(*arguments)

    monkeypatch.setattr(trainings, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(settings, 1)
    assert len(stored()) == 2
    assert all(Store().has(key) for key in stored())
    monkeypatch.setattr(trainings, "_train", spy)
    sweep.run(settings, 1)
    assert [s["lr"] for s, _, _ in trained] == [0.1, 0.2, 0.3]


# Rates of one seed in a stack

STACKED = [0.01, schedule({0: 0.01, 1: 0.3}), 0.1, schedule({0: 0.003, 2: 0.2}, linear=True), 1e30]


@pytest.mark.parametrize(
    "options",
    [{"epochs": 2}, {"epochs": 2, "momentum": 0.9}, {"epochs": 2, "optimizer": "adam", "record_every": 2},
     {"steps": 12, "record_steps": (1, 3, 5, 7)}],
    ids=["sgd", "momentum", "adam", "steps"],
)  # fmt: skip
def test_rates_in_a_stack_equal_each_alone_to_the_bit(tmp_path, trained, options):
    settings = sweep.grid(RATES | options, lr=STACKED)
    together = sweep.run(settings, [5, 1], jobs=1)
    assert [(s["lr"], seeds) for s, seeds, _ in trained] == [(tuple(STACKED), [5] * 5), (tuple(STACKED), [1] * 5)]
    alone = [sweep.run([one], [5, 1], jobs=1, store=Store(tmp_path / "alone")) for one in settings]
    assert len(trained) == 2 + 10
    assert_same(together, pd.concat(alone))
    diverged = together.groupby(["seed", "lr"], sort=False).diverged_at.max().notna()
    assert diverged.tolist() == [False] * 8 + [True] * 2
    assert set(together.replicas) == {1} and together.groupby(["seed", "epochs"]).seconds.nunique().max() == 1


def test_stacks_of_rates_are_the_same_in_one_process_and_in_two(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(jobs_module, "_WORTH_WORKERS", 0.0)
    settings = [one for b in (20, 40) for one in sweep.grid(RATES | {"epochs": 1, "batch_size": b}, lr=STACKED)]
    one, two = (sweep.run(settings, [0], jobs=n, store=Store(tmp_path / str(n))) for n in (1, 2))
    assert_same(one, two)
    assert sorted(stored(Store(tmp_path / "1"))) == sorted(stored(Store(tmp_path / "2")))


def test_stacks_are_split_where_there_are_fewer_than_processes(monkeypatch, trained):
    monkeypatch.setattr(joblib, "parallel_config", lambda *_, **__: joblib.parallel_backend("sequential"))
    sweep.run(sweep.grid(RATES | {"epochs": 1}, lr=STACKED), 1, jobs=2)
    assert [len(seeds) for _, seeds, _ in trained] == [3, 2]
    sweep.run(sweep.grid(RATES | {"epochs": 2}, lr=STACKED), 2, jobs=2)
    assert [len(seeds) for _, seeds, _ in trained[2:]] == [5, 5]


def test_a_half_done_stack_is_resumed_with_the_rates_it_lacks(tmp_path, trained):
    settings = sweep.grid(RATES | {"epochs": 2}, lr=STACKED)
    sweep.run([settings[3], settings[0]], 1, jobs=1)
    trained.clear()
    resumed = sweep.run([*settings, settings[2]], 1, jobs=1)  # one of them twice
    assert [s["lr"] for s, _, _ in trained] == [(STACKED[1], STACKED[2], STACKED[4])]
    whole = sweep.run([*settings, settings[2]], 1, jobs=1, store=Store(tmp_path / "whole"))
    assert_same(resumed, whole)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}], ids=["sgd", "adam"])
def test_rates_branch_off_their_trunks_as_a_stack(tmp_path, trained, options):
    settings = sweep.grid(RATES | {"epochs": 3, **options}, batch_size=schedule({0: 40, 1: 100}), lr=[0.01, 0.02])
    branched = sweep.run(settings, 1, snapshots=[0, 3], branch_at=1, jobs=1)
    assert [(s["epochs"], len(seeds), on_trunk) for s, seeds, on_trunk in trained] == [(1, 2, False), (3, 2, True)]
    alone = [sweep.run([one], 1, snapshots=[0, 3], jobs=1, store=Store(tmp_path / "alone")) for one in settings]
    assert_same(branched, pd.concat(alone))
    for key in branched["run"].unique():
        kept, own = Store().arrays(key), Store(tmp_path / "alone").arrays(key)
        assert kept.keys() == own.keys() and all(np.array_equal(kept[name], own[name]) for name in kept)


def test_runs_to_a_target_are_trained_apart_and_evaluated_on_its_split_alone(tmp_path, trained, monkeypatch):
    evaluated, real = [], Training.evaluate
    monkeypatch.setattr(Training, "evaluate", lambda self, split="test": evaluated.append(split) or real(self, split))
    to = {"steps": 12, "record_steps": (1, 3, 5, 7), "target": ("test_accuracy", 0.5)}
    settings = sweep.grid(RATES | to, lr=[0.01, 0.3, 1e30])
    frame = sweep.run(settings, 1, jobs=1)
    assert [seeds for _, seeds, _ in trained] == [[0]] * 3 and set(evaluated) == {"test"}
    whole = sweep.run([one | {"target": None} for one in settings], 1, jobs=1, store=Store(tmp_path / "whole"))
    ends = frame.groupby("lr").steps.max()
    assert ends[0.01] == 12 and 1 < ends[0.3] < 12 and ends[1e30] < 12
    shown = ["lr", "steps", "minibatch_loss", "test_loss", "test_accuracy", "diverged_at", "distance_from_init"]
    kept = whole[whole.steps <= whole.lr.map(ends)]
    pd.testing.assert_frame_equal(frame[shown], kept[shown].reset_index(drop=True), check_exact=True)
    assert frame[["train_loss", "train_accuracy", "generalization_gap"]].isna().all(axis=None)


def test_an_untrained_network_is_evaluated_once(monkeypatch):
    starts, real = [], Training.evaluate

    def spy(self, split="test"):
        starts.extend([(split, *self.seeds)] if not self.steps else [])
        return real(self, split)

    monkeypatch.setattr(Training, "evaluate", spy)
    problem = Problem(problems.load("digits", num_train=150, device="cpu"), Net(NET))
    settings = sweep.grid({"problem": problem, "epochs": 1}, batch_size=[50, 100], lr=[0.1, 0.2])
    frame = sweep.run(settings, 2, jobs=1)
    assert sorted(starts) == [(split, seed) for split in ("test", "train") for seed in (0, 1)]
    for seed, one in frame[frame.steps == 0].groupby("seed"):
        alone = Training(problem, seeds=[seed])
        alone.record()
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert set(one[name]) == set(alone.history[name])


# Branches


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"optimizer": "adam"}, {"lr": schedule({0: 0.01, 4: 0.1}, linear=True)}],
    ids=["sgd", "momentum", "adam", "linear lr"],
)
def test_branches_equal_runs_trained_straight_through_to_the_bit(tmp_path, trained, options):
    base = BLOBS | {"epochs": 4, **options}
    settings = [base, base | {"batch_size": schedule({0: 100, 2: 30})}]
    branched = sweep.run(settings, 2, branch_at=2)
    assert [(s["epochs"], on_trunk) for s, _, on_trunk in trained] == [(2, False), (4, True), (4, True)]
    straight = sweep.run(settings, 2, store=Store(tmp_path / "straight"))
    assert_same(branched, straight)


def test_a_finished_branch_is_not_computed_again(monkeypatch):
    settings = [BLOBS | {"epochs": 3, "lr": schedule({0: 0.05, 1: 0.1})}]
    first = sweep.run(settings, 1, branch_at=1)
    monkeypatch.setattr(trainings, "_train", not_again)
    assert_same(first, sweep.run(settings, 1, branch_at=1))


def test_a_run_that_ends_before_the_branch_is_not_computed_again(monkeypatch):
    first = sweep.run([BLOBS], 1, branch_at=3)
    monkeypatch.setattr(trainings, "_train", not_again)
    assert_same(first, sweep.run([BLOBS], 1, branch_at=3))


def test_snapshots_from_before_the_branch_are_kept_too():
    key = sweep.run([BLOBS | {"epochs": 3}], 1, snapshots=[0, 1, 3], branch_at=2)["run"].iloc[0]
    assert Store().has(key, [f"{epoch}/weights/head.weight" for epoch in (0, 1, 3)])


@pytest.mark.parametrize("record_every", [2, 4])
def test_a_branch_does_not_change_what_is_recorded(tmp_path, record_every):
    settings = [BLOBS | {"epochs": 8, "record_every": record_every}]
    branched = sweep.run(settings, 1, branch_at=4)
    assert_same(branched, sweep.run(settings, 1, store=Store(tmp_path / "straight")))


def test_a_branch_where_nothing_would_be_recorded_is_refused():
    with pytest.raises(ValueError, match="branch_at is 2; expected a multiple of record_every"):
        sweep.run([BLOBS | {"epochs": 4, "record_every": 4}], 1, branch_at=2)
    assert stored() == []


# Processes


@pytest.mark.parametrize(("given", "variable", "expected"), [(None, "1", 1), (None, "2", 2), (3, "2", 3), (1, "2", 1)])
def test_jobs_are_those_asked_for_else_of_companion_jobs(monkeypatch, given, variable, expected):
    asked, real = [], joblib.parallel_config

    def spy(backend, n_jobs=1, **options):
        asked.append((backend, n_jobs))
        return real("sequential")

    monkeypatch.setattr(jobs_module, "_WORTH_WORKERS", 0.0)
    monkeypatch.setattr(joblib, "parallel_config", spy)
    monkeypatch.setenv("COMPANION_JOBS", variable)
    sweep.run(sweep.grid(BLOBS, lr=[0.1, 0.2, 0.3, 0.4]), 1, jobs=given)
    assert asked == [("loky", expected)]


def test_torchs_threads_are_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sweep.run([BLOBS], 1)
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
        ({"steps": 0}, "steps is 0; expected a whole number from 1 on"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"record_every": 0}, "record_every is 0"),
        ({"target": ("test_accuracy", 0.9)}, "a target ends a run given by steps; set steps"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"norm_batch_size": 4}, "norm_batch_size is 4 with norm='none'"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_anything_starts(change, message):
    with pytest.raises(ValueError, match=message):
        sweep.run([BLOBS, BLOBS | change], 1)
    assert stored() == []


@pytest.mark.parametrize("options", [{"snapshots": [1]}, {"branch_at": 1}, {"branch_at": 0}])
def test_snapshots_and_branches_of_a_run_given_by_steps_are_refused(options):
    with pytest.raises(ValueError, match="snapshots and branches are at epochs"):
        sweep.run([BLOBS, STEPS], 1, **options)
    assert stored() == []


@pytest.mark.parametrize("seeds", [0, [], [1, 1], [-1]])
def test_impossible_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="expected a number of seeds, at least 1, or distinct seeds"):
        sweep.run([BLOBS], seeds)
    assert stored() == []


def test_divergence_is_a_result(trained):
    settings = sweep.grid(BLOBS, batch_size=50, lr=[0.05, 1e3])
    frame = sweep.run(settings, 2)
    bad, good = frame.query("lr == 1000"), frame.query("lr == 0.05")
    assert len(bad) == len(good) == 6
    assert bad.query("epochs == 2")["diverged_at"].between(1, 10).all()
    assert bad.query("epochs == 2")["test_loss"].isna().all()
    assert good["diverged_at"].isna().all()
    assert good["test_loss"].notna().all()
    assert_same(frame, sweep.run(settings, 2))
    assert len(trained) == 2  # and one that is kept


# Measures on trained networks


@pytest.mark.parametrize("protocol", ["walk", "frozen"])
def test_measure_applies_a_protocol_to_the_weights_after_each_epoch(monkeypatch, protocol):
    options = {"batch_sizes": [4, 32], "trials": 12, "draw_size": 32}
    frame = sweep.measure(protocol, [BLOBS], [1, 5], epochs=[0, 2], **options)
    assert len(frame) == 2 * 2 * 2 * 12
    assert set(frame["protocol"]) == {protocol}
    assert set(frame["batch_size"]) == {100}  # of the training
    training = Training(BLOBS_PROBLEM, seeds=[1, 5], batch_size=100, lr=0.05)
    for epoch in (0, 2):
        after = frame[frame["epoch"] == epoch].sort_values(["trial", "measured_batch_size"])
        for replica, seed in enumerate((1, 5)):
            weights = {name: w[replica : replica + 1] for name, w in training.weights().items()}
            solution = Solution(BLOBS_PROBLEM, weights)
            function = getattr(gradients, protocol)
            direct = function(solution, seed=seed, **options | {"trials": range(12)})
            direct, mine = direct.sort_values(["trial", "batch_size"]), after[after["seed"] == seed]
            assert mine["trial"].tolist() == direct["trial"].tolist()
            assert mine["measured_batch_size"].tolist() == direct["batch_size"].tolist()
            np.testing.assert_allclose(mine["gradient_norm"], direct["gradient_norm"], rtol=1e-4)
        training.advance(epochs=2)
    monkeypatch.setattr(trainings, "_measure", not_again)
    again = sweep.measure(protocol, [BLOBS], [1, 5], epochs=[0, 2], **options)
    pd.testing.assert_frame_equal(frame, again)


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("spectrum", {"examples": 60, "count": 2}),
        ("boxes", {"examples": 60, "epsilons": [1e-3], "dimensions": [None, 5]}),
        ("staleness", {"batch_size": 8, "counts": [1, 4], "base_rates": [1e-3]}),
    ],
)
def test_measure_gives_the_protocols_frame_for_each_seed_and_epoch(monkeypatch, protocol, options):
    settings = sweep.grid(BLOBS, lr=[0.05, 0.01])
    frame = sweep.measure(protocol, settings, [1, 5], epochs=[0, 2], **options)
    function = getattr(gradients if protocol == "staleness" else landscape, protocol)
    assert len(frame) == 2 * 2 * 2 * 2 and set(frame["protocol"]) == {protocol}
    for s, epoch in itertools.product(settings, (0, 2)):
        for seed, solution in zip((1, 5), sweep.weights(s, [1, 5], epoch)):
            direct = function(solution, seed=seed, **options)
            mine = frame[(frame["lr"] == s["lr"]) & (frame["epoch"] == epoch) & (frame["seed"] == seed)]
            np.testing.assert_allclose(mine[list(direct)].astype(float), direct.astype(float), rtol=1e-3)
    monkeypatch.setattr(trainings, "_measure", not_again)
    pd.testing.assert_frame_equal(
        frame, sweep.measure(protocol, settings, [1, 5], epochs=[0, 2], **options), check_exact=True
    )


def test_an_unknown_protocol_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown protocol 'hessian'; choose one of: walk, frozen, .*spectrum, boxes"):
        sweep.measure("hessian", [BLOBS], 1, epochs=[0])
    assert stored() == []


@pytest.mark.parametrize("epoch", [3, -1])
def test_measuring_after_an_epoch_that_is_not_trained_is_refused(epoch):
    with pytest.raises(ValueError, match=f"epoch {epoch} is not within a training of 2 epochs"):
        sweep.measure("frozen", [BLOBS], 1, epochs=[0, epoch], batch_sizes=[4], trials=1)
    assert stored() == []


def test_measuring_a_batch_larger_than_the_draw_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="batch_size is 33"):
        sweep.measure("walk", [BLOBS], 1, epochs=[0], batch_sizes=[4, 33], trials=1, draw_size=32)
    assert stored() == []


def test_to_target_is_where_a_run_first_reaches_it():
    frame = pd.DataFrame({
        "batch_size": [8] * 4 + [64] * 4, "lr": 0.1, "seed": 0, "epochs": [0, 1, 2, 3] * 2, "steps": [0, 5, 10, 15] * 2,
        "test_accuracy": [0.1, 0.8, 0.7, 0.9, 0.1, 0.2, 0.3, 0.4],
    })  # fmt: skip
    hits = sweep.to_target(frame, "test_accuracy", 0.8).set_index("batch_size")
    assert hits.loc[8, ["epochs", "reached"]].tolist() == [1, True]
    assert hits.loc[64, ["epochs", "reached"]].tolist() == [3, False]
    assert sweep.to_target(frame, "test_accuracy", 0.8, axis="steps")["steps"].tolist() == [5, 15]


def test_the_key_is_that_of_what_the_entry_says_it_is():
    frame = sweep.run([BLOBS], 1)
    checked = settings_module.checked(BLOBS)
    assert frame["run"].iloc[0] == key_of(settings_module.content(checked, 0))
    assert stored() == [frame["run"].iloc[0]]


def test_each_seed_of_a_stack_ends_where_it_would_end_alone(tmp_path):
    s = {"dataset": "blobs", "model": "brownlee_mlp", "steps": 60, "record_steps": range(1, 60), "lr": 0.02}
    together = sweep.run([dict(s, target=("test_accuracy", 0.7))], 4, store=Store(tmp_path))
    ends = together.groupby("seed").steps.max()
    assert ends.nunique() > 1
    for seed, one in together.groupby("seed"):
        assert (one.test_accuracy[:-1] < 0.7).all(), seed
        assert one.test_accuracy.iloc[-1] >= 0.7 or ends[seed] == 60, seed


@pytest.mark.parametrize("target", [("test_loss", 0.1), ("test_accuracy",), "test_accuracy"])
def test_a_target_that_cannot_be_reached_from_below_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="expected a pair such as"):
        sweep.run(
            [{"dataset": "blobs", "model": "brownlee_mlp", "steps": 3, "target": target}], 1, store=Store(tmp_path)
        )


def test_a_target_on_a_split_without_examples_is_refused():
    data = Dataset.of(torch.randn(8, 2), torch.arange(8) % 2, device="cpu")
    problem = Problem(data, Net(functools.partial(torch.nn.Linear, 2, 2)))
    with pytest.raises(ValueError, match=r"target is \('test_accuracy', 0.5\), but data has no test examples"):
        sweep.run([{"problem": problem, "batch_size": 4, "steps": 2, "target": ("test_accuracy", 0.5)}], 1)


def test_spectra_are_of_the_loss_a_network_was_trained_with(tmp_path):
    s = {"dataset": "blobs", "model": "brownlee_mlp", "epochs": 1, "loss": "squared", "lr": 1e-4}
    given = {"epochs": [1], "store": Store(tmp_path)}
    found = sweep.measure("spectrum", [s], 1, **given).eigenvalue.item()
    (solution,) = sweep.weights(s, 1, 1, store=given["store"])
    assert found == pytest.approx(landscape.spectrum(solution).eigenvalue.item(), rel=1e-3)
    crossed = Solution(problems.named("blobs", "brownlee_mlp"), solution.weights)
    assert found != pytest.approx(landscape.spectrum(crossed).eigenvalue.item(), rel=0.1)


def test_trials_of_a_protocol_without_any_are_refused(tmp_path):
    s = {"dataset": "blobs", "model": "brownlee_mlp", "epochs": 1}
    with pytest.raises(ValueError, match="only walk and frozen have trials"):
        sweep.measure("noise", [s], 1, epochs=[1], trials=20, store=Store(tmp_path))


# Running statistics


def test_a_sweep_keeps_the_running_statistics_of_a_normalisation():
    base = {"dataset": "digits", "num_train": 300, "model": "brownlee_mlp", "epochs": 2, "norm": "batch"}
    frame = sweep.run(sweep.grid(base, norm_batch_size=[None, 5]), [3], snapshots=[1], jobs=1)
    assert frame["test_loss"].nunique() == 5  # the starts agree
    problem = problems.named("digits", "brownlee_mlp", num_train=300, norm="batch")
    state = Training(problem, seeds=[3]).advance(epochs=1).stack.state()
    (kept,) = sweep.weights(base, [3], 1)
    assert kept.weights.keys() == state.keys()
    for name, value in state.items():  # a sweep computes with one thread
        torch.testing.assert_close(kept.weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


PROTOCOL_OPTIONS = {
    "walk": {"batch_sizes": [4], "draw_size": 16}, "frozen": {"batch_sizes": [4], "draw_size": 16},
    "staleness": {"batch_size": 2, "counts": [3], "base_rates": [1e-3]}, "noise": {},
    "spectrum": {"examples": 30}, "boxes": {"epsilons": [1e-3], "examples": 30},
    "minibatches": {"batch_sizes": [4], "draws": 3, "draw_size": 20, "replace": True},
    "micro_batches": {"batch_size": 8, "micro_batch_size": 2, "draws": 2},
}  # fmt: skip


@pytest.mark.parametrize("protocol", sweep.PROTOCOLS)
def test_protocols_take_any_loss_and_a_group_normalisation(protocol, tmp_path):
    plain = {"dataset": "digits", "num_train": 60, "model": "small_mlp", "epochs": 1, "batch_size": 20, "lr": 1e-4}
    given, options = {"epochs": [1], "jobs": 1, "store": Store(tmp_path)}, PROTOCOL_OPTIONS[protocol]
    seen = [sweep.measure(protocol, [plain], 1, **given, **options)]
    for other in ({"loss": "squared"}, {"norm": "group"}):
        seen.append(sweep.measure(protocol, [plain | other], 1, **given, **options))
        (solution,) = sweep.weights(plain | other, 1, 1, store=given["store"])
        trials = {"trials": [0]} if sweep.PROTOCOLS[protocol].trials else {}
        direct = sweep.PROTOCOLS[protocol].function(solution, **options, **trials)
        column = direct.select_dtypes("float").columns[-1]
        np.testing.assert_allclose(seen[-1][column].astype(float), direct[column], rtol=1e-3)
    assert len({tuple(frame[column]) for frame in seen}) == 3  # each has a key of its own


@pytest.mark.parametrize("protocol", sweep.PROTOCOLS)
def test_protocols_refuse_batch_normalisation(protocol):
    with pytest.raises(ValueError, match="without batch normalisation; choose norm='group'"):
        sweep.measure(protocol, [BLOBS, BLOBS | {"norm": "batch"}], 1, epochs=[0], **PROTOCOL_OPTIONS[protocol])
    assert stored() == []
