"""A grid of settings × seeds → one tidy DataFrame. What the store has is not computed again.

The unit of work is a job: a stack of seeds of one setting. A job computes with one thread, wherever it runs, so its
result is the same to the bit whatever ``jobs`` is; joblib spreads jobs over the cores, or over the workers of the Dask
scheduler whose address is in ``$COMPANION_CLUSTER``. The store has one writer: the process that calls.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import numbers
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import joblib
import numpy as np
import pandas as pd
import threadpoolctl
import torch
from filelock import FileLock
from tqdm import tqdm

from helpers.engine import kernels as models
from helpers.engine.training import NUMERICS, Schedule, Training, check_batch_size, check_lr, check_optimizer
from helpers.measure import geometry, gradients, landscape, noise
from helpers.problems import data
from helpers.sweep import cluster, processes
from helpers.sweep.store import Store, key_of

DEFAULTS = {
    "dataset": "mnist", "num_train": None, "subset_seed": 0, "model": "shen_mlp",
    "batch_size": 64, "lr": 0.01, "optimizer": "sgd", "momentum": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0,
    "norm": "none", "norm_batch_size": None, "loss": "cross_entropy",
    "epochs": 30, "steps": None, "record_every": 1, "record_steps": (), "target": None,
}  # fmt: skip

_TARGETS = ("test_accuracy", "train_accuracy")

_OF_TRAINING = (
    "model", "batch_size", "lr", "optimizer", "momentum", "betas", "weight_decay", "norm", "norm_batch_size", "loss"
)  # fmt: skip

# (dataset, model's name, one replica's weights, seed=, **options) → a frame
PROTOCOLS = {
    "walk": gradients.walk, "frozen": gradients.frozen, "staleness": gradients.staleness,
    "spectrum": landscape.spectrum, "boxes": landscape.boxes, "noise": noise.scale, "minibatches": noise.minibatches,
}  # fmt: skip

_TRIALS_PER_JOB = 10
_LOOK_AGAIN = 0.5  # seconds between looks at what another process computes
_WORTH_WORKERS = 8.0  # estimated seconds: below, starting processes takes longer than they save


def grid(base: Mapping[str, object] | None = None, **values: object) -> list[dict[str, object]]:
    """Settings for each combination: a list is varied, anything else is set. ``base`` comes first."""
    fixed = {**(base or {}), **{k: v for k, v in values.items() if not isinstance(v, list)}}
    varied = {k: v for k, v in values.items() if isinstance(v, list)}
    return [{**fixed, **dict(zip(varied, combination))} for combination in itertools.product(*varied.values())]


def run(
    settings: Sequence[Mapping[str, object]] | Mapping[object, Mapping[str, object]],
    seeds: int | Iterable[int],
    *,
    snapshots: Iterable[int] = (),
    branch_at: int | None = None,
    jobs: int | None = None,
    store: Store | None = None,
) -> pd.DataFrame:
    """Train every setting with every seed; the history of all, with a column per setting.

    ``settings``: dicts over ``DEFAULTS`` (``grid`` makes them); as a mapping, its keys become a column ``label``. A run
    is ``epochs`` long and recorded ``record_every`` so many; or, where ``steps`` is given, it is that long and recorded
    at its beginning, its end and after each of ``record_steps``. ``target``, such as ``("test_accuracy", 0.9)``, ends a
    run of ``steps`` at the first record at or above it, and divergence ends it too. ``snapshots``: epochs whose
    weights the store keeps for ``measure`` and ``weights``. ``branch_at``: runs that are equal up to this epoch train
    up to it once. ``jobs``: processes side by side, by default one a core. Raises ValueError for settings that cannot
    be trained, before anything starts.
    """
    store, seeds = store or Store(), _seeds(seeds)
    labels = list(settings) if isinstance(settings, Mapping) else None
    complete = [_checked(s) for s in (settings.values() if isinstance(settings, Mapping) else settings)]
    snapshots = sorted(set(snapshots))
    if any(s["steps"] for s in complete) and (snapshots or branch_at is not None):
        raise ValueError("snapshots and branches are at epochs; give the runs they belong to by epochs, not by steps")
    if branch_at is not None and any(branch_at % s["record_every"] for s in complete if s["epochs"] > branch_at):
        raise ValueError(f"branch_at is {branch_at}; expected a multiple of record_every: a trunk ends with a record")
    if branch_at is not None:
        trunks = [_until(s, branch_at) for s in complete if s["epochs"] > branch_at]
        trunks = list({_key(t, seeds[0], seeds): t for t in trunks}.values())
        kept = [e for e in snapshots if e < branch_at]
        _execute(_training_jobs(trunks, seeds, [*kept, branch_at], None, store), jobs, store)
    _execute(_training_jobs(complete, seeds, snapshots, branch_at, store), jobs, store)
    columns = [{**_columns(s), "run": _key(s, seed, seeds)} for s in complete for seed in seeds]
    if labels is not None:
        columns = [{**one, "label": labels[i // len(seeds)]} for i, one in enumerate(columns)]
    return _joined([store.frame(one["run"]) for one in columns], columns)


def measure(
    protocol: str,
    settings: Sequence[Mapping[str, object]],
    seeds: int | Iterable[int],
    *,
    epochs: Sequence[int],
    trials: int = 1,
    jobs: int | None = None,
    store: Store | None = None,
    **options: object,
) -> pd.DataFrame:
    """Measure trained networks after each of ``epochs``, by one of ``PROTOCOLS``; ``options`` go to its function.

    Trains what the store lacks. Columns: ``epoch``, ``seed``, what the function's frame has (its ``batch_size`` as
    ``measured_batch_size``), and a column per training setting. Only walk and frozen have several ``trials``.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
    store, seeds = store or Store(), _seeds(seeds)
    complete, epochs = [_checked(s) for s in settings], [int(e) for e in epochs]
    for batch_size in options.get("batch_sizes", ()):
        gradients.check_split(batch_size, options.get("draw_size", 1024))
    if any(s["norm"] != "none" for s in complete):
        raise ValueError("the protocols measure networks without normalisation; leave out norm")
    of_any_loss = protocol in ("spectrum", "boxes")
    if not of_any_loss and any(s["loss"] != "cross_entropy" for s in complete):
        raise ValueError(f"protocol {protocol!r} measures the cross-entropy; leave out loss")
    late = [(e, s["epochs"]) for e in epochs for s in complete if not 0 <= e <= s["epochs"]]
    if late:
        raise ValueError(f"epoch {late[0][0]} is not within a training of {late[0][1]} epochs")
    if trials > 1 and protocol not in ("walk", "frozen"):
        raise ValueError(f"trials is {trials} with {protocol!r}; only walk and frozen have trials")
    run(complete, seeds, snapshots=epochs, jobs=jobs, store=store)
    todo, rows, arrays = [], [], functools.lru_cache(maxsize=1)(store.arrays)  # an entry holds all its epochs
    for s, seed, epoch, start in itertools.product(complete, seeds, epochs, range(0, trials, _TRIALS_PER_JOB)):
        chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        if of_any_loss:
            chosen = {"loss": s["loss"], **chosen}
        if protocol in ("walk", "frozen"):
            chosen["trials"] = list(range(trials)[start:][:_TRIALS_PER_JOB])
        content = {"protocol": protocol, "of": _content(s, seed, seeds), "epoch": epoch, **chosen}
        key = key_of(content)
        rows.append((key, s, seed, epoch))
        if not store.has(key):
            label = f"{protocol} epoch={epoch} seed={seed}"
            arguments = (protocol, s, _snapshot(arrays(_key(s, seed, seeds)), epoch), seed, chosen)
            todo.append(_Job(_measure, arguments, [content], label, _measure_seconds(s, chosen)))
    _execute(todo, jobs, store)
    frames = [store.frame(key).rename(columns={"batch_size": "measured_batch_size"}) for key, *_ in rows]
    columns = [{**_columns(s), "seed": seed, "epoch": epoch, "protocol": protocol} for _, s, seed, epoch in rows]
    return _joined(frames, columns)


