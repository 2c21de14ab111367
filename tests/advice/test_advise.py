"""Advice: each awkward problem gets a right answer or one clear line, and nothing of the user's moves."""

import copy
import dataclasses
import json
import math
import os
import random
import traceback

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers import Dataset, Net, Problem, Training, advise
from helpers.advice import answer, contract, critical, memory, rate, speed
from helpers.advice.advise import _Phases
from helpers.advice.interval import Interval
from helpers.advice.subject import subject as make_subject

QUICK = {"minutes": 0.02, "say": lambda line: None}
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(200, 1, 8, 8, generator=GENERATOR), torch.randint(5, (200,), generator=GENERATOR)
TOKENS = torch.randint(11, (200, 7), generator=GENERATOR)


pytestmark = pytest.mark.usefixtures("steady")


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5))


def normalised_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def problem(net=plain, loss=F.cross_entropy, x=X, y=Y):
    return Problem(Dataset.of(x, y, device="cpu"), Net(net), loss)


def checked(made, batch_size=16, **options):
    return contract.check(make_subject(made, "sgd", batch_size, 0.1, None, **options), 1.0)


# Contract


@pytest.mark.parametrize("net", [plain, lambda: nn.Sequential(plain(), nn.Dropout(0.5))])
def test_accumulation_of_independent_examples_is_exact(net):
    found = checked(problem(net))
    assert found.accumulation == contract.EXACT and found.precision == "float64" and found.deviation < 1e-12
    assert found.deterministic and found.by_example


def test_batch_normalisation_is_found_by_the_name_of_its_layer():
    found = checked(problem(normalised_cnn))
    assert found.accumulation == contract.IMPOSSIBLE and found.cause == "1 (BatchNorm2d)"


def test_dropout_in_a_function_is_told_and_does_not_count_as_company():
    class Dropping(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x.flatten(1)), 0.5, self.training)

    found = checked(problem(lambda: Dropping(64, 5)))
    assert found.accumulation == contract.EXACT and not found.deterministic


def test_tied_embeddings_are_told_and_accumulate_exactly():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    found = checked(problem(Tied, x=TOKENS[:, :-1], y=TOKENS[:, 1:]))
    assert found.accumulation == contract.EXACT and found.tied == ("head.weight",)


def padded():
    targets = TOKENS[:, 1:].clone()
    for row, target in enumerate(targets):
        target[1 + row % 6 :] = -100
    return problem(lambda: nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)), x=TOKENS[:, :-1], y=targets)


def test_unequal_numbers_of_tokens_want_weights():
    made = padded()
    found = checked(made)
    assert found.accumulation == contract.WEIGHTED and found.deviation > 1e-3
    indices = torch.arange(24)
    module = made.net.module(0)
    own = F.cross_entropy(module(made.dataset.batch(indices)[0]).movedim(-1, 1), made.dataset.batch(indices)[1])
    as_trained = found.as_trained(made).example_losses(
        module(made.dataset.batch(indices)[0]), made.dataset.batch(indices)[1]
    )
    assert torch.allclose(as_trained.mean(), own)  # what follows trains what the user trains


def test_unequal_lengths_are_told_and_the_longest_are_first():
    items = [(torch.ones(1 + i % 9), torch.tensor(i % 2)) for i in range(40)]

    def collate(chosen):
        xs, ys = zip(*chosen)
        return nn.utils.rnn.pad_sequence(xs, batch_first=True), torch.stack(ys)

    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x.sum(1, keepdim=True))

    made = Problem(Dataset.of_map(items, collate_fn=collate, device="cpu"), Net(lambda: Mean(1, 2)))
    assert checked(made).uneven
    found = make_subject(made, "sgd", 8, 0.1, None)
    longest = memory._longest(found)[:4]
    assert found.problem.dataset.batch(longest)[0].shape == (4, 9)


