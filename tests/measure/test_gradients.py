import math

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import mlp_gradient, one_replica
from scipy import stats
from strangers import STRANGERS, gradients_one_by_one, initial, normalised, twin

from helpers import problems
from helpers.engine import stack
from helpers.measure import gradients, kernels
from helpers.problems import Net, Problem, Solution, nets
from helpers.problems.dataset import Tensors

DIGITS = problems.load("digits", num_train=200, device="cpu")
SPLITS = [1, 2, 3, 5, 7, 8, 64, 96]


def solution_of(model, seed=0):
    """A built-in net's solution, its biases moved off 0 so that they matter."""
    problem = model if isinstance(model, Problem) else problems.named("digits", model, num_train=200, device="cpu")
    generator, weights = torch.Generator().manual_seed(1), stack.build(problem, [seed]).weights()
    return Solution(problem, {k: p + 0.05 * torch.randn(p.shape, generator=generator) for k, p in weights.items()})


def perceptron(data, hidden, dtype=torch.float32, loss=problems.LOSSES["cross_entropy"]):
    """A problem of a built-in perceptron with other hidden layers."""
    start = nets.he_uniform_then_xavier_uniform
    return Problem(data, Net(lambda: nets.MLP(data.input_shape, data.num_classes, hidden, start).to(dtype)), loss)


BROWNLEE = solution_of("brownlee_mlp")
WEIGHTS = BROWNLEE.weights


def examples(indices):
    return DIGITS.train_inputs[indices].double().numpy(), DIGITS.train_targets[indices].numpy()


def named_weights(solution):
    """The weights by name, in the order of an ordinary module."""
    return {name: solution.weights[name] for name, _ in solution.problem.net.module(0).named_parameters()}


def explicit_sum(trial, batch_size, draw_size, lr, seed=0):
    """The protocol in float64, one example at a time: the minibatches' mean gradients, each times its share."""
    w, indices = one_replica(WEIGHTS), gradients.draw(DIGITS.num_train, draw_size, seed, trial)
    total = {name: np.zeros_like(value) for name, value in w.items()}
    for start in range(0, draw_size, batch_size):
        chosen = indices[start : start + batch_size]
        for name, g in mlp_gradient(w, *examples(chosen)).items():
            total[name] += g * len(chosen) / draw_size
            w[name] -= lr * g
    return total