def _joined(frames: Sequence[pd.DataFrame], columns: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """The frames below each other, each with values of its own in further columns."""
    joined, lengths = pd.concat(frames, ignore_index=True), [len(frame) for frame in frames]
    for name in columns[0]:
        values = np.empty(len(columns), dtype=object)
        values[:] = [one[name] for one in columns]
        joined[name] = pd.Series(np.repeat(values, lengths)).infer_objects()
    return joined


def weights(
    settings: Mapping[str, object], seeds: int | Iterable[int], epoch: int, *, store: Store | None = None
) -> list[dict[str, torch.Tensor]]:
    """The weights after ``epoch``, one dict a seed, each with a replica axis of 1. Trains what the store lacks."""
    store, seeds, s = store or Store(), _seeds(seeds), _checked(settings)
    run([s], seeds, snapshots=[epoch], store=store)
    device = _dataset(s).device
    kept = [_snapshot(store.arrays(_key(s, seed, seeds)), epoch) for seed in seeds]
    return [{name: torch.tensor(value, device=device) for name, value in one.items()} for one in kept]


def to_target(frame: pd.DataFrame, column: str, target: float, *, axis: str = "epochs") -> pd.DataFrame:
    """Where on ``axis`` each run's ``column`` first reaches ``target``: columns batch_size, lr, seed, ``axis``.

    A run that never does gets the end of the axis, and ``reached`` False.
    """
    rows = []
    for (batch_size, lr, seed), group in frame.groupby(["batch_size", "lr", "seed"], sort=False):
        hits = group.loc[group[column] >= target, axis]
        end = hits.min() if len(hits) else group[axis].max()
        rows.append({"batch_size": batch_size, "lr": lr, "seed": seed, axis: end, "reached": len(hits) > 0})
    return pd.DataFrame(rows)


@dataclass
class _Job:
    """One function call whose results, one per content, go into the store."""

    function: Callable[..., list[tuple[pd.DataFrame, dict[str, np.ndarray]]]]
    arguments: tuple
    contents: list[dict[str, object]]
    label: str
    cost: float = 0.0  # a rough estimate, in seconds of one core
    wanted: frozenset[str] = frozenset()  # arrays without which an entry does not count
    torch_version: str = torch.__version__

    @property
    def keys(self) -> list[str]:
        return [key_of(content) for content in self.contents]

    @property
    def of(self) -> dict[str, object]:
        """The content of the training: a measure's content holds it."""
        return self.contents[0].get("of", self.contents[0])


def _execute(todo: list[_Job], jobs: int | None, store: Store) -> None:
    """Run jobs, the longest first, each result into the store as it comes; what another process runs is awaited."""
    if not todo:
        return
    address = os.environ.get("COMPANION_CLUSTER")
    jobs = jobs or int(os.environ.get("COMPANION_JOBS", 0)) or (joblib.cpu_count() if _device_type() == "cpu" else 1)
    workers = min(len(todo), jobs) if sum(job.cost for job in todo) > _WORTH_WORKERS else 1
    todo = sorted(todo, key=lambda job: -job.cost)
    about = {"torch": torch.__version__, "python": platform.python_version(), "device": _device_type()}
    with (
        tqdm(total=len(todo), unit="job", file=sys.stdout, mininterval=1.0, ncols=110) as bar,
        cluster.backend(address, {job.of["dataset"] for job in todo}) if address
        # Arguments go through pipes, not as pickled files (max_nbytes).
        else joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1, max_nbytes=None) if workers > 1
        else joblib.parallel_config("sequential"),
    ):  # fmt: skip
        while todo:
            claims: dict[int, list[FileLock]] = {}
            done = set()
            # A cluster takes all there is, for workers may join; elsewhere a job is claimed shortly before it is run.
            call = joblib.Parallel(return_as="generator_unordered", pre_dispatch="all" if address else "2*n_jobs")
            calls = (joblib.delayed(_one)(i, todo[i], os.getpid()) for i in _claimed(todo, claims, store))
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
            left = [job for i, job in enumerate(todo) if i not in done and not _is_done(job, store)]
            bar.update(len(todo) - len(done) - len(left))
            todo = left
            if todo:
                time.sleep(_LOOK_AGAIN)


