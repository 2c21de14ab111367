import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import mlp_activations, one_replica

from helpers import geometry, models


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
    large = [layer for layer in model.layers if layer.weight[0].numel() >= models._BATCHED_BELOW]
    assert len(large) == (2 if hidden == [300, 200] else 0)  # both ways to multiply are tested
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


def test_an_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'resnet'.*brownlee_mlp, shen_mlp, plain_cnn"):
        models.build("resnet", (1, 8, 8), 10, [0])


def test_a_cnn_on_anything_but_images_is_refused():
    with pytest.raises(ValueError, match="plain_cnn needs images"):
        models.build("plain_cnn", (2,), 3, [0])
