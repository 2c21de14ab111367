"""The hand-written fast paths against the ordinary modules of ``nets``, and against explicit float64 loops."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import mlp_activations, one_replica

from helpers import Dataset, Net, Problem
from helpers.engine import kernels, stack
from helpers.problems import LOSSES, nets

NETS = {**nets.NETS, "deep": functools.partial(nets.MLP, hidden=(200, 100, 30), initialise=nets.xavier_normal)}


def build(name, input_shape, num_classes, seeds, **options):
    """The stack of a built-in net's replicas, one a seed."""
    data = Dataset.of(torch.zeros(num_classes, *input_shape), torch.arange(num_classes), device="cpu")
    factory = functools.partial(NETS[name], input_shape, num_classes, **options)
    return stack.build(Problem(data, Net(factory)), seeds)


def perceptron(replicas, hidden):
    """A stacked perceptron of inputs (2, 60) and 4 classes, every weight drawn anew, biases included."""
    net = kernels.MLP(replicas, nets.MLP((2, 60), 4, hidden, nets.xavier_normal))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=(p[0].numel() / p.shape[1]) ** -0.5, generator=generator)
    return net


def perturbed(kernel):
    """In float64, with every parameter and running statistic moved off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in (*kernel.double().parameters(), *kernel.buffers()):
            t.add_(0.3 * torch.rand(t.shape, generator=generator, dtype=torch.float64))
    return kernel


def module_of(s, replica):
    """The ordinary module with one replica's weights and running statistics."""
    module = s.problem.net.module(0).double()
    module.load_state_dict({name: value[replica] for name, value in s.kernel.state_dict().items()})
    return module


