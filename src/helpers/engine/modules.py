"""Stacks in general, and of ordinary modules: one replica of a network a seed.

Any ``nn.Module`` is a replica as it is: its parameters are views of the stack's tensors, so that an optimizer may work
on the stack or on one replica. Many small modules go through vmap.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from helpers.engine import kernels
from helpers.problems import Problem
from helpers.problems.problem import call

_CHUNK = 250  # examples of a forward pass without a graph, on a CPU; a device takes 1,000
# Below so many parameters a replica, a step's overhead outweighs its arithmetic, and vmap shares it among replicas.
_VMAP_BELOW = 20_000
_PROBE = 32  # examples on which vmap is compared with a replica alone
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, kernels.BatchNorm, kernels.nets.GhostBatchNorm)


class Stack:
    """What training and the measures need of replicas; ``Kernel`` and ``Modules`` implement the rest alike.

    ``parameters``: name → ``(replicas, *shape)``, those that are trained. ``kernel``: the fast path, or None.
    """

    parameters: dict[str, torch.Tensor]
    kernel: kernels.Model | None = None
    problem: Problem
    replicas: int
    factors: Sequence[kernels.Factors] = ()  # the last gradient, where the kernel gives it in closed form
    by_hand = True  # False: gradients by autograd on ordinary tensors, so that the memory it keeps can be counted
    apart = False  # whether each replica's leaves hold its gradient, and the stack does not

    @property
    def closed_form(self) -> bool:
        """Whether there is ``backpropagate``."""
        return self.by_hand and self.kernel is not None and self.kernel.closed_form

    def looped(self, batch_size: int) -> bool:
        """Whether our optimizers' steps are one compiled loop (``loops``)."""
        return False

    def train(self, mode: bool = True) -> Stack:
        """Switch dropout and batch statistics on or off."""
        for module in self.roots:
            if module.training != mode:
                module.train(mode)
        return self

    def eval(self) -> Stack:
        return self.train(False)

    def buffers(self) -> list[torch.Tensor]:
        """The buffers of every replica: the tensors that a forward pass may change."""
        return [buffer for root in self.roots for buffer in root.buffers()] if self._has_buffers else []

    @functools.cached_property
    def _has_buffers(self) -> bool:
        return any(True for _ in self.roots[0].buffers())

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters by name, each with its replica axis."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def leaves(self, replica: int) -> dict[str, torch.Tensor]:
        """One replica's parameters by name, for an optimizer of its own; they share the stack's memory."""
        if not self._leaves:
            self._leaves = [
                {n: nn.Parameter(p.data[i]) for n, p in self.parameters.items()} for i in range(self.replicas)
            ]
        return self._leaves[replica]

    def batch(self, indices: torch.Tensor) -> tuple[Any, Any]:
        """Inputs and targets of a minibatch ``(replicas, n)``: stacked tensors, or one of each a replica."""
        return self.problem.dataset.batch(indices)

    @property
    def chunk(self) -> int:
        """Examples of a forward pass that records no graph."""
        return _CHUNK if self.problem.dataset.device.type == "cpu" else 4 * _CHUNK

    def batch_statistics(self) -> str | None:
        """The name of the first layer whose output depends on the others in its batch; None without one."""
        for root in self.roots[:1]:
            for name, module in root.named_modules():
                if isinstance(module, _BATCH_STATISTICS) and (module.training or not _has_statistics(module)):
                    return name or type(module).__name__
        return None

    def refuse_batch_statistics(self, what: str) -> None:
        """Raise ValueError, naming the layer, where an example's loss depends on the others in its batch."""
        layer = self.batch_statistics()
        if layer is not None:
            raise ValueError(
                f"{what}: under batch normalisation ({layer}) an example has no gradient of its own, for its loss "
                "depends on the others in its batch; normalise by groups, call eval() for the running statistics, or "
                "estimate the noise by micro-batches"
            )

    def __setstate__(self, state: dict) -> None:
        """A copy's leaves share its own memory again, which copying one by one has parted."""
        self.__dict__.update(state)
        for replica, leaves in enumerate(self._leaves):
            for name, leaf in leaves.items():
                leaf.data = self.parameters[name].data[replica]


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


