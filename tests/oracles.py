"""What the package computes, again: explicit float64 loops over replicas, examples and layers, in numpy alone."""

import numpy as np


def one_replica(weights, replica=0):
    """A replica's weights by name, in float64."""
    return {name: w[replica].double().numpy().copy() for name, w in weights.items()}


def mlp_layers(weights):
    """The (weight, bias) names of a multilayer perceptron, first to last."""
    hidden = sum(name.startswith("layers.") for name in weights) // 2
    return [*((f"layers.{i}.weight", f"layers.{i}.bias") for i in range(hidden)), ("head.weight", "head.bias")]


def mlp_activations(weights, x):
    """Inputs of every layer of one example, and the logits: a list."""
    activations = [np.asarray(x, dtype=float).reshape(-1)]
    for w, b in mlp_layers(weights):
        z = weights[w] @ activations[-1] + weights[b]
        activations.append(z if w == "head.weight" else np.maximum(z, 0.0))
    return activations


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def mlp_loss(weights, inputs, targets):
    """Mean cross-entropy over examples."""
    return float(np.mean([-np.log(softmax(mlp_activations(weights, x)[-1])[y]) for x, y in zip(inputs, targets)]))


def mlp_gradient(weights, inputs, targets):
    """The gradient of the mean cross-entropy, by backpropagation of one example at a time."""
    total = {name: np.zeros_like(w) for name, w in weights.items()}
    for x, y in zip(inputs, targets):
        *before, logits = mlp_activations(weights, x)
        delta = softmax(logits)
        delta[y] -= 1.0
        for (w, b), activation in reversed([*zip(mlp_layers(weights), before)]):
            total[w] += np.outer(delta, activation) / len(targets)
            total[b] += delta / len(targets)
            delta = (weights[w].T @ delta) * (activation > 0)
    return total


def squared_norm(gradient):
    """Of a gradient by name, all its entries together."""
    return sum(float((g**2).sum()) for g in gradient.values())
