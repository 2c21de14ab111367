"""Stacks of ordinary modules beside those on the fast path: copies, states, micro-batches, memory, rates."""

import copy
import functools
import pickle

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Dataset, Net, Problem, Solution, Training, problems, schedule
from helpers.engine import kernels, stack
from helpers.measure import geometry
from helpers.problems import nets

X = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
DATA = Dataset.of(X, (X[:, 0] > 0).long() + (X[:, 1] > 0).long(), X[:20], torch.arange(20) % 3, device="cpu")


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def normalised():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def one_by_one():
    return nn.Sequential(nn.Linear(5, 3_000), nn.ReLU(), nn.Linear(3_000, 3))  # too large for vmap to pay


DIGITS = problems.load("digits", num_train=100, device="cpu")
PROBLEMS = {
    "vmap": Problem(DATA, Net(mlp)),
    "one by one": Problem(DATA, Net(one_by_one)),
    "batch norm": Problem(DATA, Net(normalised)),
    "kernel": problems.named("digits", "small_mlp", num_train=50, device="cpu"),
    "kernel, batch norm": problems.named("digits", "small_mlp", num_train=50, norm="batch", device="cpu"),
}
SHARING = Problem(DIGITS, Net(functools.partial(nets.MLP, (1, 8, 8), 10, [300], nets.xavier_normal)))
OPTIMIZERS = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "rates and momentum": {"momentum": 0.9, "lr": [0.01, 0.03]},
    "adam": {"optimizer": "adam"},
    "adam, rates": {"optimizer": "adam", "lr": [0.01, 0.03]},
    "rmsprop": {"optimizer": torch.optim.RMSprop},
}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
each_optimizer = pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)


def train(problem, **options):
    return Training(problem, **{"seeds": [0, 3], "batch_size": 16, "lr": 0.01, **options})


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# Copies


def memory(training):
    """The storage of everything that a step changes."""
    tensors = [*training.stack.parameters.values(), *(b for root in training.stack.roots for b in root.buffers())]
    tensors += [p for replica in range(training.stack.replicas) for p in training.stack.leaves(replica).values()]
    return {t.data_ptr() for t in tensors}


@each_problem
@each_optimizer
@pytest.mark.parametrize("way", ["branch", "pickle"])
def test_a_copy_shares_nothing_and_goes_on_to_the_bit(problem, options, way):
    through, trunk = (train(problem, **options).advance(steps=5) for _ in range(2))
    branch = trunk.branch() if way == "branch" else cloudpickle.loads(cloudpickle.dumps(trunk))
    assert not memory(trunk) & memory(branch)
    trunk.advance(steps=3, record=False)  # which must not touch the branch
    for training in (through, branch):
        training.advance(steps=3, record=False).record()
    assert same(through.state(), branch.state())
    assert through.history.drop(columns="seconds").equals(branch.history.drop(columns="seconds"))
    assert way == "pickle" or trunk.dataset is branch.dataset


@each_problem
def test_a_copys_modules_are_views_of_its_own_stack(problem):
    for s in (train(problem).branch().stack, pickle.loads(pickle.dumps(train(problem).stack))):
        for replica in range(2):
            for name, leaf in s.leaves(replica).items():
                assert leaf.data_ptr() == s.parameters[name][replica].data_ptr(), name


@each_problem
@each_optimizer
def test_a_resumed_training_goes_on_to_the_bit_and_leaves_the_state_as_it_was(problem, options):
    through, first, resumed = (train(problem, **options) for _ in range(3))
    for training in (through, first):
        training.advance(epochs=1)
    state = first.state()
    kept = copy.deepcopy(state)
    resumed.resume(state, first.history)
    for training in (through, resumed):
        training.advance(epochs=1)
    assert same(through.state(), resumed.state()) and same(state, kept)
    assert through.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))


# Weights


