"""Problems of a user's own, defined here and not in the package: each trains as a plain PyTorch loop of it does."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Dataset, Net, Problem, Training, problems
from helpers.engine import stack
from helpers.engine.order import epoch_order
from helpers.engine.stack import Modules
from helpers.problems import DataError, nets

SEEDS = (0, 1, 2)


def vectors(n=60, features=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator)
    return Dataset.of(
        x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long() % classes, x[:20], torch.zeros(20).long(), device="cpu"
    )


def mlp():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def loop(problem, seed, *, steps, batch_size, optimizer, clip=None):
    """A plain PyTorch loop: the same initial weights and order, torch's own mean and optimizer."""
    module = problem.net.module(seed)
    opt = optimizer(list(module.parameters()))
    done, epoch = 0, 0
    while done < steps:
        for indices in epoch_order(problem.num_train, seed, epoch).split(batch_size):
            inputs, targets = problem.dataset.batch(indices)
            opt.zero_grad()
            problem.example_losses(module(inputs), targets).mean().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            opt.step()
            done += 1
            if done == steps:
                return dict(module.named_parameters())
        epoch += 1


def assert_equal(training, replica, parameters, tolerance=1e-6):
    for name, p in parameters.items():
        assert (training.weights()[name][replica] - p.detach()).abs().max() <= tolerance, name


def test_an_mlp_of_three_seeds_equals_three_plain_loops():
    problem = Problem(vectors(), Net(mlp))
    training = Training(problem, seeds=SEEDS, batch_size=16, lr=0.1, momentum=0.9).advance(steps=10, record=False)
    for replica, seed in enumerate(SEEDS):
        sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        assert_equal(training, replica, loop(problem, seed, steps=10, batch_size=16, optimizer=sgd))


def test_small_modules_go_through_vmap_and_large_ones_one_by_one():
    training = Training(Problem(vectors(), Net(mlp)), seeds=SEEDS, batch_size=16).advance(steps=1, record=False)
    assert training.stack._vmap is True
    wide = Problem(vectors(), Net(lambda: nn.Sequential(nn.Linear(5, 9_000), nn.ReLU(), nn.Linear(9_000, 3))))
    wide = Training(wide, seeds=SEEDS, batch_size=16)
    assert wide.advance(steps=1, record=False).stack._vmap is False


class Plain(nets.MLP):
    """A built-in net under another class: it has no fast path."""


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_general_path_equals_the_built_in_fast_path_of_the_same_net(optimizer):
    fast = problems.named("digits", "small_mlp", num_train=300)
    factory = functools.partial(Plain, (1, 8, 8), 10, hidden=(128,), initialise=nets.he_uniform_then_xavier_uniform)
    slow = Problem(fast.dataset, Net(factory))
    settings = {"seeds": SEEDS, "batch_size": 64, "lr": 0.01, "optimizer": optimizer}
    one, other = (Training(p, **settings).advance(epochs=2) for p in (fast, slow))
    assert one.stack.kernel is not None and isinstance(other.stack, Modules)
    for name, value in one.weights().items():
        assert (value - other.weights()[name]).abs().max() <= (1e-6 if optimizer == "sgd" else 1e-5), name
    columns = ["train_loss", "test_accuracy", "minibatch_loss"]
    pd.testing.assert_frame_equal(one.history[columns], other.history[columns], rtol=1e-5)


def flat():
    return nn.Sequential(nn.Linear(5, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False))


