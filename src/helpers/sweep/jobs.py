"""Jobs: function calls whose results go into the store, run here, on worker processes, or on a cluster.

A job computes with one thread wherever it runs, so its result is the same to the bit whatever ``jobs`` is. Workers get
objects, so a problem defined in a notebook cell trains on every one. The store has one writer: the calling process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import joblib
import numpy as np
import pandas as pd
import threadpoolctl
import torch
from filelock import FileLock
from tqdm import tqdm

from helpers.engine.training import NUMERICS
from helpers.problems import pick_device
from helpers.problems.sending import packed
from helpers.sweep import cluster, processes
from helpers.sweep.settings import device_type
from helpers.sweep.store import Store, key_of

_LOOK_AGAIN = 0.5  # seconds between looks at what another process computes
_WORTH_WORKERS = 2e11  # multiply-adds: with less to do, starting processes takes longer than they save


@dataclass
class Job:
    """One function call whose results, one per content, go into the store.

    work: about how many multiply-adds it takes. wanted: arrays without which an entry does not count.
    """

    function: Callable[..., list[tuple[pd.DataFrame, dict[str, np.ndarray]]]]
    arguments: tuple
    contents: list[dict[str, object]]
    label: str
    dataset: str = ""  # a built-in one, whose files a cluster's worker may lack
    work: float = 0.0
    wanted: frozenset[str] = frozenset()
    torch_version: str = torch.__version__

    @property
    def keys(self) -> list[str]:
        return [key_of(content) for content in self.contents]


def wanted_processes(jobs: int | None) -> int:
    """Count the processes side by side: ``jobs``, else those of ``companion run --jobs``, else one a core."""
    asked = os.environ.get("COMPANION_JOBS") or "0"
    if os.path.isfile(asked):  # of ``companion run``, whose notebooks get more processes when fewer of them are left
        asked = Path(asked).read_text(encoding="utf-8")
    if not asked.isdigit():
        raise ValueError(f"$COMPANION_JOBS is {asked!r}; expected a whole number of processes")
    return jobs or int(asked) or (joblib.cpu_count() if device_type() == "cpu" else 1)


def execute(todo: list[Job], jobs: int | None, store: Store) -> None:
    """Run jobs, the longest first, each result into the store as it comes; await those that another process runs."""
    if not todo:
        return
    address = cluster.address()
    jobs = wanted_processes(jobs)
    workers = min(len(todo), jobs) if sum(job.work for job in todo) > _WORTH_WORKERS else 1
    todo = sorted(todo, key=lambda job: -job.work)
    about = {"torch": torch.__version__, "python": platform.python_version(), "device": device_type()}
    if address:
        backend = cluster.backend(address, {job.dataset for job in todo})
    else:  # arguments go through pipes, not as pickled files (max_nbytes)
        backend = joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1, max_nbytes=None)
    with tqdm(total=len(todo), unit="job", file=sys.stdout, mininterval=1.0, ncols=110) as bar, backend:
        while todo:
            done = _one_round(todo, store, about, bar, remote=bool(address) or workers > 1, all_at_once=bool(address))
            left = [job for i, job in enumerate(todo) if i not in done and not _is_done(job, store)]
            bar.update(len(todo) - len(done) - len(left))
            todo = left
            if todo:
                time.sleep(_LOOK_AGAIN)


def _one_round(
    todo: Sequence[Job], store: Store, about: dict, bar: tqdm, *, remote: bool, all_at_once: bool
) -> set[int]:
    """Run the jobs that no other process has claimed; returns their numbers."""
    claims: dict[int, list[FileLock]] = {}
    done = set()
    # A cluster takes all there is, for workers may join; elsewhere a job is claimed shortly before it is run.
    call = joblib.Parallel(return_as="generator_unordered", pre_dispatch="all" if all_at_once else "2*n_jobs")
    send = packed if remote else lambda job: job
    calls = (joblib.delayed(_one)(i, send(todo[i]), os.getpid()) for i in _claimed(todo, claims, store))
    try:
        for number, results in call(calls):
            for content, (frame, arrays) in zip(todo[number].contents, results):
                store.put(content, frame, arrays, about)
            for key, lock in zip(todo[number].keys, claims.pop(number)):
                store.settle(key, lock)
            done.add(number)
            bar.set_postfix_str(todo[number].label, refresh=False)
            bar.update()
    finally:
        for lock in itertools.chain(*claims.values()):
            lock.release()
    return done


def _claimed(todo: Sequence[Job], claims: dict[int, list[FileLock]], store: Store) -> Iterator[int]:
    """The numbers of the jobs that are neither done nor another process's, each claimed as it is asked for."""
    for number, job in enumerate(todo):
        locks = list(itertools.takewhile(bool, map(store.claim, job.keys)))  # None where another process has one
        done = _is_done(job, store)  # meanwhile, by another process
        if len(locks) == len(job.keys) and not done:
            claims[number] = locks
            yield number
            continue
        for key, lock in zip(job.keys, locks):
            store.settle(key, lock) if done else lock.release()


def _is_done(job: Job, store: Store) -> bool:
    return all(store.has(key, job.wanted) for key in job.keys)


def _one(number: int, sent: Job | bytes, runner: int):
    job: Job = cloudpickle.loads(sent) if isinstance(sent, bytes) else sent
    if os.getppid() == runner:  # a process of joblib's: killed with its runner, or it would compute on for nobody
        processes.end_with_parent()
    processes.keep_freed_memory()
    here = {"numerics": NUMERICS, "device": pick_device().type, "torch": torch.__version__}
    training = job.contents[0].get("of", job.contents[0])  # a measure's content holds that of the training
    expected = {"numerics": training["numerics"], "device": training["device"], "torch": job.torch_version}
    if here != expected:
        raise RuntimeError(f"this worker has {here}, where the runner expects {expected}; install the same on both")
    with _one_thread():
        return number, job.function(*job.arguments)


_thread_pools = functools.cache(threadpoolctl.ThreadpoolController)  # looks through the loaded libraries: once


@contextlib.contextmanager
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _thread_pools().limit(limits=1):  # numpy's, in the measures
            yield
    finally:
        torch.set_num_threads(before)