@pytest.mark.parametrize("protocol", ["walk", "frozen"])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_both_protocols_equal_an_explicit_loop(protocol, layers):
    options = {"batch_sizes": [1, 7, 20, 48], "trials": [0, 3], "draw_size": 48, "seed": 2, "layers": layers}
    steps = {"lr": 0.3} if protocol == "walk" else {}
    frame = getattr(gradients, protocol)(BROWNLEE, **options, **steps)
    assert sorted(zip(frame["batch_size"], frame["trial"])) == [(b, t) for b in (1, 7, 20, 48) for t in (0, 3)]
    for row in frame.to_dict("records"):
        expected = explicit_sum(row["trial"], row["batch_size"], 48, steps.get("lr", 0.0), seed=2)
        last = expected["head.weight"]
        assert row["gradient_norm"] == pytest.approx(np.linalg.norm(last), rel=1e-4)
        assert row["tail_fraction"] == pytest.approx((np.abs(last) > 0.0082).mean(), abs=1e-6)  # of 500
        if layers == "all":
            for name, g in expected.items():
                assert row[f"gradient_norm/{name}"] == pytest.approx(np.linalg.norm(g), rel=1e-4)
            whole = math.sqrt(sum((g**2).sum() for g in expected.values()))
            assert row["network_gradient_norm"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("model", ["brownlee_mlp", "keskar_mlp", "plain_cnn"])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_at_frozen_weights_every_split_gives_the_same_norm(model, layers):
    options = {"batch_sizes": SPLITS, "trials": [0], "draw_size": 96, "layers": layers}
    norms = gradients.frozen(solution_of(model), **options)["gradient_norm"]
    np.testing.assert_allclose(norms, norms.iloc[-1], rtol=1e-5)


@pytest.mark.parametrize("model", ["brownlee_mlp", "keskar_mlp", "plain_cnn"])
def test_the_frozen_sum_is_the_gradient_of_the_mean_loss_over_the_draw(model):
    solution, indices = solution_of(model), gradients.draw(DIGITS.num_train, 64, 0, 5)
    frame = gradients.frozen(solution, batch_sizes=[24], trials=[5], draw_size=64, layers="all")
    _, each = gradients_one_by_one(solution, indices)
    expected = each.mean(0).split([w.numel() for w in named_weights(solution).values()])
    for name, g in zip(named_weights(solution), expected):
        assert frame[f"gradient_norm/{name}"].item() == pytest.approx(g.norm().item(), rel=1e-4)
    assert frame["gradient_norm"].item() == frame["gradient_norm/head.weight"].item()
    squares = sum(g.square().sum().item() for g in expected)
    assert frame["network_gradient_norm"].item() == pytest.approx(squares**0.5, rel=1e-4)


def test_taking_steps_makes_the_walk_depend_on_the_split():
    options = {"batch_sizes": [4, 64], "trials": [0], "draw_size": 64}
    walked = gradients.walk(BROWNLEE, **options, lr=0.1)["gradient_norm"]
    assert abs(walked[0] / walked[1] - 1) > 0.05


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_a_walk_in_one_step_is_the_frozen_sum(model):
    options = {"batch_sizes": [64], "trials": [0, 1, 2], "draw_size": 64}
    walked, frozen = (f(solution_of(model), **options) for f in (gradients.walk, gradients.frozen))
    np.testing.assert_allclose(walked["gradient_norm"], frozen["gradient_norm"], rtol=1e-5)


def test_trials_side_by_side_equal_trials_alone(monkeypatch):
    options = {"batch_sizes": [1, 10, 48], "draw_size": 48, "lr": 0.1}
    together = gradients.walk(BROWNLEE, trials=range(5), **options)
    alone = [gradients.walk(BROWNLEE, trials=[t], **options) for t in range(5)]
    monkeypatch.setattr(gradients, "_STACK_BYTES", 0)  # a stack of one, then the next
    one_by_one = gradients.walk(BROWNLEE, trials=range(5), **options)
    for trial in range(5):
        expected = alone[trial]["gradient_norm"]
        for frame in (together, one_by_one):
            mine = frame.query("trial == @trial")
            assert mine["batch_size"].tolist() == [1, 10, 48]
            np.testing.assert_allclose(mine["gradient_norm"], expected, rtol=1e-5)


@pytest.mark.parametrize("hidden", [[], [12], [12, 9], [12, 9, 7]])
@pytest.mark.parametrize("held", [1, 5, 32])
def test_the_lazy_walk_of_a_perceptron_equals_an_explicit_one_in_float64(hidden, held, monkeypatch):
    monkeypatch.setattr(kernels, "_HELD", held)
    torch.manual_seed(0)
    x, y = torch.randn(50, 6).double(), torch.cat([torch.arange(4), torch.randint(4, (46,))])
    few = stack.build(perceptron(Tensors("few", x, y, x, y), hidden, torch.float64), [0])
    with torch.no_grad():
        for p in few.parameters.values():
            torch.nn.init.normal_(p, std=0.5)
    before = few.weights()
    sizes, lr, seed = [1, 2, 3, 7, 16, 33, 40], 0.3, 2
    for names in (["head.weight"], list(before)):
        drawn = gradients.draw(50, 40, seed, 5)
        totals = kernels.walk_lazily(few, drawn, sizes, lr, names)
        for found, batch_size in zip(totals, sizes):
            weights, total = one_replica(before), dict.fromkeys(before, 0.0)
            for part in drawn.split(batch_size):
                gradient = mlp_gradient(weights, x[part].numpy(), y[part].numpy())
                total = {name: total[name] + len(part) / 40 * gradient[name] for name in total}
                weights = {name: w - lr * gradient[name] for name, w in weights.items()}
            assert list(found) == names
            for name in names:
                np.testing.assert_allclose(found[name][0], total[name], rtol=1e-10, atol=1e-13)
    assert all(torch.equal(p, before[name]) for name, p in few.parameters.items())


@pytest.mark.parametrize("hidden", [[50], [30, 20, 40]])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_updates_that_are_put_off_come_to_those_made_at_once(hidden, layers, monkeypatch):
    monkeypatch.setattr(kernels, "_LAZY_FROM", 0)
    wide = Tensors("wide", DIGITS.train_inputs.double(), DIGITS.train_targets, *DIGITS.tensors("test"))
    solution = solution_of(perceptron(wide, hidden, torch.float64))
    sizes = [1, 7, 16, 31, 33, 89, 90]  # held in windows, and not; some leave a rest of the draw
    options = {"batch_sizes": sizes, "trials": [0, 4], "draw_size": 90, "lr": 0.2, "layers": layers}
    put_off = gradients.walk(solution, **options)
    monkeypatch.setattr(kernels, "_GRAM_EXAMPLES", 0)
    monkeypatch.setattr(kernels, "walk_lazily", None)  # is not called
    at_once = gradients.walk(solution, **options)
    order = ["trial", "batch_size"]
    pd.testing.assert_frame_equal(
        put_off.sort_values(order, ignore_index=True), at_once.sort_values(order, ignore_index=True), rtol=1e-10
    )


def test_updates_put_off_in_float32_come_to_those_made_at_once(monkeypatch):
    solution = solution_of(perceptron(DIGITS, [300, 256]))  # so wide that oneDNN multiplies
    options = {"batch_sizes": [1, 3, 7, 16, 48], "trials": [0], "draw_size": 48, "lr": 0.1, "layers": "all"}
    put_off = gradients.walk(solution, **options)
    monkeypatch.setattr(kernels, "_GRAM_EXAMPLES", 0)
    at_once = gradients.walk(solution, **options)
    # Rounding may take a unit across 0, after which its gradient is another one.
    norms = [name for name in at_once if "gradient_norm" in name]
    np.testing.assert_allclose(put_off[norms], at_once[norms], rtol=2e-3)


# Nets that the package does not know


@pytest.mark.parametrize("hidden", [[50], [300, 256]])  # large enough for the lazy walk
@pytest.mark.parametrize("loss", problems.LOSSES.values())
def test_the_general_path_agrees_with_the_kernels(hidden, loss):
    fast = solution_of(perceptron(DIGITS, hidden, loss=loss))
    general = twin(fast, hidden)
    options = {"batch_sizes": [5, 12], "trials": [0, 3], "draw_size": 12, "layers": "all"}
    for protocol, more in (
        (gradients.walk, {"lr": 0.01}), (gradients.frozen, {}), (gradients.frozen, {"layers": "last"})
    ):  # fmt: skip
        frames = [protocol(one, **{**options, **more}) for one in (fast, general)]
        ours, theirs = (frame.sort_values(["trial", "batch_size"]) for frame in frames)
        for name in {"gradient_norm", "network_gradient_norm", "minibatch_noise"} & set(ours):
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-5)
    ours, theirs = (gradients.staleness(one, batch_size=4, counts=[2], base_rates=[1e-3]) for one in (fast, general))
    np.testing.assert_allclose(theirs, ours, rtol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "lstm", "branching", "transformer", "dropout", "regression", "tuple"])
