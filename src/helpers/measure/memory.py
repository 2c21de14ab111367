"""Memory: bytes that autograd keeps for the backward pass, a device's peak, and the line from batch to bytes.

Fitted to a few small batches, the line predicts the largest batch that fits before it is tried.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import torch
from joblib.externals.loky import ProcessPoolExecutor

from helpers.engine.training import Training
from helpers.problems import Problem
from helpers.problems.sending import packed


class _Kept:
    """A saved tensor that tells ``Saved`` when autograd lets go of it."""

    def __init__(self, saved: Saved, tensor: torch.Tensor, address: int):
        self.saved, self.tensor, self.address = saved, tensor, address

    def __del__(self):
        self.saved._release(self)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes that autograd keeps for the backward pass: exactly, each storage once.

    without: tensors that are not counted, such as the parameters.
    limit: bytes beyond which it raises ``torch.OutOfMemoryError``, as a full device does.
    ``now`` and ``peak`` are in bytes. Built-in nets keep nothing that it can count unless trained with
    ``closed_form=False``.
    """

    def __init__(self, without: Iterable[torch.Tensor] = (), limit: float = math.inf):
        self.now = self.peak = 0
        self.limit = limit
        self._without = [t.untyped_storage() for t in without]  # held, so that their addresses stay theirs
        self._excluded = {storage.data_ptr() for storage in self._without}
        self._kept: Counter[int] = Counter()
        super().__init__(self._pack, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept)

    def __enter__(self) -> Saved:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> object:
        if tensor.is_mkldnn:
            raise ValueError("tensors in oneDNN's layout cannot be counted; train with closed_form=False")
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._excluded:
            return tensor
        if not self._kept[address]:
            if self.now + storage.nbytes() > self.limit:
                raise torch.OutOfMemoryError(
                    f"out of memory: {self.now:,} bytes are kept for the backward pass, {storage.nbytes():,} more are "
                    f"asked for, and the limit is {int(self.limit):,}"
                )
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._kept[address] += 1
        return _Kept(self, tensor.detach(), address)

    def _release(self, kept: _Kept) -> None:
        self._kept[kept.address] -= 1
        if not self._kept[kept.address]:
            self.now -= kept.tensor.untyped_storage().nbytes()


def peaks(functions: Iterable[Callable[[], object]], device: torch.device | str = "cpu") -> list[int]:
    """For each function, the most bytes that it takes on the device beyond those in use before it.

    functions: called twice each, so that one-off allocations of the first call do not count. Off CUDA they go to a
        process of their own, as a ``training.step`` can, of a problem defined anywhere.
    device: on CUDA, the allocator's count; elsewhere the process's resident set. Linux can reset its highest value;
        other systems cannot, so there every function gets a fresh process, and one-off allocations count.
    """
    if torch.device(device).type == "cuda":
        return [_cuda_peak(function, device) for function in functions]
    resets = sys.platform == "linux"
    process = _process if resets else _process.__wrapped__
    try:
        calls = ((process(torch.get_num_threads()), packed(function)) for function in functions)
        return [started.submit(_resident_peak, function, resets).result() for started, function in calls]
    except BrokenExecutor:
        _process.cache_clear()
        raise


@functools.cache
def _process(threads: int) -> ProcessPoolExecutor:
    """A process of its own, kept for a minute because starting one takes seconds.

    In it the C library (glibc) returns large blocks when they are freed. It would otherwise keep some, and the peak
    would depend on earlier calls.
    """
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    return ProcessPoolExecutor(max_workers=1, env=env, timeout=60)


def _cuda_peak(function: Callable[[], object], device: torch.device | str) -> int:
    function()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(sent: bytes, resets: bool) -> int:
    function, process = cloudpickle.loads(sent), psutil.Process()
    if resets:
        function()
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest resident set so far
    before = process.memory_info().rss
    function()
    if resets:
        highest = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024 * int(highest[1]) - before
    if sys.platform == "win32":
        return process.memory_info().peak_wset - before
    import resource

    kilobytes = 1024 if sys.platform == "linux" else 1  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes - before


def largest_batch(problem: Problem, budget: float, batches: Sequence[int] = (16, 32, 64), **settings: object) -> int:
    """Predict the largest batch size whose training step takes at most ``budget`` bytes, from a few small batches.

    settings: of ``Training``, such as the optimizer. Raises ValueError where not even one example fits.
    """
    steps = [Training(problem, batch_size=batch, **settings).step for batch in batches]
    return fit_line(batches, peaks(steps, problem.dataset.device)).largest_batch(budget)


@dataclass(frozen=True)
class Line:
    """``bytes = fixed + per_example · batch``; ``residual`` is the largest relative deviation of a fitted point."""

    fixed: float
    per_example: float
    residual: float

    def __call__(self, batch: float) -> float:
        return self.fixed + self.per_example * batch

    def largest_batch(self, budget: float) -> int:
        """The most examples whose bytes are within ``budget``. Raises ValueError where not even one fits."""
        if self.per_example <= 0:
            raise ValueError(
                f"the bytes do not grow with the batch ({self.per_example:.3g} an example): fit larger ones"
            )
        if self(1) > budget:
            raise ValueError(f"one example takes {self(1):,.0f} bytes; a budget of {budget:,.0f} holds none")
        return math.floor((budget - self.fixed) / self.per_example)


def fit_line(batches: Sequence[float], measured: Sequence[float]) -> Line:
    """The least-squares line of bytes against batch size. Raises ValueError for fewer than two different batches."""
    if len(set(batches)) < 2:
        raise ValueError(f"batches are {list(batches)}; a line needs at least two different ones")
    slope, fixed = np.polyfit(np.asarray(batches, dtype=float), np.asarray(measured, dtype=float), 1)
    residual = max(abs(fixed + slope * b - m) / max(m, 1) for b, m in zip(batches, measured))
    return Line(float(fixed), float(slope), float(residual))
