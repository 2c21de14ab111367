"""Small models that hold a stack of replicas, one per seed: every weight has a leading replica axis.

A forward pass maps ``(replicas, examples, *input_shape)`` to logits ``(replicas, examples, classes)``. Replicas never
mix, so the gradient of the summed losses is each replica's own, and an optimizer of torch works on the stack as it is.
None of the models has batch normalisation or dropout: they would confound the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

# Above this many weights a CPU multiplies replica by replica: one matrix product each runs up to twice as fast as a
# batched one. The choice depends on the layer alone, so such a replica's result is the same to the bit in any stack.
_BATCHED_BELOW = 32_768


class Linear(nn.Module):
    """A fully connected layer: ``(replicas, examples, in)`` → ``(replicas, examples, out)``."""

    def __init__(self, replicas: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(replicas, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(replicas, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu or self.weight[0].numel() < _BATCHED_BELOW:
            return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))
        if len(self.weight) == 1:
            return F.linear(x.squeeze(0), self.weight.squeeze(0), self.bias.squeeze(0)).unsqueeze(0)
        return torch.stack([F.linear(*one) for one in zip(x.unbind(), self.weight.unbind(), self.bias.unbind())])


class Conv2d(nn.Module):
    """A square convolution, same padding, on ``(examples, replicas · channels, height, width)``."""

    def __init__(self, replicas: int, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(replicas, out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(replicas, out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = self.weight.shape[-1] // 2
        return F.conv2d(x, self.weight.flatten(0, 1), self.bias.flatten(), padding=padding, groups=len(self.weight))


class Model(nn.Module):
    """A classifier in two parts: ``features(x)`` (all but the last layer) and ``head`` (the last, linear, layer)."""

    head: Linear
    multiply_adds: int  # of one example's forward pass, to tell long jobs from short
    evaluation_chunk = 1_000  # examples a forward pass, so that a CPU's cache holds the activations

    @property
    def replicas(self) -> int:
        return len(self.head.weight)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of one replica."""
        return sum(p[0].numel() for p in self.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    @torch.no_grad()
    def restore(self, weights: Mapping[str, torch.Tensor]) -> Model:
        """Take over ``weights`` by name, each with its replica axis; a single replica's go to every replica."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.copy_(weights[name].expand_as(tensor))
        return self


class MLP(Model):
    """A multilayer perceptron with ReLU; ``layers`` before the head."""

    def __init__(self, replicas: int, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int]):
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        self.layers = nn.ModuleList(Linear(replicas, i, o) for i, o in zip(widths, widths[1:]))
        self.head = Linear(replicas, widths[-1], num_classes)
        self.multiply_adds = self.num_parameters

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        for layer in self.layers:
            x = layer(x).relu()
        return x


class CNN(Model):
    """Two convolutions (3×3; 16 and 32 channels), each with ReLU and 2×2 max pooling, then one linear layer."""

    evaluation_chunk = 100

    def __init__(self, replicas: int, input_shape: Sequence[int], num_classes: int):
        super().__init__()
        channels, height, width = input_shape
        self.layers = nn.ModuleList([Conv2d(replicas, channels, 16, 3), Conv2d(replicas, 16, 32, 3)])
        self.head = Linear(replicas, 32 * (height // 4) * (width // 4), num_classes)
        self.multiply_adds = height * width * 9 * (16 * channels + 16 * 32 // 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        replicas, examples = x.shape[:2]
        x = x.transpose(0, 1).flatten(1, 2)
        for layer in self.layers:
            x = F.max_pool2d(layer(x).relu(), 2)
        return x.view(examples, replicas, -1).transpose(0, 1)


def _he_uniform_then_xavier_uniform(model: Model, replica: int, generator: torch.Generator) -> None:
    for layer in model.layers:
        nn.init.kaiming_uniform_(layer.weight[replica], nonlinearity="relu", generator=generator)
    nn.init.xavier_uniform_(model.head.weight[replica], generator=generator)


def _xavier_normal(model: Model, replica: int, generator: torch.Generator) -> None:
    for layer in (*model.layers, model.head):
        nn.init.xavier_normal_(layer.weight[replica], generator=generator)


# name: (architecture, initialisation of the weights; biases start at 0)
MODELS = {
    "brownlee_mlp": (lambda *a: MLP(*a, hidden=[50]), _he_uniform_then_xavier_uniform),
    "small_mlp": (lambda *a: MLP(*a, hidden=[128]), _he_uniform_then_xavier_uniform),
    "shen_mlp": (lambda *a: MLP(*a, hidden=[1024, 1024]), _xavier_normal),
    "keskar_mlp": (lambda *a: MLP(*a, hidden=[512] * 5), _he_uniform_then_xavier_uniform),
    "plain_cnn": (CNN, _he_uniform_then_xavier_uniform),
}


def build(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> Model:
    """A model with one replica per seed, whose initial weights depend on that seed alone (drawn on the CPU).

    ``brownlee_mlp``: 50 hidden units, He uniform, head Xavier uniform (Brownlee 2019). ``shen_mlp``: 1024-1024, Xavier
    normal, gain 1 (Shen 2018). ``keskar_mlp``: five layers of 512, the F1 of Keskar 2016. ``small_mlp``: 128 hidden
    units, for hundreds of runs; it, ``keskar_mlp`` and ``plain_cnn`` (two convolutions) start as ``brownlee_mlp``.
    Raises ValueError for an unknown name or for inputs that are not images where a CNN needs them.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of: {', '.join(MODELS)}")
    if name == "plain_cnn" and len(input_shape) != 3:
        raise ValueError(f"plain_cnn needs images (channels, height, width); this dataset's inputs are {input_shape}")
    architecture, initialise = MODELS[name]
    model = architecture(len(seeds), input_shape, num_classes)
    with torch.no_grad():
        for replica, seed in enumerate(seeds):
            initialise(model, replica, torch.Generator().manual_seed(seed))
    return model.to(device)
