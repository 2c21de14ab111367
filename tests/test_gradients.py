import dataclasses
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from oracles import mlp_gradient, one_replica
from scipy import stats

from helpers.engine import kernels as models
from helpers.measure import gradients
from helpers.problems import data

DIGITS = data.load("digits", num_train=200, device="cpu")
SPLITS = [1, 2, 3, 5, 7, 8, 64, 96]


def weights_of(model, seed=0):
    """A network's weights, its biases moved off 0 so that they matter."""
    net = models.build(model, DIGITS.input_shape, DIGITS.num_classes, [seed])
    generator = torch.Generator().manual_seed(1)
    return {k: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for k, p in net.named_parameters()}


WEIGHTS = weights_of("brownlee_mlp")


def examples(indices):
    return DIGITS.train_inputs[indices].double().numpy(), DIGITS.train_targets[indices].numpy()


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
    frame = getattr(gradients, protocol)(DIGITS, "brownlee_mlp", WEIGHTS, **options, **steps)
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


@pytest.mark.parametrize("model", models.MODELS)
@pytest.mark.parametrize("layers", ["last", "all"])
def test_at_frozen_weights_every_split_gives_the_same_norm(model, layers):
    options = {"batch_sizes": SPLITS, "trials": [0], "draw_size": 96, "layers": layers}
    norms = gradients.frozen(DIGITS, model, weights_of(model), **options)["gradient_norm"]
    np.testing.assert_allclose(norms, norms.iloc[-1], rtol=1e-5)


@pytest.mark.parametrize("model", models.MODELS)
def test_the_frozen_sum_is_the_gradient_of_the_mean_loss_over_the_draw(model):
    weights, indices = weights_of(model), gradients.draw(DIGITS.num_train, 64, 0, 5)
    frame = gradients.frozen(DIGITS, model, weights, batch_sizes=[24], trials=[5], draw_size=64, layers="all")
    net = models.restored(model, DIGITS, weights).double()
    logits = net(DIGITS.train_inputs[indices].double().unsqueeze(0))[0]
    expected = torch.autograd.grad(F.cross_entropy(logits, DIGITS.train_targets[indices]), list(net.parameters()))
    for (name, _), g in zip(net.named_parameters(), expected):
        assert frame[f"gradient_norm/{name}"].item() == pytest.approx(g.norm().item(), rel=1e-4)
    assert frame["gradient_norm"].item() == frame["gradient_norm/head.weight"].item()
    squares = sum(g.square().sum().item() for g in expected)
    assert frame["network_gradient_norm"].item() == pytest.approx(squares**0.5, rel=1e-4)


def test_taking_steps_makes_the_walk_depend_on_the_split():
    options = {"batch_sizes": [4, 64], "trials": [0], "draw_size": 64}
    walked = gradients.walk(DIGITS, "brownlee_mlp", WEIGHTS, **options, lr=0.1)["gradient_norm"]
    assert abs(walked[0] / walked[1] - 1) > 0.05


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_a_walk_in_one_step_is_the_frozen_sum(model):
    options = {"batch_sizes": [64], "trials": [0, 1, 2], "draw_size": 64}
    walked, frozen = (f(DIGITS, model, weights_of(model), **options) for f in (gradients.walk, gradients.frozen))
    np.testing.assert_allclose(walked["gradient_norm"], frozen["gradient_norm"], rtol=1e-5)


def test_trials_side_by_side_equal_trials_alone(monkeypatch):
    options = {"batch_sizes": [1, 10, 48], "draw_size": 48, "lr": 0.1}
    together = gradients.walk(DIGITS, "brownlee_mlp", WEIGHTS, trials=range(5), **options)
    alone = [gradients.walk(DIGITS, "brownlee_mlp", WEIGHTS, trials=[t], **options) for t in range(5)]
    monkeypatch.setattr(gradients, "_STACK_BYTES", 0)  # a stack of one, then the next
    one_by_one = gradients.walk(DIGITS, "brownlee_mlp", WEIGHTS, trials=range(5), **options)
    for trial in range(5):
        expected = alone[trial]["gradient_norm"]
        for frame in (together, one_by_one):
            mine = frame.query("trial == @trial")
            assert mine["batch_size"].tolist() == [1, 10, 48]
            np.testing.assert_allclose(mine["gradient_norm"], expected, rtol=1e-5)


