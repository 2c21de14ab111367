"""Where the weights are: radius, and distance travelled."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from helpers.engine.stack import Stack


def squared_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Squared Euclidean norm of each tensor: name → float64 ``(replicas,)``."""
    # On the CPU, because not every device has float64.
    return {name: t.detach().reshape(len(t), -1).cpu().double().square().sum(1) for name, t in tensors.items()}


def weight_norm(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all weights and biases together, the *radius*: float64 ``(replicas,)``."""
    return sum(squared_norms(weights).values()).sqrt()


def distances(stack: Stack, initial_weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Radius, and distance from the initial weights: in all, of weights and biases apart, and of each parameter.

    Keys ``weight_norm``, ``distance_from_init``, ``distance_weights``, ``distance_biases`` and ``distance/<name>``;
    values float64 ``(replicas,)``. A ``measures`` for ``Training``.
    """
    now = {name: p.detach() for name, p in stack.parameters.items()}
    squared = squared_norms({name: now[name] - initial_weights[name] for name in now})
    none = torch.zeros(stack.replicas, dtype=torch.float64)  # of a net without biases, say
    of_biases = {name: "bias" in name.rpartition(".")[2] for name in squared}
    biases, weights = (sum((v for n, v in squared.items() if of_biases[n] == of), none) for of in (True, False))
    return {
        "weight_norm": weight_norm(now),
        "distance_from_init": (weights + biases).sqrt(),
        "distance_weights": weights.sqrt(),
        "distance_biases": biases.sqrt(),
        **{f"distance/{name}": v.sqrt() for name, v in squared.items()},
    }
