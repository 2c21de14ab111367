import itertools

import numpy as np
import pytest
import torch
from oracles import mlp_gradient, mlp_loss, one_replica, squared_norm
from strangers import STRANGERS, gradients_one_by_one, initial, resnet, twin

from helpers import Dataset, Net, Problem, problems
from helpers.engine import stack
from helpers.measure import kernels, noise
from helpers.problems import Solution

DIGITS = problems.load("digits", num_train=60, device="cpu")


def network(model="brownlee_mlp", seeds=(0,), norm="none"):
    """A stack on digits whose replicas differ, all its parameters moved so that biases and norms matter."""
    net = stack.build(problems.named("digits", model, num_train=60, norm=norm, device="cpu"), seeds)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters.values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return net


def weights_of(net, replica=0):
    return {name: p[replica : replica + 1] for name, p in net.state().items()}


def solution_of(net, replica=0, examples=None):
    """A replica as a solution, on the first ``examples`` alone."""
    problem = net.problem
    if examples is not None:
        few = Dataset.of(*(t[:examples] for t in problem.dataset.tensors("train")), device="cpu")
        problem = Problem(few, problem.net, problem.loss)
    return Solution(problem, weights_of(net, replica))


def explicit_gradients(net, n, replica=0):
    """Every example's gradient in float64, flat: one example of an MLP at a time, in numpy."""
    w = one_replica(weights_of(net, replica))
    each = [mlp_gradient(w, *examples([i])) for i in range(n)]
    return np.array([np.concatenate([g.ravel() for g in one.values()]) for one in each])


def examples(indices):
    return DIGITS.train_inputs[indices].double().numpy(), DIGITS.train_targets[indices].numpy()


def squares(net, *batch):
    """Squared norms of each example's gradient, and of their mean's."""
    norms, mean, _ = noise.of_examples(net, *batch)
    return norms, sum(g.flatten(1).double().square().sum(1) for g in mean.values())


# Example by example


