"""The built-in networks as ordinary modules. Biases start at 0; none has dropout: it would confound the batch size."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

NORMS = ("none", "batch", "group")


def parts(examples: int, size: int) -> list[int]:
    """Split ``examples`` into consecutive parts of ``size``, the last one shorter.

    A one-example remainder has no variance, so it is merged into the previous part.

    >>> parts(10, 4), parts(9, 4)
    ([4, 4, 2], [4, 5])
    """
    size = min(size, examples)
    count, rest = divmod(examples, size)
    if rest == 1 and size > 1:
        return [size] * (count - 1) + [size + 1]
    return [size] * count + [rest] * (rest > 0)


def groups(channels: int) -> int:
    """Count the groups of a group normalisation: as many as divide the channels, at most 8, each of at least two."""
    return max((g for g in range(1, 9) if channels % (2 * g) == 0), default=1)


def check_norm(norm: object, norm_batch_size: object) -> None:
    """Raise ValueError unless ``norm`` is one of ``NORMS`` and ``norm_batch_size`` None or, for batch, at least 2."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose one of: {', '.join(NORMS)}")
    if norm_batch_size is None:
        return
    if norm != "batch":
        raise ValueError(f"norm_batch_size is {norm_batch_size!r} with norm={norm!r}; only norm='batch' takes one")
    if not isinstance(norm_batch_size, numbers.Real) or not norm_batch_size >= 2 or norm_batch_size % 1:
        raise ValueError(
            f"norm_batch_size is {norm_batch_size!r}; expected a whole number of examples from 2 on (one has no "
            "variance), or None for the whole minibatch"
        )


class GhostBatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) over ghost batches of ``norm_batch_size`` examples (Hoffer 2017).

    norm_batch_size: None for the whole minibatch. Each ghost batch adds to the running statistics by its share of the
    examples. In eval mode, and for a single example without positions, the running statistics are used.
    """

    def __init__(self, channels: int, norm_batch_size: int | None = None):
        super().__init__()
        self.norm_batch_size = norm_batch_size
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        running, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        if not self.training or x.numel() == x.shape[1]:
            return F.batch_norm(x, *running, *affine)
        normalised, updated = [], [torch.zeros_like(t) for t in running]
        for ghost in x.split(parts(len(x), self.norm_batch_size or len(x))):
            statistics = [t.clone() for t in running]
            normalised.append(F.batch_norm(ghost, *statistics, *affine, training=True))
            for total, value in zip(updated, statistics):
                total.add_(value, alpha=len(ghost) / len(x))
        for buffer, value in zip(running, updated):
            buffer.copy_(value)
        return torch.cat(normalised)


class Classifier(nn.Module):
    """Hidden ``layers``, each with ReLU and perhaps a norm before it, and ``head``, the last, linear layer."""

    layers: nn.ModuleList
    norms: nn.ModuleList
    head: nn.Linear

    def _finish(self, initialise: Callable[[Classifier], None], norm: str, norm_batch_size: int | None) -> None:
        for layer in (*self.layers, self.head):
            nn.init.zeros_(layer.bias)
        initialise(self)
        check_norm(norm, norm_batch_size)
        kinds = {
            "batch": lambda channels: GhostBatchNorm(channels, norm_batch_size and int(norm_batch_size)),
            "group": lambda channels: nn.GroupNorm(groups(channels), channels),
        }
        chosen = [kinds[norm](len(layer.bias)) for layer in self.layers] if norm in kinds else []
        self.norms = nn.ModuleList(chosen)

    def _layers(self):
        return itertools.zip_longest(self.layers, self.norms, fillvalue=None)


class MLP(Classifier):
    """A multilayer perceptron of ReLU units.

    input_shape, num_classes: of the data. hidden: units of each hidden layer.
    initialise: sets the weights of the layers. norm, norm_batch_size: see ``named``.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int],
        initialise: Callable[[Classifier], None],
        norm: str = "none",
        norm_batch_size: int | None = None,
    ):
        super().__init__()
        widths = [math.prod(input_shape), *hidden, num_classes]
        # Without torch's own initialisation, which would draw from the seed's generator first.
        *layers, self.head = (nn.utils.skip_init(nn.Linear, i, o) for i, o in zip(widths, widths[1:]))
        self.layers = nn.ModuleList(layers)
        self._finish(initialise, norm, norm_batch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer, norm in self._layers():
            x = layer(x)
            x = (x if norm is None else norm(x)).relu()
        return self.head(x)


class CNN(Classifier):
    """Two convolutions (3×3; 16 and 32 channels), each with ReLU and 2×2 max pooling, then one linear layer.

    Raises ValueError for inputs that are not images ``(channels, height, width)``.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, initialise: Callable[[Classifier], None],
                 norm: str = "none", norm_batch_size: int | None = None):  # fmt: skip
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"a CNN needs images (channels, height, width); this dataset's inputs are {input_shape}")
        channels, height, width = input_shape
        convolutions = ((channels, 16), (16, 32))
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Conv2d, i, o, 3, padding=1) for i, o in convolutions)
        self.head = nn.utils.skip_init(nn.Linear, 32 * (height // 4) * (width // 4), num_classes)
        self._finish(initialise, norm, norm_batch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in self._layers():
            x = layer(x)
            x = F.max_pool2d((x if norm is None else norm(x)).relu(), 2)
        return self.head(x.flatten(1))


def he_uniform_then_xavier_uniform(net: Classifier) -> None:
    """Draw hidden weights He-uniform and the head's Xavier-uniform (Keras's choice in Brownlee 2019)."""
    for layer in net.layers:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.xavier_uniform_(net.head.weight)


def xavier_normal(net: Classifier) -> None:
    """Draw all weights Xavier-normal with gain 1 (Shen 2018)."""
    for layer in (*net.layers, net.head):
        nn.init.xavier_normal_(layer.weight)


# brownlee_mlp: Brownlee 2019. shen_mlp: Shen 2018. keskar_mlp: the F1 of Keskar 2016. small_mlp: for hundreds of runs.
NETS: dict[str, Callable[..., Classifier]] = {
    "brownlee_mlp": functools.partial(MLP, hidden=(50,), initialise=he_uniform_then_xavier_uniform),
    "small_mlp": functools.partial(MLP, hidden=(128,), initialise=he_uniform_then_xavier_uniform),
    "shen_mlp": functools.partial(MLP, hidden=(1024, 1024), initialise=xavier_normal),
    "keskar_mlp": functools.partial(MLP, hidden=(512,) * 5, initialise=he_uniform_then_xavier_uniform),
    "plain_cnn": functools.partial(CNN, initialise=he_uniform_then_xavier_uniform),
}
