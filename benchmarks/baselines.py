"""What the helpers are compared with, each written as its own documentation teaches it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from helpers.engine import kernels
from helpers.problems import Problem, pick_device
from helpers.problems.dataset import Tensors
from helpers.sweep import processes

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
EVALUATION_BATCH = 1_000  # the test batch of PyTorch's own MNIST example


def perceptron(widths: Sequence[int], hidden_init: Callable, head_init: Callable) -> nn.Sequential:
    """A multilayer perceptron with ReLU, biases at 0: https://docs.pytorch.org/docs/stable/nn.html."""
    net = nn.Sequential(nn.Flatten())
    for given, out in zip(widths, widths[1:]):
        net.extend([nn.Linear(given, out), nn.ReLU()])
    del net[-1]
    for layer in net[1::2]:
        (head_init if layer is net[-1] else hidden_init)(layer.weight)
        nn.init.zeros_(layer.bias)
    return net.to(pick_device())


def shen_net(inputs: int, classes: int) -> nn.Sequential:
    """The write-up's network, Xavier normal: https://docs.pytorch.org/docs/stable/nn.init.html."""
    return perceptron([inputs, 1024, 1024, classes], nn.init.xavier_normal_, nn.init.xavier_normal_)


def copied(weights: Mapping[str, torch.Tensor]) -> nn.Sequential:
    """``shen_net`` with one replica's weights of ours."""
    net = shen_net(weights["layers.0.weight"].shape[-1], weights["head.weight"].shape[1])
    with torch.no_grad():
        for layer, name in zip(net[1::2], ("layers.0", "layers.1", "head")):
            layer.weight.copy_(weights[f"{name}.weight"][0])
            layer.bias.copy_(weights[f"{name}.bias"][0])
    return net


def train_epoch(net: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    """One pass: https://docs.pytorch.org/tutorials/beginner/basics/optimization_tutorial.html."""
    net.train()
    device = pick_device()
    for x, y in batches:
        loss = F.cross_entropy(net(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(net: nn.Module, batches: Batches) -> float:
    """Accuracy (0 to 1): https://docs.pytorch.org/tutorials/beginner/basics/optimization_tutorial.html."""
    net.eval()
    device, correct, count = pick_device(), 0, 0
    for x, y in batches:
        correct += (net(x.to(device)).argmax(1) == y.to(device)).sum().item()
        count += len(y)
    return correct / count


def mnist_loaders(
    root: Path, normalisation: tuple[float, float], batch_size: int, workers: int, num_train: int, num_test: int
) -> list[DataLoader]:
    """To train on, and to evaluate on (train, test): https://docs.pytorch.org/vision/stable/datasets.html.

    Transforms as in https://docs.pytorch.org/vision/stable/transforms.html; workers that stay from epoch to epoch.
    """
    from torchvision import transforms
    from torchvision.datasets import MNIST

    mean, std = normalisation
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))])
    train, test = (
        Subset(MNIST(root, train=train, transform=transform, download=False), range(n))
        for train, n in ((True, num_train), (False, num_test))
    )
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    return [
        DataLoader(train, batch_size=batch_size, shuffle=True, **options),
        *(DataLoader(part, batch_size=EVALUATION_BATCH, **options) for part in (train, test)),
    ]


def mnist_epoch(net: nn.Module, loaders: Sequence[DataLoader], lr: float) -> list[float]:
    """The write-up's epoch, then train and test accuracy; SGD: https://docs.pytorch.org/docs/stable/optim.html."""
    train, *evaluated = loaders
    train_epoch(net, train, torch.optim.SGD(net.parameters(), lr=lr))
    return [accuracy(net, part) for part in evaluated]


def shuffled(x: torch.Tensor, y: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Minibatches by index: https://docs.pytorch.org/docs/stable/generated/torch.randperm.html."""
    for indices in torch.randperm(len(y)).split(batch_size):
        yield x[indices], y[indices]


class CausalTransformer(nn.Module):
    """Two causal layers of width 64: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html."""

    def __init__(self, vocabulary: int = 65, context: int = 64, width: int = 64):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(width, vocabulary),
        )
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.layers(self.tokens(x) + places, mask=self.mask, is_causal=True))


