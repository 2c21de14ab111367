"""Processes that end with the one that started them, whatever ended it; all ended at once; that keep freed memory."""

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

PATIENCE = 2.0  # seconds in which those that clean up after others may end


@functools.cache
def end_with_parent() -> None:
    """End this process within about a second after its parent has ended, even by ``kill -9``; asked again, nothing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ends with its parent").start()


def end_children(pid: int | None = None) -> None:
    """End every process below ``pid`` (below this one without it), also those in sessions of their own, as kernels."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
        for patience in (PATIENCE, 0.0):
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # A kernel that is asked first complains on its way out. joblib's trackers remove what the others
                    # leave in shared memory, and end by themselves then.
                    if not patience or not any("resource_tracker" in part for part in process.cmdline()):
                        process.kill()
            _, below = psutil.wait_procs(below, timeout=patience)


@contextlib.contextmanager
def interruptible():
    """SIGINT and SIGTERM end all that was started, and raise KeyboardInterrupt: also where a shell ignores SIGINT."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number, frame):
    end_children()  # now: asked politely, as nbclient would, a kernel that trains takes seconds
    raise KeyboardInterrupt


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to 256 MB, where the environment asks it to give it back at once.

    Dask's nanny does ($MALLOC_TRIM_THRESHOLD_, 64 kB): each step of a training would then wait for the system to hand
    out the same pages again, and two workers on a machine would wait for each other.
    """
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt is not None:
            mallopt(-1, 2**28)  # M_TRIM_THRESHOLD
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its most
