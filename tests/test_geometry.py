import numpy as np
import pytest
import torch

from helpers.engine import kernels as models
from helpers.measure import geometry


def moved_model():
    """A model of two replicas whose every parameter has moved, and its initial weights."""
    model = models.build("brownlee_mlp", (2,), 3, [0, 1])
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator)
    return model, initial


def norm(*arrays):
    return np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))


def test_weight_norm_is_the_euclidean_norm_of_weights_and_biases_together():
    weights = {name: p.detach() for name, p in moved_model()[0].named_parameters()}
    for replica, ours in enumerate(geometry.weight_norm(weights)):
        assert ours.item() == pytest.approx(norm(*(w[replica].numpy() for w in weights.values())), rel=1e-12)


def test_distances_are_those_of_numpy_in_all_by_kind_and_by_parameter():
    model, initial = moved_model()
    ours = geometry.distances(model, initial)
    for replica in range(2):
        steps = {k: (p.detach() - initial[k])[replica].numpy() for k, p in model.named_parameters()}
        biases = [v for k, v in steps.items() if k.endswith("bias")]
        weights = [v for k, v in steps.items() if k.endswith("weight")]
        expected = {
            "weight_norm": norm(*(p.detach()[replica].numpy() for p in model.parameters())),
            "distance_from_init": norm(*steps.values()),
            "distance_weights": norm(*weights),
            "distance_biases": norm(*biases),
            **{f"distance/{k}": norm(v) for k, v in steps.items()},
        }
        assert set(ours) == set(expected)
        for name, value in expected.items():
            assert ours[name][replica].item() == pytest.approx(value, rel=1e-10), name


def test_squared_distances_of_weights_and_biases_add_up():
    ours = geometry.distances(*moved_model())
    total = ours["distance_weights"] ** 2 + ours["distance_biases"] ** 2
    np.testing.assert_allclose(ours["distance_from_init"] ** 2, total, rtol=1e-12)


def test_nothing_moved_is_no_distance():
    model = moved_model()[0]
    ours = geometry.distances(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(value.tolist() == [0, 0] for name, value in ours.items() if name != "weight_norm")