def random_inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2"])
def capability(request, monkeypatch):
    """Both kinds of CPU, which multiply by libraries of their own."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if request.param else "AVX2")
    kernels._onednn.cache_clear()
    yield
    kernels._onednn.cache_clear()


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "given", "out"), [(1, 300, 400), (3, 5, 400), (40, 300, 257), (9, 7, 3), (1024, 40, 784)]
)
def test_a_product_is_the_sum_of_products_whoever_multiplies(rows, given, out, dtype):
    x, weight, bias = random_inputs(rows, given), random_inputs(out, given) + 1, random_inputs(out)
    expected = x.double().numpy() @ weight.double().numpy().T
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    for a, w in ((x, weight), (x.t().contiguous().t(), weight.t().contiguous().t())):  # by rows, by columns
        found = kernels.product(a, w)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(kernels.product(a, w, bias), expected + bias.double().numpy(), rtol=1e-5, atol=1e-4)


# Forward passes


SHAPES = [("brownlee_mlp", (3,)), ("plain_cnn", (2, 8, 8)), ("deep", (3,))]
NORMS = [
    {}, {"norm": "group"}, {"norm": "batch"},
    *({"norm": "batch", "norm_batch_size": size} for size in (99, 6, 4, 2)),
]  # fmt: skip


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(map(str, o.values())) or "none")
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(("name", "input_shape"), SHAPES)
def test_a_stack_gives_each_replica_the_outputs_of_its_ordinary_module(name, input_shape, replicas, options):
    s = build(name, input_shape, 4, range(replicas), **options)
    perturbed(s.kernel)
    modules = [module_of(s, replica) for replica in range(replicas)]
    x = random_inputs(replicas, 17, *input_shape).double()
    for train in (True, False):
        logits = s.kernel.train(train)(x)
        for replica, module in enumerate(modules):
            expected = module.train(train)(x[replica])
            torch.testing.assert_close(logits[replica], expected, rtol=1e-10, atol=1e-10)
            for k, b in module.named_buffers():
                torch.testing.assert_close(s.kernel.get_buffer(k)[replica], b, rtol=1e-12, atol=1e-12)


def test_a_single_example_without_positions_has_no_batch_statistics():
    kernel = perturbed(build("brownlee_mlp", (3,), 4, [0, 1], norm="batch").kernel)
    x, buffers = random_inputs(2, 1, 3).double(), {k: b.clone() for k, b in kernel.named_buffers()}
    assert torch.equal(kernel.train()(x), kernel.eval()(x))
    assert all(torch.equal(b, buffers[k]) for k, b in kernel.named_buffers())


@pytest.mark.parametrize(("name", "input_shape"), SHAPES)
def test_initial_weights_are_the_modules_of_the_seeds(name, input_shape):
    s = build(name, input_shape, 10, [3, 1, 0])
    for replica, seed in enumerate([3, 1, 0]):
        for k, p in s.problem.net.module(seed).named_parameters():
            assert torch.equal(s.parameters[k][replica], p), k


@pytest.mark.parametrize("hidden", [[50], [20, 30], [300, 200]])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_stacked_perceptron_equals_an_explicit_loop(hidden, replicas):
    kernel = perceptron(replicas, hidden)
    assert kernel.multiply_adds == sum(p[0].numel() for p in kernel.parameters())
    x = random_inputs(replicas, 5, 2, 60)
    logits = kernel(x).detach().numpy()
    for replica in range(replicas):
        mine = one_replica({k: p.detach() for k, p in kernel.named_parameters()}, replica)
        expected = [mlp_activations(mine, example)[-1] for example in x[replica].double().numpy()]
        np.testing.assert_allclose(logits[replica], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", NORMS[:4], ids=lambda o: "-".join(map(str, o.values())) or "none")
@pytest.mark.parametrize(("name", "input_shape"), SHAPES)
def test_replicas_do_not_mix(name, input_shape, options):
    kernel, twin = (perturbed(build(name, input_shape, 4, [0, 1, 2], **options).kernel) for _ in range(2))
    x = random_inputs(3, 7, *input_shape).double()
    changed = x.clone()
    changed[1].square_()
    with torch.no_grad():
        next(twin.parameters())[1] += 1.0
    before, after = kernel(x).detach(), twin(changed).detach()
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
    for b, c in zip(kernel.buffers(), twin.buffers()):
        assert torch.equal(b[[0, 2]], c[[0, 2]])
        assert not torch.equal(b[1], c[1])


# Gradients


@pytest.mark.parametrize("options", NORMS[:4], ids=lambda o: "-".join(map(str, o.values())) or "none")
@pytest.mark.parametrize(("name", "input_shape"), SHAPES)
def test_the_gradient_of_the_summed_losses_is_each_ordinary_modules(name, input_shape, options):
    s = build(name, input_shape, 4, [0, 1], **options)
    perturbed(s.kernel)
    modules = [module_of(s, replica) for replica in range(2)]
    x, y = random_inputs(2, 12, *input_shape).double(), torch.arange(24).view(2, 12) % 4
    s.train().losses(x, y, shared=False).mean(1).sum().backward()
    for replica, module in enumerate(modules):
        F.cross_entropy(module.train()(x[replica]), y[replica]).backward()
        for k, p in module.named_parameters():
            torch.testing.assert_close(s.parameters[k].grad[replica], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", [[50], [20, 30], [300, 200]])
@pytest.mark.parametrize("examples", [1, 4, 5, 15, 16, 33])  # a CPU adds few examples to large weights in other ways
def test_backpropagation_by_hand_equals_autograd_in_float64(hidden, examples, loss):
    model, loss = perceptron(3, hidden), LOSSES[loss]
    x, targets = random_inputs(3, examples, 2, 60), torch.arange(3 * examples).view(3, examples) % 4
    twin = copy.deepcopy(model).double()
    expected_losses = kernels.example_losses(twin(x.double()), targets, loss).mean(1)
    expected_losses.sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, factors = model.backpropagate(x, targets, loss)
    torch.testing.assert_close(losses.double(), expected_losses.detach(), rtol=1e-5, atol=1e-5)
    names = ["head", *(f"layers.{i}" for i in reversed(range(len(hidden))))]
    assert [(each.replica, each.layer) for each in factors] == [(r, name) for r in range(3) for name in names]
    found = {name: torch.ones_like(p) for name, p in before.items()}
    for each in factors:
        each.add_to(found, alpha=-0.5)
    for name, p in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), before[name])  # nothing moves by itself
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[name].double(), 1 - 0.5 * p.grad, rtol=1e-5, atol=1e-5 * scale + 1e-6)


@pytest.mark.parametrize("input_shape", [(1, 28, 28), (2, 9, 15)])
@pytest.mark.parametrize("examples", [1, 2, 33])  # a single one is not put into oneDNN's layout
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_cnn_in_float32_gives_the_losses_and_gradients_of_its_ordinary_modules(input_shape, examples, replicas):
    s = build("plain_cnn", input_shape, 4, range(replicas))
    for p in s.parameters.values():
        p.data.add_(0.03 * random_inputs(*p.shape))  # biases too
    modules = [module_of(s, replica) for replica in range(replicas)]
    x, y = random_inputs(replicas, examples, *input_shape), torch.arange(replicas * examples).view(replicas, -1) % 4
    with torch.no_grad():
        logits = s.kernel(x)
    losses = s.backward(x, y)
    s.backward(x, y, share=0.5)  # on top, as a second micro-batch
    for replica, module in enumerate(modules):
        expected = module(x[replica].double())
        torch.testing.assert_close(logits[replica].double(), expected, rtol=1e-4, atol=1e-4)
        loss = F.cross_entropy(expected, y[replica])
        torch.testing.assert_close(losses[replica].double(), loss.detach(), rtol=1e-5, atol=1e-5)
        loss.backward()
        for k, p in module.named_parameters():
            found, scale = s.parameters[k].grad[replica].double(), p.grad.abs().max().item()
            torch.testing.assert_close(found, 1.5 * p.grad, rtol=1e-4, atol=1e-5 * scale)


def test_a_cnn_whose_sums_overflow_says_nan_as_its_ordinary_module_does():
    s = build("plain_cnn", (1, 8, 8), 4, [0])
    for name in ("layers.0.weight", "layers.1.weight"):
        s.parameters[name].data.mul_(1e20)
    x = random_inputs(5, 1, 8, 8)
    for logits in (
        module_of(s, 0).float()(x),
        s.outputs(x),
        s.kernel.differentiable_once(x[None]),
        torch.no_grad()(s.outputs)(x),
    ):
        assert logits.isnan().all()


def test_only_a_perceptron_without_normalisation_has_a_closed_form():
    for name, norm in itertools.product(nets.NETS, nets.NORMS):
        s = build(name, (1, 8, 8), 10, [0], norm=norm)
        assert s.closed_form == (type(s.problem.net.module(0)) is nets.MLP and norm == "none")


def test_a_fast_path_is_of_the_very_class_with_a_built_in_loss_on_data_in_memory():
    class Mine(nets.MLP):
        pass

    data = Dataset.of(torch.zeros(4, 3), torch.arange(4), device="cpu")
    mapped = Dataset.of_map([(torch.zeros(3), i) for i in range(4)], device="cpu")
    net = Net(functools.partial(nets.NETS["small_mlp"], (3,), 4))
    mine = Net(functools.partial(Mine, (3,), 4, hidden=(5,), initialise=nets.xavier_normal))
    assert stack.build(Problem(data, net), [0]).kernel is not None
    others = [Problem(data, mine), Problem(mapped, net), Problem(data, net, torch.nn.CrossEntropyLoss())]
    assert all(stack.build(problem, [0]).kernel is None for problem in others)


# State


def test_a_state_brings_back_the_running_statistics():
    s, other = (build("brownlee_mlp", (3,), 4, [0, 1], norm="batch") for _ in range(2))
    perturbed(s.kernel), perturbed(other.kernel)
    x = random_inputs(2, 6, 3).double()
    kept = {k: t.clone() for k, t in s.state().items()}
    s.train().kernel(x)
    assert not torch.equal(s.eval().kernel(x), other.eval().kernel(x))
    assert torch.equal(s.load(kept).eval().kernel(x), other.eval().kernel(x))


def test_weights_of_another_net_are_refused_by_name():
    s = build("small_mlp", (1, 8, 8), 10, [0], norm="batch")
    with pytest.raises(ValueError, match=r"of another model: norms\.0\.bias.*; give the problem they were trained on"):
        build("small_mlp", (1, 8, 8), 10, [0]).load(s.state())


@pytest.mark.parametrize("loss", LOSSES)
def test_example_losses_are_each_replicas(loss):
    logits, targets = random_inputs(2, 5, 3).double(), torch.tensor([[0, 2, 1, 1, 0], [2, 2, 0, 1, 2]])
    problem = Problem(Dataset.of(torch.zeros(3, 2), torch.arange(3)), Net(torch.nn.Identity), LOSSES[loss])
    found = kernels.example_losses(logits, targets, LOSSES[loss])
    for replica in range(2):
        torch.testing.assert_close(found[replica], problem.example_losses(logits[replica], targets[replica]))
