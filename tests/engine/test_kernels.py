import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from oracles import mlp_activations, one_replica

from helpers.engine import kernels as models
from helpers.measure import geometry


def initial_weights(name, input_shape, num_classes, seeds):
    return {k: p.detach() for k, p in models.build(name, input_shape, num_classes, seeds).named_parameters()}


def randomised(model):
    """The model with every weight drawn anew, biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=1 / math.sqrt(p[0].numel() / p.shape[1]), generator=generator)
    return model


def random_inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "given", "out"), [(1, 300, 400), (2, 5, 400), (3, 5, 400), (40, 300, 257), (9, 7, 3), (1024, 40, 784)]
)
def test_a_product_is_the_sum_of_products_whoever_multiplies(rows, given, out, dtype):
    x, weight, bias = random_inputs(rows, given), random_inputs(out, given) + 1, random_inputs(out)
    expected = x.double().numpy() @ weight.double().numpy().T
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    for a, w in ((x, weight), (x.t().contiguous().t(), weight.t().contiguous().t())):  # by rows, by columns
        found = models.product(a, w)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(models.product(a, w, bias), expected + bias.double().numpy(), rtol=1e-5, atol=1e-4)


def test_shens_network_starts_at_radius_44_whatever_the_seed():
    expected = math.sqrt(sum(2 * i * o / (i + o) for i, o in ((784, 1024), (1024, 1024), (1024, 10))))
    assert expected == pytest.approx(43.95, abs=0.01)
    norms = geometry.weight_norm(initial_weights("shen_mlp", (1, 28, 28), 10, range(4)))
    np.testing.assert_allclose(norms, expected, atol=0.1)


def test_shens_network_has_1863690_parameters_and_starts_without_biases():
    model = models.build("shen_mlp", (1, 28, 28), 10, [0, 1])
    assert model.num_parameters == 1_863_690
    assert model.replicas == 2
    for name, p in model.named_parameters():
        assert (name.endswith("bias")) == (not p.any()), name


@pytest.mark.parametrize(
    ("name", "input_shape"), [("brownlee_mlp", (2,)), ("shen_mlp", (1, 8, 8)), ("plain_cnn", (1, 8, 8))]
)
def test_initial_weights_depend_on_the_seed_alone(name, input_shape):
    stack = initial_weights(name, input_shape, 10, [3, 1, 4, 0, 5])
    for replica, seed in enumerate([3, 1, 4, 0, 5]):
        alone = initial_weights(name, input_shape, 10, [seed])
        assert all(torch.equal(alone[k][0], stack[k][replica]) for k in stack)
    assert not any(torch.equal(stack[k][0], stack[k][1]) for k in stack if k.endswith("weight"))


def test_building_leaves_torchs_own_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    models.build("brownlee_mlp", (2,), 3, [0])
    assert torch.equal(torch.rand(3), expected)


def test_brownlees_hidden_layer_is_he_uniform_and_its_head_xavier_uniform():
    weights = initial_weights("brownlee_mlp", (2,), 3, range(20))
    for w, bound in (
        (weights["layers.0.weight"], math.sqrt(6 / 2)),
        (weights["head.weight"], math.sqrt(6 / (50 + 3))),
    ):
        assert w.abs().max() <= bound
        assert w.abs().max() > 0.99 * bound
        assert w.mean().item() == pytest.approx(0, abs=0.05 * bound)
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # a normal one would pass the bound
    assert not weights["layers.0.bias"].any()
    assert not weights["head.bias"].any()


@pytest.mark.parametrize("hidden", [[50], [20, 30], [300, 200]])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_stacked_perceptron_equals_an_explicit_loop(hidden, replicas):
    model = randomised(models.MLP(replicas, (2, 60), 4, hidden))
    assert (model.num_parameters >= models.BATCHED_BELOW) == (hidden == [300, 200])  # both ways to multiply are tested
    assert model.multiply_adds == model.num_parameters
    x = random_inputs(replicas, 5, 2, 60)
    logits = model(x).detach().numpy()
    weights = dict(model.named_parameters())
    for replica in range(replicas):
        mine = one_replica({k: p.detach() for k, p in weights.items()}, replica)
        expected = [mlp_activations(mine, example)[-1] for example in x[replica].double().numpy()]
        np.testing.assert_allclose(logits[replica], expected, rtol=1e-4, atol=1e-5)


def test_a_stacked_cnn_equals_convolutions_one_replica_at_a_time():
    model = randomised(models.build("plain_cnn", (2, 12, 8), 4, [0, 1, 2]))
    x = random_inputs(3, 5, 2, 12, 8)
    for replica in range(3):
        w = {k: p.detach()[replica].double() for k, p in model.named_parameters()}
        h = x[replica].double()
        for i in range(2):
            h = F.max_pool2d(F.conv2d(h, w[f"layers.{i}.weight"], w[f"layers.{i}.bias"], padding="same").relu(), 2)
        assert h.shape == (5, 32, 3, 2)
        expected = h.flatten(1) @ w["head.weight"].T + w["head.bias"]
        np.testing.assert_allclose(model(x)[replica].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_replicas_do_not_mix(name):
    model = randomised(models.build(name, (1, 8, 8), 10, [0, 1, 2]))
    x = random_inputs(3, 4, 1, 8, 8)
    before = model(x).detach()
    with torch.no_grad():
        for p in model.parameters():
            p[1] += 1.0
    after = model(x).detach()
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("name", models.MODELS)
def test_the_gradient_of_the_summed_losses_is_each_replicas_own(name):
    x = random_inputs(1, 4, 1, 8, 8).expand(2, -1, -1, -1, -1)
    stack = randomised(models.build(name, (1, 8, 8), 10, [0, 1]))
    stack(x).square().sum().backward()
    for replica in range(2):
        alone = models.build(name, (1, 8, 8), 10, [0])
        with torch.no_grad():
            for p, q in zip(alone.parameters(), stack.parameters()):
                p.copy_(q[replica : replica + 1])
        alone(x[:1]).square().sum().backward()
        for p, q in zip(alone.parameters(), stack.parameters()):
            torch.testing.assert_close(p.grad[0], q.grad[replica], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", models.LOSSES)
@pytest.mark.parametrize("hidden", [[50], [20, 30], [300, 200]])
@pytest.mark.parametrize("examples", [1, 2, 4, 5, 15, 16, 33])  # a CPU adds few examples to large weights in other ways
def test_backpropagation_by_hand_equals_autograd_in_float64(hidden, examples, loss):
    model = randomised(models.MLP(3, (2, 60), 4, hidden))
    x, targets = random_inputs(3, examples, 2, 60), torch.arange(3 * examples).view(3, examples) % 4
    twin = copy.deepcopy(model).double()
    expected_losses = models.example_losses(twin(x.double()), targets, loss).mean(1)
    expected_losses.sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, factors = model.backpropagate(x, targets, loss)
    torch.testing.assert_close(losses.double(), expected_losses.detach(), rtol=1e-5, atol=1e-5)
    replicas = [...] if hidden != [300, 200] else range(3)  # a large network's one by one
    names = ["head", *(f"layers.{i}" for i in reversed(range(len(hidden))))]
    assert [(each.replica, each.layer) for each in factors] == [(r, name) for r in replicas for name in names]
    found = {name: torch.ones_like(p) for name, p in before.items()}
    for each in factors:
        each.add_to(found, alpha=-0.5)
    for name, p in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), before[name])  # nothing moves by itself
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[name].double(), 1 - 0.5 * p.grad, rtol=1e-5, atol=1e-5 * scale + 1e-6)


def test_only_a_perceptron_without_normalisation_has_a_closed_form():
    closed = {(name, norm): models.build(name, (1, 8, 8), 10, [0], norm=norm).closed_form
              for name in models.MODELS for norm in models.NORMS}  # fmt: skip
    assert {key for key, value in closed.items() if value} == {(n, "none") for n in models.MODELS if n != "plain_cnn"}


def test_an_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=rf"'resnet'.*{', '.join(models.MODELS)}"):
        models.build("resnet", (1, 8, 8), 10, [0])


def test_a_cnn_on_anything_but_images_is_refused():
    with pytest.raises(ValueError, match="plain_cnn needs images"):
        models.build("plain_cnn", (2,), 3, [0])


# Normalisation


def perturbed(model):
    """The model in float64, with every parameter and running statistic moved off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in (*model.double().parameters(), *model.buffers()):
            t.add_(0.3 * torch.rand(t.shape, generator=generator, dtype=torch.float64))
    return model


