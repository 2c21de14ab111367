import functools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from oracles import mlp_activations

from helpers.problems import Net, nets
from helpers.problems.nets import check_norm, groups, parts


def module(name, input_shape, num_classes, seed=0, **options):
    """A built-in net at a seed's initial weights."""
    return Net(functools.partial(nets.NETS[name], input_shape, num_classes, **options)).module(seed)


def weights(name, input_shape, num_classes, seeds):
    """Initial weights by name, a seed's after another's along a first axis."""
    each = [dict(module(name, input_shape, num_classes, seed).named_parameters()) for seed in seeds]
    return {k: torch.stack([one[k].detach() for one in each]) for k in each[0]}


def perturbed(net):
    """The net in float64, with every parameter and running statistic moved off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in (*net.double().parameters(), *net.buffers()):
            t.add_(0.3 * torch.rand(t.shape, generator=generator, dtype=torch.float64))
    return net


def random_inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Initial weights


def test_shens_network_starts_at_radius_44_whatever_the_seed():
    expected = math.sqrt(sum(2 * i * o / (i + o) for i, o in ((784, 1024), (1024, 1024), (1024, 10))))
    assert expected == pytest.approx(43.95, abs=0.01)
    for seed in range(4):
        squares = [p.double().square().sum().item() for p in module("shen_mlp", (1, 28, 28), 10, seed).parameters()]
        assert math.sqrt(sum(squares)) == pytest.approx(expected, abs=0.1)


def test_shens_network_has_1863690_parameters_and_starts_without_biases():
    net = module("shen_mlp", (1, 28, 28), 10)
    assert sum(p.numel() for p in net.parameters()) == 1_863_690
    for name, p in net.named_parameters():
        assert (name.endswith("bias")) == (not p.any()), name


def test_brownlees_hidden_layer_is_he_uniform_and_its_head_xavier_uniform():
    found = weights("brownlee_mlp", (2,), 3, range(20))
    for w, bound in (
        (found["layers.0.weight"], math.sqrt(6 / 2)),
        (found["head.weight"], math.sqrt(6 / (50 + 3))),
    ):
        assert w.abs().max() <= bound
        assert w.abs().max() > 0.99 * bound
        assert w.mean().item() == pytest.approx(0, abs=0.05 * bound)
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # a normal one would pass the bound
    assert not found["layers.0.bias"].any()
    assert not found["head.bias"].any()


@pytest.mark.parametrize("name", nets.NETS)
def test_every_net_is_its_seeds_alone_and_uses_every_weight(name):
    first, again, other = (module(name, (1, 8, 8), 10, seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters()))
    outputs = first(random_inputs(6, 1, 8, 8).float())
    assert outputs.shape == (6, 10)
    F.cross_entropy(outputs, torch.arange(6)).backward()
    assert all(p.grad.isfinite().all() for p in first.parameters())


# Forward passes


@pytest.mark.parametrize("hidden", [[50], [20, 30]])
def test_a_perceptron_equals_an_explicit_loop(hidden):
    net = perturbed(nets.MLP((2, 60), 4, hidden, nets.xavier_normal))
    w = {k: p.detach().numpy() for k, p in net.named_parameters()}
    x = random_inputs(5, 2, 60)
    expected = [mlp_activations(w, example)[-1] for example in x.numpy()]
    np.testing.assert_allclose(net(x).detach(), expected, rtol=1e-10)


def by_hand(net, x, normalise=lambda i, h, *affine: h):
    """Logits in a plain loop over layers; ``normalise(i, h, scale, shift)`` is torch's own function."""
    w = {k: p.detach() for k, p in net.named_parameters()}
    h = x if isinstance(net, nets.CNN) else x.flatten(1)
    for i in range(len(net.layers)):
        layer = (h, w[f"layers.{i}.weight"], w[f"layers.{i}.bias"])
        h = F.conv2d(*layer, padding=1) if isinstance(net, nets.CNN) else F.linear(*layer)
        affine = (w[f"norms.{i}.weight"], w[f"norms.{i}.bias"]) if len(net.norms) else ()
        h = normalise(i, h, *affine).relu()
        h = F.max_pool2d(h, 2) if isinstance(net, nets.CNN) else h
    return F.linear(h.flatten(1), w["head.weight"], w["head.bias"])


def test_a_cnn_is_two_convolutions_with_pooling_and_a_linear_layer():
    net, x = perturbed(module("plain_cnn", (2, 12, 8), 4)), random_inputs(5, 2, 12, 8)
    assert [tuple(layer.weight.shape) for layer in net.layers] == [(16, 2, 3, 3), (32, 16, 3, 3)]
    torch.testing.assert_close(net(x), by_hand(net, x), rtol=1e-10, atol=1e-10)


NORMALISED = [("brownlee_mlp", (3,)), ("plain_cnn", (2, 8, 8))]


