import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import mlp_gradient, mlp_loss, one_replica, squared_norm

from helpers.engine import kernels as models
from helpers.measure import noise
from helpers.problems import data
from helpers.sweep import sweeps
from helpers.sweep.store import Store

DIGITS = data.load("digits", num_train=60, device="cpu")


def network(model="brownlee_mlp", seeds=(0,), norm="none"):
    """A network on digits whose replicas differ, all its parameters moved so that biases and norms matter."""
    net = models.build(model, DIGITS.input_shape, DIGITS.num_classes, seeds, norm=norm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return net


def weights_of(net, replica=0):
    return {name: p.detach()[replica : replica + 1] for name, p in net.named_parameters()}


def explicit_gradients(net, n, replica=0):
    """Every example's gradient in float64, flat: one example of an MLP at a time, in numpy."""
    w = one_replica(weights_of(net, replica))
    each = [mlp_gradient(w, *examples([i])) for i in range(n)]
    return np.array([np.concatenate([g.ravel() for g in one.values()]) for one in each])


def examples(indices):
    return DIGITS.train_inputs[indices].double().numpy(), DIGITS.train_targets[indices].numpy()


def one_at_a_time(model, net, n, replica, norm="none"):
    """The same by autograd in float64, for any network: ``(n, parameters)``."""
    alone = models.build(model, DIGITS.input_shape, DIGITS.num_classes, [0], norm=norm).double().train(net.training)
    alone.restore({**weights_of(net, replica), **dict(alone.named_buffers())})
    each = []
    for x, y in zip(DIGITS.train_inputs[:n].double(), DIGITS.train_targets[:n]):
        loss = F.cross_entropy(alone(x[None, None])[0], y[None])
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(alone.parameters()))]))
    return torch.stack(each)


# Example by example