def _claimed(todo: Sequence[_Job], claims: dict[int, list[FileLock]], store: Store) -> Iterator[int]:
    """The numbers of the jobs that are neither done nor another process's, each claimed as it is asked for."""
    for number, job in enumerate(todo):
        locks = []
        for key in job.keys:
            lock = store.claim(key)
            if lock is None:
                break
            locks.append(lock)
        done = _is_done(job, store)  # meanwhile, by another process
        if len(locks) == len(job.keys) and not done:
            claims[number] = locks
            yield number
            continue
        for key, lock in zip(job.keys, locks):
            store.settle(key, lock) if done else lock.release()


def _is_done(job: _Job, store: Store) -> bool:
    return all(store.has(key, job.wanted) for key in job.keys)


def _one(number: int, job: _Job, runner: int):
    if os.getppid() == runner:  # a process of joblib's: killed with its runner, or it would compute on for nobody
        processes.end_with_parent()
    processes.keep_freed_memory()
    here = {"numerics": NUMERICS, "device": data.pick_device().type, "torch": torch.__version__}
    expected = {**job.of, "torch": job.torch_version}
    if any(expected[name] != value for name, value in here.items()):
        there = {name: expected[name] for name in here}
        raise RuntimeError(f"this worker has {here}, where the runner expects {there}; install the same on both")
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


