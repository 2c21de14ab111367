import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.engine import kernels as models
from helpers.engine.training import Training
from helpers.measure import landscape
from helpers.measure.landscape import Landscape
from helpers.problems import data

BLOBS = data.load("blobs", device="cpu")
DIGITS = data.load("digits", num_train=200, device="cpu")


def weights_of(model="brownlee_mlp", dataset=BLOBS, seed=0):
    """A network's weights in float64, its biases moved off 0 so that they matter."""
    net = models.build(model, dataset.input_shape, dataset.num_classes, [seed]).double()
    generator = torch.Generator().manual_seed(1)
    noise = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in net.named_parameters()}
    return {k: p.detach() + 0.05 * noise[k] for k, p in net.named_parameters()}


def of(weights=None, **options):
    return Landscape(BLOBS, "brownlee_mlp", weights or weights_of(), **{"dtype": torch.float64, **options})


def vector(weights):
    return np.concatenate([w.numpy().ravel() for w in weights.values()])


def explicit_loss(weights, inputs, targets, loss):
    """Of one hidden layer, from the definitions."""
    hidden = (inputs @ weights["layers.0.weight"][0].T + weights["layers.0.bias"][0]).relu()
    logits = hidden @ weights["head.weight"][0].T + weights["head.bias"][0]
    if loss == "cross_entropy":
        return -logits.log_softmax(1)[range(len(targets)), targets].mean()
    return 0.5 * ((logits - F.one_hot(targets, 3)) ** 2).sum(1).mean()


def explicit_hessian(here, weights, loss):
    """Of the mean loss over a landscape's examples."""
    shapes = {name: w.shape for name, w in weights.items()}

    def function(flat):
        parts = flat.split([s.numel() for s in shapes.values()])
        named = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}
        return explicit_loss(named, here.inputs, here.targets, loss)

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