def test_per_example_norms_of_an_mlp_equal_an_explicit_loop():
    net = network(seeds=range(3))
    norms, mean = noise.per_example_squared_norms(net, DIGITS.train_inputs[:9], DIGITS.train_targets[:9])
    assert (norms.shape, mean.shape, norms.dtype, mean.dtype) == ((3, 9), (3,), torch.float64, torch.float64)
    for replica in range(3):
        w = one_replica(weights_of(net, replica))
        expected = [squared_norm(mlp_gradient(w, *examples([i]))) for i in range(9)]
        np.testing.assert_allclose(norms[replica], expected, rtol=1e-4)
        assert mean[replica].item() == pytest.approx(squared_norm(mlp_gradient(w, *examples(range(9)))), rel=1e-4)


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("model", ["small_mlp", "plain_cnn"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_per_example_norms_equal_one_example_at_a_time(model, replicas, norm):
    net, n = network(model, range(replicas), norm), 5
    norms, mean = noise.per_example_squared_norms(net, DIGITS.train_inputs[:n], DIGITS.train_targets[:n])
    for replica in range(replicas):
        each = one_at_a_time(model, net, n, replica, norm)
        np.testing.assert_allclose(norms[replica], each.square().sum(1), rtol=1e-4)
        assert mean[replica].item() == pytest.approx(each.mean(0).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
@pytest.mark.parametrize("held", [0, 2**20])
def test_the_closed_form_and_torch_func_agree_whatever_is_held_at_a_time(model, held, monkeypatch):
    net, batch = network(model, range(2)), (DIGITS.train_inputs[:7], DIGITS.train_targets[:7])
    closed = noise._examples(net, *batch)
    monkeypatch.setattr(noise, "_GRADIENT_BYTES", held)
    general = noise._one_by_one(net, *batch)
    np.testing.assert_allclose(general[0], closed[0], rtol=1e-5)
    np.testing.assert_allclose(general[2], closed[2], rtol=1e-6)
    for ours, expected in zip(general[1], closed[1]):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_under_batch_normalisation_an_example_has_no_gradient_of_its_own(model):
    net, batch = network(model, norm="batch"), (DIGITS.train_inputs[:5], DIGITS.train_targets[:5])
    for measure in (noise.per_example_squared_norms, noise.noise_statistics, noise.exact):
        with pytest.raises(ValueError, match=r"no gradient of its own.* norm='group', or call net.eval\(\)"):
            measure(net, *batch)
    each = one_at_a_time(model, net.eval(), 5, 0, norm="batch")
    np.testing.assert_allclose(noise.per_example_squared_norms(net, *batch)[0][0], each.square().sum(1), rtol=1e-4)


def test_noise_statistics_average_to_the_populations_over_all_equally_likely_draws():
    net = network()
    flat = explicit_gradients(net, 4)
    variance, squared = ((flat - flat.mean(0)) ** 2).sum(1).mean(), (flat.mean(0) ** 2).sum()
    for n in (2, 3):
        draws = [list(chosen) for chosen in itertools.product(range(4), repeat=n)]
        found = [noise.noise_statistics(net, DIGITS.train_inputs[d], DIGITS.train_targets[d]) for d in draws]
        averages = torch.stack([torch.cat(pair) for pair in found]).mean(0)
        np.testing.assert_allclose(averages, [variance, squared], rtol=1e-4)


def test_noise_statistics_are_the_sample_variance_and_what_it_leaves_of_the_mean():
    net, n = network(), 6
    flat = explicit_gradients(net, n)
    variance = flat.var(axis=0, ddof=1).sum()
    found = noise.noise_statistics(net, DIGITS.train_inputs[:n], DIGITS.train_targets[:n])
    assert found[0].item() == pytest.approx(variance, rel=1e-4)
    assert found[1].item() == pytest.approx((flat.mean(0) ** 2).sum() - variance / n, rel=1e-3)


@pytest.mark.parametrize("n", [0, 1])
def test_a_variance_needs_two_examples(n):
    with pytest.raises(ValueError, match=f"{n} examples; a variance needs at least two"):
        noise.noise_statistics(network(), DIGITS.train_inputs[:n], DIGITS.train_targets[:n])


@pytest.mark.parametrize(("model", "norm"), [("brownlee_mlp", "none"), ("plain_cnn", "none"), ("small_mlp", "group")])
def test_measuring_noise_leaves_no_hook_and_no_gradient_behind(model, norm):
    net = network(model, norm=norm)
    before = [p.detach().clone() for p in net.parameters()]
    first, *others = net.parameters()
    first.grad = torch.full_like(first, 7.0)
    noise.exact(net, DIGITS.train_inputs[:4], DIGITS.train_targets[:4])
    with pytest.raises((IndexError, RuntimeError)):  # a target that is no class
        noise.noise_statistics(net, DIGITS.train_inputs[:4], torch.tensor([0, 1, 2, 99]))
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())
    assert (first.grad == 7).all() and all(p.grad is None for p in others)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


def test_the_hooks_go_where_a_forward_pass_fails_too():
    net = network()
    with pytest.raises(RuntimeError):
        noise.per_example_squared_norms(net, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    assert not any(m._forward_hooks for m in net.modules())


# A population, exactly


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_the_exact_noise_is_that_of_an_explicit_loop_over_the_population(chunk, monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    net = network(seeds=range(2))
    found = noise.exact(net, DIGITS.train_inputs[:25], DIGITS.train_targets[:25])
    for replica in range(2):
        w = weights_of(net, replica)
        flat = explicit_gradients(net, 25, replica)
        trace, squared = flat.var(axis=0).sum(), (flat.mean(0) ** 2).sum()
        assert found.trace[replica].item() == pytest.approx(trace, rel=1e-5)
        assert found.squared_gradient[replica].item() == pytest.approx(squared, rel=1e-5)
        assert found.gradient_noise_scale[replica].item() == pytest.approx(trace / squared, rel=1e-5)
        assert found.loss[replica].item() == pytest.approx(mlp_loss(one_replica(w), *examples(range(25))), rel=1e-6)
        ours = np.concatenate([g[replica].numpy().ravel() for g in found.gradient])
        np.testing.assert_allclose(ours, flat.mean(0), rtol=1e-4, atol=1e-7)
    assert found.trace.dtype == torch.float64


def test_equal_examples_have_no_noise():
    same = [3] * 8
    found = noise.exact(network(), DIGITS.train_inputs[same], DIGITS.train_targets[same])
    assert abs(found.trace.item()) < 1e-6 * found.squared_gradient.item()


# The noise of a minibatch


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6])
def test_the_noise_of_a_mean_is_that_over_all_equally_likely_minibatches(batch_size):
    gradients = np.random.default_rng(0).normal(size=(6, 3))
    mean, trace = gradients.mean(0), gradients.var(axis=0).sum()

    def spread(minibatches):
        return np.mean([((gradients[list(m)].mean(0) - mean) ** 2).sum() for m in minibatches])

    without = spread(itertools.combinations(range(6), batch_size))
    assert noise.variance_of_mean(trace, batch_size, 6) == pytest.approx(without, rel=1e-9, abs=1e-15)
    with_replacement = spread(itertools.product(range(6), repeat=batch_size))
    assert noise.variance_of_mean(trace, batch_size) == pytest.approx(with_replacement, rel=1e-9)


def draw(net=None, **options):
    given = {"batch_sizes": [4, 15], "draws": 300, "draw_size": 10_000, "replace": True, **options}
    return noise.minibatches(DIGITS, "brownlee_mlp", weights_of(net or network()), **given)


@pytest.mark.parametrize("replace", [True, False])
def test_minibatches_spread_as_the_formula_says(replace):
    frame = draw(batch_sizes=[1, 4, 30], draws=1500, draw_size=60_000, replace=replace)
    found = noise.exact(network(), DIGITS.train_inputs, DIGITS.train_targets)
    for batch_size, one in frame.groupby("batch_size"):
        expected = noise.variance_of_mean(found.trace.item(), batch_size, None if replace else 60)
        for column, mean in (
            ("squared_distance", expected),
            ("squared_norm", found.squared_gradient.item() + expected),
        ):
            error = one[column].std() / len(one) ** 0.5
            assert abs(one[column].mean() - mean) < 4 * error, (batch_size, column)


def test_a_minibatch_of_everything_is_the_full_gradient():
    frame = draw(batch_sizes=[60], draws=2, replace=False)
    found = noise.exact(network(), DIGITS.train_inputs, DIGITS.train_targets)
    np.testing.assert_allclose(frame["squared_norm"], found.squared_gradient.item(), rtol=1e-5)
    assert (frame["squared_distance"] < 1e-10 * found.squared_gradient.item()).all()


def test_gram_holds_the_inner_products_of_explicit_gradients():
    found = noise.gram(network(), DIGITS.train_inputs[:12], DIGITS.train_targets[:12])
    each = explicit_gradients(network(), 12)
    np.testing.assert_allclose(found, each @ each.T, rtol=1e-4, atol=1e-6 * (each @ each.T).max())
    with pytest.raises(ValueError, match="one replica of a perceptron"):
        noise.gram(network("plain_cnn"), DIGITS.train_inputs[:12], DIGITS.train_targets[:12])


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 59])  # by look-ups and by products
def test_minibatches_off_the_gram_matrix_equal_those_one_by_one(replace, batch_size, monkeypatch):
    asked = {"batch_sizes": [batch_size], "draws": 20, "replace": replace}
    fast = draw(**asked)
    monkeypatch.setattr(noise, "gram", lambda *_: pytest.fail("this is the slow way"))
    monkeypatch.setattr(noise, "_GRAM_BYTES", 8 * 59**2)
    np.testing.assert_allclose(fast, draw(**asked), rtol=1e-5, atol=1e-9)