def test_both_protocols_measure_any_net(name):
    solution = initial(STRANGERS[name]())
    indices = gradients.draw(24, 6, 2, 3)
    _, each = gradients_one_by_one(solution, indices)
    options = {"batch_sizes": [2, 4, 6], "trials": [3], "draw_size": 6, "seed": 2}
    frozen, walked = (
        frame.set_index("batch_size").network_gradient_norm
        for frame in (
            gradients.frozen(solution, **options, layers="all"),
            gradients.walk(solution, **options, lr=0.1, layers="all"),
        )
    )
    np.testing.assert_allclose(frozen, each.mean(0).norm().item(), rtol=1e-5)
    assert walked[6] == pytest.approx(frozen[6], rel=1e-6) and abs(walked[2] / walked[6] - 1) > 1e-3
    last = gradients.walk(solution, **options, lr=0.1)
    assert last.gradient_norm.between(0, walked.to_numpy()).all()
    assert all(torch.equal(w, stack.at(solution).state()[n]) for n, w in solution.weights.items())


def test_a_walk_takes_the_steps_of_a_plain_loop():
    solution = initial(STRANGERS["transformer"]())
    frame = gradients.walk(solution, batch_sizes=[5], trials=[1], draw_size=12, lr=0.1, layers="all")
    module, indices = solution.problem.net.module(0), gradients.draw(24, 12, 0, 1)
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for part in indices.split(5):
        inputs, targets = solution.problem.dataset.batch(part)
        loss = torch.nn.functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
        with torch.no_grad():
            found = torch.autograd.grad(loss, list(module.parameters()))
            for (name, p), g in zip(module.named_parameters(), found):
                total[name] += len(part) / 12 * g
                p -= 0.1 * g
    for name, value in total.items():
        assert frame[f"gradient_norm/{name}"].item() == pytest.approx(value.norm().item(), rel=1e-4)
    assert frame["gradient_norm"].item() == frame["gradient_norm/blocks.1.mlp.3.weight"].item()