def test_a_sum_is_told_and_advice_is_for_its_mean():
    found = checked(problem(loss=lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum")))
    assert found.accumulation == contract.SUM and not found.by_example
    module, mean = plain(), problem()
    summed = found.as_trained(problem(loss=lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum")))
    assert torch.allclose(
        summed.example_losses(module(X[:9]), Y[:9]).mean(), mean.example_losses(module(X[:9]), Y[:9]).mean()
    )


def test_a_contrastive_loss_is_found_by_computing():
    def contrastive(outputs, targets):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")

    found = checked(problem(loss=contrastive))
    assert found.accumulation == contract.IMPOSSIBLE and found.cause == "the loss"


# One clear line


def test_a_fixed_batch_dimension_is_one_clear_line():
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(16, -1))

    with pytest.raises(ValueError, match=r"takes batches of 16 .* its batch dimension is fixed"):
        advise(problem(lambda: Fixed(64, 5)), batch_size=16, **QUICK)


def test_an_iterable_dataset_is_refused_with_the_way_out():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(X[0], Y[0])])

    model = plain()
    with pytest.raises(RuntimeError, match=r"one order alone.*islice"):
        advise.from_loop(
            model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(Stream()), F.cross_entropy, **QUICK
        )


def test_one_example_is_no_choice():
    with pytest.raises(ValueError, match="1 training example"):
        advise(problem(x=X[:1], y=Y[:1]), batch_size=1, **QUICK)


def test_without_a_test_set_some_training_examples_are_held_out():
    found = make_subject(problem(), "sgd", 200, 0.1, None)
    assert (found.num_train, found.problem.dataset.num_test, found.batch_size) == (180, 20, 180)
    assert {*map(float, found.problem.dataset.train_inputs[:, 0, 0, 0])} | {
        *map(float, found.problem.dataset.test_inputs[:, 0, 0, 0])
    } == {*map(float, X[:, 0, 0, 0])}


def test_a_loss_that_is_not_a_number_is_one_clear_line():
    with pytest.raises(ValueError, match="the loss of the first 16 examples is nan at the weights given"):
        advise(problem(loss=lambda outputs, targets: outputs.sum(1) * math.nan), batch_size=16, **QUICK)


def test_a_net_on_meta_is_named():
    with pytest.raises(ValueError, match=r"weight is on the meta device.*to_empty"):
        advise(problem(lambda: nn.Linear(64, 5, device="meta")), **QUICK)


def test_a_users_exception_keeps_its_own_traceback():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 5)

        def forward(self, x):
            return {"logits": self.linear(x.flatten(1))}["scores"]

    with pytest.raises(KeyError, match="scores") as caught:
        advise(problem(Broken), **QUICK)
    assert "forward" in [frame.name for frame in traceback.extract_tb(caught.tb)]


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 201}, "batch_size is 201"), ({"lr": 0.0}, "lr is 0.0"), ({"minutes": 0}, "minutes is 0"),
    ({"weights": {"0.weight": torch.zeros(1)}}, "of another net"), ({"optimizer": "lion"}, "unknown optimizer"),
])  # fmt: skip
def test_bad_input_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        advise(problem(), **{**QUICK, **options})
    assert "\n" not in str(caught.value)


# Memory that runs out


class Hungry(nn.Sequential):
    """Runs out of memory above 40 examples, in one mode."""

    def __init__(self, training):
        super().__init__(*plain())
        self.hungry = training

    def forward(self, x):
        if self.training == self.hungry and len(x) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


class Greedy(torch.optim.SGD):
    def step(self, closure=None):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(("training", "where"), [(True, "a training step"), (False, "an evaluation batch")])
def test_the_largest_batch_is_found_where_memory_runs_out(training, where):
    found = memory.measure(make_subject(problem(lambda: Hungry(training)), "adamw", 32, 0.01, None), 120.0)
    assert (found.proven, found.fits, found.limit) == (40, 40, (41, where))


def test_an_optimizer_whose_state_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"not even one example fits: out of memory in the optimizer's state"):
        advise(problem(), optimizer=Greedy, **QUICK)


# Nothing of the user's moves


def test_a_loops_objects_are_the_same_to_the_bit_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(normalised_cnn(), nn.Dropout(0.1))
    optimizer = torch.optim.Adam(
        [{"params": [*model[0][:2].parameters()], "lr": 0.02}, {"params": model[0][5].parameters()}], 0.01
    )
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def state():
        every = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state(), X, Y]
        return (
            [t.clone() for t in every],
            copy.deepcopy(optimizer.state_dict()),
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002
        )

    before = state()
    found = advise.from_loop(model, optimizer, loader, lambda outputs, y: F.cross_entropy(outputs, y), **QUICK)
    after = state()
    assert all(torch.equal(one, other) for one, other in zip(before[0], after[0]))
    assert str(before[1]) == str(after[1]) and before[2] == after[2] and str(before[3]) == str(after[3])
    assert model.training and os.listdir(tmp_path) == []
    assert found.phases["contract"].cause == "0.1 (BatchNorm2d)" and "BatchNorm2d" in found.missing["noise"]
    assert found.about["lr"] == 0.02 and found.about["rule"] == "√"


def test_a_loops_optimizer_goes_on_from_its_state():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X[:50]), Y[:50]).backward()
        optimizer.step()
    from helpers.advice import subject as subjects

    made, again, batch_size, lr, state, workers = subjects.loop(
        model, optimizer, DataLoader(TensorDataset(X, Y), 20), F.cross_entropy
    )
    training = make_subject(made, again, batch_size, lr, state, workers).training()
    indices = training.next_indices()[0]
    x, y = training.dataset.batch(indices)
    training.step()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(training.stack.parameters[name][0], p, atol=1e-6)