def _training_jobs(
    settings: list[dict], seeds: Sequence[int], snapshots: Sequence[int], branch_at: int | None, store: Store
) -> list[_Job]:
    todo = []
    for s in settings:
        wanted = {f"{e}/weights/head.weight" for e in snapshots}
        missing = [seed for seed in seeds if not store.has(_key(s, seed, seeds), wanted)]
        if missing and _stack_matters(s):
            missing = list(seeds)
        size = 1 if _device_type() == "cpu" and not _stack_matters(s) else len(seeds)
        for stack in (missing[i : i + size] for i in range(0, len(missing), size)):
            trunk = None
            if branch_at is not None and branch_at < s["epochs"]:
                keys = [_key(_until(s, branch_at), seed, seeds) for seed in stack]
                trunk = [(store.frame(key), store.arrays(key)) for key in keys]
            label = " ".join(f"{k}={s[k]}" for k in ("model", "batch_size", "lr")) + f" seeds={list(stack)}"
            contents = [_content(s, seed, seeds) for seed in stack]
            start = branch_at if trunk else 0
            steps = s["steps"] or sum(s["num_train"] / _value(s["batch_size"], e) for e in range(start, s["epochs"]))
            epochs = s["steps"] * _value(s["batch_size"], 0) / s["num_train"] if s["steps"] else s["epochs"] - start
            cost = _seconds(s, steps, epochs * 2 * s["num_train"] * len(stack))
            arguments = (s, stack, snapshots, branch_at, trunk)
            todo.append(_Job(_train, arguments, contents, label, cost, frozenset(wanted)))
    return todo