def test_a_draw_depends_on_its_seed_size_and_number_alone():
    both, alone = draw(draws=5), draw(batch_sizes=[15], draws=3)
    np.testing.assert_array_equal(both[both.batch_size == 15].squared_norm[:3], alone.squared_norm)
    assert both.squared_norm.nunique() == 10
    assert not set(draw(draws=5, seed=1).squared_norm) & set(both.squared_norm)


def test_as_many_draws_as_asked_for_or_as_the_examples_make():
    frame = draw(batch_sizes=[2, 20], draws=10, draw_size=50)
    assert frame.groupby("batch_size").size().to_dict() == {2: 10, 20: 2}


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"batch_sizes": [0]}, 10_000),
        ({"batch_sizes": [61], "replace": False}, 60),
        ({"batch_sizes": [10_001]}, 10_000),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(options, limit):
    with pytest.raises(ValueError, match=f"expected whole numbers from 1 to {limit}"):
        draw(**options)


# The two-batch estimator, on a problem of known covariance

MEAN, STANDARD_DEVIATIONS = np.array([1.0, -0.5, 0.25, 0.0]), np.array([3.0, 2.0, 1.0, 0.5])
TRACE, SQUARED, SMALL, BIG = float((STANDARD_DEVIATIONS**2).sum()), float((MEAN**2).sum()), 4, 64


