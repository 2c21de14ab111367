"""A Dask cluster, by its scheduler's address: the same jobs on other machines. Needs the extra ``cluster``."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable

import joblib

from helpers.problems import builtin, pick_device

PATIENCE = 10.0  # seconds within which the scheduler must answer, and a first worker be there


class ClusterError(RuntimeError):
    """A cluster that cannot be used; the message says what was found and the way out."""


def address() -> str | None:
    """The scheduler's address that ``companion run --cluster`` gives its kernels."""
    return os.environ.get("COMPANION_CLUSTER")


@functools.cache
def connect(address: str):
    """The client of a scheduler; raises ClusterError where none answers, or its workers cannot do our jobs."""
    try:
        import distributed  # here: it takes as long as pandas, and only a cluster needs it
    except ModuleNotFoundError:
        raise ClusterError("a cluster needs Dask: pip install -c constraints.txt -e '.[cluster]'") from None
    if not re.fullmatch(r"((tcp|tls|ws|wss|ucx)://)?[^\s/]+:\d{1,5}", address):
        raise ClusterError(f"{address!r} is not a scheduler's address; expected tcp://host:8786 or the like")
    start = f"dask worker {address} --nworkers auto --nthreads 1"
    try:
        client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClusterError(f"no Dask scheduler answers at {address!r} ({reason}); start one: dask scheduler") from None
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        client.close()
        raise ClusterError(f"the scheduler at {address} has no workers; start one: {start}") from None
    threads = {w["nthreads"] for w in client.scheduler_info(n_workers=-1)["workers"].values()}
    if threads != {1}:
        client.close()
        raise ClusterError(f"workers with {sorted(threads)} threads; a job wants a process of its own: {start}")
    return client


@functools.cache
def device_type(address: str) -> str:
    """The kind of device that the workers have; raises ClusterError where they differ, as their results would."""
    kinds = set(connect(address).run(lambda: pick_device().type).values())
    if len(kinds) > 1:
        raise ClusterError(f"the workers at {address} have different devices: {', '.join(sorted(kinds))}; use one kind")
    return kinds.pop()


def backend(address: str, datasets: Iterable[str]):
    """The context in which joblib runs its calls on the cluster; each worker, one that joins too, gets the datasets."""
    for name in sorted(set(datasets) - {""}):
        _provide(address, name)
    return joblib.parallel_config("dask", client=connect(address))


@functools.cache
def _provide(address: str, name: str) -> None:
    import distributed

    class Provide(distributed.WorkerPlugin):
        def setup(self, worker) -> None:
            builtin.put_files(name, files)

    files = builtin.files_of(name)
    if files:  # by name: another runner's call replaces this plugin, and the scheduler keeps the files once
        connect(address).register_plugin(Provide(), name=f"companion-{name}")
