"""The compiled loop against explicit float64 gradients, torch's own optimizers, and itself one step at a time."""

import functools

import numpy as np
import pytest
import torch
from oracles import mlp_gradient, mlp_loss, one_replica

from helpers import Dataset, Net, Problem, Training, schedule
from helpers.engine import compiled
from helpers.problems import LOSSES, nets


def dataset(inputs, num_train=300):
    x = torch.randn(num_train, inputs, generator=torch.Generator().manual_seed(0))
    return Dataset.of(x, torch.arange(num_train) % 5, x[:20], torch.arange(20) % 5, device="cpu")


def train(inputs, hidden=(50,), loss="cross_entropy", **settings):
    data = dataset(inputs)
    net = functools.partial(nets.MLP, data.input_shape, 5, hidden, nets.xavier_normal)
    training = Training(Problem(data, Net(net), LOSSES[loss]), **{"seeds": [0, 1], "lr": 0.1, **settings})
    assert training.stack.looped(training.batch_size)
    return training


def module_of(training, replica):
    module = training.problem.net.module(0)
    module.load_state_dict({name: value[replica] for name, value in training.weights().items()})
    return module


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("hidden", [(50,), (7, 33), (3,)])
@pytest.mark.parametrize("inputs", [2, 40])  # narrow inputs run across examples in large batches
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 23, 24, 130])
def test_a_step_is_one_along_the_explicit_gradient(inputs, hidden, batch_size):
    training = train(inputs, hidden, batch_size=batch_size).advance(steps=2, record=False)
    training.take_losses()
    before, indices = training.weights(), training.next_indices()
    training.step()
    _, losses = training.take_losses()
    for replica, own in enumerate(indices):
        x, y = training.dataset.train_inputs[own].double().numpy(), training.dataset.train_targets[own].numpy()
        weights = one_replica(before, replica)
        gradient = mlp_gradient(weights, x, y)
        assert losses[0, replica].item() == pytest.approx(mlp_loss(weights, x, y), rel=1e-5)
        found = training.stack.gradients()
        for name, g in gradient.items():
            np.testing.assert_allclose(found[name][replica], g, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(training.weights()[name][replica], weights[name] - 0.1 * g, rtol=1e-5, atol=1e-6)


OPTIONS = [
    {}, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.01}, {"weight_decay": 0.1}, {"loss": "squared"},
    {"optimizer": "adam"}, {"optimizer": "adam", "weight_decay": 0.1}, {"optimizer": "adamw", "betas": (0.8, 0.9)},
    {"optimizer": "adamw", "weight_decay": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("inputs", "batch_size"), [(2, 3), (2, 64), (40, 16)])
def test_the_loop_follows_the_ordinary_module_and_torchs_optimizer(inputs, batch_size, options):
    training = train(inputs, batch_size=batch_size, lr=0.01, **options)
    how = {k: v for k, v in options.items() if k not in ("loss", "optimizer")}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind = kind[options.get("optimizer", "sgd")]
    modules = [module_of(training, replica).double() for replica in range(2)]
    rules = [kind(module.parameters(), lr=0.01, **{"weight_decay": 0.0, **how}) for module in modules]
    for _ in range(6):
        for replica, indices in enumerate(training.next_indices()):
            x, y = training.dataset.batch(indices)
            losses = training.problem.example_losses(modules[replica](x.double()), y)
            rules[replica].zero_grad()
            losses.mean().backward()
            rules[replica].step()
        training.step()
    for replica, module in enumerate(modules):
        for name, p in module.named_parameters():
            torch.testing.assert_close(training.weights()[name][replica].double(), p.data, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("options", [*OPTIONS, {"lr": schedule({0: 0.1, 2: 0.01}, linear=True)}], ids=str)
@pytest.mark.parametrize(("inputs", "batch_size"), [(2, 1), (2, 40), (40, 7)])
def test_many_steps_at_once_are_the_same_steps_to_the_bit(inputs, batch_size, options):
    at_once, single = (train(inputs, batch_size=batch_size, **options) for _ in range(2))
    for size, momentum in ((batch_size, None), (batch_size + 1, None), (batch_size, 0.0)):
        for training in (at_once, single):
            training.batch_size = size
            if momentum is not None and "momentum" in options:
                training.momentum = momentum
        at_once.advance(steps=7, record=False)
        for _ in range(7):
            single.step()
    assert same(at_once.state(), single.state())
    assert same(at_once.stack.gradients(), single.stack.gradients())
    assert (at_once.steps, at_once.examples_seen, at_once.lr) == (single.steps, single.examples_seen, single.lr)
    assert all(map(torch.equal, at_once.take_losses(), single.take_losses()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_replicas_bits_do_not_depend_on_those_beside_it(options):
    for inputs, batch_size in ((2, 3), (2, 50), (40, 9)):
        stacked = train(inputs, seeds=[3, 0, 4], batch_size=batch_size, **options).advance(epochs=1)
        for replica, seed in enumerate([3, 0, 4]):
            alone = train(inputs, seeds=[seed], batch_size=batch_size, **options).advance(epochs=1)
            assert all(torch.equal(v[replica : replica + 1], alone.state()[k]) for k, v in stacked.state().items())
            mine = stacked.history[stacked.history.seed == seed].drop(columns=["seconds", "replicas"])
            assert mine.reset_index(drop=True).equals(alone.history.drop(columns=["seconds", "replicas"]))


def test_each_replica_has_its_own_rate():
    both = train(40, seeds=[1, 1], lr=[0.1, 0.02], batch_size=8).advance(steps=5, record=False)
    for replica, lr in enumerate((0.1, 0.02)):
        alone = train(40, seeds=[1], lr=lr, batch_size=8).advance(steps=5, record=False)
        assert all(torch.equal(v[replica], alone.weights()[k][0]) for k, v in both.weights().items())


@pytest.mark.parametrize("inputs", [2, 40])
@pytest.mark.parametrize("batch_size", [2, 30])
def test_a_replica_that_diverges_is_known_by_its_step_and_leaves_the_next_one_alone(inputs, batch_size):
    both = train(inputs, seeds=[0, 0], lr=[1e30, 0.1], batch_size=batch_size).advance(steps=9, record=False)
    _, losses = both.take_losses()
    assert losses[1:, 1].isfinite().all()
    bad = (~losses[:, 0].isfinite()).nonzero()[0].item()
    assert both.diverged_at[0] == bad + 1 and both.diverged_at[1].isnan()
    assert not losses[bad:, 0].isfinite().any()
    alone = train(inputs, seeds=[0], lr=0.1, batch_size=batch_size).advance(steps=9, record=False)
    assert all(torch.equal(v[1], alone.weights()[k][0]) for k, v in both.weights().items())


def test_a_loop_that_can_be_kept_nowhere_is_compiled_in_memory():
    made = {}
    exec("def double(x):\n    return 2 * x", made)  # of no file, beside which its machine code could lie
    assert compiled.kept(made["double"])(3.0) == 6.0


def test_steps_stop_at_records_and_at_the_end_of_an_epoch():
    training = train(2, batch_size=40).advance(epochs=2, record_steps=[3, 11])
    assert training.history[training.history.seed == 0].steps.tolist() == [0, 3, 8, 11, 16]
    training.advance(epochs=0.4, record=False)
    assert training.examples_seen == 600 + 120
