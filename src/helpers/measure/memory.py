"""Memory: what autograd keeps for the backward pass, counted; a device's peak, measured; the line from batch to bytes.

Fitted to a few small batches, the line says which is the largest that fits before it is tried.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from joblib.externals.loky import ProcessPoolExecutor


class _Kept:
    """A saved tensor; ``Saved`` hears when autograd lets go of it."""

    def __init__(self, saved: Saved, tensor: torch.Tensor, address: int):
        self.saved, self.tensor, self.address = saved, tensor, address

    def __del__(self):
        self.saved._release(self)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes that autograd keeps for the backward pass: exactly, a storage once.

    ``without``: tensors that are not counted, such as the parameters. ``now`` and ``peak`` are in bytes. With a
    ``limit`` it refuses more, as a full device does: by ``torch.OutOfMemoryError``. ``Saved.entered`` is how many are.
    """

    entered = 0

    def __init__(self, without: Iterable[torch.Tensor] = (), limit: float = math.inf):
        self.now = self.peak = 0
        self.limit = limit
        self._without = [t.untyped_storage() for t in without]  # held, so that their addresses stay theirs
        self._excluded = {storage.data_ptr() for storage in self._without}
        self._kept: Counter[int] = Counter()
        super().__init__(self._pack, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept)

    def __enter__(self) -> Saved:
        super().__enter__()
        Saved.entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        Saved.entered -= 1
        super().__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> object:
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
    """For each function, the most bytes that it takes on the device beyond what was in use before it.

    On CUDA the allocator's own count. Elsewhere the resident set of a process of its own: Linux keeps its highest, on
    other systems it is read every half millisecond. In that process the C library (glibc) gives large blocks back when
    they are freed, where otherwise it keeps some, and the peak would hang on what ran before. Each function is called
    twice: what is allocated once and for all, by the first call, is not counted. It goes there by pickle, as a
    ``training.step`` can.
    """
    if torch.device(device).type == "cuda":
        return [_cuda_peak(function, device) for function in functions]
    try:
        return list(_process(torch.get_num_threads()).map(_resident_peak, functions))
    except BrokenExecutor:
        _process.cache_clear()
        raise


@functools.cache
def _process(threads: int) -> ProcessPoolExecutor:
    """A process of its own, kept for a minute: starting one takes seconds."""
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


def _resident_peak(function: Callable[[], object]) -> int:
    function()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest resident set so far
    except OSError:
        return _watched_peak(function)
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of Linux's on this process, in bytes."""
    kilobytes = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes[1])


def _watched_peak(function: Callable[[], object]) -> int:
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch():
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return highest - before


@dataclass(frozen=True)
class Line:
    """``bytes = fixed + per_example · batch``; ``residual`` is the largest relative one of the points fitted."""

    fixed: float
    per_example: float
    residual: float

    def __call__(self, batch: float) -> float:
        return self.fixed + self.per_example * batch

    def largest_batch(self, budget: float) -> int:
        """The most examples whose bytes are within ``budget``. Raises ValueError where not even one is."""
        if self.per_example <= 0:
            raise ValueError(
                f"the bytes do not grow with the batch ({self.per_example:.3g} an example): fit larger ones"
            )
        if self(1) > budget:
            raise ValueError(f"one example takes {self(1):,.0f} bytes; a budget of {budget:,.0f} holds none")
        return math.floor((budget - self.fixed) / self.per_example)


def fit_line(batches: Sequence[float], measured: Sequence[float]) -> Line:
    """The least-squares line of bytes in the batch; ValueError for fewer than two different batches."""
    if len(set(batches)) < 2:
        raise ValueError(f"batches are {list(batches)}; a line needs at least two different ones")
    slope, fixed = np.polyfit(np.asarray(batches, dtype=float), np.asarray(measured, dtype=float), 1)
    residual = max(abs(fixed + slope * b - m) / max(m, 1) for b, m in zip(batches, measured))
    return Line(float(fixed), float(slope), float(residual))


def exhausted(error: BaseException) -> bool:
    """Whether it says that memory did not suffice: by its class, or in the words of a CPU's or MPS's allocator."""
    # oneDNN, which convolves on a CPU, says no more than that it could not create what it wanted the memory for.
    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)