OPTIMIZERS = {
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=0.01),
    "muon": functools.partial(torch.optim.Muon, lr=0.01),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "two groups": lambda ps: torch.optim.SGD([{"params": ps[:1], "lr": 0.01}, {"params": ps[1:], "lr": 0.1}]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_any_optimizer_keeps_seeds_apart(name, clip):
    problem, optimizer = Problem(vectors(), Net(flat)), OPTIMIZERS[name]
    training = Training(problem, seeds=SEEDS, batch_size=16, lr=0.01, optimizer=optimizer, clip_norm=clip)
    training.advance(steps=3, record=False)
    training.branch().advance(steps=5, record=False)  # which leaves the trunk alone
    training.advance(steps=5, record=False)
    for replica, seed in enumerate(SEEDS):
        alone = loop(problem, seed, steps=8, batch_size=16, optimizer=optimizer, clip=clip)
        assert_equal(training, replica, alone, 2e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "momentum"])
def test_one_rate_a_replica_equals_single_runs(optimizer):
    settings = {"momentum": 0.9} if optimizer == "momentum" else {"optimizer": optimizer}
    for problem in (Problem(vectors(), Net(mlp)), problems.named("digits", "small_mlp", num_train=200, device="cpu")):
        rates = [0.003, 0.01, 0.03]
        training = Training(problem, seeds=[7, 7, 8], batch_size=16, lr=rates, **settings).advance(epochs=1)
        for replica, (seed, lr) in enumerate(zip([7, 7, 8], rates)):
            alone = Training(problem, seeds=[seed], batch_size=16, lr=lr, **settings).advance(epochs=1)
            for name, value in alone.weights().items():
                assert (training.weights()[name][replica] - value[0]).abs().max() <= 1e-6
        assert training.history.groupby(level=0).size().sum() == 6 and set(training.history.lr_now) == set(rates)


def test_a_state_goes_on_to_the_bit_with_an_optimizer_of_ones_own():
    make = functools.partial(
        Training, Problem(vectors(), Net(mlp)), seeds=SEEDS, batch_size=16, optimizer=torch.optim.RMSprop
    )
    through, before, after = (make(lr=0.01) for _ in range(3))
    through.advance(epochs=2)
    before.advance(epochs=1)
    after.resume(before.state(), before.history)
    after.advance(epochs=1)
    assert all(torch.equal(v, after.weights()[n]) for n, v in through.weights().items())
    pd.testing.assert_frame_equal(through.history.drop(columns="seconds"), after.history.drop(columns="seconds"))


# Modules that vmap cannot take, or must not.


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(F.dropout(self.a(x).relu(), 0.3, self.training))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        return self.a(x), self.b(x)


def two_losses(outputs, y):
    return F.cross_entropy(outputs[0], y, reduction="none") + outputs[1].square().mean(1)


@pytest.mark.parametrize(("net", "loss"), [(Dropout, F.cross_entropy), (Recurrent, F.cross_entropy),
                                           (Branching, F.cross_entropy), (Two, two_losses)])  # fmt: skip
def test_any_module_trains_the_same_to_the_bit_twice_and_whatever_stands_beside_it(net, loss):
    problem = Problem(vectors(), Net(net), loss)

    def weights(seeds):
        torch.rand(3)  # the generator's state outside must not matter
        return Training(problem, seeds=seeds, batch_size=16, lr=0.1).advance(epochs=2).weights()

    first, second, alone = weights(SEEDS), weights(SEEDS), weights(SEEDS[1:2])
    assert all(torch.equal(v, second[n]) for n, v in first.items())
    tolerance = 1e-6 if net is Two else 0.0  # which vmap takes
    assert all((v[1] - alone[n][0]).abs().max() <= tolerance for n, v in first.items())
    assert (
        Training(problem, seeds=[0], batch_size=16, lr=0.1).advance(epochs=2).history.train_loss.is_monotonic_decreasing
    )


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_weight_that_a_step_does_not_use_stays_as_in_a_plain_loop(optimizer):
    problem = Problem(vectors(), Net(Branching))
    settings = {"momentum": 0.9} if optimizer == "momentum" else {"optimizer": "adamw", "weight_decay": 0.1}
    kind = torch.optim.SGD if optimizer == "momentum" else torch.optim.AdamW
    training = Training(problem, seeds=SEEDS, batch_size=4, lr=0.05, **settings).advance(steps=12, record=False)
    for replica, seed in enumerate(SEEDS):
        own = {k: v for k, v in settings.items() if k != "optimizer"}
        alone = loop(problem, seed, steps=12, batch_size=4, optimizer=functools.partial(kind, lr=0.05, **own))
        assert_equal(training, replica, alone, 2e-6)
    resumed = Training(problem, seeds=SEEDS, batch_size=4, lr=0.05, **settings)
    training.record()
    resumed.resume(training.state(), training.history)
    for one in (training, resumed):
        one.advance(steps=4, record=False)
    assert all(torch.equal(v, resumed.weights()[n]) for n, v in training.weights().items())