def _train(s: dict, seeds: Sequence[int], snapshots: Sequence[int], branch_at: int | None, trunk: list | None):
    training = Training(
        _dataset(s),
        seeds=seeds,
        measures=geometry.distances,
        **{k: s[k] for k in _OF_TRAINING},
    )
    arrays: list[dict[str, np.ndarray]] = [{} for _ in seeds]
    start = 0
    if trunk is not None:
        start, prefix = branch_at, f"{branch_at}/"
        names = [name for name in trunk[0][1] if name.startswith(prefix)]
        state = {n.removeprefix(prefix): torch.from_numpy(np.concatenate([a[n] for _, a in trunk])) for n in names}
        training.resume(state, pd.concat([frame for frame, _ in trunk]))
        for mine, (_, kept) in zip(arrays, trunk):
            mine |= {name: value for name, value in kept.items() if int(name.split("/")[0]) in snapshots}
    if s["steps"]:
        _train_steps(training, s)
    for epoch in range(start, 0 if s["steps"] else s["epochs"] + 1):
        if epoch > start:
            due = epoch % s["record_every"] == 0 or epoch == s["epochs"]
            training.advance(epochs=1, record=due, record_steps=s["record_steps"])
        elif not trunk:
            training.record()
        if epoch in snapshots:
            for name, value in training.state().items():
                for replica, mine in enumerate(arrays):
                    mine[f"{epoch}/{name}"] = value[replica : replica + 1].numpy()
    history = training.history
    histories = [history[history["seed"] == seed] for seed in seeds]
    if s["steps"]:  # a seed's history ends where it would have alone, whatever the others of its stack do
        histories = [one[_ended(one, s).cumsum().shift(fill_value=0) == 0] for one in histories]
    return list(zip(histories, arrays))


def _train_steps(training: Training, s: Mapping) -> None:
    training.record()
    ended = torch.zeros(len(training.seeds), dtype=torch.bool)
    for step in sorted({s["steps"], *(k for k in s["record_steps"] if 0 < k < s["steps"])}):
        training.advance(steps=step - training.steps, record=False)
        training.record()
        ended |= _ended(training.latest, s)
        if ended.all():
            return


def _ended(records: Mapping, s: Mapping):
    """Which records reach the target or have diverged: of a history's rows, or of one record's replicas."""
    measure, value = s["target"] or ("test_accuracy", np.inf)
    return (records[measure] >= value) | (records["diverged_at"] >= 0)


def _snapshot(arrays: Mapping[str, np.ndarray], epoch: int) -> dict[str, np.ndarray]:
    prefix = f"{epoch}/weights/"
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _measure(protocol: str, s: dict, weights: dict[str, np.ndarray], seed: int, options: dict):
    dataset = _dataset(s)
    tensors = {name: torch.tensor(value, device=dataset.device) for name, value in weights.items()}
    return [(PROTOCOLS[protocol](dataset, s["model"], tensors, seed=seed, **options), {})]


def _measure_seconds(s: Mapping, options: Mapping) -> float:
    sizes, trials = options.get("batch_sizes", ()), len(options.get("trials", [0]))
    draw_size = options.get("draw_size", 1024)
    steps = sum(draw_size / b for b in sizes) * trials
    return _seconds(s, steps, steps) + _seconds(s, 0, draw_size * len(sizes) * trials or s["num_train"])


def _device_type() -> str:
    """The kind of device that the jobs are run on."""
    address = os.environ.get("COMPANION_CLUSTER")
    return cluster.device_type(address) if address else data.pick_device().type


def _dataset(s: Mapping) -> data.Dataset:
    return data.load(s["dataset"], num_train=s["num_train"], subset_seed=s["subset_seed"])


def _seconds(s: Mapping, steps: float, examples: float) -> float:
    """What so many steps over so many examples take on one core, roughly: 0.3 ms a step, 30 billion multiply-adds/s."""
    parameters, multiply_adds = _size(s["model"], _dataset(s).input_shape, _dataset(s).num_classes, s["norm"])
    return steps * (3e-4 + 1e-9 * parameters) + examples * 3 * multiply_adds / 3e10


@functools.lru_cache(maxsize=64)
def _size(model: str, input_shape: tuple[int, ...], num_classes: int, norm: str) -> tuple[int, int]:
    """Weights and biases of a model, and the multiply-adds of an example's forward pass."""
    net = models.build(model, input_shape, num_classes, [0], norm=norm)
    return net.num_parameters, net.multiply_adds


