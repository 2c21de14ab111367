"""Processes: child processes that end with their parent, ending all of them, and memory kept by the C library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time

import psutil

PATIENCE = 2.0  # seconds that processes which clean up after others have to end


@functools.cache
def end_with_parent() -> None:
    """End this process within about a second after its parent has ended, even by ``kill -9``."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ends with its parent").start()


def end_children(pid: int | None = None) -> None:
    """End all descendants of ``pid`` (by default of this process), also those in sessions of their own, as kernels."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
        for patience in (PATIENCE, 0.0):
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Killed, as a kernel that is terminated complains on its way out. joblib's trackers end by
                    # themselves once they have removed the others' shared memory.
                    if not patience or not any("resource_tracker" in part for part in process.cmdline()):
                        process.kill()
            _, below = psutil.wait_procs(below, timeout=patience)


interrupted = threading.Event()  # set from the first signal on: threads see why their processes ended


@contextlib.contextmanager
def interruptible():
    """SIGINT, SIGTERM and SIGHUP end all child processes and raise KeyboardInterrupt, even where SIGINT is ignored."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    interrupted.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number, frame):
    interrupted.set()
    end_children()  # now: a kernel that trains would take seconds to end when asked
    raise KeyboardInterrupt


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 256 MB of freed memory where the environment tells it to return it at once.

    Dask's nanny sets $MALLOC_TRIM_THRESHOLD_ to 64 kB: each training step would then wait for the system to hand out
    the same pages again, and two workers on a machine would wait for each other.
    """
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt is not None:
            mallopt(-1, 2**28)  # M_TRIM_THRESHOLD
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its most