@pytest.mark.parametrize("hidden", [[], [12], [12, 9], [12, 9, 7]])
@pytest.mark.parametrize("held", [1, 5, 32])
def test_the_lazy_walk_of_a_perceptron_equals_an_explicit_one_in_float64(hidden, held, monkeypatch):
    monkeypatch.setattr(gradients, "_HELD", held)
    torch.manual_seed(0)
    net = models.MLP(1, (6,), 4, hidden).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, y = torch.randn(50, 6).double(), torch.randint(4, (50,))
    few = data.Dataset("few", x, y, x, y, 4, "")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    sizes, lr, trial, seed = [1, 2, 3, 7, 16, 33, 40], 0.3, 5, 2
    for names in (["head.weight"], list(before)):
        drawn = gradients.draw(50, 40, seed, trial)
        rows = gradients._walk_lazily(trial, drawn, net, few, sizes, lr, names)
        for row, batch_size in zip(rows, sizes):
            weights, total = one_replica(before), dict.fromkeys(before, 0.0)
            for part in drawn.split(batch_size):
                gradient = mlp_gradient(weights, x[part].numpy(), y[part].numpy())
                total = {name: total[name] + len(part) / 40 * gradient[name] for name in total}
                weights = {name: w - lr * gradient[name] for name, w in weights.items()}
            expected = np.linalg.norm(total["head.weight"])
            assert row["trial"] == trial and row["batch_size"] == batch_size
            assert row["gradient_norm"] == pytest.approx(expected, rel=1e-11)
            if len(names) > 2:
                whole = np.sqrt(sum((g**2).sum() for g in total.values()))
                assert row["network_gradient_norm"] == pytest.approx(whole, rel=1e-11)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("hidden", [[], [50], [30, 20, 40]])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_updates_that_are_put_off_come_to_those_made_at_once(hidden, layers, monkeypatch):
    architecture = (lambda *a: models.MLP(*a, hidden=hidden)), models.MODELS["brownlee_mlp"][1]
    monkeypatch.setitem(models.MODELS, "some_mlp", architecture)
    monkeypatch.setattr(models, "restored", functools.partial(models.restored, dtype=torch.float64))
    monkeypatch.setattr(models, "BATCHED_BELOW", 0)
    dataset = dataclasses.replace(DIGITS, train_inputs=DIGITS.train_inputs.double(), fingerprint="")
    sizes = [1, 2, 7, 10, 16, 31, 32, 33, 64, 89, 90]  # held in windows, and not; some leave a rest of the draw
    options = {"batch_sizes": sizes, "trials": [0, 4], "draw_size": 90, "lr": 0.2, "layers": layers}
    put_off = gradients.walk(dataset, "some_mlp", weights_of("some_mlp"), **options)
    monkeypatch.setattr(gradients, "_GRAM_EXAMPLES", 0)
    monkeypatch.setattr(gradients, "_walk_lazily", None)  # is not called
    at_once = gradients.walk(dataset, "some_mlp", weights_of("some_mlp"), **options)
    order = ["trial", "batch_size"]
    pd.testing.assert_frame_equal(
        put_off.sort_values(order, ignore_index=True), at_once.sort_values(order, ignore_index=True), rtol=1e-10
    )


def test_updates_put_off_in_float32_come_to_those_made_at_once(monkeypatch):
    architecture = (lambda *a: models.MLP(*a, hidden=[300, 256])), models.MODELS["brownlee_mlp"][1]
    monkeypatch.setitem(models.MODELS, "wide_mlp", architecture)  # so wide that oneDNN multiplies
    options = {"batch_sizes": [1, 3, 7, 16, 48], "trials": [0], "draw_size": 48, "lr": 0.1, "layers": "all"}
    put_off = gradients.walk(DIGITS, "wide_mlp", weights_of("wide_mlp"), **options)
    monkeypatch.setattr(gradients, "_GRAM_EXAMPLES", 0)
    at_once = gradients.walk(DIGITS, "wide_mlp", weights_of("wide_mlp"), **options)
    # Rounding may take a unit across 0, after which its gradient is another one.
    norms = [name for name in at_once if "gradient_norm" in name]
    np.testing.assert_allclose(put_off[norms], at_once[norms], rtol=2e-3)