def _stack_matters(s: Mapping) -> bool:
    """Whether seeds are trained as one stack on a CPU, where the last bits depend on the stack's size."""
    dataset = _dataset(s)
    parameters, _ = _size(s["model"], dataset.input_shape, dataset.num_classes, s["norm"])
    return _device_type() == "cpu" and parameters < models.BATCHED_BELOW


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds is {seeds!r}; expected a number of seeds, at least 1, or distinct seeds from 0 on")
    return chosen


def _checked(settings: Mapping[str, object]) -> dict[str, object]:
    unknown = set(settings) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)[0]!r}; choose from: {', '.join(DEFAULTS)}")
    s = {**DEFAULTS, **settings}
    s["dataset"], _ = data.resolve(s["dataset"])
    for name in ("epochs", "record_every", *(["steps"] if s["steps"] is not None else [])):
        if not isinstance(s[name], int) or s[name] < 1:
            raise ValueError(f"{name} is {s[name]!r}; expected a whole number from 1 on")
    s["record_steps"] = tuple(int(step) for step in s["record_steps"])
    if s["target"] is not None and s["steps"] is None:
        raise ValueError("a target ends a run given by steps; set steps, the most it may take, and record_steps")
    if s["target"] is not None and (len(s["target"]) != 2 or s["target"][0] not in _TARGETS):
        raise ValueError(f"target is {s['target']!r}; expected a pair such as ('test_accuracy', 0.9), of {_TARGETS}")
    check_optimizer(s["optimizer"], s["momentum"])
    models.check_norm(s["norm"], s["norm_batch_size"])
    models.check_loss(s["loss"])
    s["num_train"] = _dataset(s).num_train  # so that None and the whole set are the same
    for name, check in (("batch_size", lambda v: check_batch_size(v, _dataset(s).num_train)), ("lr", check_lr)):
        for value in [v for _, v in s[name].points] if isinstance(s[name], Schedule) else [s[name]]:
            check(value)
    return s


def _value(setting: object, epoch: float) -> float:
    return setting(epoch) if isinstance(setting, Schedule) else setting


def _until(s: Mapping, epoch: int) -> dict[str, object]:
    cut = {k: s[k].until(epoch) if isinstance(s[k], Schedule) else s[k] for k in ("batch_size", "lr")}
    cut["batch_size"] = int(cut["batch_size"]) if not isinstance(cut["batch_size"], Schedule) else cut["batch_size"]
    return {**s, **cut, "epochs": min(epoch, s["epochs"])}


def _plain(s: Mapping) -> dict[str, object]:
    """Settings as JSON holds them; the same for 64 and 64.0."""
    plain = {}
    for k, v in s.items():
        if isinstance(v, Schedule):
            v = {"points": [[float(e), float(x)] for e, x in v.points], "linear": v.linear}
        plain[k] = float(v) if isinstance(v, numbers.Real) else v
    return plain


def _content(s: Mapping, seed: int, seeds: Sequence[int]) -> dict[str, object]:
    """What a result depends on: settings, seed, data, the kind of device, and the version of the numerics."""
    dataset = _dataset(s)
    content = {**_plain(s), "seed": seed, "data": dataset.fingerprint, "device": _device_type()}
    return {**content, "numerics": NUMERICS, **({"stack": list(seeds)} if _stack_matters(s) else {})}


def _key(s: Mapping, seed: int, seeds: Sequence[int]) -> str:
    return key_of(_content(s, seed, seeds))


def _columns(s: Mapping) -> dict[str, object]:
    """The settings as columns; a schedule, or a pair, as text. `epochs` stays what it is in the history: an axis."""
    return {
        k: v if isinstance(v, numbers.Real | str | None) else str(v)
        for k, v in s.items()
        if k not in ("subset_seed", "epochs", "steps", "record_every", "record_steps", "target")
    }