def by_hand(model, x, replica, normalise):
    """One replica's logits in a plain loop over layers; ``normalise(i, h, scale, shift)`` is torch's own function."""
    w = {k: p.detach()[replica] for k, p in model.named_parameters()}
    convolutions = isinstance(model, models.CNN)
    h = x[replica] if convolutions else x[replica].flatten(1)
    for i in range(len(model.layers)):
        layer = (h, w[f"layers.{i}.weight"], w[f"layers.{i}.bias"])
        h = F.conv2d(*layer, padding=1) if convolutions else F.linear(*layer)
        h = normalise(i, h, w[f"norms.{i}.weight"], w[f"norms.{i}.bias"]).relu()
        h = F.max_pool2d(h, 2) if convolutions else h
    return F.linear(h.flatten(1), w["head.weight"], w["head.bias"])


NORMALISED = [("brownlee_mlp", (3,)), ("plain_cnn", (2, 8, 8)), ("keskar_mlp", (3,))]


@pytest.mark.parametrize(("name", "input_shape"), NORMALISED)
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    ("norm_batch_size", "ghosts"),
    [(None, [17]), (99, [17]), (6, [6, 6, 5]), (4, [4, 4, 4, 5]), (2, [*[2] * 7, 3])],
)
def test_batch_normalisation_is_torchs_of_each_replica_and_ghost_batch(
    name, input_shape, replicas, norm_batch_size, ghosts
):
    model = perturbed(
        models.build(name, input_shape, 4, range(replicas), norm="batch", norm_batch_size=norm_batch_size)
    )
    x = random_inputs(replicas, 17, *input_shape).double()
    before = {k: b.clone() for k, b in model.named_buffers()}
    logits = model(x).detach()
    for replica in range(replicas):
        running = {k: torch.zeros_like(b[replica]) for k, b in before.items()}

        def normalise(i, h, scale, shift, replica=replica, running=running):
            out = []
            for ghost in h.split(ghosts):
                names = [f"norms.{i}.running_mean", f"norms.{i}.running_var"]
                statistics = [before[k][replica].clone() for k in names]
                out.append(F.batch_norm(ghost, *statistics, scale, shift, training=True))
                for k, value in zip(names, statistics):
                    running[k] += value * len(ghost) / 17
            return torch.cat(out)

        torch.testing.assert_close(logits[replica], by_hand(model, x, replica, normalise), rtol=1e-10, atol=1e-10)
        for k, b in model.named_buffers():
            torch.testing.assert_close(b[replica], running[k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "input_shape"), NORMALISED)
