"""Problems that the package does not know, of ordinary modules, for the tests of everything that takes any problem."""

import torch
from torch import nn

from helpers import Dataset, Net, Problem
from helpers.engine import stack
from helpers.problems import Solution

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 1, 8, 8, generator=GENERATOR), torch.randint(5, (24,), generator=GENERATOR)
TOKENS = torch.randint(11, (24, 7), generator=GENERATOR)
SERIES = torch.randn(24, 6, 3, generator=GENERATOR)


class Block(nn.Module):
    """Causal attention by scaled_dot_product_attention, and an MLP."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Two causal layers; the embedding is the head."""

    def __init__(self, tokens=11, width=8):
        super().__init__()
        self.embedding, self.position = nn.Embedding(tokens, width), nn.Parameter(0.1 * torch.randn(6, width))
        self.blocks, self.head = nn.Sequential(Block(width), Block(width)), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.blocks(self.embedding(x) + self.position[: x.shape[1]]))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Branching(nn.Module):
    """Its path depends on the data, and differs from example to example."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(18, 4), nn.Linear(18, 4)

    def forward(self, x):
        return torch.stack([self.one(row) if row.sum() > 0 else self.other(row) for row in x.flatten(1)])


class Uneven(nn.Module):
    """Returns a tuple; has a scalar parameter, one that is not used and one that is not trained."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(64, 5), nn.Parameter(torch.tensor(1.5))
        self.unused, self.fixed = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x):
        return self.linear(x.flatten(1)) * self.scale * self.fixed, x


def sequential():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))


def resnet():
    import torchvision

    return torchvision.models.resnet18(num_classes=4)


def normalised():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


def dropping():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 5))


def first_of_a_tuple(outputs, targets):
    return nn.functional.cross_entropy(outputs[0], targets, reduction="none")


def _images(net, loss=nn.functional.cross_entropy):
    return Problem(Dataset.of(*IMAGES, *IMAGES, device="cpu"), Net(net), loss)


def _series(net):
    return Problem(Dataset.of(SERIES, (SERIES.sum((1, 2)) > 0).long() + 1, device="cpu"), Net(net))


STRANGERS = {
    "sequential": lambda: _images(sequential),
    "cnn": lambda: _images(cnn),
    "batch norm": lambda: _images(normalised),
    "dropout": lambda: _images(dropping),
    "tuple": lambda: _images(Uneven, first_of_a_tuple),
    "lstm": lambda: _series(Recurrent),
    "branching": lambda: _series(Branching),
    "transformer": lambda: Problem(Dataset.of(TOKENS[:, :-1], TOKENS[:, 1:], device="cpu"), Net(Transformer)),
    "regression": lambda: Problem(
        Dataset.of(SERIES, SERIES.mean((1, 2))[:, None], device="cpu"),
        Net(lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 1))),
        nn.functional.mse_loss,
    ),
}


def initial(problem, seed=0):
    """The solution at the initial weights."""
    return Solution(problem, stack.build(problem, [seed]).state())


def twin(solution, hidden):
    """A built-in perceptron's solution as one of an ordinary Sequential, with the same weights."""
    data = solution.problem.dataset
    widths = [data.train_inputs[0].numel(), *hidden, data.num_classes]

    def net():
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

    names = [*(f"layers.{i}" for i in range(len(hidden))), "head"]
    weights = {
        f"{2 * i + 1}.{k}": solution.weights[f"{n}.{k}"] for i, n in enumerate(names) for k in ("weight", "bias")
    }
    return Solution(Problem(data, Net(net), solution.problem.loss), weights)


def gradients_one_by_one(solution, indices=None):
    """Training examples' losses and gradients ``(n, parameters)``: float64, a backward pass each, in eval mode."""
    problem, dtype = solution.problem, torch.float64
    module = problem.net.module(0).to(dtype).eval()
    module.load_state_dict({name: w[0].to(dtype) for name, w in solution.weights.items()}, strict=False)
    losses, gradients = [], []
    for i in torch.arange(problem.num_train) if indices is None else indices:
        x, y = (t.to(dtype) if t.is_floating_point() else t for t in problem.dataset.batch(i[None]))
        loss = problem.example_losses(module(x), y)[0]
        trained = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in found]))
    return torch.tensor(losses, dtype=dtype), torch.stack(gradients)
