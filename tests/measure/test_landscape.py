import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strangers import STRANGERS, initial, twin

from helpers import problems
from helpers.engine import stack
from helpers.engine.training import Training
from helpers.measure import landscape
from helpers.measure.landscape import Landscape
from helpers.problems import Net, Problem, Solution, nets

BLOBS = problems.load("blobs", device="cpu")
DIGITS = problems.load("digits", num_train=200, device="cpu")
LOSSES = list(problems.LOSSES)


def problem_of(model="brownlee_mlp", dataset=BLOBS, loss="cross_entropy"):
    net = nets.NETS.get(model) or functools.partial(
        nets.MLP, hidden=(12, 9), initialise=nets.he_uniform_then_xavier_uniform
    )
    net = functools.partial(net, dataset.input_shape, dataset.num_classes)
    return Problem(dataset, Net(net, key=model), problems.LOSSES[loss])


def weights_of(model="brownlee_mlp", dataset=BLOBS, seed=0):
    """A net's weights in float64, its biases moved off 0 so that they matter."""
    generator, weights = torch.Generator().manual_seed(1), stack.build(problem_of(model, dataset), [seed]).weights()
    return {k: p.double() + 0.05 * torch.randn(p.shape, generator=generator).double() for k, p in weights.items()}


def of(weights=None, loss="cross_entropy", **options):
    solution = Solution(problem_of(loss=loss), weights or weights_of())
    return Landscape(solution, **{"dtype": torch.float64, **options})


def vector(weights):
    return np.concatenate([w.numpy().ravel() for w in weights.values()])


def explicit_loss(weights, inputs, targets, loss):
    """Of one hidden layer, from the definitions."""
    hidden = (inputs @ weights["layers.0.weight"][0].T + weights["layers.0.bias"][0]).relu()
    logits = hidden @ weights["head.weight"][0].T + weights["head.bias"][0]
    if loss == "cross_entropy":
        return -logits.log_softmax(1)[range(len(targets)), targets].mean()
    return 0.5 * ((logits - F.one_hot(targets, 3)) ** 2).sum(1).mean()


def examples_of(here):
    """All the examples of a landscape."""
    return [torch.cat(tensors) for tensors in zip(*here.batches)]


def explicit_hessian(here, weights, loss):
    """Of the mean loss over a landscape's examples."""
    shapes, (inputs, targets) = {name: w.shape for name, w in weights.items()}, examples_of(here)

    def function(flat):
        parts = flat.split([s.numel() for s in shapes.values()])
        named = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}
        return explicit_loss(named, inputs, targets, loss)

    return torch.autograd.functional.hessian(function, torch.from_numpy(vector(weights))).numpy()


class Quadratic:
    """The loss 1 + g·d + Σ h d²/2 at a distance d from an ``origin``, and all the places it was asked for."""

    def __init__(self, slopes, curvatures, origin=None):
        self.slopes, self.curvatures = np.asarray(slopes, dtype=float), np.asarray(curvatures, dtype=float)
        self.origin = np.random.default_rng(7).normal(size=len(self.slopes)) if origin is None else origin
        self.seen = []

    def loss(self, place):
        d = place - self.origin
        return 1 + self.slopes @ d + self.curvatures @ d**2 / 2, 0.0

    def gradient(self, place):
        self.seen.append(place)
        return self.loss(place)[0], self.slopes + self.curvatures * (place - self.origin)

    def hessian_vector(self, v):
        return self.curvatures * v