def test_in_eval_mode_the_running_statistics_are_used_and_stay(name, input_shape):
    model = perturbed(models.build(name, input_shape, 4, [0, 1], norm="batch", norm_batch_size=4)).eval()
    x, buffers = random_inputs(2, 9, *input_shape).double(), {k: b.clone() for k, b in model.named_buffers()}
    logits = model(x)
    for replica in range(2):

        def normalise(i, h, scale, shift, replica=replica):
            running = (buffers[f"norms.{i}.running_{s}"][replica] for s in ("mean", "var"))
            return F.batch_norm(h, *running, scale, shift)

        torch.testing.assert_close(logits[replica], by_hand(model, x, replica, normalise), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())


def test_a_single_example_without_positions_is_normalised_by_the_running_statistics():
    model = perturbed(models.build("brownlee_mlp", (3,), 4, [0, 1], norm="batch"))
    x, buffers = random_inputs(2, 1, 3).double(), {k: b.clone() for k, b in model.named_buffers()}
    assert torch.equal(model.train()(x), model.eval()(x))
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())
    assert not torch.equal(model.train()(x.repeat(1, 2, 1) * torch.tensor([[[1.0]], [[2.0]]])), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "input_shape", "groups"),
    [("brownlee_mlp", (3,), [5]), ("small_mlp", (3,), [8]), ("plain_cnn", (2, 8, 8), [8, 8])],
)
@pytest.mark.parametrize("replicas", [1, 3])
def test_group_normalisation_is_torchs_of_each_replica(name, input_shape, groups, replicas):
    model = perturbed(models.build(name, input_shape, 4, range(replicas), norm="group"))
    x = random_inputs(replicas, 5, *input_shape).double()
    logits = model(x).detach()
    for replica in range(replicas):
        expected = by_hand(model, x, replica, lambda i, h, *affine: F.group_norm(h, groups[i], *affine))
        torch.testing.assert_close(logits[replica], expected, rtol=1e-10, atol=1e-10)