@pytest.mark.parametrize(("name", "input_shape"), NORMALISED)
@pytest.mark.parametrize(
    ("norm_batch_size", "ghosts"),
    [(None, [17]), (99, [17]), (6, [6, 6, 5]), (4, [4, 4, 4, 5]), (2, [*[2] * 7, 3])],
)
def test_batch_normalisation_is_torchs_of_each_ghost_batch(name, input_shape, norm_batch_size, ghosts):
    net = perturbed(module(name, input_shape, 4, norm="batch", norm_batch_size=norm_batch_size))
    x = random_inputs(17, *input_shape)
    before = {k: b.clone() for k, b in net.named_buffers()}
    running = {k: torch.zeros_like(b) for k, b in before.items()}

    def normalise(i, h, scale, shift):
        out = []
        for ghost in h.split(ghosts):
            names = [f"norms.{i}.running_mean", f"norms.{i}.running_var"]
            statistics = [before[k].clone() for k in names]
            out.append(F.batch_norm(ghost, *statistics, scale, shift, training=True))
            for k, value in zip(names, statistics):
                running[k] += value * len(ghost) / 17
        return torch.cat(out)

    torch.testing.assert_close(net(x), by_hand(net, x, normalise), rtol=1e-10, atol=1e-10)
    for k, b in net.named_buffers():
        torch.testing.assert_close(b, running[k], rtol=1e-12, atol=1e-12)
    kept = {k: b.clone() for k, b in net.named_buffers()}

    def by_running(i, h, scale, shift):
        return F.batch_norm(h, kept[f"norms.{i}.running_mean"], kept[f"norms.{i}.running_var"], scale, shift)

    torch.testing.assert_close(net.eval()(x), by_hand(net, x, by_running), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(b, kept[k]) for k, b in net.named_buffers())


def test_a_single_example_without_positions_is_normalised_by_the_running_statistics():
    net, x = perturbed(module("brownlee_mlp", (3,), 4, norm="batch")), random_inputs(1, 3)
    kept = {k: b.clone() for k, b in net.named_buffers()}
    assert torch.equal(net.train()(x), net.eval()(x))
    assert all(torch.equal(b, kept[k]) for k, b in net.named_buffers())


@pytest.mark.parametrize(
    ("name", "input_shape", "expected"),
    [("brownlee_mlp", (3,), [5]), ("small_mlp", (3,), [8]), ("plain_cnn", (2, 8, 8), [8, 8])],
)
def test_group_normalisation_is_torchs(name, input_shape, expected):
    net, x = perturbed(module(name, input_shape, 4, norm="group")), random_inputs(5, *input_shape)
    logits = by_hand(net, x, lambda i, h, *affine: F.group_norm(h, expected[i], *affine))
    torch.testing.assert_close(net(x), logits, rtol=1e-10, atol=1e-10)


def test_a_group_has_at_least_two_channels_where_there_are_two():
    assert [groups(c) for c in (1, 2, 3, 8, 10, 16, 128)] == [1, 1, 1, 4, 5, 8, 8]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("name", "input_shape"), NORMALISED)
def test_a_normalisation_leaves_the_initial_weights_as_they_are_and_adds_scale_1_and_shift_0(name, input_shape, norm):
    plain, net = (module(name, input_shape, 4, 3, norm=n) for n in ("none", norm))
    found = dict(net.named_parameters())
    assert all(torch.equal(found.pop(k), p) for k, p in plain.named_parameters())
    assert sorted(found) == sorted(f"norms.{i}.{k}" for i in range(len(net.layers)) for k in ("weight", "bias"))
    for k, p in found.items():
        assert torch.equal(p, torch.full_like(p, float(k.endswith("weight"))))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 10))
def test_parts_cover_the_examples_and_a_rest_of_one_joins_the_part_before(examples, size, multiple):
    sizes = parts(examples, size)
    assert sum(sizes) == examples
    assert set(sizes[:-1]) <= {size}
    assert 1 not in sizes or size == 1 or examples == 1
    assert sizes[-1] <= size + 1
    if size > 1:  # parts of a multiple, split again, are the parts
        assert [n for part in parts(examples, multiple * size) for n in parts(part, size)] == sizes


@pytest.mark.parametrize(
    ("norm", "size", "message"),
    [
        ("layer", None, "unknown norm 'layer'; choose one of: none, batch, group"),
        (None, None, "unknown norm None"),
        ("group", 8, "only norm='batch' takes one"),
        *[("batch", bad, "whole number of examples from 2 on") for bad in (1, 2.5, math.nan, "8", True)],
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(norm, size, message):
    with pytest.raises(ValueError, match=message):
        check_norm(norm, size)
    with pytest.raises(ValueError, match=message):
        module("brownlee_mlp", (3,), 4, norm=norm, norm_batch_size=size)
