"""A grid of settings × seeds → one tidy DataFrame. What the store has is not computed again.

The unit of work is a job: a stack of runs that differ in seed alone, or in rate alone (see ``jobs``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from helpers.engine import stack
from helpers.engine.schedules import values_of
from helpers.engine.training import Training
from helpers.measure import geometry, gradients, landscape, noise
from helpers.problems import Problem, Solution
from helpers.sweep import settings as of_runs
from helpers.sweep.jobs import Job, execute, wanted_processes
from helpers.sweep.store import Store, key_of


class Protocol(NamedTuple):
    """A measure of trained networks: (solution, seed=, **options) → a frame. Raise ``version`` when it changes."""

    function: Callable[..., pd.DataFrame]
    version: int = 1
    trials: bool = False  # whether it has several
    loss_in_key: bool = False  # whether its keys name the loss once more, apart from the training's
    any_batch: bool = False  # whether an example's loss may depend on the others in its batch


PROTOCOLS = {
    "walk": Protocol(gradients.walk, trials=True), "frozen": Protocol(gradients.frozen, trials=True),
    "spectrum": Protocol(landscape.spectrum, version=2, loss_in_key=True, any_batch=True),
    "boxes": Protocol(landscape.boxes, loss_in_key=True, any_batch=True),
    "staleness": Protocol(gradients.staleness), "noise": Protocol(noise.scale),
    "minibatches": Protocol(noise.minibatches), "micro_batches": Protocol(noise.micro_batches, any_batch=True),
}  # fmt: skip

_TRIALS_PER_JOB = 10
_RATES_PER_JOB = 16  # what more of them share is little by then, and an interruption loses them all


def run(
    settings: Sequence[Mapping[str, object]] | Mapping[object, Mapping[str, object]],
    seeds: int | Iterable[int],
    *,
    snapshots: Iterable[int] = (),
    branch_at: int | None = None,
    jobs: int | None = None,
    store: Store | None = None,
) -> pd.DataFrame:
    """Train every setting with every seed; returns the history of all, with a column per setting.

    Runs that differ in seed or in rate alone may be trained side by side; ``seconds`` are then equal shares.

    settings: dicts over ``settings.DEFAULTS`` (``grid`` makes them), by names or with a ``problem``; as a mapping, its
        keys become a column ``label``. A run is ``epochs`` long, recorded every
        ``record_every``; or, where ``steps`` is given, it is that long and recorded at its beginning, its end and after
        each of ``record_steps``. ``target``, such as ``("test_accuracy", 0.9)``, ends a run of ``steps`` at the first
        record at or above it, and divergence ends it too; its records are of that split, the other's measures NaN.
    seeds: a number of them, or a list.
    snapshots: epochs whose weights the store keeps for ``measure`` and ``weights``.
    branch_at: runs that are equal up to this epoch train up to it once.
    jobs: processes side by side, by default one a core.
    store: by default ``Store()``.
    Raises ValueError for settings that cannot be trained, before anything starts.

    >>> run([dict(dataset="blobs", model="brownlee_mlp", epochs=1)], seeds=2).seed.nunique()
    2
    """
    store, seeds = store or Store(), of_runs.checked_seeds(seeds)
    of_runs.read_code()
    labels, workers = list(settings) if isinstance(settings, Mapping) else None, wanted_processes(jobs)
    complete = [of_runs.checked(s) for s in (settings.values() if isinstance(settings, Mapping) else settings)]
    snapshots = sorted(set(snapshots))
    if any(s["steps"] for s in complete) and (snapshots or branch_at is not None):
        raise ValueError("snapshots and branches are at epochs; give the runs they belong to by epochs, not by steps")
    longer = [s for s in complete if branch_at is not None and s["epochs"] > branch_at]
    if any(branch_at % s["record_every"] for s in longer):
        raise ValueError(f"branch_at is {branch_at}; expected a multiple of record_every: a trunk ends with a record")
    if longer:
        trunks = [of_runs.until(s, branch_at) for s in longer]
        trunks = list({of_runs.key(t, seeds[0]): t for t in trunks}.values())
        kept = [e for e in snapshots if e < branch_at]
        execute(_training_jobs(trunks, seeds, [*kept, branch_at], None, store, workers), jobs, store)
    execute(_training_jobs(complete, seeds, snapshots, branch_at, store, workers), jobs, store)
    described = [{**of_runs.columns(s), "run": of_runs.key(s, seed)} for s in complete for seed in seeds]
    if labels is not None:
        described = [{**one, "label": labels[i // len(seeds)]} for i, one in enumerate(described)]
    return _joined([store.frame(one["run"]) for one in described], described)


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
    """Measure trained networks after each of ``epochs``. Trains what the store lacks.

    protocol: one of ``PROTOCOLS``; ``options`` go to its function.
    trials: draws of a protocol that has several: walk and frozen.
    Columns: ``epoch``, ``seed``, the function's own (its ``batch_size`` as ``measured_batch_size``), and a column per
    training setting. Raises ValueError for what cannot be measured, before anything starts.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
    chosen, store, seeds = PROTOCOLS[protocol], store or Store(), of_runs.checked_seeds(seeds)
    complete, epochs = [of_runs.checked(s) for s in settings], [int(e) for e in epochs]
    _check_measure(protocol, chosen, complete, epochs, trials, options)
    run(settings, seeds, snapshots=epochs, jobs=jobs, store=store)
    todo, rows, arrays = [], [], functools.lru_cache(maxsize=1)(store.arrays)  # an entry holds all its epochs
    for s, seed, epoch, start in itertools.product(complete, seeds, epochs, range(0, trials, _TRIALS_PER_JOB)):
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        if chosen.trials:
            given["trials"] = list(range(trials)[start:][:_TRIALS_PER_JOB])
        of = {"protocol": protocol, "of": of_runs.content(s, seed), "epoch": epoch, **given}
        if chosen.loss_in_key:
            of["loss"] = s["loss"]
        if chosen.version > 1:
            of["version"] = chosen.version
        rows.append((key_of(of), s, seed, epoch))
        if not store.has(rows[-1][0]):
            weights = _snapshot(arrays(of_runs.key(s, seed)), epoch)
            arguments = (protocol, s["problem"], weights, seed, given)
            label = f"{protocol} epoch={epoch} seed={seed}"
            draws = len(given.get("batch_sizes", [0])) * len(given.get("trials", [0]))
            work = _work(s["problem"], draws * given.get("draw_size", s["num_train"]) / 32, 32)
            todo.append(Job(_measure, arguments, [of], label, s["problem"].names.get("dataset", ""), work))
    execute(todo, jobs, store)
    frames = [store.frame(k).rename(columns={"batch_size": "measured_batch_size"}) for k, *_ in rows]
    described = [
        {**of_runs.columns(s), "seed": seed, "epoch": epoch, "protocol": protocol} for _, s, seed, epoch in rows
    ]
    return _joined(frames, described)


