import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Dataset, Net, Problem
from helpers.problems.problem import squared_error

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
DATA = Dataset.of(X, Y, device="cpu")
NET = Net(lambda: nn.Linear(3, 4))
LOGITS = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


# Nets


def test_a_nets_initial_weights_are_its_seeds_and_torchs_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = NET.module(2), NET.module(2), NET.module(3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            nn.Linear(2, 2),
            r"Net\(Linear\(...\)\) is one module, .* give a function that makes one: Net\(lambda: Linear",
        ),
        (3, "Net needs a function that makes a module, not 3"),
        (nn.Linear, "must be callable without arguments .*; wrap it in a lambda"),
    ],
)
def test_a_factory_that_is_none_is_refused(factory, message):
    with pytest.raises(TypeError, match=message):
        Net(factory)


def test_a_factory_that_makes_no_module_is_refused_when_it_is_called():
    with pytest.raises(TypeError, match="the factory made a int; expected a"):
        Net(lambda: 3).module(0)


# Losses


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        functools.partial(F.cross_entropy, label_smoothing=0.1),
    ],
)
def test_torchs_losses_give_each_examples(loss):
    found = Problem(DATA, NET, loss).example_losses(LOGITS, Y)
    expected = [loss(LOGITS[i : i + 1], Y[i : i + 1]) for i in range(12)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_example_losses_are_their_closed_forms():
    for i, (z, t) in enumerate(zip(LOGITS.double().tolist(), Y.tolist())):
        logits = LOGITS.double()
        expected = math.log(sum(map(math.exp, z))) - z[t]
        assert Problem(DATA, NET).example_losses(logits, Y)[i].item() == pytest.approx(expected, rel=1e-12)
        expected = sum((v - (c == t)) ** 2 for c, v in enumerate(z)) / 2
        assert Problem(DATA, NET, squared_error).example_losses(logits, Y)[i].item() == pytest.approx(expected)


def test_an_examples_loss_is_the_mean_over_its_tokens_whichever_axis_has_the_classes():
    tokens = torch.arange(12).view(3, 4) % 5
    logits = torch.randn(3, 4, 5)
    data = Dataset.of(X[:3], tokens)
    expected = [F.cross_entropy(logits[i], tokens[i]) for i in range(3)]
    for outputs in (logits, logits.movedim(-1, 1)):
        found = Problem(data, NET).example_losses(outputs, tokens)
        torch.testing.assert_close(found, torch.stack(expected))
    scores = Problem(data, NET).example_scores(logits, tokens)
    torch.testing.assert_close(scores, (logits.argmax(-1) == tokens).double().mean(1))


def test_regression_and_several_labels_have_losses_and_no_accuracy():
    y = torch.rand(12, 4)
    for loss in (F.mse_loss, nn.BCEWithLogitsLoss(), nn.SmoothL1Loss()):
        problem = Problem(Dataset.of(X, y), NET, loss)
        problem.check()
        torch.testing.assert_close(problem.example_losses(LOGITS, y).mean(), loss(LOGITS, y))
        assert problem.example_scores(LOGITS, y) is None


def test_a_loss_of_ones_own_returns_one_loss_an_example():
    problem = Problem(DATA, NET, lambda outputs, targets: (outputs[:, 0] - targets).abs())
    problem.check()
    assert problem.example_losses(LOGITS, Y).shape == (12,)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: F.cross_entropy(o, t), "returned a tensor of shape .* for 12 examples, perhaps a sum or a mean"),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum"), "perhaps a sum or a mean; expected one loss an example"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0, 1.0])), "class weights"),
        (nn.CrossEntropyLoss(ignore_index=1), "targets that it ignores"),
        (nn.BCEWithLogitsLoss(), r"cannot take outputs of shape \(12, 4\) with targets of shape \(12,\)"),
    ],
)
def test_a_loss_whose_mean_is_not_that_of_its_examples_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        Problem(DATA, NET, loss).check()


# What does not fit


@pytest.mark.parametrize(
    ("data", "net", "message"),
    [
        (DATA, lambda: nn.Linear(5, 4), r"the net cannot take this data, inputs of shape \(12, 3\): .*mat1 and mat2"),
        (DATA, lambda: nn.Linear(3, 2), "labels are 0 to 3, but the net has 2 outputs: .*renumbers them"),
        (Dataset.of(X, Y - 1), lambda: nn.Linear(3, 4), "labels are -1 to 2"),
    ],
)
def test_a_net_that_does_not_fit_is_refused(data, net, message):
    with pytest.raises(ValueError, match=message):
        Problem(data, net).check()


def test_a_factory_that_returns_one_module_again_and_again_is_refused():
    module = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="the same module each time; expected a fresh one for each seed"):
        Problem(DATA, lambda: module).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, NET), r"dataset is a Tensor; make one with Dataset\.of"),
        ((DATA, NET, "mse"), "loss is 'mse'; expected a function"),
    ],
)
def test_a_problem_of_other_kinds_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        Problem(*arguments)