# The whole


def test_an_interrupt_keeps_what_is_known(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_Phases, "_noise", interrupted)
    found = advise(problem(), batch_size=16, **QUICK)
    assert (
        found.interrupted
        and set(found.phases) == {"contract", "memory", "speed"}
        and found.missing["noise"] == "interrupted"
    )
    assert found.answer is None and found.summary()[0].startswith("No advice")


def test_the_answer_is_ten_lines_and_a_file(tmp_path):
    found = advise(problem(), batch_size=16, optimizer="sgd", lr=0.1, out=tmp_path, **QUICK)
    assert len(found.summary()) == 10
    read = json.loads((tmp_path / "advice.json").read_text())
    assert read["version"] == 1 and read["summary"] == found.summary()
    assert read["answer"]["batch_size"] == found.answer.batch_size
    assert {"contract", "memory", "speed", "noise"} == set(read["phases"])
    assert [row["batch_size"] for row in read["answer"]["table"]] == found.table.batch_size.tolist()


def test_a_trained_state_is_measured_where_it_is():
    training = Training(problem(), batch_size=16, lr=0.1).advance(epochs=3, record=False)
    found = advise(problem(), optimizer="sgd", batch_size=16, lr=0.1, weights=training, **QUICK)
    again = advise(
        problem(), optimizer="sgd", batch_size=16, lr=0.1, weights=training.stack.modules[0].state_dict(), **QUICK
    )
    assert found.phases["noise"].trace == again.phases["noise"].trace
    assert (
        found.phases["noise"].trace != advise(problem(), optimizer="sgd", batch_size=16, **QUICK).phases["noise"].trace
    )


def test_half_an_hours_advice_has_rates_and_branches_along_a_pilot_run(monkeypatch):
    monkeypatch.setattr(critical, "_MOST", 3)  # orders of the data
    x, curvature = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0)), 1 / torch.arange(1.0, 17)

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((16,), 3.0))

        def forward(self, inputs):
            return self.w - inputs

    data = Dataset.of(x, torch.zeros(1024), torch.zeros(1, 16), torch.zeros(1), device="cpu")
    made = Problem(data, Net(Point), lambda outputs, _: (outputs.square() * curvature).sum(1) / 2)
    found = advise(made, optimizer="sgd", batch_size=32, lr=0.05, minutes=30, say=lambda line: None)
    asked = [*found.phases, *found.missing]
    assert asked.count("rate") == 1 and sum(name.startswith("critical") for name in asked) == 4
    first, rate, a = found.phases["critical at initialisation"], found.phases["rate"], found.answer
    assert first.examples == 1024 and first.frame.batch_size.unique().tolist() == [8, 16, 32, 64, 128]
    assert 8 < first.size.estimate < 128 and first.size.low > 0
    assert rate.best.low <= rate.best.estimate <= rate.best.high <= rate.stable.high
    assert rate.best.estimate > 0.2  # the highest rate of the first grid
    assert a.critical_from.startswith("critical") and a.low <= a.batch_size <= a.high <= 1024 / 20
    assert a.lr.low < a.lr.estimate < a.lr.high


def test_a_critical_batch_that_grows_more_than_fourfold_is_answered_by_a_ramp():
    found = advise(problem(), batch_size=16, optimizer="sgd", lr=0.1, **QUICK)
    sizes = {"critical at initialisation": 10, "critical after warm-up": 90}
    frame = pd.DataFrame()
    phases = {name: critical.Branches(Interval(size / 2, size, 2 * size), 8, 64, 1000, {8: 0.1, 64: 0.2}, frame)
              for name, size in sizes.items()}  # fmt: skip
    grown = dataclasses.replace(found, phases={**found.phases, **phases})
    assert grown.growth == pytest.approx(9)
    assert f"it grows 9-fold, so start with {round(found.answer.batch_size / 3)}" in "".join(grown.summary())
    assert "grows" not in "".join(found.summary())


def test_branches_that_do_not_fit_the_time_are_refused_before_they_are_tried():
    subject = make_subject(problem(), "sgd", 16, 0.1, None)
    slow = dataclasses.replace(speed.measure(subject, 5.0, 180), fixed=60.0, per_example=1.0)
    with pytest.raises(ValueError, match=r"30 steps of 5 rates in 3 orders take about [\d,]+ s"):
        rate.measure(subject, 100.0, slow)
    with pytest.raises(ValueError, match="do not fit into 100 s"):
        critical.measure(subject, 100.0, slow, 0.1, 100)


