import numpy as np
import pytest
import torch
from strangers import STRANGERS

from helpers import problems
from helpers.engine import stack
from helpers.measure import geometry


def moved_model(problem=None):
    """A stack of two replicas whose every parameter has moved, and its initial weights."""
    model = stack.build(problem or problems.named("blobs", "brownlee_mlp", device="cpu"), [0, 1])
    initial, generator = model.weights(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters.values():
            p += torch.randn(p.shape, generator=generator)
    return model, initial


def norm(*arrays):
    return np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))


def test_weight_norm_is_the_euclidean_norm_of_weights_and_biases_together():
    weights = moved_model()[0].weights()
    for replica, ours in enumerate(geometry.weight_norm(weights)):
        assert ours.item() == pytest.approx(norm(*(w[replica].numpy() for w in weights.values())), rel=1e-12)


@pytest.mark.parametrize("name", [None, "lstm", "transformer", "tuple"])
def test_distances_are_those_of_numpy_in_all_by_kind_and_by_parameter(name):
    model, initial = moved_model(STRANGERS[name]() if name else None)
    ours = geometry.distances(model, initial)
    for replica in range(2):
        steps = {k: (p.detach() - initial[k])[replica].numpy() for k, p in model.parameters.items()}
        biases = [v for k, v in steps.items() if "bias" in k]
        weights = [v for k, v in steps.items() if "bias" not in k]
        expected = {
            "weight_norm": norm(*(p.detach()[replica].numpy() for p in model.parameters.values())),
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
    ours = geometry.distances(model, model.weights())
    assert all(value.tolist() == [0, 0] for name, value in ours.items() if name != "weight_norm")