@each_problem
def test_a_stack_at_a_solution_has_its_weights_and_buffers_in_every_replica(problem):
    training = train(problem, seeds=[3]).advance(epochs=1, record=False)
    solution = Solution(problem, training.stack.state())
    s = stack.at(solution, replicas=3)
    assert all(torch.equal(value[replica], solution.weights[name][0])
               for name, value in s.state().items() for replica in range(3))  # fmt: skip
    x, y = problem.dataset.batch(torch.arange(10))
    expected = training.stack.eval().losses(x, y).expand(3, -1)
    torch.testing.assert_close(s.eval().losses(x, y), expected, rtol=1e-6, atol=1e-6)
    double = stack.at(solution, dtype=torch.float64)
    assert {p.dtype for p in double.parameters.values()} == {torch.float64}


def test_weights_of_another_net_are_refused_by_name():
    state = train(PROBLEMS["batch norm"]).stack.state()
    with pytest.raises(ValueError, match=r"these weights are of another net: 1\.bias, .* on one side alone"):
        train(PROBLEMS["vmap"]).stack.load(state)


@each_problem
def test_gradients_by_autograd_leaves_are_those_of_a_step(problem):
    training = train(problem, seeds=[0, 1])
    s, indices = training.stack.train(), training.next_indices()
    losses = s.losses(*s.batch(indices), shared=False).mean(1)
    found = s.stacked(torch.autograd.grad(losses.sum(), s.autograd_leaves()))
    fresh = train(problem, seeds=[0, 1]).minibatch_gradient()
    for name, gradient in fresh.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# Micro-batches


@each_problem
def test_micro_batches_add_up_and_batch_statistics_are_theirs(problem):
    whole, split = train(problem, batch_size=24), train(problem, batch_size=24, micro_batch_size=8)
    indices = whole.next_indices()
    gradient = split.minibatch_gradient()
    expected = whole.minibatch_gradient()
    if whole.stack.train().batch_statistics() is not None:
        assert not all(torch.allclose(gradient[name], g, atol=1e-4) for name, g in expected.items())
        parts = []
        for part in indices.split(8, dim=1):
            single = train(problem, batch_size=24)
            single.next_indices = lambda part=part: part
            parts.append(single.minibatch_gradient())
        expected = {name: sum(part[name] for part in parts) / 3 for name in gradient}
    for name, g in expected.items():
        torch.testing.assert_close(gradient[name], g, rtol=1e-4, atol=1e-6, msg=name)


def fail_above(training, limit):
    """A device whose memory does not hold the backward pass of more than ``limit`` examples."""
    real, seen = training.stack.backward, []

    def backward(inputs, targets, share=1.0, step=(0, 0)):
        seen.append(len(targets[0]))
        losses = real(inputs, targets, share, step)
        if len(targets[0]) > limit:  # when buffers have moved
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes")
        return losses

    training.stack.backward = backward
    return seen


@each_problem
def test_a_minibatch_that_does_not_fit_is_started_over_with_its_buffers_as_they_were(problem):
    options = {"batch_size": 24, "momentum": 0.9, "closed_form": False}
    training = train(problem, **options)
    seen = fail_above(training, 6)
    with pytest.warns(UserWarning, match="at once do not fit in memory") as caught:
        training.advance(steps=2, record=False)
    assert [w.message.args[0].split(": ")[1].split(" at")[0] for w in caught] == ["24 examples", "12 examples"]
    assert seen[:6] == [24, 12, 6, 6, 6, 6] and training.micro_batch_size == 6
    given = train(problem, micro_batch_size=6, **options).advance(steps=2, record=False)
    assert same(training.state(), given.state())


