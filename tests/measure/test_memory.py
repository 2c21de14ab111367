import functools
import gc
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import Dataset, Net, Problem, problems
from helpers.engine import stack
from helpers.engine.micro import exhausted
from helpers.engine.training import Training
from helpers.measure import memory

SCALAR = 4  # cross-entropy keeps the total weight of the examples, a number


def digits(model, **options):
    return problems.named("digits", model, device="cpu", **options)


def saved_by_a_forward_pass(name, batch, replicas=1, **options):
    net = stack.build(digits(name, **options), range(replicas))
    x, y = torch.rand(batch, 1, 8, 8), torch.zeros(batch, dtype=torch.int64)
    x, y = x.repeat(replicas, 1, 1, 1, 1), y.repeat(replicas, 1)
    with memory.Saved(without=[*net.parameters.values(), *net.buffers(), x, y]) as saved:
        loss = F.cross_entropy(net.kernel(x).flatten(0, 1), y.flatten())
    assert loss.requires_grad
    return saved.now


# Saved bytes, counted


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize(("name", "hidden"), [("brownlee_mlp", [50]), ("keskar_mlp", [512] * 5)])
def test_a_perceptron_keeps_the_output_of_each_relu_and_the_log_probabilities(name, hidden, batch, replicas):
    expected = 4 * replicas * batch * (sum(hidden) + 10) + SCALAR
    assert saved_by_a_forward_pass(name, batch, replicas) == expected


def test_a_cnn_keeps_each_relu_each_pooling_and_where_its_maxima_were():
    relus, pooled = 16 * 64 + 32 * 16, 16 * 16 + 32 * 4
    assert saved_by_a_forward_pass("plain_cnn", 5) == 5 * (4 * (relus + pooled + 10) + 8 * pooled) + SCALAR


def test_group_normalisation_keeps_its_input_and_two_numbers_a_group():
    plain, normalised = (saved_by_a_forward_pass("small_mlp", 6, norm=norm) for norm in ("none", "group"))
    assert normalised - plain == 6 * 4 * (128 + 2 * 8)


def test_a_step_keeps_its_minibatch_too_and_lets_go_of_all():
    training = Training(digits("small_mlp"), batch_size=30, closed_form=False)
    with memory.Saved(without=training.stack.parameters.values()) as saved:
        training.advance(steps=3, record=False)
    assert saved.peak == 30 * (4 * (64 + 128 + 10) + 8) + SCALAR  # inputs and targets: float32 and int64
    assert saved.now == 0


@pytest.mark.parametrize("batch_size", [24, 240, 245])
def test_accumulation_keeps_one_micro_batch_at_a_time(batch_size):
    training = Training(digits("small_mlp"), batch_size=batch_size, micro_batch_size=24, closed_form=False)
    with memory.Saved(without=training.stack.parameters.values()) as saved:
        training.step()
    assert saved.peak == 24 * (4 * (64 + 128 + 10) + 8) + SCALAR


def test_a_storage_is_counted_once_and_whole():
    x = torch.rand(100, requires_grad=True)
    with memory.Saved() as saved:
        square = x * x  # keeps x twice
        part = (x[:10] * 2.0).exp()  # and its own result
        assert saved.now == 400 + 40
        view = square[:5].square()  # a view keeps the whole
        assert saved.now == 400 + 40 + 400
        del view
        gc.collect()
        assert saved.now == 400 + 40
        del square, part
        assert (saved.now, saved.peak) == (0, 840)


def test_a_cnn_in_onednns_layout_is_refused_with_the_way_out():
    with memory.Saved(), pytest.raises(ValueError, match="train with closed_form=False"):
        Training(digits("plain_cnn"), batch_size=30).step()


def test_counting_changes_no_gradient():
    one, other = (Training(digits("plain_cnn", norm="batch"), batch_size=30) for _ in range(2))
    with memory.Saved(without=one.stack.parameters.values()):
        one.advance(steps=3, record=False)
    other.advance(steps=3, record=False)
    assert all(torch.equal(w, other.weights()[name]) for name, w in one.weights().items())


def test_a_limit_refuses_what_would_exceed_it_and_nothing_else():
    x = torch.rand(100, requires_grad=True)
    with memory.Saved(limit=400) as saved:
        kept = x.square()
        with pytest.raises(
            torch.OutOfMemoryError, match=r"400 bytes are kept .* 40 more are asked for, and the limit is 400"
        ):
            x[:10].exp()
        assert (saved.now, saved.peak) == (400, 400)
        del kept
        assert x[:10].exp().sum().requires_grad
    assert x.exp().exp().exp().requires_grad  # outside, nothing is refused


# The device's peak


def allocate(megabytes):
    return torch.ones(megabytes * 250_000)


def in_turn():
    for _ in range(5):
        allocate(40)


def together():
    return [allocate(40) for _ in range(3)]


def nothing():
    pass


class Growing:
    """Allocates 100 MB once and for all, and 30 MB at each call."""

    kept = None

    def __call__(self):
        self.kept = allocate(100) if self.kept is None else self.kept
        allocate(30)


@pytest.mark.slow
def test_the_peak_of_the_resident_set_is_what_was_in_use_at_once_whatever_ran_before():
    functions = [nothing, in_turn, together, in_turn, Growing(), nothing]
    for found, expected in zip(memory.peaks(functions), [0, 40e6, 120e6, 40e6, 30e6, 0]):
        assert found == pytest.approx(expected, abs=3e6)