class Modules(Stack):
    """A stack of ordinary modules, one a replica; vmapped over replicas where that pays and gives the same gradient."""

    def __init__(self, problem: Problem, modules: Sequence[nn.Module], seeds: Sequence[int]):
        self.problem, self.replicas, self.seeds = problem, len(modules), tuple(seeds)
        self.modules = [module.to(problem.dataset.device) for module in modules]
        self._leaves = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in self.modules]
        if not self._leaves[0]:
            raise ValueError(f"{problem.net.name} has no parameters that require a gradient; there is nothing to train")
        self.parameters = {n: torch.stack([own[n].data for own in self._leaves]) for n in self._leaves[0]}
        self.__setstate__({})
        self._vmapped: dict[str, torch.Tensor] | None = None  # the last gradient, where vmap made it

    @functools.cached_property
    def _vmap(self) -> bool:
        """Whether vmap takes the gradients of all replicas at once: where that pays, and they are the same."""
        dataset, size = self.problem.dataset, sum(p[0].numel() for p in self.parameters.values())
        if self.replicas == 1 or not dataset.in_memory or (size >= _VMAP_BELOW and dataset.device.type == "cpu"):
            return False
        first = self.modules[0]
        trained = {name for name, p in first.named_parameters(remove_duplicate=False) if p.requires_grad}
        if not set(first.state_dict()) <= trained:  # what is not trained would be the first replica's for all
            return False
        few = torch.arange(min(_PROBE, dataset.num_train), device=dataset.device)
        return self._vmap_agrees(*dataset.batch(few.expand(self.replicas, -1)))

    @property
    def apart(self) -> bool:
        return not self._vmap

    def batch(self, indices: torch.Tensor) -> tuple[Any, Any]:
        if self._vmap:
            return self.problem.dataset.batch(indices)
        return tuple(zip(*(self.problem.dataset.batch(one) for one in indices)))

    @property
    def roots(self) -> list[nn.Module]:
        return self.modules

    def state(self) -> dict[str, torch.Tensor]:
        states = [module.state_dict() for module in self.modules]
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> Modules:
        for replica, module in enumerate(self.modules):
            own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            unknown, missing = set(state) - set(module.state_dict()), set(dict(module.named_parameters())) - set(state)
            if unknown or missing:
                differ = ", ".join(sorted(unknown | missing))
                raise ValueError(f"these weights are of another net: {differ} on one side alone")
            for name in set(own) & set(state):
                own[name].copy_(state[name][replica if len(state[name]) > 1 else 0])
        return self

    def autograd_leaves(self) -> list[torch.Tensor]:
        return [p for leaves in self._leaves for p in leaves.values()]

    def stacked(self, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        count = len(self.parameters)
        return {name: torch.stack(list(gradients[i::count])) for i, name in enumerate(self.parameters)}

    def gradients(self) -> dict[str, torch.Tensor]:
        if self._vmapped is not None:
            return self._vmapped
        found = {}
        for name, p in self.parameters.items():
            grads = [leaves[name].grad for leaves in self._leaves]
            if all(g is None for g in grads):
                continue  # not used in this step, or no step yet
            grads = [torch.zeros_like(p[0]) if g is None else g for g in grads]
            found[name] = grads[0].unsqueeze(0) if self.replicas == 1 else torch.stack(grads)
        return found

    def clear(self) -> None:
        self._vmapped = None
        for leaf in self.autograd_leaves():
            leaf.grad = None

    def backward(self, inputs: Any, targets: Any, share: float = 1.0, step: tuple[int, int] = (0, 0)) -> torch.Tensor:
        if self._vmap:
            gradients, losses = self._vmapped_gradient(inputs, targets, share)
            before = self._vmapped or {}
            self._vmapped = {name: g + before[name] if name in before else g for name, g in gradients.items()}
            return losses
        losses = []
        for replica, (x, y) in enumerate(zip(inputs, targets)):
            with _seeded(self.seeds[replica], *step, self.problem.dataset.device):
                loss = self.problem.mean_loss(self._outputs(replica, x), y)
                (loss if share == 1 else loss * share).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def _outputs(self, replica: int, inputs: Any) -> Any:
        try:
            return call(self.modules[replica], inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            layer = self.batch_statistics()
            raise ValueError(
                f"a minibatch of one example has no batch statistics ({layer}); choose a batch size that leaves "
                f"no last minibatch of one of the {self.problem.num_train} training examples"
            ) from error

    def _vmapped_gradient(
        self, inputs: Any, targets: Any, share: float = 1.0
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """``share`` times the gradient of each replica's mean loss, and these losses.

        vmap runs the forward pass alone: autograd, outside of it, records what it does for all replicas at once, in
        half the time of a ``vmap(grad)``.
        """
        base, own = self.modules[0], {id(p): name for name, p in self._leaves[0].items()}
        held = [(m._parameters, key, p) for m in base.modules() for key, p in m._parameters.items()]
        places = [(holder, key, own[id(p)]) for holder, key, p in held if p is not None]

        after = self.problem.averages_labels  # a loss of each label by itself takes all replicas' as one minibatch

        def run(x: Any, y: Any, *parameters: torch.Tensor) -> torch.Tensor:
            named = dict(zip(self.parameters, parameters))
            try:
                for holder, key, name in places:
                    holder[key] = named[name]
                return base(x) if after else self.problem.example_losses(base(x), y)
            finally:
                for holder, key, name in places:
                    holder[key] = self._leaves[0][name]

        stacked = [p.detach().requires_grad_() for p in self.parameters.values()]
        losses = torch.func.vmap(run, randomness="error")(inputs, targets, *stacked)
        if after:
            losses = self.problem.example_losses(losses.flatten(0, 1), targets.flatten(0, 1)).view(targets.shape[:2])
        each = torch.full((), share / losses.shape[1], dtype=losses.dtype, device=losses.device).expand_as(losses)
        found = torch.autograd.grad(losses, stacked, each)
        return {n: g.contiguous() for n, g in zip(self.parameters, found)}, losses.detach().mean(1)

    def _vmap_agrees(self, inputs: Any, targets: Any) -> bool:
        """Whether vmap can differentiate this net, and gives the last replica the gradient that it has alone."""
        training = self.modules[0].training
        self.train()
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("error")  # of an operation that vmap would take example by example
                gradients, _ = self._vmapped_gradient(inputs, targets)
            loss = self.problem.mean_loss(self._outputs(self.replicas - 1, inputs[-1]), targets[-1])
            alone = torch.autograd.grad(loss, list(self._leaves[-1].values()))
        except Exception:  # whatever vmap cannot do: data-dependent control flow, random numbers, missing rules
            return False
        finally:
            self.train(training)
        return all(torch.allclose(gradients[n][-1], g, rtol=1e-4, atol=1e-6) for n, g in zip(self.parameters, alone))

    def losses(self, inputs: Any, targets: Any, *, shared: bool = True) -> torch.Tensor:
        pairs = [(inputs, targets)] * self.replicas if shared else zip(inputs, targets)
        return torch.stack([self.problem.example_losses(self._outputs(i, x), y) for i, (x, y) in enumerate(pairs)])

    def outputs(self, inputs: Any) -> Any:
        each = [call(module, inputs) for module in self.modules]
        return torch.stack(each) if isinstance(each[0], torch.Tensor) else each

    def evaluate(self, inputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        losses, scores = [], []
        for module in self.modules:
            outputs = call(module, inputs)
            losses.append(self.problem.example_losses(outputs, targets).double().sum().cpu())
            score = self.problem.example_scores(outputs, targets)
            scores.append(torch.tensor(torch.nan, dtype=torch.float64) if score is None else score.sum().cpu())
        return torch.stack(losses), torch.stack(scores)


@contextlib.contextmanager
def _seeded(seed: int, step: int, part: int, device: torch.device):
    """Random numbers of a forward pass, such as dropout's, depend on seed and step; the generators are put back."""
    state = ((seed * 1_000_003 + step) * 1_009 + part) % 2**63
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(state)
    if cuda is not None:
        torch.cuda.manual_seed(state)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