# The answer in closed form


def test_the_range_is_within_a_tenth_of_the_least_time():
    low, best, high, bound = answer.within(turning=50.0, critical=50.0, cap=1e9)
    assert (low, best, high) == pytest.approx((50 / 1.86, 50, 50 * 1.86), rel=0.01) and not bound
    low, best, high, bound = answer.within(turning=30.0, critical=300.0, cap=1e9)
    for size in (low, high):
        assert (1 + 300 / size) * (30 + size) == pytest.approx(1.1 * (30**0.5 + 300**0.5) ** 2, rel=1e-3)
    assert best == pytest.approx(math.sqrt(30 * 300), rel=1e-2)


def test_a_cap_moves_the_range_to_the_least_time_that_it_allows():
    low, best, high, bound = answer.within(turning=1000.0, critical=1000.0, cap=100.0)
    assert bound and best == pytest.approx(100, rel=1e-2) and high == pytest.approx(100, rel=1e-2)
    assert (1 + 1000 / low) * (1000 + low) == pytest.approx(1.1 * (1 + 1000 / 100) * 1100, rel=1e-2)


def test_the_rate_is_read_between_the_branches_and_smoothed_over_neighbours():
    subject = make_subject(problem(), "sgd", 16, 0.1, None)
    frame = pd.DataFrame()
    branches = {"critical": critical.Branches(Interval(50, 100, 200), 8, 64, 1000, {8: 0.1, 16: 0.4, 32: 0.1}, frame)}
    assert answer._rate(subject, None, branches, 16).estimate == pytest.approx((0.1 * 0.4 * 0.1) ** (1 / 3))
    assert answer._rate(subject, None, {}, 32).estimate == pytest.approx(0.2)  # the linear rule from the present rate


def test_intervals_combine_in_logs_and_stay_open():
    both = (Interval(5, 10, 20) * Interval(5, 10, 20)) ** 0.5
    assert both.estimate == pytest.approx(10) and both.high == pytest.approx(10 * 2 ** (1 / math.sqrt(2)))
    assert math.isinf((Interval(5, 10, math.inf) ** 0.5).high) and (Interval(5, 10, math.inf) ** -1).low == 0


def test_a_steps_price_is_read_off_steps_of_a_known_price(monkeypatch):
    rng = np.random.default_rng(0)

    def steps(subject, size):
        seconds = (0.02 + 0.001 * size) * np.exp(0.05 * rng.normal(size=9))
        return np.stack([0 * seconds, seconds], axis=1)

    monkeypatch.setattr(speed, "_steps", steps)
    found = speed.measure(make_subject(problem(), "sgd", 16, 0.1, None), 5.0, 180)
    assert found.fixed == pytest.approx(0.02, rel=0.2) and found.per_example == pytest.approx(0.001, rel=0.2)
    assert found.turning.low <= 20 <= found.turning.high and found.loader_from is None


def test_a_loader_that_takes_longer_than_the_step_is_said(monkeypatch):
    def steps(subject, size):
        return np.array([[0.001 * size, 0.02]] * 9)

    monkeypatch.setattr(speed, "_steps", steps)
    found = speed.measure(make_subject(problem(), "sgd", 16, 0.1, None), 5.0, 180)
    assert found.loader_from == 32 and "the loader is the limit from 32 on" in found.sentence


def test_the_present_batch_is_compared_over_the_interval_of_the_critical_one():
    x, y = X.repeat(40, 1, 1, 1), Y.repeat(40)
    advice = advise(Problem(Dataset.of(x, y, X, Y, device="cpu"), Net(plain)), optimizer="sgd", batch_size=8, **QUICK)
    assert advice.answer.low <= advice.answer.batch_size <= advice.answer.high <= advice.answer.cap
    turning, critical, cap = advice.phases["speed"].turning.estimate, advice.answer.critical, advice.answer.cap
    more = []
    for c in (critical.low, critical.estimate, critical.high):
        own, *others = ((1 + c / b) * (turning + b) for b in (8.0, *np.linspace(0.01, cap, 100_000)))
        more.append(100 * max(own / min(others) - 1, 0))
    assert max(more) > min(more) + 1
    assert f"takes {min(more):.0f} to {max(more):.0f} % more time than the best" in "\n".join(advice.summary())


def test_a_cap_is_reached_and_the_size_to_take_lies_in_the_range():
    assert answer.within(turning=100.0, critical=400.0, cap=10.0)[2:] == (10.0, True)
    assert answer._round(9.7, 9, 9) == 9 and answer._round(9.7, 5, 9) == 8
