"""Accumulated gradients and one example in many batches, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from helpers import Training, problems
from helpers.measure import coupling


def _training(norm, seeds=(0, 1), **options):
    problem = problems.named("digits", "small_mlp", num_train=200, norm=norm)
    return Training(problem, seeds=seeds, batch_size=32, lr=0.1, **options).advance(steps=3, record=False)


def _module(training, replica):
    """One replica as an ordinary module in training mode."""
    module = training.problem.net.module(0)
    module.load_state_dict({name: value[replica] for name, value in training.stack.state().items()})
    return module.train()


def _gradient(module, inputs, targets):
    module.zero_grad()
    F.cross_entropy(module(inputs), targets).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_the_accumulation_error_is_that_of_two_loops(norm):
    training = _training(norm)
    found = coupling.accumulation_error(training, [4, 32])
    assert found[found.micro == 32].difference.max() == 0
    for replica, seed in enumerate(training.seeds):
        x, y = training.dataset.batch(training.next_indices()[replica])
        whole = _gradient(_module(training, replica), x, y)
        pieces = sum(_gradient(_module(training, replica), a, b) / 8 for a, b in zip(x.split(4), y.split(4)))
        expected = float((pieces - whole).norm() / whole.norm())
        assert found.set_index(["micro", "seed"]).difference[4, seed] == pytest.approx(expected, abs=1e-6)
        assert expected > 0.01 if norm == "batch" else expected < 1e-5


def test_measuring_the_error_leaves_the_training_as_it_is():
    training = _training("batch", micro_batch_size=16)
    before = training.state()
    coupling.accumulation_error(training, [8])
    coupling.losses_in_batches(training, 8, 2)
    assert training.micro_batch_size == 16 and training.steps == 3
    assert all(torch.equal(value, before[name]) for name, value in training.state().items())


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_losses_in_batches_are_those_of_the_module(norm):
    training = _training(norm)
    found, data = coupling.losses_in_batches(training, 5, 3), training.dataset
    assert found.shape == (3, 2)
    generator = torch.Generator().manual_seed(5)
    for row in found:
        others = torch.randint(200, (4,), generator=generator)
        batch = torch.cat([data.test_inputs[:1], data.train_inputs[others]])
        expected = [
            float(F.cross_entropy(_module(training, r)(batch)[:1], data.test_targets[:1]).detach()) for r in (0, 1)
        ]
        assert row == pytest.approx(expected, rel=1e-5)
    assert (found.std(0) > 1e-3).all() if norm == "batch" else (found.std(0) < 1e-6).all()