# The loss and its derivatives


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_loss_and_accuracy_of_all_examples_are_the_trainings(split, loss):
    problem = problem_of(loss=loss)
    training = Training(problem, seeds=[3], batch_size=50, lr=0.002).advance(epochs=2)
    here = Landscape(Solution(problem, training.weights()), split=split)
    value, accuracy = here.loss(here.origin)
    expected = [float(x) for x in training.evaluate(split)]
    assert (value, accuracy) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert here.num_examples == 500


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_equals_finite_differences_of_the_loss(loss):
    here, step = of(loss=loss, examples=60), 1e-6
    value, gradient = here.gradient(here.origin)
    assert value == pytest.approx(here.loss(here.origin)[0], rel=1e-12)
    moved = here.origin + step * np.eye(len(here.origin))
    back = here.origin - step * np.eye(len(here.origin))
    slopes = [(here.loss(a)[0] - here.loss(b)[0]) / (2 * step) for a, b in zip(moved, back)]
    np.testing.assert_allclose(gradient, slopes, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_vector_is_the_explicit_hessian_times_the_vector(loss):
    here = of(loss=loss, examples=60)
    hessian = explicit_hessian(here, weights_of(), loss)
    u, v = np.random.default_rng(0).normal(size=(2, len(here.origin)))
    np.testing.assert_allclose(here.hessian_vector(v), hessian @ v, rtol=1e-9, atol=1e-9 * np.abs(hessian).max())
    assert u @ here.hessian_vector(v) == pytest.approx(v @ here.hessian_vector(u), rel=1e-9)
    step = 1e-7
    change = here.gradient(here.origin + step * v)[1] - here.gradient(here.origin - step * v)[1]
    np.testing.assert_allclose(here.hessian_vector(v), change / (2 * step), atol=1e-4 * np.abs(hessian @ v).max())


def test_the_hessian_is_that_at_the_origin_wherever_the_loss_was_asked_for_last():
    here, v = of(), np.ones(len(vector(weights_of())))
    before = here.hessian_vector(v)
    here.loss(here.origin + 1.0)
    np.testing.assert_array_equal(here.hessian_vector(v), before)


@pytest.mark.parametrize("loss", LOSSES)
def test_eigenvalues_are_the_largest_of_the_explicit_hessian(loss):
    here = of(loss=loss, examples=60)
    expected = np.linalg.eigvalsh(explicit_hessian(here, weights_of(), loss))[::-1][:5]
    frame = landscape.eigenvalues(here, 5, tolerance=1e-10)
    np.testing.assert_allclose(frame["eigenvalue"], expected, rtol=1e-8)
    assert frame["rank"].tolist() == [1, 2, 3, 4, 5]
    assert frame["converged"].all() and (frame["residual"] < 1e-6).all() and (frame["products"] > 5).all()
    rough = landscape.eigenvalues(of(loss=loss, examples=60, dtype=torch.float32))
    assert rough["eigenvalue"].tolist() == pytest.approx(expected[:1], rel=1e-3)


def test_the_largest_eigenvalues_are_not_those_of_largest_size():
    frame = landscape.eigenvalues(Quadratic(np.zeros(50), [-500, 4, 2, *[-1] * 47]), 2)
    np.testing.assert_allclose(frame["eigenvalue"], [4, 2], rtol=1e-3)


def test_an_eigenvalue_that_has_not_converged_is_nan():
    curvatures = [100, *np.linspace(0, 1, 299)]
    frame = landscape.eigenvalues(Quadratic(np.zeros(300), curvatures), 5, tolerance=1e-12, limit=1)
    assert frame["eigenvalue"][0] == pytest.approx(100)
    assert frame["eigenvalue"][1:].isna().all() and frame["residual"][1:].isna().all()
    assert frame["converged"].tolist() == [True] + [False] * 4
    assert frame["rank"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["nan", "inf", "overflow"])
def test_a_diverged_network_has_no_eigenvalues_and_no_box_sharpness(what):
    factor = {"nan": math.nan, "inf": math.inf, "overflow": 1e30}[what]
    lost = {name: w.float() * factor for name, w in weights_of().items()}
    frame = landscape.spectrum(Solution(problem_of(), lost), seed=0, count=3)
    assert frame["rank"].tolist() == [1, 2, 3]
    assert frame["eigenvalue"].isna().all() and not frame["converged"].any() and not frame["products"].any()
    assert math.isnan(landscape.box_sharpness(of(lost, dtype=torch.float32)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", [0.0, math.nan, math.inf])
def test_a_hessian_that_is_zero_or_not_finite_has_no_eigenvalues(curvature):
    flat = Quadratic(np.zeros(50), np.full(50, curvature))
    flat.loss = lambda place: (1.0, 0.0)
    frame = landscape.eigenvalues(flat, 2)
    assert frame["eigenvalue"].isna().all() and not frame["converged"].any() and len(frame) == 2


def test_spectrum_is_the_eigenvalues_of_the_landscape_asked_for():
    options = {"split": "test", "examples": 60}
    frame = landscape.spectrum(Solution(problem_of(loss="squared"), weights_of()), seed=0, count=2, **options)
    expected = landscape.eigenvalues(of(dtype=torch.float32, loss="squared", **options), 2)
    np.testing.assert_allclose(frame["eigenvalue"], expected["eigenvalue"], rtol=1e-5)
    assert frame["rank"].tolist() == [1, 2]


# The examples and the weights


def test_the_examples_are_the_same_for_every_network():
    few, other = examples_of(of(examples=50)), examples_of(of(weights_of(seed=5), examples=50))
    large = Landscape(Solution(problem_of("small_mlp"), weights_of("small_mlp")), examples=50)
    ordinary = Landscape(twin(Solution(problem_of(), weights_of()), [50]), examples=50)
    for found in (other, examples_of(large), examples_of(ordinary)):
        assert torch.equal(few[0].float(), found[0].float()) and torch.equal(few[1], found[1])
    given = [(*x, y) for x, y in zip(BLOBS.train_inputs.tolist(), BLOBS.train_targets.tolist())]
    mine = [(*x, y) for x, y in zip(few[0].tolist(), few[1].tolist())]
    assert len(set(mine)) == 50 and set(mine) < set(given)
    assert not torch.equal(few[1], BLOBS.train_targets[:50])  # drawn, in case a set is sorted
    assert of(examples=50).num_examples == 50


def test_the_mean_is_over_the_chosen_examples():
    few = of(examples=50)
    expected = explicit_loss(weights_of(), *examples_of(few), "cross_entropy").item()
    assert few.loss(few.origin)[0] == pytest.approx(expected, rel=1e-12)
    assert few.gradient(few.origin)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("examples", [0, -1, 501])
@pytest.mark.parametrize("split", ["train", "test"])
def test_more_examples_than_there_are_are_refused(split, examples):
    with pytest.raises(ValueError, match=rf"examples is {examples}; expected 1 to 500 \(the {split} set\)"):
        of(examples=examples, split=split)


def test_without_a_test_set_there_is_no_landscape_of_it():
    with pytest.raises(ValueError, match=r"expected 1 to 0 \(the test set\)"):
        Landscape(initial(STRANGERS["lstm"]()), split="test")


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_change_nothing(monkeypatch, loss):
    whole = of(loss=loss)
    v = np.random.default_rng(0).normal(size=len(whole.origin))
    monkeypatch.setattr(landscape, "_CHUNK", 7)
    here = of(loss=loss)
    assert [len(targets) for _, targets in here.batches] == [7] * 71 + [3]
    assert here.loss(here.origin) == pytest.approx(whole.loss(whole.origin), rel=1e-12)
    (value, gradient), expected = here.gradient(here.origin), whole.gradient(whole.origin)
    assert value == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(here.hessian_vector(v), whole.hessian_vector(v), rtol=1e-9, atol=1e-12)


def test_the_origin_is_the_weights_to_the_last_bit_of_float64():
    np.testing.assert_array_equal(of().origin, vector(weights_of()))


def test_a_landscape_leaves_the_weights_it_was_given_alone():
    given, before = weights_of(), weights_of()
    here = of(given)
    here.loss(here.origin + 1.0)
    assert all(torch.equal(given[name], w) for name, w in before.items())


# The box


def sharpest(quadratic, size):
    """The highest value in the box ±size: each coordinate by itself, at an end or, where it bends down, between."""
    between = -quadratic.slopes / np.where(quadratic.curvatures < 0, quadratic.curvatures, math.inf)
    places = np.stack([size, -size, np.clip(between, -size, size)])
    rises = quadratic.slopes * places + quadratic.curvatures * places**2 / 2
    return 100 * rises.max(0).sum() / (1 + 1)


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
@pytest.mark.parametrize(
    ("scale", "curvatures"),
    [(1.0, [3, 1, 0, 2, 5, 0.1]), (1.0, [-900, 1, -400, 2, 5, 0]), (1e-7, [3, 1, 0, 2, 5, 0.1])],
    ids=["corner", "some within", "nearly flat"],
)
def test_box_sharpness_is_the_rise_to_the_highest_place_of_the_box(epsilon, scale, curvatures):
    here = Quadratic(scale * np.array([0.5, -0.2, 0.3, -0.1, 0.4, 0.25]), scale * np.array(curvatures))
    size = epsilon * (np.abs(here.origin) + 1)
    found = landscape.box_sharpness(here, epsilon)
    assert found == pytest.approx(sharpest(here, size), rel=1e-4 if min(curvatures) >= 0 else 1e-2)
    for place in here.seen:
        assert (np.abs(place - here.origin) <= size * (1 + 1e-9)).all()


@pytest.mark.parametrize(("seed", "dimensions"), [(0, 3), (0, 1), (4, 3)])
def test_in_a_subspace_the_box_is_of_the_weights_own_coordinates_there(seed, dimensions):
    rng = np.random.default_rng(1)
    here = Quadratic(rng.normal(size=40), rng.uniform(0, 3, 40), 20 * rng.normal(size=40))
    columns = np.random.default_rng(seed).standard_normal((40, dimensions))
    columns /= np.sqrt((columns**2).sum(0))
    inside = np.linalg.lstsq(columns, here.origin, rcond=None)[0]  # A⁺w
    size = 1e-3 * (np.abs(inside) + 1)
    corners = [columns @ (size * signs) for signs in itertools.product([-1, 1], repeat=dimensions)]
    rise = max(here.loss(here.origin + corner)[0] for corner in corners) - 1  # a convex loss is highest at a corner
    found = landscape.box_sharpness(here, 1e-3, dimensions=dimensions, seed=seed)
    assert found == pytest.approx(100 * rise / 2, rel=1e-6)
    for place in here.seen:
        moved, rest, *_ = np.linalg.lstsq(columns, place - here.origin, rcond=None)
        assert (np.abs(moved) <= size * (1 + 1e-9)).all() and rest < 1e-20


def test_box_sharpness_stops_after_so_many_iterations():
    curvatures, slopes = -np.logspace(0, 4, 30), np.logspace(0, 2, 30)
    one, ten = (landscape.box_sharpness(Quadratic(slopes, curvatures), 0.1, iterations=i) for i in (1, 10))
    assert 0 < one < ten


def test_boxes_has_a_row_for_each_size_and_space():
    frame = landscape.boxes(
        Solution(problem_of(), weights_of()), seed=0, epsilons=[1e-3, 5e-4], dimensions=[None, 4], examples=50
    )
    here = of(examples=50)
    rows = list(frame.itertuples(index=False, name=None))
    assert [row[:2] for row in rows] == [(1e-3, 303), (1e-3, 4), (5e-4, 303), (5e-4, 4)]
    for epsilon, dimensions, value in rows:
        limit = None if dimensions == 303 else 4
        assert value == pytest.approx(landscape.box_sharpness(here, epsilon, dimensions=limit), rel=1e-6)
        assert value > 0


# Directions


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_a_filter_normalised_direction_is_as_long_as_the_weights_unit_by_unit(model):
    weights = weights_of(model, DIGITS)
    here = Landscape(Solution(problem_of(model, DIGITS), weights), examples=1, dtype=torch.float64)
    direction = landscape.filter_normalised(here, seed=3)
    assert direction.shape == here.origin.shape
    parts = np.split(direction, np.cumsum([w.numel() for w in weights.values()])[:-1])
    for part, (name, w) in zip(parts, weights.items()):
        if name.endswith("bias"):
            assert not part.any()
            continue
        units = part.reshape(w.shape[1], -1)  # a row a unit, or a filter
        np.testing.assert_allclose(np.linalg.norm(units, axis=1), w[0].flatten(1).norm(dim=1), rtol=1e-9)
        assert np.abs(np.corrcoef(units.ravel(), w.ravel())[0, 1]) < 0.3
    assert np.array_equal(direction, landscape.filter_normalised(here, seed=3))
    assert np.abs(np.corrcoef(direction, landscape.filter_normalised(here, seed=4))[0, 1]) < 0.3


@pytest.mark.parametrize("factor", [3.0, 0.1])
@pytest.mark.parametrize("model", ["brownlee_mlp", "two_layers", "plain_cnn", "sequential"])
def test_a_rescaled_network_is_the_same_function_and_has_other_eigenvalues(model, factor):
    solution = Solution(problem_of(model, DIGITS), weights_of(model, DIGITS))
    if model == "sequential":
        solution = twin(Solution(problem_of(dataset=DIGITS), weights_of(dataset=DIGITS)), [50])
    other = landscape.rescale(solution, factor)
    assert other.weights.keys() == solution.weights.keys()
    outputs, values = [], []
    for one in (solution, other):
        here = Landscape(one, examples=10, dtype=torch.float64)
        outputs.append(here.stack.outputs(here.batches[0][0]).detach())
        values.append(landscape.eigenvalues(here)["eigenvalue"][0])
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-12, atol=1e-12 * outputs[0].abs().max())
    assert abs(math.log(values[1] / values[0])) > 0.2
    assert sum(not torch.equal(other.weights[name], w) for name, w in solution.weights.items()) == 3


@pytest.mark.parametrize("factor", [0.0, -2.0, float("nan"), float("inf")])
def test_a_factor_that_changes_the_function_is_refused(factor):
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        landscape.rescale(Solution(problem_of(), {}), factor)


@pytest.mark.parametrize("name", ["batch norm", "dropout", "lstm", "transformer", "regression"])
def test_a_net_that_cannot_be_rescaled_is_refused(name):
    with pytest.raises(ValueError, match="is no plain ReLU net with a hidden layer"):
        landscape.rescale(initial(STRANGERS[name]()), 2.0)


# Nets that the package does not know


@pytest.mark.parametrize("name", STRANGERS)
def test_derivatives_of_any_net_equal_finite_differences(name):
    solution, step = initial(STRANGERS[name]()), 1e-5
    here = Landscape(solution, dtype=torch.float64)
    assert len(here.origin) == sum(p.numel() for p in solution.problem.net.module(0).parameters() if p.requires_grad)
    v = np.random.default_rng(0).normal(size=len(here.origin))
    value, gradient = here.gradient(here.origin)
    (up, above), (down, below) = here.gradient(here.origin + step * v), here.gradient(here.origin - step * v)
    assert gradient @ v == pytest.approx((up - down) / (2 * step), rel=1e-5)
    change = (above - below) / (2 * step)
    np.testing.assert_allclose(here.hessian_vector(v), change, atol=1e-5 * np.abs(change).max())
    loss, accuracy = here.loss(here.origin)
    assert loss == pytest.approx(value, rel=1e-12)
    assert math.isnan(accuracy) == (name == "regression") and not accuracy < 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_general_path_agrees_with_the_kernels(loss):
    fast = Solution(problem_of(loss=loss), weights_of())
    one, other = (Landscape(s, dtype=torch.float64) for s in (fast, twin(fast, [50])))
    assert one.loss(one.origin) == pytest.approx(other.loss(other.origin), rel=1e-12)
    assert landscape.box_sharpness(one) == pytest.approx(landscape.box_sharpness(other), rel=1e-6)
    ours, theirs = (landscape.eigenvalues(here, 3, tolerance=1e-10).eigenvalue for here in (one, other))
    np.testing.assert_allclose(theirs, ours, rtol=1e-9)


def test_the_spectrum_of_a_transformer_in_float32_and_its_directions():
    solution = initial(STRANGERS["transformer"]())
    single, double = (
        landscape.spectrum(solution, seed=0, count=2, dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    np.testing.assert_allclose(single.eigenvalue, double.eigenvalue, rtol=1e-3)
    here = Landscape(solution)
    direction = landscape.filter_normalised(here, seed=1)
    parts = np.split(direction, np.cumsum([p.numel() for p in here.stack.parameters.values()])[:-1])
    for part, (name, p) in zip(parts, here.stack.parameters.items()):
        lengths = p[0].norm(dim=-1) if p.dim() > 2 else torch.zeros(p[0].shape)
        np.testing.assert_allclose(np.linalg.norm(part.reshape(p[0].shape), axis=-1) if p.dim() > 2 else part, lengths,
                                   rtol=1e-6, err_msg=name)  # fmt: skip