# The closed form, clipping, rates


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_autograds_way_is_the_closed_forms(monkeypatch, options, clip_norm):
    monkeypatch.setattr(kernels, "LOOPED_ACTIVATIONS", 0)
    by_hand, by_autograd = (
        train(PROBLEMS["kernel"], clip_norm=clip_norm, closed_form=closed, **options).advance(epochs=2)
        for closed in (True, False)
    )
    assert bool(by_hand.stack.factors) != by_hand._looped  # in closed form, by operators or in the compiled loop
    assert not by_autograd.stack.factors and not by_autograd._looped
    tolerance = 1e-4 if options.get("optimizer") else 1e-6  # Adam and RMSprop divide rounding by small gradients
    for name, value in by_hand.weights().items():
        torch.testing.assert_close(value, by_autograd.weights()[name], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", ["kernel", "vmap", "one by one"])
def test_a_gradient_is_clipped_as_torch_clips_it_a_replica(name):
    training = train(PROBLEMS[name], lr=1.0, clip_norm=0.05)
    before, gradient = training.weights(), training.minibatch_gradient()
    training.step()
    for replica in range(2):
        leaves = [nn.Parameter(w[replica].clone()) for w in before.values()]
        for leaf, g in zip(leaves, gradient.values()):
            leaf.grad = g[replica].clone()
        assert nn.utils.clip_grad_norm_(leaves, 0.05) > 0.05
        for (n, w), leaf in zip(before.items(), leaves):
            torch.testing.assert_close(training.weights()[n][replica], w[replica] - leaf.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "adam"}], ids=["sgd", "momentum", "adam"])
def test_rates_may_part_between_steps(name, options):
    problem = PROBLEMS[name]
    if "optimizer" in options and "batch norm" in name:
        pytest.skip("biases before a batch norm have gradients of 0, and Adam follows the sign of their rounding")
    options = {"batch_size": 25, **options}  # no minibatch of two examples, whose batch statistics amplify rounding
    stacked = train(problem, lr=0.01, **options).advance(steps=3, record=False)
    stacked.lr = [0.02, 0.05]
    stacked.advance(steps=3, record=False)
    for replica, (seed, lr) in enumerate([(0, 0.02), (3, 0.05)]):
        single = train(problem, seeds=[seed], lr=0.01, **options).advance(steps=3, record=False)
        single.lr = lr
        single.advance(steps=3, record=False)
        for n, w in single.weights().items():
            assert (stacked.weights()[n][replica] - w[0]).abs().max() <= 2e-6, n


RATES = (0.002, schedule({0: 0.001, 2: 0.01}, linear=True), 0.05, 30.0)


@pytest.mark.parametrize("batch_size", [1, 20, 100])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"optimizer": "adam"}, {"optimizer": "adamw", "weight_decay": 0.1}],
    ids=["sgd", "momentum", "decay", "adam", "adamw"],
)
@pytest.mark.parametrize("activations", [0, kernels.LOOPED_ACTIVATIONS], ids=["products", "loop"])
def test_rates_side_by_side_equal_each_alone_to_the_bit(monkeypatch, activations, options, batch_size):
    monkeypatch.setattr(kernels, "LOOPED_ACTIVATIONS", activations)
    options = {"batch_size": batch_size, "measures": geometry.distances, **options}
    stacked = Training(SHARING, seeds=[2] * 4, lr=RATES, **options).advance(epochs=3, record_steps=[7])
    records = len(stacked.history) // 4
    for replica, lr in enumerate(RATES):
        single = Training(SHARING, seeds=[2], lr=lr, **options).advance(epochs=3, record_steps=[7])
        for (name, value), own in zip(stacked.state().items(), single.state().values()):
            torch.testing.assert_close(value[replica : replica + 1], own, rtol=0, atol=0, equal_nan=True, msg=name)
        mine = stacked.history[replica * records :][:records].reset_index(drop=True)
        assert mine.drop(columns=["seconds", "replicas"]).equals(single.history.drop(columns=["seconds", "replicas"]))
        assert stacked.state().keys() == single.state().keys()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "adam"}], ids=["sgd", "momentum", "adam"])