def test_batch_statistics_are_refused_by_the_layers_name():
    assert normalised()[2].training
    solution = initial(STRANGERS["batch norm"]())
    options = {"batch_sizes": [4], "trials": [0], "draw_size": 8}
    for measure in (
        lambda: gradients.walk(solution, **options),
        lambda: gradients.frozen(solution, **options),
        lambda: gradients.staleness(solution, batch_size=2, counts=[2], base_rates=[0.1]),
    ):
        with pytest.raises(ValueError, match=r"\(2\).*micro-batches"):
            measure()


def test_measuring_leaves_the_weights_alone():
    given = {name: w.clone() for name, w in WEIGHTS.items()}
    solution = Solution(BROWNLEE.problem, given)
    for protocol in (gradients.walk, gradients.frozen):
        protocol(solution, batch_sizes=[8], trials=[0], draw_size=16)
    assert all(torch.equal(w, WEIGHTS[name]) for name, w in given.items())


def test_a_draw_is_a_function_of_seed_and_trial():
    draws = {(seed, trial): gradients.draw(200, 50, seed, trial) for seed in (0, 1) for trial in (0, 1, 2)}
    assert len({tuple(d.tolist()) for d in draws.values()}) == 6
    for (seed, trial), indices in draws.items():
        assert torch.equal(indices, gradients.draw(200, 50, seed, trial))


def test_a_draw_is_uniform_and_with_replacement():
    indices = gradients.draw(20, 20_000, 0, 0)
    counts = np.bincount(indices.numpy(), minlength=20)
    assert len(counts) == 20
    assert stats.chisquare(counts).pvalue > 1e-3


def test_minibatch_noise_is_the_rms_distance_from_the_full_gradient():
    w, indices = one_replica(WEIGHTS), gradients.draw(DIGITS.num_train, 48, 0, 0)
    full = mlp_gradient(w, *examples(torch.arange(DIGITS.num_train)))["head.weight"]
    frame = gradients.frozen(BROWNLEE, batch_sizes=[1, 7, 16, 48], trials=[0], draw_size=48)
    for batch_size, noise in zip(frame["batch_size"], frame["minibatch_noise"]):
        squares = [
            ((mlp_gradient(w, *examples(indices[i : i + batch_size]))["head.weight"] - full) ** 2).sum()
            for i in range(0, 48 - batch_size + 1, batch_size)  # the short last one has another size
        ]
        assert noise == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)