def _check_measure(protocol: str, chosen: Protocol, complete: Sequence[Mapping], epochs: Sequence[int], trials: int,
                   options: Mapping[str, object]) -> None:  # fmt: skip
    gradients.check_splits(options.get("batch_sizes", ()), options.get("draw_size", 1024))
    if any(s["norm"] == "batch" for s in complete):
        raise ValueError("the protocols measure networks without batch normalisation; choose norm='group' or 'none'")
    for s in complete if not chosen.any_batch else ():
        if not s["problem"].names:
            stack.build(s["problem"], [0]).train().refuse_batch_statistics(protocol)
    late = [(e, s["epochs"]) for e in epochs for s in complete if not 0 <= e <= s["epochs"]]
    if late:
        raise ValueError(f"epoch {late[0][0]} is not within a training of {late[0][1]} epochs")
    if trials > 1 and not chosen.trials:
        raise ValueError(f"trials is {trials} with {protocol!r}; only walk and frozen have trials")


def _joined(frames: Sequence[pd.DataFrame], described: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """The frames below each other, each with values of its own in further columns."""
    joined, lengths = pd.concat(frames, ignore_index=True), [len(frame) for frame in frames]
    for name in dict.fromkeys(name for one in described for name in one):
        values = np.empty(len(described), dtype=object)
        values[:] = [one.get(name) for one in described]
        joined[name] = pd.Series(np.repeat(values, lengths)).infer_objects()
    return joined


def weights(
    settings: Mapping[str, object], seeds: int | Iterable[int], epoch: int, *, store: Store | None = None
) -> list[Solution]:
    """The solutions after ``epoch``, one a seed. Trains what the store lacks."""
    store, seeds, s = store or Store(), of_runs.checked_seeds(seeds), of_runs.checked(settings)
    run([settings], seeds, snapshots=[epoch], store=store)
    keys = [of_runs.key(s, seed) for seed in seeds]
    return [_solution(s["problem"], _snapshot(store.arrays(key), epoch)) for key in keys]


def to_target(frame: pd.DataFrame, column: str, target: float, *, axis: str = "epochs") -> pd.DataFrame:
    """Find where on ``axis`` each run's ``column`` first reaches ``target``: columns batch_size, lr, seed, ``axis``.

    A run that never does gets the end of the axis, and ``reached`` False.
    """
    rows = []
    for (batch_size, lr, seed), group in frame.groupby(["batch_size", "lr", "seed"], sort=False):
        hits = group.loc[group[column] >= target, axis]
        end = hits.min() if len(hits) else group[axis].max()
        rows.append({"batch_size": batch_size, "lr": lr, "seed": seed, axis: end, "reached": len(hits) > 0})
    return pd.DataFrame(rows)


def _training_jobs(
    settings: list[dict], seeds: Sequence[int], snapshots: Sequence[int], branch_at: int | None, store: Store,
    workers: int,
) -> list[Job]:  # fmt: skip
    wanted = frozenset(f"{epoch}/" for epoch in snapshots)  # an entry holds all of a snapshot, or none
    stacks: dict[str, dict[str, tuple[dict, int, dict]]] = {}
    for s in settings:
        for seed in seeds:
            content = of_runs.content(s, seed)
            if not store.has(key_of(content), wanted):
                stacks.setdefault(of_runs.stack_of(s, content), {})[key_of(content)] = (s, seed, content)
    todo = []
    for runs in (list(stack_.values()) for stack_ in stacks.values()):
        size = len(runs)
        if of_runs.shares_order(runs[0][0]):  # fewer to a stack where there would be less than one a worker
            size = min(_RATES_PER_JOB, math.ceil(size / math.ceil(workers / len(stacks))))
        for own in (runs[i : i + size] for i in range(0, len(runs), size)):
            trunk = None
            if branch_at is not None and branch_at < own[0][0]["epochs"]:
                keys = [of_runs.key(of_runs.until(s, branch_at), seed) for s, seed, _ in own]
                trunk = [(store.frame(k), store.arrays(k)) for k in keys]
            todo.append(_training_job(own, snapshots, branch_at, trunk, wanted))
    return todo


def _training_job(own: Sequence[tuple[dict, int, dict]], snapshots: Sequence[int], branch_at: int | None,
                  trunk: list | None, wanted: frozenset[str]) -> Job:  # fmt: skip
    """The job of one stack: of runs that differ in seed alone, or in rate alone."""
    settings, seeds, contents = (list(column) for column in zip(*own))
    rates = [s["lr"] for s in settings]
    s = {**settings[0], "lr": rates[0] if rates.count(rates[0]) == len(rates) else tuple(rates)}
    shown = " to ".join(str(rate) for rate in dict.fromkeys((rates[0], rates[-1])))
    label = f"model={s['model']} batch_size={s['batch_size']} lr={shown} seeds={list(dict.fromkeys(seeds))}"
    batch_size = values_of(s["batch_size"])[-1]
    work = len(own) * _work(s["problem"], s["steps"] or s["epochs"] * s["num_train"] / batch_size, batch_size)
    arguments = (s, seeds, snapshots, branch_at, trunk, [of_runs.start(content) for content in contents])
    return Job(_train, arguments, contents, label, s["problem"].names.get("dataset", ""), work, wanted)


def _work(problem: Problem, steps: float, batch_size: float) -> float:
    """Multiply-adds of so many steps, the overhead of each counted as ten million."""
    return 3 * steps * (1e7 + batch_size * _num_parameters(problem))


_num_parameters = functools.lru_cache(maxsize=64)(stack.num_parameters)


def _train(s: dict, seeds: Sequence[int], snapshots: Sequence[int], branch_at: int | None, trunk: list | None,
           starts: Sequence[str]):  # fmt: skip
    training = Training(
        s["problem"], seeds=seeds, measures=geometry.distances, **{k: s[k] for k in of_runs.OF_TRAINING}
    )
    arrays: list[dict[str, np.ndarray]] = [{} for _ in seeds]
    start = 0
    if trunk is not None:
        start, prefix = branch_at, f"{branch_at}/"
        names = [name for name in trunk[0][1] if name.startswith(prefix)]
        state = {n.removeprefix(prefix): torch.from_numpy(np.concatenate([a[n] for _, a in trunk])) for n in names}
        training.resume(state, pd.concat([frame.assign(seconds=frame.seconds * len(seeds)) for frame, _ in trunk]))
        for mine, (_, kept) in zip(arrays, trunk):
            mine |= {name: value for name, value in kept.items() if int(name.split("/")[0]) in snapshots}
    splits = (s["target"][0].removesuffix("_accuracy"),) if s["target"] else ("train", "test")
    if not trunk:
        known = {split: _untrained(s["problem"], dict(zip(starts, seeds)), split) for split in splits}
        training.record(splits, {split: torch.stack([at[start] for start in starts], 1) for split, at in known.items()})
    if s["steps"]:
        _train_steps(training, s, splits)
    for epoch in range(start, 0 if s["steps"] else s["epochs"] + 1):
        if epoch > start:
            due = epoch % s["record_every"] == 0 or epoch == s["epochs"]
            training.advance(epochs=1, record=due, record_steps=s["record_steps"])
        if epoch in snapshots:
            for name, value in training.state().items():
                for replica, mine in enumerate(arrays):
                    mine[f"{epoch}/{name}"] = value[replica : replica + 1].numpy()
    history = training.history.assign(seconds=lambda h: h.seconds / len(seeds), replicas=1)  # as if each were alone
    records = len(history) // len(seeds)
    histories = [history[i : i + records] for i in range(0, len(history), records)]
    if s["steps"]:  # a run's history ends where it would have alone, whatever the others of its stack do
        histories = [one[_ended(one, s).cumsum().shift(fill_value=0) == 0] for one in histories]
    return list(zip(histories, arrays))


_evaluated: dict[tuple[str, str], torch.Tensor] = {}


def _untrained(problem: Problem, starts: Mapping[str, int], split: str) -> dict[str, torch.Tensor]:
    """Loss and accuracy of untrained networks, by their ``start``: each is evaluated once a process."""
    if any((start, split) not in _evaluated for start in starts):
        found = torch.stack(Training(problem, seeds=list(starts.values()), batch_size=1).evaluate(split), 1)
        _evaluated.update({(start, split): pair for start, pair in zip(starts, found)})
    return {start: _evaluated[start, split] for start in starts}


def _train_steps(training: Training, s: Mapping, splits: Sequence[str]) -> None:
    ended = torch.zeros(len(training.seeds), dtype=torch.bool)
    for step in sorted({s["steps"], *(k for k in s["record_steps"] if 0 < k < s["steps"])}):
        training.advance(steps=step - training.steps, record=False)
        training.record(splits)
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


def _solution(problem: Problem, arrays: Mapping[str, np.ndarray]) -> Solution:
    return Solution(problem, {n: torch.tensor(value, device=problem.dataset.device) for n, value in arrays.items()})


def _measure(protocol: str, problem: Problem, arrays: dict[str, np.ndarray], seed: int, options: dict):
    return [(PROTOCOLS[protocol].function(_solution(problem, arrays), seed=seed, **options), {})]