def test_a_group_has_at_least_two_channels_where_there_are_two():
    assert [models.GroupNorm(1, c).groups for c in (1, 2, 3, 8, 10, 16, 128)] == [1, 1, 1, 4, 5, 8, 8]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("name", "input_shape"), NORMALISED)
def test_a_normalisation_leaves_the_initial_weights_as_they_are_and_adds_scale_1_and_shift_0(name, input_shape, norm):
    plain, model = (models.build(name, input_shape, 4, [3, 1], norm=n) for n in ("none", norm))
    given = dict(model.named_parameters())
    assert all(torch.equal(given.pop(k), p) for k, p in plain.named_parameters())
    assert sorted(given) == sorted(f"norms.{i}.{k}" for i in range(len(model.layers)) for k in ("weight", "bias"))
    for k, p in given.items():
        assert torch.equal(p, torch.full((2, p.shape[1]), float(k.endswith("weight"))))


@pytest.mark.parametrize(("norm", "size"), [("batch", None), ("batch", 3), ("group", None)])
@pytest.mark.parametrize(("name", "input_shape"), NORMALISED)
def test_replicas_do_not_mix_under_a_normalisation(name, input_shape, norm, size):
    options = {"norm": norm, "norm_batch_size": size}
    model, twin = (perturbed(models.build(name, input_shape, 4, [0, 1, 2], **options)) for _ in range(2))
    x = random_inputs(3, 7, *input_shape).double()
    changed = x.clone()
    changed[1].square_()
    before, after = model(x).detach(), twin(changed).detach()
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
    for b, c in zip(model.buffers(), twin.buffers()):
        assert torch.equal(b[[0, 2]], c[[0, 2]])
        assert not torch.equal(b[1], c[1])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 10))
def test_parts_cover_the_examples_and_a_rest_of_one_joins_the_part_before(examples, size, multiple):
    sizes = models.parts(examples, size)
    assert sum(sizes) == examples
    assert set(sizes[:-1]) <= {size}
    assert 1 not in sizes or size == 1 or examples == 1
    assert sizes[-1] <= size + 1
    if size > 1:  # parts of a multiple, split again, are the parts
        assert [n for part in models.parts(examples, multiple * size) for n in models.parts(part, size)] == sizes


def test_restoring_brings_back_the_running_statistics():
    model, other = (perturbed(models.build("brownlee_mlp", (3,), 4, [0, 1], norm="batch")) for _ in range(2))
    x = random_inputs(2, 6, 3).double()
    kept = {k: t.clone() for k, t in model.state_dict().items()}
    model(x)
    assert not torch.equal(model.eval()(x), other.eval()(x))
    assert torch.equal(model.restore(kept)(x), other(x))


@pytest.mark.parametrize(
    ("norm", "size", "message"),
    [
        ("layer", None, "unknown norm 'layer'; choose one of: none, batch, group"),
        (None, None, "unknown norm None"),
        ("group", 8, "only norm='batch' takes one"),
        ("none", 8, "only norm='batch' takes one"),
        *[
            ("batch", bad, "whole number of examples from 2 on")
            for bad in (1, 0, -2, 2.5, math.nan, math.inf, "8", True)
        ],
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(norm, size, message):
    with pytest.raises(ValueError, match=message):
        models.build("brownlee_mlp", (3,), 4, [0], norm=norm, norm_batch_size=size)


def test_weights_of_another_norm_are_refused_by_name():
    weights = dict(models.build("small_mlp", (1, 8, 8), 10, [0], norm="batch").state_dict())
    with pytest.raises(ValueError, match=r"norms\.0\.running_mean.*build it with their norm"):
        models.build("small_mlp", (1, 8, 8), 10, [0]).restore(weights)


@pytest.mark.parametrize("loss", models.LOSSES)
def test_example_losses_are_their_closed_forms(loss):
    logits = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 2, 1, 1, 0], [2, 2, 0, 1, 2]])
    found = models.example_losses(logits, targets, loss)
    for replica, example in np.ndindex(2, 5):
        z, t = logits[replica, example].tolist(), targets[replica, example].item()
        squared = sum((v - (c == t)) ** 2 for c, v in enumerate(z)) / 2
        expected = squared if loss == "squared" else math.log(sum(map(math.exp, z))) - z[t]
        assert found[replica, example].item() == pytest.approx(expected, rel=1e-12)


def test_an_unknown_loss_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'hinge'; choose one of: cross_entropy, squared"):
        models.check_loss("hinge")