def known_squares(shape, batch_size, rng):
    """|G_B|² of minibatches of normal gradients."""
    gradients = MEAN + rng.normal(size=(*shape, 4)) * STANDARD_DEVIATIONS / np.sqrt(batch_size)
    return (gradients**2).sum(-1)


def test_each_of_the_two_estimates_is_unbiased_over_10_000_draws():
    rng = np.random.default_rng(0)
    small, big = (known_squares((10_000, 2), size, rng) for size in (SMALL, BIG))
    found = np.array([noise.two_batch(s, b, SMALL, BIG)[:2] for s, b in zip(small, big)])  # two draws of each a time
    error = found.std(axis=0, ddof=1) / 100
    assert (np.abs(found.mean(0) - [TRACE, SQUARED]) < 3 * error).all()
    assert (error < 0.02 * np.array([TRACE, SQUARED])).all()  # so a bias of 6 % would show


def test_the_standard_error_of_the_ratio_covers_as_often_as_it_should():
    rng = np.random.default_rng(1)
    repeats, truth = 2000, TRACE / SQUARED
    small, big = known_squares((repeats, 400), SMALL, rng), known_squares((repeats, 100), BIG, rng)
    found = [noise.two_batch(s, b, SMALL, BIG) for s, b in zip(small, big)]
    ratios, errors = (np.array([f[i] for f in found]) for i in (2, 3))
    assert 0.93 < np.mean(np.abs(ratios - truth) < 1.96 * errors) < 0.97
    assert errors.mean() == pytest.approx(ratios.std(ddof=1), rel=0.1)


def test_expected_squares_give_back_the_truth_without_error():
    squares = [[SQUARED + TRACE / size] * 3 for size in (SMALL, BIG)]
    found = noise.two_batch(*squares, SMALL, BIG)
    assert found == pytest.approx((TRACE, SQUARED, TRACE / SQUARED, 0.0))


def test_where_no_gradient_stands_out_the_ratio_is_infinite():
    found = noise.two_batch([8.0, 8.0], [0.4, 0.5], 1, 16)
    assert found.squared_gradient < 0
    assert np.isinf(found.gradient_noise_scale) and np.isnan(found.standard_error)


@pytest.mark.parametrize(
    ("small", "big", "draws"), [(4, 4, (2, 2)), (8, 4, (2, 2)), (0, 4, (2, 2)), (1, 4, (1, 9)), (1, 4, (9, 1))]
)
def test_two_sizes_and_two_draws_of_each_are_needed(small, big, draws):
    with pytest.raises(ValueError, match="expected 1 <= small < big, at least two draws each"):
        noise.two_batch([1.0] * draws[0], [1.0] * draws[1], small, big)


# As protocols of a sweep


def test_a_sweep_measures_the_noise_of_what_it_trains(tmp_path):
    store = Store(tmp_path)
    settings = {"dataset": "digits", "num_train": 60, "model": "brownlee_mlp", "batch_size": 16, "epochs": 2}
    frame = sweeps.measure("noise", [settings], 2, epochs=[0, 2], store=store)
    assert list(zip(frame.seed, frame.epoch)) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for row in frame.itertuples():
        net = models.build("brownlee_mlp", DIGITS.input_shape, DIGITS.num_classes, [0])
        net.restore(sweeps.weights(settings, 2, row.epoch, store=store)[row.seed])
        found = noise.exact(net, DIGITS.train_inputs, DIGITS.train_targets)
        assert row.trace == pytest.approx(found.trace.item(), rel=1e-6)
        assert row.squared_gradient == pytest.approx(found.squared_gradient.item(), rel=1e-6)
        assert row.gradient_noise_scale == pytest.approx(row.trace / row.squared_gradient)
        assert row.train_loss == pytest.approx(found.loss.item(), rel=1e-6)
    options = {"batch_sizes": [4, 20], "draws": 3, "draw_size": 60, "replace": False}
    drawn = sweeps.measure("minibatches", [settings], 2, epochs=[2], store=store, **options)
    assert drawn.groupby(["seed", "measured_batch_size"]).size().tolist() == [3, 3, 3, 3]