def test_measuring_leaves_the_weights_alone():
    given = {name: w.clone() for name, w in WEIGHTS.items()}
    for protocol in (gradients.walk, gradients.frozen):
        protocol(DIGITS, "brownlee_mlp", given, batch_sizes=[8], trials=[0], draw_size=16)
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


def test_a_minibatchs_share_undoes_the_mean():
    sizes, values = [7, 7, 6], np.random.default_rng(0).normal(size=20)
    means = [part.mean() for part in np.split(values, [7, 14])]
    assert sum(gradients.share(b, 20) * m for b, m in zip(sizes, means)) == pytest.approx(values.mean())
    assert gradients.share(64, 1024) == 1 / 16


def test_mean_loss_averages_over_the_examples_of_each_replica():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    targets = torch.tensor([[0, 0], [1, 0]])
    expected = [
        (math.log(2) + math.log(1 + math.exp(-2))) / 2,
        (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2,
    ]
    np.testing.assert_allclose(gradients.mean_loss(logits, targets), expected, rtol=1e-6)


def test_minibatch_noise_is_the_rms_distance_from_the_full_gradient():
    w, indices = one_replica(WEIGHTS), gradients.draw(DIGITS.num_train, 48, 0, 0)
    full = mlp_gradient(w, *examples(torch.arange(DIGITS.num_train)))["head.weight"]
    frame = gradients.frozen(DIGITS, "brownlee_mlp", WEIGHTS, batch_sizes=[1, 7, 16, 48], trials=[0], draw_size=48)
    for batch_size, noise in zip(frame["batch_size"], frame["minibatch_noise"]):
        squares = [
            ((mlp_gradient(w, *examples(indices[i : i + batch_size]))["head.weight"] - full) ** 2).sum()
            for i in range(0, 48 - batch_size + 1, batch_size)  # the short last one has another size
        ]
        assert noise == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)


def test_noise_falls_with_the_root_of_the_batch_size_from_the_examples_own_spread():
    sizes = [1, 2, 4, 8, 16, 32]
    frame = gradients.frozen(DIGITS, "brownlee_mlp", WEIGHTS, batch_sizes=sizes, trials=range(60), draw_size=128)
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
        protocol(DIGITS, "brownlee_mlp", WEIGHTS, trials=[0], draw_size=16, **options)


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
    frame = gradients.staleness(DIGITS, "brownlee_mlp", WEIGHTS, **options)
    rows = list(frame.itertuples(index=False, name=None))
    assert [row[:2] for row in rows] == [(n, rate) for n in (2, 5, 12) for rate in (1e-3, 1e-2)]
    for n, rate, distance in rows:
        assert distance == pytest.approx(explicit_distance(4, n, rate, seed=3), rel=1e-9)


@pytest.mark.parametrize("model", ["brownlee_mlp", "plain_cnn"])
def test_staleness_falls_in_proportion_to_the_rate_and_is_none_for_a_single_step(model):
    options = {"batch_size": 8, "counts": [1, 6], "base_rates": [1e-6, 1e-7]}
    frame = gradients.staleness(DIGITS, model, weights_of(model), **options).set_index(["count", "base_rate"])
    distance = frame["relative_distance"]
    assert distance[6, 1e-6] / distance[6, 1e-7] == pytest.approx(10, rel=0.01)
    assert 0 < distance[6, 1e-7] < 1e-3
    assert max(distance[1, 1e-6], distance[1, 1e-7]) < 1e-9  # rounding, of float64


def test_staleness_leaves_the_weights_alone():
    given = {name: w.clone() for name, w in WEIGHTS.items()}
    gradients.staleness(DIGITS, "brownlee_mlp", given, batch_size=4, counts=[3], base_rates=[0.1])
    assert all(torch.equal(w, WEIGHTS[name]) for name, w in given.items())