def test_noise_falls_with_the_root_of_the_batch_size_from_the_examples_own_spread():
    sizes = [1, 2, 4, 8, 16, 32]
    frame = gradients.frozen(BROWNLEE, batch_sizes=sizes, trials=range(60), draw_size=128)
    rms = frame.groupby("batch_size")["minibatch_noise"].apply(lambda noise: np.mean(noise**2) ** 0.5)
    assert stats.linregress(np.log(sizes), np.log(rms)).slope == pytest.approx(-0.5, abs=0.02)
    w = one_replica(WEIGHTS)
    each = np.array([mlp_gradient(w, *examples([i]))["head.weight"] for i in range(DIGITS.num_train)])
    spread = ((each - each.mean(0)) ** 2).sum((1, 2)).mean() ** 0.5
    np.testing.assert_allclose(rms, spread / np.sqrt(sizes), rtol=0.05)


@pytest.mark.parametrize("protocol", [gradients.walk, gradients.frozen])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": [0]}, r"batch_size is 0; expected .* 1 to 16"),
        ({"batch_sizes": [-1]}, r"batch_size is -1; expected .* 1 to 16"),
        ({"batch_sizes": [8, 17]}, r"batch_size is 17; expected .* 1 to 16"),
        ({"batch_sizes": [8], "layers": "first"}, "layers is 'first'; expected 'last' or 'all'"),
    ],
)
def test_impossible_measurements_are_refused(protocol, options, message):
    with pytest.raises(ValueError, match=message):
        protocol(BROWNLEE, trials=[0], draw_size=16, **options)


# Stale gradients


def explicit_distance(batch_size, n, rate, seed):
    """How far n small steps end from a large one, in units of the large one; float64, one example at a time."""
    indices = gradients.draw(DIGITS.num_train, 48, seed, 0)[: n * batch_size]
    start, ends = one_replica(WEIGHTS), []
    for size in (batch_size, n * batch_size):
        w = {name: value.copy() for name, value in start.items()}
        for minibatch in indices.split(size):
            for name, g in mlp_gradient(w, *examples(minibatch)).items():
                w[name] -= rate * size * g  # the sum over examples
        ends.append(w)
    small, large = ends
    apart = sum(((small[k] - large[k]) ** 2).sum() for k in start)
    return math.sqrt(apart / sum(((large[k] - start[k]) ** 2).sum() for k in start))


def test_staleness_is_the_distance_of_an_explicit_loop():
    options = {"batch_size": 4, "counts": [2, 5, 12], "base_rates": [1e-3, 1e-2], "seed": 3}
    frame = gradients.staleness(BROWNLEE, **options)
    rows = list(frame.itertuples(index=False, name=None))
    assert [row[:2] for row in rows] == [(n, rate) for n in (2, 5, 12) for rate in (1e-3, 1e-2)]
    for n, rate, distance in rows:
        assert distance == pytest.approx(explicit_distance(4, n, rate, seed=3), rel=1e-9)


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_staleness_falls_in_proportion_to_the_rate_and_is_none_for_a_single_step(model):
    options = {"batch_size": 8, "counts": [1, 6], "base_rates": [1e-6, 1e-7]}
    frame = gradients.staleness(solution_of(model), **options).set_index(["count", "base_rate"])
    distance = frame["relative_distance"]
    assert distance[6, 1e-6] / distance[6, 1e-7] == pytest.approx(10, rel=0.01)
    assert 0 < distance[6, 1e-7] < 1e-3
    assert max(distance[1, 1e-6], distance[1, 1e-7]) < 1e-9  # rounding, of float64


def test_staleness_leaves_the_weights_alone():
    given = {name: w.clone() for name, w in WEIGHTS.items()}
    gradients.staleness(Solution(BROWNLEE.problem, given), batch_size=4, counts=[3], base_rates=[0.1])
    assert all(torch.equal(w, WEIGHTS[name]) for name, w in given.items())