def test_a_run_whose_batch_grows_out_of_the_compiled_loop_goes_on(monkeypatch, options):
    def train(lr):
        grows = schedule({0: 10, 1: 50, 2: 10})
        return Training(SHARING, seeds=[2] * len(lr), lr=lr, batch_size=grows, **options).advance(epochs=3)

    looped = train([0.01, 0.02])
    monkeypatch.setattr(kernels, "LOOPED_ACTIVATIONS", 20 * (64 + 300 + 10))
    assert looped.stack.looped(10) and not looped.stack.looped(50)
    grown = train([0.01, 0.02])
    for name, value in grown.weights().items():
        torch.testing.assert_close(value, looped.weights()[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(value[1:], train([0.02]).weights()[name]), name


def test_replicas_of_one_seed_share_the_copy_of_a_minibatch():
    x, y = Training(SHARING, seeds=[2, 2, 2], batch_size=20).stack.batch(torch.arange(20).expand(3, -1))
    assert x.stride(0) == y.stride(0) == 0 and torch.equal(x[2], SHARING.dataset.batch(torch.arange(20))[0])
    shared = Training(SHARING, seeds=[2, 2], batch_size=20).next_indices()
    apart = Training(SHARING, seeds=[2, 3], batch_size=20).next_indices()
    assert shared.stride(0) == 0 and torch.equal(shared[1], apart[0]) and not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("activations", [0, kernels.LOOPED_ACTIVATIONS], ids=["products", "loop"])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adam"}], ids=["momentum", "adam"])
def test_a_resumed_stack_of_rates_continues_to_the_bit(monkeypatch, activations, options):
    monkeypatch.setattr(kernels, "LOOPED_ACTIVATIONS", activations)

    def new():
        return Training(SHARING, seeds=[2] * 4, lr=RATES, batch_size=30, **options)

    through, first, resumed = new(), new(), new()
    for training in (through, first):
        training.advance(epochs=1)
    resumed.resume(first.state(), first.history)
    for training in (through, resumed):
        training.advance(epochs=2)
    assert same(through.weights(), resumed.weights())
    assert through.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))


def test_vmapped_replicas_equal_single_runs():
    stacked = Training(PROBLEMS["vmap"], seeds=range(4), batch_size=16, lr=0.1, momentum=0.9).advance(epochs=5)
    assert stacked.stack._vmap
    for seed in range(4):
        single = Training(PROBLEMS["vmap"], seeds=[seed], batch_size=16, lr=0.1, momentum=0.9).advance(epochs=5)
        for name, w in single.weights().items():
            assert (stacked.weights()[name][seed] - w[0]).abs().max() <= 1e-6, name


class Unused(nn.Module):
    """A layer that the output does not use: it has no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "adam"}], ids=["sgd", "momentum", "adam"])
def test_a_layer_without_a_gradient_stays(seeds, options):
    training = Training(Problem(DATA, Net(Unused)), seeds=seeds, batch_size=16, lr=0.1, **options)
    before = training.weights()
    after = training.advance(epochs=1).weights()
    assert torch.equal(before["b.weight"], after["b.weight"]) and not torch.equal(before["a.weight"], after["a.weight"])
    resumed = Training(Problem(DATA, Net(Unused)), seeds=seeds, batch_size=16, lr=0.1, **options)
    resumed.resume(training.state(), training.history)
    assert same(resumed.advance(epochs=1).weights(), training.advance(epochs=1).weights())


def test_losses_of_every_replica_are_its_modules():
    s = train(PROBLEMS["batch norm"]).stack.train()
    x, y = DATA.batch(torch.arange(12))
    modules = [PROBLEMS["batch norm"].net.module(seed).train() for seed in (0, 3)]
    for found, module in zip(s.losses(x, y), modules):
        torch.testing.assert_close(found, F.cross_entropy(module(x), y, reduction="none"))
    one = functools.partial(torch.equal, s.outputs(x)[0])
    assert not one(s.eval().outputs(x)[0])