def own_loop(net: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """A pass over examples in memory by AdamW, fused: https://docs.pytorch.org/docs/stable/optim.html."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    net.train()
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size)):
        loss = F.cross_entropy(net(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(net.named_parameters())


def blobs_loop(
    dataset: Tensors, batch_size: int, epochs: int, lr: float, momentum: float, loader: bool, threads: int
) -> list[list[float]]:
    """Train and test accuracy of each epoch; minibatches by https://docs.pytorch.org/docs/stable/data.html or shuffled.

    ``threads``: https://docs.pytorch.org/docs/stable/generated/torch.set_num_threads.html.
    """
    net = perceptron([2, 50, 3], lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"), nn.init.xavier_uniform_)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    train, test = (dataset.train_inputs, dataset.train_targets), (dataset.test_inputs, dataset.test_targets)
    by_loader = DataLoader(TensorDataset(*train), batch_size=batch_size, shuffle=True)
    before, history = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    for _ in range(epochs):
        train_epoch(net, by_loader if loader else shuffled(*train, batch_size), optimizer)
        history.append([accuracy(net, [train]), accuracy(net, [test])])
    torch.set_num_threads(before)
    return history


def torch_epoch(
    problem: Problem,
    seeds: Sequence[int],
    order: torch.Tensor,
    batch_size: int,
    compiled: bool = False,
    channels_last: bool = False,
    **sgd: object,
) -> tuple[Callable[[], Callable], float]:
    """An epoch of SGD on tensors in memory, seeds in turn, and the seconds that its compiled step took to compile.

    The step of https://docs.pytorch.org/tutorials/beginner/basics/optimization_tutorial.html, compiled whole as in
    https://docs.pytorch.org/tutorials/intermediate/torch_compile_tutorial.html; ``sgd``: options of
    https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html; ``channels_last``:
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html.

    order: of the examples, int64 ``(seeds, examples)``. The call returns each step's loss, ``(seeds, steps)``.
    """
    form = torch.channels_last if channels_last else torch.contiguous_format
    start = [problem.net.module(seed).state_dict() for seed in seeds]
    x, y = (problem.dataset.tensors("train")[i] for i in (0, 1))
    x, net = x.contiguous(memory_format=form), problem.net.module(0).to(x.device, memory_format=form)
    optimizer = torch.optim.SGD(net.parameters(), **sgd)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    call = torch.compile(step) if compiled else step

    def epoch() -> torch.Tensor:
        losses = []
        for weights, one in zip(start, order):
            net.load_state_dict(weights)
            for state in optimizer.state.values():  # the momentum of the seed before; there is no other state
                state["momentum_buffer"].zero_()
            losses.append(torch.stack([call(x[minibatch], y[minibatch]) for minibatch in one.split(batch_size)]))
        return torch.stack(losses)

    seconds = _beyond_the_second(epoch) if compiled else 0.0
    return lambda: epoch, seconds


def torch_logits(
    net: nn.Module, x: torch.Tensor, chunk: int, compiled: bool = False, channels_last: bool = False
) -> tuple[Callable[[], Callable], float]:
    """Logits chunk by chunk, without a graph, and the seconds to compile; see ``torch_epoch``."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, net = x.contiguous(memory_format=form), net.eval().to(x.device, memory_format=form)
    call = torch.compile(net) if compiled else net

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return torch.cat([call(part) for part in x.split(chunk)])

    seconds = _beyond_the_second(forward) if compiled else 0.0
    return lambda: forward, seconds


def _beyond_the_second(call: Callable) -> float:
    """Seconds that a first call, which compiles, takes beyond a second one."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times[0] - times[1]


def jax_perceptron(weights: Mapping[str, torch.Tensor], inputs_first: bool) -> tuple[Callable, dict]:
    """Logits of a perceptron, and its parameters, from ours: https://docs.jax.dev/en/latest/jax.nn.html.

    inputs_first: a layer's weights are (in, out), as Flax has them, else (out, in); which is faster depends on sizes.
    """
    import jax

    def linear(parameters: dict, layer: str, x):
        weight = parameters[f"{layer}.weight"]
        return x @ (weight if inputs_first else weight.T) + parameters[f"{layer}.bias"]

    def logits(parameters: dict, x):
        x = x.reshape(len(x), -1)
        for i in range(len(weights) // 2 - 1):
            x = jax.nn.relu(linear(parameters, f"layers.{i}", x))
        return linear(parameters, "head", x)

    return logits, {name: w.mT if inputs_first and w.dim() == 3 else w for name, w in weights.items()}


def jax_cnn(weights: Mapping[str, torch.Tensor]) -> tuple[Callable, dict]:
    """Logits of ``plain_cnn``, and its parameters, from ours; each convolution as a product of patches.

    XLA's own, https://docs.jax.dev/en/latest/_autosummary/jax.lax.conv.html, takes ten times as long in a CPU's scan.
    """
    import jax
    from jax import numpy as jnp

    def logits(parameters: dict, x):
        x = x.transpose(0, 2, 3, 1)
        for layer in ("layers.0", "layers.1"):
            (n, height, width, _), padded = x.shape, jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
            x = jnp.concatenate(shifted, -1) @ parameters[f"{layer}.weight"] + parameters[f"{layer}.bias"]
            x = jax.nn.relu(x).reshape(n, height // 2, 2, width // 2, 2, -1).max((2, 4))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        return x @ parameters["head.weight"].T + parameters["head.bias"]

    return logits, {n: w.permute(0, 3, 4, 2, 1).flatten(1, 3) if w.dim() == 5 else w for n, w in weights.items()}


def jax_epoch(
    logits: Callable,
    parameters: Mapping[str, torch.Tensor],
    dataset: Tensors,
    order: torch.Tensor,
    batch_size: int,
    lr: float | Sequence[float],
    momentum: float = 0.0,
) -> tuple[Callable[[], Callable], float]:
    """An epoch of SGD as one compiled call, and the seconds that compiling it took.

    Steps by https://docs.jax.dev/en/latest/_autosummary/jax.lax.scan.html, seeds by
    https://docs.jax.dev/en/latest/automatic-vectorization.html, weights donated as in
    https://docs.jax.dev/en/latest/buffer_donation.html, compiled by https://docs.jax.dev/en/latest/aot.html.

    logits: of one seed's parameters and inputs. parameters: of all seeds, ``(replicas, …)``, from which each call
    starts. order: of the examples, int64 ``(replicas, examples)``; of one row where all share it. lr: one for all,
    or one a replica. The call returns each step's loss, ``(steps,)`` or ``(replicas, steps)``.
    """
    import jax
    from jax import numpy as jnp

    def loss(parameters: dict, x, y):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits(parameters, x)), y[:, None], 1).mean()

    def epoch(parameters: dict, lr, order, x, y):
        def step(state: tuple, minibatch):
            parameters, velocity = state
            value, moved = jax.value_and_grad(loss)(parameters, x[minibatch], y[minibatch])
            if momentum:
                moved = velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, moved)
            return (jax.tree.map(lambda p, g: p - lr * g, parameters, moved), velocity), value

        state = parameters, jax.tree.map(jnp.zeros_like, parameters) if momentum else None
        whole = len(order) - len(order) % batch_size
        state, losses = jax.lax.scan(step, state, order[:whole].reshape(-1, batch_size))
        if whole < len(order):
            state, last = step(state, order[whole:])
            losses = jnp.append(losses, last)
        return state, losses

    def arrays(tensors: Mapping[str, torch.Tensor]) -> dict:
        return {name: jnp.array(t.numpy(force=True)) for name, t in tensors.items()}

    if len(parameters["head.bias"]) == 1:
        parameters, order = {name: p[0] for name, p in parameters.items()}, order[0]
    else:
        shared = len(order) == 1
        axes = (0, None if isinstance(lr, float) else 0, None if shared else 0, None, None)
        epoch, order = jax.vmap(epoch, in_axes=axes), order[0] if shared else order
    tensors = {"lr": torch.tensor(lr), "order": order, "x": dataset.train_inputs, "y": dataset.train_targets}
    data = arrays(tensors).values()
    lowered = jax.jit(epoch, donate_argnums=0).lower(arrays(parameters), *data)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started

    def prepare() -> Callable:
        start = jax.block_until_ready(arrays(parameters))
        return lambda: jax.block_until_ready(compiled(start, *data))[1]

    return prepare, seconds


def jax_logits(logits: Callable, parameters: Mapping, x: torch.Tensor, chunk: int) -> tuple[Callable, float]:
    """One seed's logits chunk by chunk in one compiled call, and the seconds to compile; see ``jax_epoch``."""
    import jax

    given = {name: p[0].numpy(force=True) for name, p in parameters.items()}
    parts = jax.device_put((given, x.numpy(force=True).reshape(-1, chunk, *x.shape[1:])))
    lowered = jax.jit(lambda given, x: jax.lax.map(lambda part: logits(given, part), x)).lower(*parts)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    return lambda: lambda: jax.block_until_ready(compiled(*parts)).reshape(len(x), -1), seconds


def keras_backend() -> str:
    """TensorFlow, the write-up's, where it is; else PyTorch: https://keras.io/getting_started/."""
    found = "tensorflow" if importlib.util.find_spec("tensorflow") else "torch"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return os.environ.setdefault("KERAS_BACKEND", found)


def keras_fit(dataset: Tensors, batch_size: int, epochs: int, lr: float, momentum: float) -> Callable[[], list]:
    """``epochs`` of https://keras.io/api/models/model_training_apis/#fit-method, after a first that compiles, untimed.

    Returns the call, and the call train and test accuracy by epoch; fit's train accuracy is a running mean.
    """
    keras_backend()
    import keras

    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(50, activation="relu", kernel_initializer="he_uniform")
    model = keras.Sequential([keras.Input((2,)), hidden, keras.layers.Dense(3, activation="softmax")])
    sgd = keras.optimizers.SGD(learning_rate=lr, momentum=momentum)
    model.compile(optimizer=sgd, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y, *test = (
        t.numpy(force=True)
        for t in (dataset.train_inputs, dataset.train_targets, dataset.test_inputs, dataset.test_targets)
    )
    options = {"validation_data": test, "batch_size": batch_size, "verbose": 0}
    model.fit(x, y, epochs=1, **options)

    def fit() -> list:
        history = model.fit(x, y, epochs=epochs, **options).history
        return list(zip(history["accuracy"], history["val_accuracy"]))

    return fit


def walk_port(
    weights: Mapping[str, torch.Tensor],
    dataset: Tensors,
    draws: Sequence[torch.Tensor],
    batch_sizes: Sequence[int],
    lr: float,
) -> list[list[float]]:
    """The write-up's section 1d, line by line: a norm per draw and size.

    Saving and loading: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html.
    """
    net = copied(weights)
    checkpoint = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    norms: list[list[float]] = []
    for draw in draws:
        images, labels = dataset.train_inputs[draw], dataset.train_targets[draw]
        norms.append([])
        for batch_size in batch_sizes:
            net.load_state_dict(checkpoint)
            total = torch.zeros_like(net[-1].weight)
            for x, y in zip(images.split(batch_size), labels.split(batch_size)):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                total += net[-1].weight.grad * (len(y) / len(draw))
                optimizer.step()
                optimizer.zero_grad()
            norms[-1].append(total.norm().item())
    return norms


def backpack_norms(
    net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, chunk: int, second_moment: bool
) -> tuple[torch.Tensor, float]:
    """Squared gradient norms by ``BatchL2Grad``, and tr Σ: https://docs.backpack.pt/en/master/extensions.html.

    tr Σ from those norms and the mean gradient, or with ``second_moment`` by ``SumGradSquared``, entry by entry.
    """
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, SumGradSquared

    model, loss_function = extend(net), extend(nn.CrossEntropyLoss())
    extensions = [BatchL2Grad(), SumGradSquared()] if second_moment else [BatchL2Grad()]
    model.zero_grad()
    norms, moment = [], 0.0
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # it is how BackPACK works
    for part, labels in zip(x.split(chunk), y.split(chunk)):
        loss = loss_function(model(part), labels)
        with backpack(*extensions):
            loss.backward()  # of a mean over the chunk: its examples' gradients are divided by its length
        norms.append(sum(p.batch_l2 for p in model.parameters()) * len(labels) ** 2)
        if second_moment:
            moment += sum(p.sum_grad_squared.sum().item() for p in model.parameters()) * len(labels) ** 2 / len(y)
    squared = torch.cat(norms)
    mean = sum(p.grad.square().sum().item() for p in model.parameters()) * (chunk / len(y)) ** 2
    return squared, (moment if second_moment else squared.mean().item()) - mean


def vmap_norms(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, chunk: int) -> tuple[torch.Tensor, float]:
    """The same by ``vmap(grad)``: https://docs.pytorch.org/tutorials/intermediate/per_sample_grads.html."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict, one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (one[None],)), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    norms, total = [], {name: torch.zeros_like(p) for name, p in parameters.items()}
    for part, labels in zip(x.split(chunk), y.split(chunk)):
        each = gradients(parameters, part, labels)
        norms.append(sum(g.flatten(1).square().sum(1) for g in each.values()))
        total = {name: before + each[name].sum(0) for name, before in total.items()}
    squared = torch.cat(norms)
    return squared, squared.mean().item() - sum((g / len(y)).square().sum().item() for g in total.values())


def minibatch_norms(net: nn.Sequential, dataset: Tensors, minibatches: Iterable[torch.Tensor]) -> list[float]:
    """Norm of each minibatch's gradient by https://docs.pytorch.org/docs/stable/generated/torch.autograd.grad.html."""
    norms, parameters = [], list(net.parameters())
    for minibatch in minibatches:
        loss = F.cross_entropy(net(dataset.train_inputs[minibatch]), dataset.train_targets[minibatch])
        squares = [g.square().sum() for g in torch.autograd.grad(loss, parameters)]
        norms.append(torch.stack(squares).sum().sqrt().item())
    return norms


def gemm(size: int, repeats: int) -> Callable[[], float]:
    """So many square float32 products, by the faster of the libraries that torch brings (``kernels.product``)."""
    a, b = torch.rand(2, size, size, device=pick_device())

    def multiply() -> float:
        for _ in range(repeats):
            out = kernels.product(a, b)
        return out[0, 0].item()  # waits for the device

    return multiply


def step_products(widths: Sequence[int], steps: Sequence[int], evaluated: Sequence[int] = ()) -> Callable[[], float]:
    """The matrix products of ``steps`` of SGD on so many examples each, and nothing else: none can do without them.

    A perceptron of these ``widths``: outputs, gradients by weights, and by inputs of all layers but the first; each the
    faster of PyTorch's own product (summed into the weights, where it makes a gradient) and oneDNN's (whose factors lie
    ready as it wants them). ``evaluated``: chunks of examples of which the outputs alone are taken.
    """
    device = pick_device()
    weights = [torch.rand(out, given, device=device) for given, out in zip(widths, widths[1:])]
    sizes = [*((n, True) for n in steps), *((n, False) for n in evaluated)]
    made = {size: _fastest(_products(weights, *size)) for size in set(sizes)}

    def multiply() -> float:
        for size in sizes:
            for call in made[size]:
                call()
        return weights[0][0, 0].item()  # waits for the device

    return multiply


def _products(weights: Sequence[torch.Tensor], examples: int, train: bool) -> list[tuple[Callable, Callable]]:
    inputs = [torch.rand(examples, w.shape[1], device=w.device) for w in weights]
    calls = [(partial(F.linear, a, w), partial(kernels.product, a, w)) for a, w in zip(inputs, weights)]
    for w, a in list(zip(weights, inputs))[::-1] if train else ():
        delta = torch.rand(examples, len(w), device=w.device)
        ready = delta.t().contiguous(), a.t().contiguous()
        calls.append((partial(w.addmm_, delta.t(), a, alpha=1e-9), partial(kernels.product, *ready)))
        if w is not weights[0]:
            calls.append((partial(torch.mm, delta, w), partial(kernels.product, delta, w.t().contiguous())))
    return calls


def _fastest(calls: Sequence[tuple[Callable, Callable]]) -> list[Callable]:
    """The faster of each two, timed in the order of a step: what it finds in the cache is what a step finds there."""
    best = [[float("inf")] * 2 for _ in calls]
    for _, way, (place, pair) in itertools.product(range(5), (0, 1), enumerate(calls)):
        started = time.perf_counter()
        pair[way]()
        best[place][way] = min(best[place][way], time.perf_counter() - started)
    return [pair[times.index(min(times))] for pair, times in zip(calls, best)]


@contextlib.contextmanager
def dask_scheduler():
    """A scheduler on this machine: its address, and a function that sees to so many workers of one thread each."""
    import distributed

    dask = str(Path(sys.executable).parent / "dask")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers: list[subprocess.Popen] = []

        def start(*arguments: str) -> subprocess.Popen:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen([dask, *arguments, "--no-dashboard"], **quiet)
            stack.callback(end, process)
            return process

        def end(process: subprocess.Popen) -> None:
            processes.end_children(process.pid)
            process.kill()
            process.wait()

        def have(number: int) -> None:
            while len(workers) > number:
                end(workers.pop())
            while len(workers) < number:
                workers.append(
                    start("worker", address, "--nworkers", "1", "--nthreads", "1", "--local-directory", folder)
                )
            with distributed.Client(address, set_as_default=False) as client:
                while len(client.scheduler_info()["workers"]) != number:
                    time.sleep(0.1)
                client.run(importlib.import_module, "helpers.sweep.trainings")

        file = Path(folder) / "scheduler.json"
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        while not file.exists():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        yield address, have