def test_per_example_norms_of_an_mlp_equal_an_explicit_loop():
    net = network(seeds=range(3))
    norms, mean = squares(net, DIGITS.train_inputs[:9], DIGITS.train_targets[:9])
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
    norms, mean = squares(net, DIGITS.train_inputs[:n], DIGITS.train_targets[:n])
    for replica in range(replicas):
        _, each = gradients_one_by_one(solution_of(net, replica, n))
        np.testing.assert_allclose(norms[replica], each.square().sum(1), rtol=1e-4)
        assert mean[replica].item() == pytest.approx(each.mean(0).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("held", [0, 2**26])
def test_closed_forms_torch_func_and_a_loop_agree_whatever_is_held_at_a_time(held, monkeypatch):
    net, batch = network(seeds=range(2)), (DIGITS.train_inputs[:7], DIGITS.train_targets[:7])
    modules = stack.Modules(net.problem, [net.problem.net.module(0) for _ in range(2)], range(2)).load(net.state())
    monkeypatch.setattr(noise, "_GRADIENT_BYTES", held)
    assert noise._vmap_agrees(modules, *batch)
    closed, general = noise.of_examples(net, *batch), noise.of_examples(modules, *batch)
    monkeypatch.setattr(stack.Kernel, "closed_form", False)
    for found in (general, noise.of_examples(net, *batch)):
        np.testing.assert_allclose(found[0], closed[0], rtol=1e-5)
        np.testing.assert_allclose(found[2], closed[2], rtol=1e-6)
        for name, expected in closed[1].items():
            np.testing.assert_allclose(found[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_under_batch_normalisation_an_example_has_no_gradient_of_its_own(model):
    net, batch = network(model, norm="batch"), (DIGITS.train_inputs[:5], DIGITS.train_targets[:5])
    for measure in (lambda: noise.statistics(net, *batch), lambda: noise.exact(solution_of(net))):
        with pytest.raises(ValueError, match=r"\(norms.0\) an example has no gradient of its own.* call eval\(\)"):
            measure()
    _, each = gradients_one_by_one(solution_of(net, 0, 5))
    found = squares(net.eval(), *batch)[0][0]
    np.testing.assert_allclose(found, each.square().sum(1), rtol=1e-4)


def test_statistics_average_to_the_populations_over_all_equally_likely_draws():
    net = network()
    flat = explicit_gradients(net, 4)
    variance, squared = ((flat - flat.mean(0)) ** 2).sum(1).mean(), (flat.mean(0) ** 2).sum()
    for n in (2, 3):
        draws = [list(chosen) for chosen in itertools.product(range(4), repeat=n)]
        found = [noise.statistics(net, DIGITS.train_inputs[d], DIGITS.train_targets[d]) for d in draws]
        averages = torch.stack([torch.cat(pair) for pair in found]).mean(0)
        np.testing.assert_allclose(averages, [variance, squared], rtol=1e-4)


def test_statistics_are_the_sample_variance_and_what_it_leaves_of_the_mean():
    net, n = network(), 6
    flat = explicit_gradients(net, n)
    variance = flat.var(axis=0, ddof=1).sum()
    found = noise.statistics(net, DIGITS.train_inputs[:n], DIGITS.train_targets[:n])
    assert found[0].item() == pytest.approx(variance, rel=1e-4)
    assert found[1].item() == pytest.approx((flat.mean(0) ** 2).sum() - variance / n, rel=1e-3)


@pytest.mark.parametrize("n", [0, 1])
def test_a_variance_needs_two_examples(n):
    with pytest.raises(ValueError, match=f"{n} examples; a variance needs at least two"):
        noise.statistics(network(), DIGITS.train_inputs[:n], DIGITS.train_targets[:n])


@pytest.mark.parametrize(("model", "norm"), [("brownlee_mlp", "none"), ("plain_cnn", "none"), ("small_mlp", "group")])
def test_measuring_noise_leaves_no_gradient_behind(model, norm):
    net = network(model, norm=norm)
    before, (first, *others) = net.weights(), net.parameters.values()
    first.grad = torch.full_like(first, 7.0)
    noise.statistics(net, DIGITS.train_inputs[:4], DIGITS.train_targets[:4])
    with pytest.raises((IndexError, RuntimeError, ValueError)):  # a target that is no class
        noise.statistics(net, DIGITS.train_inputs[:4], torch.tensor([0, 1, 2, 99]))
    assert (first.grad == 7).all() and all(p.grad is None for p in others)
    assert all(torch.equal(p, before[name]) for name, p in net.parameters.items())
    assert net.kernel.training


# A population, exactly


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_the_exact_noise_is_that_of_an_explicit_loop_over_the_population(chunk, monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    net = network()
    found, flat = noise.exact(solution_of(net, examples=25)), explicit_gradients(net, 25)
    trace, squared = flat.var(axis=0).sum(), (flat.mean(0) ** 2).sum()
    assert found.trace == pytest.approx(trace, rel=1e-5)
    assert found.squared_gradient == pytest.approx(squared, rel=1e-5)
    assert found.gradient_noise_scale == pytest.approx(trace / squared, rel=1e-5)
    assert found.loss == pytest.approx(mlp_loss(one_replica(weights_of(net)), *examples(range(25))), rel=1e-6)
    np.testing.assert_allclose(found.squared_norms, (flat**2).sum(1), rtol=1e-4)
    ours = np.concatenate([found.gradient[name].numpy().ravel() for name in net.parameters])
    np.testing.assert_allclose(ours, flat.mean(0), rtol=1e-4, atol=1e-7)


def test_equal_examples_have_no_noise():
    problem = network().problem
    same = Dataset.of(*(t[[3] * 8] for t in DIGITS.tensors("train")), device="cpu")
    found = noise.exact(Solution(Problem(same, problem.net), weights_of(network())))
    assert abs(found.trace) < 1e-6 * found.squared_gradient


# Nets that the package does not know


@pytest.mark.parametrize("name", [name for name in STRANGERS if name != "batch norm"])
def test_the_exact_noise_of_any_net_is_that_of_single_backward_passes(name):
    solution = initial(STRANGERS[name]())
    found, (losses, each) = noise.exact(solution), gradients_one_by_one(solution)
    np.testing.assert_allclose(found.squared_norms, each.square().sum(1), rtol=1e-5)
    assert found.trace == pytest.approx(each.var(0, correction=0).sum().item(), rel=1e-5)
    assert found.squared_gradient == pytest.approx(each.mean(0).square().sum().item(), rel=1e-5)
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert noise.exact(solution).trace == found.trace  # without dropout, to the bit


@pytest.mark.parametrize("loss", problems.LOSSES)
def test_the_general_path_agrees_with_the_kernels(loss):
    problem = problems.named("digits", "brownlee_mlp", num_train=60, loss=loss, device="cpu")
    fast = Solution(problem, weights_of(network()))
    general = twin(fast, [50])
    ours, theirs = noise.exact(fast), noise.exact(general)
    np.testing.assert_allclose(theirs.squared_norms, ours.squared_norms, rtol=2e-6)
    assert theirs.trace == pytest.approx(ours.trace, rel=1e-6)
    assert theirs.squared_gradient == pytest.approx(ours.squared_gradient, rel=1e-6)
    options = {"batch_sizes": [4, 15], "draws": 5, "draw_size": 100, "replace": False}
    np.testing.assert_allclose(
        noise.minibatches(general, **options), noise.minibatches(fast, **options), rtol=1e-5, atol=1e-9
    )


def test_a_map_style_dataset_is_measured_one_example_at_a_time():
    solution = initial(STRANGERS["lstm"]())
    x, y = solution.problem.dataset.tensors("train")
    mapped = Dataset.of_map(list(zip(x, y)), device="cpu")
    found = noise.exact(Solution(Problem(mapped, solution.problem.net), solution.weights))
    assert found.trace == pytest.approx(noise.exact(solution).trace, rel=1e-6)


def test_what_torch_func_would_get_wrong_is_done_one_by_one():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Net_(torch.nn.Linear):
        def forward(self, x):
            return Odd.apply(super().forward(x.flatten(1)))

    solution = initial(Problem(STRANGERS["cnn"]().dataset, Net(lambda: Net_(64, 5))))
    _, each = gradients_one_by_one(solution)
    np.testing.assert_allclose(noise.exact(solution).squared_norms, each.square().sum(1), rtol=1e-5)


# By micro-batches


def by_micro_batches(solution, **options):
    """The one row that the measure returns."""
    return noise.TwoBatch(*noise.micro_batches(solution, **options).iloc[0])


def test_micro_batches_estimate_the_exact_noise():
    solution = initial(STRANGERS["transformer"]())
    found, exact = by_micro_batches(solution, batch_size=8, micro_batch_size=2, draws=60), noise.exact(solution)
    assert abs(found.gradient_noise_scale - exact.gradient_noise_scale) < 3 * found.standard_error
    assert found.trace == pytest.approx(exact.trace, rel=0.3)
    assert 0 < found.standard_error < 0.5 * found.gradient_noise_scale


def test_micro_batches_are_squared_norms_of_an_explicit_loop():
    solution = initial(STRANGERS["sequential"]())
    found = by_micro_batches(solution, batch_size=6, micro_batch_size=2, draws=4, seed=3)
    _, each = gradients_one_by_one(solution)
    rng, small, big = np.random.default_rng([3, 6]), [], []
    for _ in range(4):
        means = torch.stack([each[part].mean(0) for part in torch.from_numpy(rng.integers(0, 24, (3, 2)))])
        small.append(means.square().sum(1).mean())
        big.append(means.mean(0).square().sum())
    assert found == pytest.approx(noise.two_batch(small, big, 2, 6, paired=True), rel=1e-5)


@pytest.mark.parametrize("name", ["batch norm", "dropout"])
def test_micro_batches_take_a_net_as_it_trains_and_seeded(name):
    solution = initial(STRANGERS[name]())
    options = {"batch_size": 12, "micro_batch_size": 4, "draws": 6}
    state = torch.get_rng_state()
    found = by_micro_batches(solution, **options)
    assert found == by_micro_batches(solution, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.trace > 0 and found != by_micro_batches(solution, **options, seed=1)


def test_a_resnet_has_micro_batch_noise_and_no_exact_one():
    data = Dataset.of(torch.randn(16, 3, 32, 32), torch.arange(16) % 4, device="cpu")
    solution = initial(Problem(data, Net(resnet)))
    found = noise.micro_batches(solution, batch_size=8, micro_batch_size=4, draws=2)
    assert found.trace.item() > 0 and found.columns.tolist() == list(noise.TwoBatch._fields)
    with pytest.raises(ValueError, match=r"\(bn1\).*estimate the noise by micro-batches"):
        noise.exact(solution)


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(8, 8), (8, 3), (8, 0), (4, 8)])
def test_a_batch_that_does_not_split_is_refused(batch_size, micro_batch_size):
    with pytest.raises(ValueError, match="expected a multiple of the micro-batch size, at least twice that"):
        noise.micro_batches(
            initial(STRANGERS["cnn"]()), batch_size=batch_size, micro_batch_size=micro_batch_size, draws=2
        )


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
    return noise.minibatches(solution_of(net or network()), **given)


@pytest.mark.parametrize("replace", [True, False])
def test_minibatches_spread_as_the_formula_says(replace):
    frame = draw(batch_sizes=[1, 4, 30], draws=1500, draw_size=60_000, replace=replace)
    found = noise.exact(solution_of(network()))
    for batch_size, one in frame.groupby("batch_size"):
        expected = noise.variance_of_mean(found.trace, batch_size, None if replace else 60)
        for column, mean in (
            ("squared_distance", expected),
            ("squared_norm", found.squared_gradient + expected),
        ):
            error = one[column].std() / len(one) ** 0.5
            assert abs(one[column].mean() - mean) < 4 * error, (batch_size, column)


def test_a_minibatch_of_everything_is_the_full_gradient():
    frame = draw(batch_sizes=[60], draws=2, replace=False)
    found = noise.exact(solution_of(network()))
    np.testing.assert_allclose(frame["squared_norm"], found.squared_gradient, rtol=1e-5)
    assert (frame["squared_distance"] < 1e-10 * found.squared_gradient).all()


def test_gram_holds_the_inner_products_of_explicit_gradients():
    found = kernels.gram(network(), DIGITS.train_inputs[:12], DIGITS.train_targets[:12])
    each = explicit_gradients(network(), 12)
    np.testing.assert_allclose(found, each @ each.T, rtol=1e-4, atol=1e-6 * (each @ each.T).max())
    assert not kernels.has_gram(network("plain_cnn"))


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 59])  # by look-ups and by products
def test_minibatches_off_the_gram_matrix_equal_those_one_by_one(replace, batch_size, monkeypatch):
    asked = {"batch_sizes": [batch_size], "draws": 20, "replace": replace}
    fast = draw(**asked)
    monkeypatch.setattr(kernels, "gram", lambda *_: pytest.fail("this is the slow way"))
    monkeypatch.setattr(kernels, "_GRAM_BYTES", 8 * 59**2)
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


def test_paired_draws_have_the_standard_error_of_their_differences():
    rng, repeats, draws = np.random.default_rng(2), 1000, 100
    means = MEAN + rng.normal(size=(repeats, draws, 4, 4)) * STANDARD_DEVIATIONS / np.sqrt(SMALL)
    small, big = (means**2).sum(-1).mean(-1), (means.mean(2) ** 2).sum(-1)
    found = [noise.two_batch(s, b, SMALL, 4 * SMALL, paired=True) for s, b in zip(small, big)]
    ratios, errors = (np.array([f[i] for f in found]) for i in (2, 3))
    assert 0.92 < np.mean(np.abs(ratios - TRACE / SQUARED) < 1.96 * errors) < 0.97


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


# As a protocol of a sweep


def test_scale_is_a_row_of_the_exact_noise():
    solution = solution_of(network())
    row, found = noise.scale(solution, seed=5).iloc[0], noise.exact(solution)
    expected = [found.trace, found.squared_gradient, found.loss, found.gradient_noise_scale]
    assert row[["trace", "squared_gradient", "train_loss", "gradient_noise_scale"]].tolist() == expected