def test_momentum_may_come_and_go_in_a_module_of_ones_own():
    training = Training(Problem(vectors(), Net(Recurrent)), seeds=SEEDS, batch_size=16, lr=0.01)
    training.advance(steps=2, record=False).momentum = 0.9
    assert set(training._optimizer.state()) == set()
    training.advance(steps=1, record=False)
    assert training._optimizer.state()["head.bias/velocity"].shape == (3, 3)
    training.momentum = 0.0
    assert set(training._optimizer.state()) == set()


def test_training_leaves_the_generator_of_random_numbers_alone():
    before = torch.get_rng_state()
    Training(Problem(vectors(), Net(Dropout)), seeds=SEEDS, batch_size=16).advance(epochs=1)
    assert torch.equal(before, torch.get_rng_state())


class Block(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two causal layers; input and output embeddings are one tensor."""

    def __init__(self, vocabulary=11, context=8, width=16):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(
            self.norm(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))))
        )


def text(n=40):
    x = torch.randint(11, (n, 9), generator=torch.Generator().manual_seed(1))
    return Dataset.of(x[:, :-1], x[:, 1:], x[:8, :-1], x[:8, 1:], device="cpu")


def test_a_transformer_with_tied_embeddings_equals_plain_loops():
    problem = Problem(text(), Net(Transformer))
    training = Training(problem, seeds=SEEDS, batch_size=8, lr=0.05).advance(steps=6, record=False)
    assert "head.weight" not in training.weights()
    for replica, seed in enumerate(SEEDS):
        sgd = functools.partial(torch.optim.SGD, lr=0.05)
        assert_equal(training, replica, loop(problem, seed, steps=6, batch_size=8, optimizer=sgd))
    training.record()
    outputs, y = problem.net.module(0)(problem.dataset.test_inputs), problem.dataset.test_targets
    assert problem.example_losses(outputs, y).mean().item() == pytest.approx(
        F.cross_entropy(outputs.flatten(0, 1), y.flatten()).item()
    )
    assert problem.example_scores(outputs, y).mean().item() == pytest.approx(
        (outputs.argmax(-1) == y).double().mean().item()
    )


@pytest.mark.slow
def test_resnet18_trains_as_a_plain_loop_batch_statistics_included():
    from torchvision.models import resnet18

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, 32, 32, generator=generator), torch.arange(12) % 4
    problem = Problem(Dataset.of(x, y, x, y, device="cpu"), Net(lambda: resnet18(num_classes=4), key="resnet18"))
    training = Training(problem, seeds=[0, 1], batch_size=6, lr=0.01).advance(steps=3, record=False)
    for replica, seed in enumerate([0, 1]):
        sgd = functools.partial(torch.optim.SGD, lr=0.01)
        assert_equal(training, replica, loop(problem, seed, steps=3, batch_size=6, optimizer=sgd))
    assert training.stack.state()["bn1.num_batches_tracked"].tolist() == [3, 3]
    assert training.stack.train().batch_statistics() == "bn1"
    with pytest.raises(ValueError, match=r"\(bn1\).*micro-batches"):
        training.stack.refuse_batch_statistics("gram")
    with pytest.warns(UserWarning, match="do not fit"):
        limited(training)


def limited(training):
    """Run one step in which the first try of the whole batch says that memory is short."""
    whole = training.stack.backward

    def short(inputs, targets, share=1.0, step=(0, 0)):
        if share == 1.0:
            raise MemoryError("out of memory")
        return whole(inputs, targets, share, step)

    training.stack.backward = short
    training.step()
    del training.stack.backward
    assert training.micro_batch_size == 3


# Losses: the right mean, or a refusal that says which.


def test_regression_and_multi_label_train_and_have_no_accuracy():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for loss, y in [
        (F.mse_loss, x[:, :2]),
        (F.binary_cross_entropy_with_logits, (x[:, :2] > 0).float()),
        (nn.L1Loss(), x[:, :2]),
    ]:
        problem = Problem(Dataset.of(x, y, device="cpu"), Net(lambda: nn.Linear(5, 2)), loss)
        training = Training(problem, seeds=SEEDS, batch_size=16, lr=0.1).advance(epochs=3)
        row = training.history.iloc[-1]
        module = problem.net.module(2)
        module.load_state_dict({n: v[2] for n, v in training.weights().items()})
        assert row.train_loss == pytest.approx(loss(module(x), y).item(), rel=1e-6)
        assert np.isnan(row.train_accuracy) and np.isnan(row.test_loss)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_the_mean_loss_is_that_over_examples_also_where_torch_would_leave_labels_out(loss):
    x = torch.randn(40, 6, 4, generator=torch.Generator().manual_seed(0))
    for ignored in (False, True):
        y = torch.arange(240).view(40, 6) % 3
        y[39, :4] = -100 if ignored else 0  # an example beyond those that a new problem is tried on
        problem = Problem(Dataset.of(x, y, device="cpu"), Net(lambda: nn.Linear(4, 3)), loss)
        assert problem.averages_labels is not ignored
        outputs = problem.net.module(0)(x)
        expected = problem.example_losses(outputs.double(), y).mean().item()
        assert problem.mean_loss(outputs, y).item() == pytest.approx(expected, rel=1e-6)


WEIGHTS = torch.tensor([1.0, 5.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHTS), "averages to .* class weights"),
        (functools.partial(F.cross_entropy, weight=WEIGHTS), "averages to .* class weights"),
        (lambda outputs, y: F.cross_entropy(outputs, y, reduction="sum"), "perhaps a sum or a mean"),
        (lambda outputs, y: F.cross_entropy(outputs, y), "perhaps a sum or a mean"),
        (lambda outputs, y: 1.0, "returned 1.0"),
        (F.mse_loss, "cannot take outputs"),
    ],
)
def test_a_loss_that_is_no_mean_over_examples_is_refused_with_the_way_out(loss, message):
    with pytest.raises(ValueError, match=message):
        Problem(vectors(), Net(mlp), loss).check()


def test_class_weights_written_one_loss_an_example_are_the_means_they_say():
    problem = Problem(
        vectors(), Net(mlp), lambda outputs, y: F.cross_entropy(outputs, y, weight=WEIGHTS, reduction="none")
    )
    training = Training(problem, batch_size=16, lr=0.1).advance(epochs=1)
    outputs, y = training.stack.eval().outputs(problem.dataset.train_inputs)[0], problem.dataset.train_targets
    assert training.history.train_loss.iloc[-1] == pytest.approx(
        (WEIGHTS[y] * F.cross_entropy(outputs, y, reduction="none")).mean().item()
    )


# Data.


class Items:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_map_style_dataset_of_three_examples_trains():
    items = Items([(torch.randn(5, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(3)])
    problem = Problem(Dataset.of_map(items, items), Net(mlp))
    training = Training(problem, seeds=SEEDS, batch_size=2, lr=0.1).advance(epochs=4)
    assert training.history.train_loss.iloc[-1] < training.history.train_loss.iloc[0]
    with pytest.raises(ValueError, match="from 1 to 3"):
        Training(problem, batch_size=4)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 2)

    def forward(self, tokens, length):
        shown = torch.arange(tokens.shape[1]) < length[:, None]
        return self.head((self.embed(tokens) * shown.unsqueeze(-1)).sum(1) / length[:, None])


def padded(items):
    tokens, targets = zip(*items)
    length = torch.tensor([len(t) for t in tokens])
    return {"tokens": nn.utils.rnn.pad_sequence(tokens, batch_first=True), "length": length}, torch.tensor(targets)


def test_items_of_different_lengths_train_with_a_collate_fn_and_are_refused_without():
    items = Items([(torch.arange(1 + i % 4) % 7, i % 2) for i in range(10)])
    problem = Problem(Dataset.of_map(items, items, collate_fn=padded), Net(Pooled))
    training = Training(problem, seeds=SEEDS, batch_size=4, lr=0.5).advance(epochs=20)
    assert (training.history.groupby("seed").test_accuracy.last() > 0.8).all()
    with pytest.raises(DataError, match="give a collate_fn"):
        Training(Problem(Dataset.of_map(items), Net(Pooled)), batch_size=4)


def test_what_data_cannot_be_is_one_clear_line():
    x = torch.randn(8, 5)
    bad = x.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(DataError, match=r"^x has NaN or infinity in 1 of 8 examples: 3$"):
        Dataset.of(bad, torch.zeros(8).long())
    with pytest.raises(DataError, match="8 examples and its targets 7"):
        Dataset.of(x, torch.zeros(7))
    with pytest.raises(ValueError, match=r"labels are 4 to 11, but the net has 3 outputs.*return_inverse"):
        Training(Problem(Dataset.of(x, torch.arange(8) + 4), Net(mlp)))
    with pytest.raises(DataError, match="NaN or infinity among the train examples"):
        Training(Problem(Dataset.of_map(Items([(row, 0) for row in bad])), Net(mlp)), batch_size=8)
    with pytest.raises(ValueError, match=r"the net cannot take this data, inputs of shape \(8, 4\)"):
        Training(Problem(Dataset.of(x[:, :4], torch.zeros(8).long()), Net(mlp)))
    late = Dataset.of_map(Items([(row, 0 if i < 40 else 9) for i, row in enumerate(torch.randn(60, 5))]), device="cpu")
    with pytest.raises(ValueError, match="label is none of the net's outputs"):
        Training(Problem(late, Net(mlp)), batch_size=60).advance(epochs=1)


def test_a_net_that_is_one_module_for_all_seeds_is_refused():
    with pytest.raises(TypeError, match="give a function that makes one"):
        Net(mlp())
    one = mlp()
    with pytest.raises(ValueError, match="returns the same module each time"):
        Training(Problem(vectors(), Net(lambda: one)))
    with pytest.raises(TypeError, match="callable without arguments"):
        Net(nn.Linear)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        Training(Problem(vectors(), Net(lambda: 3)))
    with pytest.raises(ValueError, match="lazy layer"):
        stack.build(Problem(vectors(), Net(lambda: nn.Sequential(nn.Linear(5, 4), nn.LazyLinear(3)))), [0])


def test_frozen_parameters_stay_each_seeds_own():
    def partly():
        net = mlp()
        net[0].requires_grad_(False)
        return net

    training = Training(Problem(vectors(), Net(partly)), seeds=SEEDS, batch_size=16, lr=0.1)
    before = training.stack.state()["0.weight"]
    training.advance(epochs=1)
    assert torch.equal(before, training.stack.state()["0.weight"])
    for replica, seed in enumerate(SEEDS):
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        alone = loop(training.problem, seed, steps=4, batch_size=16, optimizer=sgd)
        assert_equal(training, replica, {name: p for name, p in alone.items() if name.startswith("2")})