@pytest.mark.slow
def test_where_the_system_cannot_reset_its_peak_a_fresh_process_has_it():
    # Linux, where this is not used, starts a process's highest at its parent's: so from a small parent, and more.
    code = """if __name__ == "__main__":
        import torch
        from helpers.measure import memory
        fresh = memory._process.__wrapped__(1)
        sent = memory.packed(lambda: torch.ones(250_000_000).sum())
        print(fresh.submit(memory._resident_peak, sent, False).result())
        fresh.shutdown()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) == pytest.approx(1_000e6, rel=0.05)


@pytest.mark.slow
def test_the_step_of_a_net_of_ones_own_is_measured():
    class Own(torch.nn.Linear):
        pass

    data = Dataset.of(torch.rand(4_000, 1_000), torch.arange(4_000) % 5, device="cpu")
    problem = Problem(data, Net(lambda: torch.nn.Sequential(Own(1_000, 500), torch.nn.Tanh(), Own(500, 5))))
    small, large = memory.peaks([Training(problem, batch_size=b).step for b in (1_000, 4_000)])
    per_example = 4 * (1_000 + 500)  # its inputs, and what tanh returns, at least
    assert 3_000 * per_example * 0.9 < large - small < 3_000 * per_example * 4


@pytest.mark.slow
def test_the_largest_batch_of_a_budget_is_predicted():
    problem, batches = digits("plain_cnn"), (200, 400, 800)
    line = memory.fit_line(batches, memory.peaks([Training(problem, batch_size=b).step for b in batches]))
    found = memory.largest_batch(problem, line(600), batches, optimizer="adam")
    assert found == pytest.approx(600, rel=0.15)


def test_the_peak_of_a_step_is_at_least_what_it_saves_and_flat_in_the_accumulation_steps():
    own = {"micro_batch_size": 300, "closed_form": False}
    steps = [Training(digits("plain_cnn"), batch_size=b, **own) for b in (300, 600)]
    with memory.Saved(without=steps[0].stack.parameters.values()) as saved:
        steps[0].branch().step()
    one, two = memory.peaks([training.step for training in steps])
    assert saved.peak < one < 3 * saved.peak
    assert two == pytest.approx(one, rel=0.1)


def test_an_error_of_the_function_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        memory.peaks([functools.partial(divmod, 1, 0)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_cuda_device_is_its_allocators():
    held = torch.ones(1_000_000, device="cuda")
    assert memory.peaks([lambda: held * 2 + 1], "cuda") == [pytest.approx(8_000_000, abs=4096)]


# The line


def test_a_line_is_recovered_and_predicts_the_largest_batch():
    batches = [8, 16, 64]
    line = memory.fit_line(batches, [1000 + 250 * b for b in batches])
    assert (line.fixed, line.per_example) == (pytest.approx(1000), pytest.approx(250))
    assert line.residual < 1e-12
    assert line(100) == pytest.approx(26_000)
    for budget, largest in ((26_100, 100), (26_249, 100), (26_251, 101), (1_251, 1)):
        assert line.largest_batch(budget) == largest


def test_the_residual_is_the_largest_relative_one_of_least_squares():
    batches, measured = np.array([1.0, 2.0, 3.0, 5.0]), np.array([3.0, 4.0, 8.0, 9.0])
    design = np.stack([np.ones(4), batches], axis=1)
    fixed, slope = np.linalg.solve(design.T @ design, design.T @ measured)
    line = memory.fit_line(batches, measured)
    assert (line.fixed, line.per_example) == (pytest.approx(fixed), pytest.approx(slope))
    assert line.residual == pytest.approx(np.max(np.abs(fixed + slope * batches - measured) / measured))


def test_saved_bytes_are_a_straight_line_and_the_largest_batch_is_the_largest():
    def step(batch, limit=np.inf):
        training = Training(digits("plain_cnn"), batch_size=batch, closed_form=False)
        with memory.Saved(without=training.stack.parameters.values(), limit=limit) as saved:
            training.step()
        return saved.peak

    line = memory.fit_line([8, 16, 32], [step(b) for b in (8, 16, 32)])
    assert line.residual < 1e-9
    largest = line.largest_batch(3_000_000)
    assert step(largest, 3_000_000) <= 3_000_000
    with pytest.warns(UserWarning, match=f"{largest + 1} examples at once do not fit"):
        step(largest + 1, 3_000_000)


def test_a_line_through_one_batch_is_refused():
    with pytest.raises(ValueError, match="at least two different ones"):
        memory.fit_line([8, 8], [1, 2])


def test_a_budget_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match=r"one example takes 1,250 bytes; a budget of 1,249 holds none"):
        memory.Line(1000, 250, 0).largest_batch(1249)
    with pytest.raises(ValueError, match="do not grow"):
        memory.Line(1000, 0, 0).largest_batch(5000)


# When memory does not suffice


def test_a_real_failure_of_the_cpus_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exhausted(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("batch_size is 0"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, expected):
    assert exhausted(error) is expected


FAULTS = """
import resource, sys, torch
from helpers.engine import kernels
from helpers.sweep import processes
if sys.argv[1] == "kept":
    processes.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1_000_000), torch.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_what_a_step_frees_the_next_one_has_without_asking_the_system():
    def faults(what: str, **environment: str) -> int:
        own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
        found = subprocess.run(
            [sys.executable, "-c", FAULTS, what], env=own, capture_output=True, text=True, check=True
        )
        return int(found.stdout)

    asked = faults("as it is", MALLOC_TRIM_THRESHOLD_="65536")  # as Dask's nanny asks
    assert asked > 2_000
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="65536") < asked / 10
    assert faults("as it is") < asked / 10