@pytest.mark.parametrize("loss", models.LOSSES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_loss_and_accuracy_of_all_examples_are_the_trainings(split, loss):
    training = Training(BLOBS, "brownlee_mlp", seeds=[3], batch_size=50, lr=0.002, loss=loss)
    training.advance(epochs=2)
    inputs, targets = getattr(BLOBS, f"{split}_inputs"), getattr(BLOBS, f"{split}_targets")
    here = Landscape(BLOBS, "brownlee_mlp", training.weights(), split=split, loss=loss)
    value, accuracy = here.loss(here.origin)
    expected = [float(x) for x in training.evaluate(inputs, targets)]
    assert (value, accuracy) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert here.description == f"500 {split} examples"


@pytest.mark.parametrize("loss", models.LOSSES)
def test_the_gradient_equals_finite_differences_of_the_loss(loss):
    here, step = of(loss=loss, examples=60), 1e-6
    value, gradient = here.gradient(here.origin)
    assert value == pytest.approx(here.loss(here.origin)[0], rel=1e-12)
    moved = here.origin + step * np.eye(len(here.origin))
    back = here.origin - step * np.eye(len(here.origin))
    slopes = [(here.loss(a)[0] - here.loss(b)[0]) / (2 * step) for a, b in zip(moved, back)]
    np.testing.assert_allclose(gradient, slopes, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize("loss", models.LOSSES)
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


@pytest.mark.parametrize("loss", models.LOSSES)
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
    frame = landscape.spectrum(BLOBS, "brownlee_mlp", lost, seed=0, count=3)
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
    options = {"split": "test", "examples": 60, "loss": "squared"}
    frame = landscape.spectrum(BLOBS, "brownlee_mlp", weights_of(), seed=0, count=2, **options)
    expected = landscape.eigenvalues(of(dtype=torch.float32, **options), 2)
    np.testing.assert_allclose(frame["eigenvalue"], expected["eigenvalue"], rtol=1e-5)
    assert frame["rank"].tolist() == [1, 2]


# The examples and the weights


def test_the_examples_are_the_same_for_every_network():
    few, other = of(examples=50), of(weights_of(seed=5), examples=50)
    large = Landscape(BLOBS, "small_mlp", weights_of("small_mlp"), examples=50)
    assert torch.equal(few.inputs, other.inputs) and torch.equal(few.targets, other.targets)
    assert torch.equal(few.inputs.float(), large.inputs) and torch.equal(few.targets, large.targets)
    given = [(*x, y) for x, y in zip(BLOBS.train_inputs.tolist(), BLOBS.train_targets.tolist())]
    mine = [(*x, y) for x, y in zip(few.inputs.tolist(), few.targets.tolist())]
    assert len(set(mine)) == 50 and set(mine) < set(given)
    assert not torch.equal(few.targets, BLOBS.train_targets[:50])  # drawn, in case a set is sorted
    assert few.description == "50 train examples"


def test_the_mean_is_over_the_chosen_examples():
    few = of(examples=50)
    expected = explicit_loss(weights_of(), few.inputs, few.targets, "cross_entropy").item()
    assert few.loss(few.origin)[0] == pytest.approx(expected, rel=1e-12)
    assert few.gradient(few.origin)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("examples", [0, -1, 501])
@pytest.mark.parametrize("split", ["train", "test"])
def test_more_examples_than_there_are_are_refused(split, examples):
    with pytest.raises(ValueError, match=rf"examples is {examples}; expected 1 to 500 \(the {split} set\)"):
        of(examples=examples, split=split)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="unknown loss 'hinge'; choose one of: cross_entropy, squared"):
        of(loss="hinge")


@pytest.mark.parametrize("loss", models.LOSSES)
def test_chunks_change_nothing(monkeypatch, loss):
    here, sizes = of(loss=loss), []
    v = np.random.default_rng(0).normal(size=len(here.origin))
    whole = here.loss(here.origin), here.gradient(here.origin), here.hessian_vector(v)
    monkeypatch.setattr(landscape, "_CHUNK", 7)
    here.net.register_forward_pre_hook(lambda net, given: sizes.append(given[0].shape[1]))
    assert here.loss(here.origin) == pytest.approx(whole[0], rel=1e-12)
    assert sizes == [7] * 71 + [3]
    value, gradient = here.gradient(here.origin)
    assert value == pytest.approx(whole[1][0], rel=1e-12)
    np.testing.assert_allclose(gradient, whole[1][1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(here.hessian_vector(v), whole[2], rtol=1e-9, atol=1e-12)


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
        BLOBS, "brownlee_mlp", weights_of(), seed=0, epsilons=[1e-3, 5e-4], dimensions=[None, 4], examples=50
    )
    here = of(examples=50)
    rows = list(frame.itertuples(index=False, name=None))
    assert [row[:2] for row in rows] == [(1e-3, 303), (1e-3, 4), (5e-4, 303), (5e-4, 4)]
    for epsilon, dimensions, value in rows:
        limit = None if dimensions == 303 else 4
        assert value == pytest.approx(landscape.box_sharpness(here, epsilon, dimensions=limit), rel=1e-6)
        assert value > 0


# Lines and directions


def test_the_ends_of_a_line_are_the_two_solutions():
    start, end = weights_of(), weights_of(seed=1)
    frame = landscape.line(of(start), vector(start), vector(end), [0.0, 0.5, 1.0])
    assert frame["alpha"].tolist() == [0.0, 0.5, 1.0]
    middle = {name: (w + end[name]) / 2 for name, w in start.items()}
    for i, weights in enumerate((start, middle, end)):
        here = of(weights)
        assert frame.loc[i, ["loss", "accuracy"]].tolist() == pytest.approx(here.loss(here.origin), rel=1e-12)
    assert frame["loss"].nunique() == 3


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_a_filter_normalised_direction_is_as_long_as_the_weights_unit_by_unit(model):
    weights = weights_of(model, DIGITS)
    here = Landscape(DIGITS, model, weights, examples=1, dtype=torch.float64)
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
@pytest.mark.parametrize("model", ["brownlee_mlp", "two_layers", "plain_cnn"])
def test_a_rescaled_network_is_the_same_function_and_has_other_eigenvalues(monkeypatch, model, factor):
    two = (lambda *a: models.MLP(*a, hidden=[12, 9]), models.MODELS["brownlee_mlp"][1])
    monkeypatch.setitem(models.MODELS, "two_layers", two)
    weights = weights_of(model, DIGITS)
    other = landscape.rescale(weights, factor)
    assert other.keys() == weights.keys()
    logits, values = [], []
    for w in (weights, other):
        net = models.build(model, DIGITS.input_shape, DIGITS.num_classes, [0]).double().restore(w)
        logits.append(net(DIGITS.train_inputs[None, :10].double()).detach())
        here = Landscape(DIGITS, model, w, examples=10, dtype=torch.float64)
        values.append(landscape.eigenvalues(here)["eigenvalue"][0])
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-12, atol=1e-12 * logits[0].abs().max())
    assert abs(math.log(values[1] / values[0])) > 0.2
    assert sum(not torch.equal(other[name], w) for name, w in weights.items()) == 3


@pytest.mark.parametrize("factor", [0.0, -2.0, float("nan"), float("inf")])
def test_a_factor_that_changes_the_function_is_refused(factor):
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        landscape.rescale({}, factor)
