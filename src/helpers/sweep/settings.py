"""Settings of a run: their defaults and checks, and the content of the key under which the store keeps its result."""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Callable, Iterable, Mapping

from helpers import problems
from helpers.engine import kernels, stack
from helpers.engine.optimizers import check_optimizer
from helpers.engine.schedules import Schedule, check_batch_size, check_lr, values_of
from helpers.engine.training import NUMERICS
from helpers.problems import Problem, fingerprint, nets
from helpers.sweep import cluster
from helpers.sweep.store import key_of

# A problem is given by names, or as ``problem``; the names stand for it then.
DEFAULTS = {
    "dataset": "mnist", "num_train": None, "subset_seed": 0, "model": "shen_mlp",
    "batch_size": 64, "lr": 0.01, "optimizer": "sgd", "momentum": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0,
    "norm": "none", "norm_batch_size": None, "loss": "cross_entropy",
    "epochs": 30, "steps": None, "record_every": 1, "record_steps": (), "target": None,
}  # fmt: skip
EXTRA = {"problem": None, "clip_norm": None}  # part of a key only where they are given
OF_PROBLEM = ("dataset", "num_train", "subset_seed", "model", "norm", "norm_batch_size", "loss")
OF_TRAINING = ("batch_size", "lr", "optimizer", "momentum", "betas", "weight_decay", "clip_norm")
TARGETS = ("test_accuracy", "train_accuracy")

# The code of the built-in nets and of their fast paths when ``NUMERICS`` was last raised. A net whose code is another
# gets it into its key, so that results of the old code are not taken for its own. After a change that leaves every
# bit as it was, ``python -m helpers.sweep.settings`` prints the new values.
KNOWN_CODE = {
    "brownlee_mlp": "9740d10e362c3fd4", "small_mlp": "4d875d6c7adba8c0", "shen_mlp": "52448feb0554a28c",
    "keskar_mlp": "5b873abcf1f7e6f2", "plain_cnn": "c446b469d2650a02",
}  # fmt: skip


def grid(base: Mapping[str, object] | None = None, **values: object) -> list[dict[str, object]]:
    """Make settings for each combination: a list is varied, anything else is set. ``base`` comes first.

    >>> [s["batch_size"] for s in grid({"epochs": 5}, batch_size=[16, 64])]
    [16, 64]
    """
    fixed = {**(base or {}), **{k: v for k, v in values.items() if not isinstance(v, list)}}
    varied = {k: v for k, v in values.items() if isinstance(v, list)}
    return [{**fixed, **dict(zip(varied, combination))} for combination in itertools.product(*varied.values())]


def checked_seeds(seeds: int | Iterable[int]) -> list[int]:
    """List the seeds: a number of them from 0 on, or these. Raises ValueError for none, negative or double ones."""
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds is {seeds!r}; expected a number of seeds, at least 1, or distinct seeds from 0 on")
    return chosen


def checked(settings: Mapping[str, object]) -> dict[str, object]:
    """Complete the settings of a run, with its ``problem``. Raises ValueError for what cannot be trained."""
    unknown = set(settings) - set(DEFAULTS) - set(EXTRA)
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)[0]!r}; choose from: {', '.join((*DEFAULTS, 'problem'))}")
    s = {**DEFAULTS, **EXTRA, **settings}
    _resolve_problem(s, settings)
    for name in ("epochs", "record_every", *(["steps"] if s["steps"] is not None else [])):
        if not isinstance(s[name], int) or s[name] < 1:
            raise ValueError(f"{name} is {s[name]!r}; expected a whole number from 1 on")
    s["record_steps"] = tuple(int(step) for step in s["record_steps"])
    if s["target"] is not None and s["steps"] is None:
        raise ValueError("a target ends a run given by steps; set steps, the most it may take, and record_steps")
    if s["target"] is not None and (len(s["target"]) != 2 or s["target"][0] not in TARGETS):
        raise ValueError(f"target is {s['target']!r}; expected a pair such as ('test_accuracy', 0.9), of {TARGETS}")
    if s["target"] is not None and not s["problem"].dataset.size(s["target"][0].removesuffix("_accuracy")):
        raise ValueError(f"target is {s['target']!r}, but {s['problem'].dataset.name} has no test examples")
    check_optimizer(s["optimizer"], s["momentum"])
    for name, check in (("batch_size", lambda v: check_batch_size(v, s["problem"].num_train)), ("lr", check_lr)):
        for value in values_of(s[name]):
            check(value)
    return s


def _resolve_problem(s: dict[str, object], given: Mapping[str, object]) -> None:
    if s["problem"] is None:
        s["problem"] = problems.named(**{name: s[name] for name in OF_PROBLEM})
    elif not isinstance(s["problem"], Problem):
        raise TypeError(f"problem is a {type(s['problem']).__name__}; expected a helpers.Problem")
    elif double := set(OF_PROBLEM) & set(given):
        raise ValueError(f"{sorted(double)[0]} is part of the problem; leave it out beside problem=")
    p = s["problem"]
    p.check()
    own = {"dataset": p.dataset.name, "num_train": p.num_train, "model": p.net.name, "loss": p.loss_name}
    s.update(p.names or own)


def until(s: Mapping, epoch: int) -> dict[str, object]:
    """Cut the settings off at an epoch: the trunk that runs with another end may share."""
    cut = {k: s[k].until(epoch) if isinstance(s[k], Schedule) else s[k] for k in ("batch_size", "lr")}
    return {**s, **cut, "epochs": min(epoch, s["epochs"])}


def content(s: Mapping, seed: int) -> dict[str, object]:
    """Everything a result depends on: settings, seed, data, code, the kind of device, the version of the numerics."""
    problem: Problem = s["problem"]
    found = {k: _plain(v) for k, v in s.items() if k in DEFAULTS}
    found |= {"seed": seed, "data": problem.dataset.fingerprint, "device": device_type(), "numerics": NUMERICS}
    if s["clip_norm"] is not None:
        found["clip_norm"] = float(s["clip_norm"])
    return found | _code_of(problem)


def key(s: Mapping, seed: int) -> str:
    """The key of a run's result in the store."""
    return key_of(content(s, seed))


@functools.lru_cache(maxsize=256)
def _code_of(problem: Problem) -> dict[str, object]:
    """The code of a problem, as far as its names do not stand for it."""
    if not problem.names:
        return {"problem": problem.content}
    code = _code_of_net(problem.net.factory.args[0], tuple(kernels.KERNELS.values()))  # the entry of ``nets.NETS``
    return {} if code == KNOWN_CODE.get(problem.names["model"]) else {"code": code}


@functools.lru_cache(maxsize=64)
def _code_of_net(entry: Callable, fast_paths: tuple[type, ...]) -> str:
    return fingerprint.of((entry, fast_paths))


def read_code() -> None:
    """Hash the code of problems anew from here on: a class may have been edited in place."""
    _code_of.cache_clear()
    _code_of_net.cache_clear()


def _plain(value: object) -> object:
    """A setting as JSON holds it; the same for 64 and 64.0."""
    if isinstance(value, Schedule):
        return {"points": [[float(e), float(x)] for e, x in value.points], "linear": value.linear}
    if isinstance(value, numbers.Real):
        return float(value)
    return fingerprint.of(value) if callable(value) else value


def columns(s: Mapping) -> dict[str, object]:
    """The settings as columns of a frame; a schedule, a pair or an optimizer as text."""
    left_out = ("subset_seed", "epochs", "steps", "record_every", "record_steps", "target", *EXTRA)
    shown = {k: v for k, v in s.items() if k not in left_out}
    if s["clip_norm"] is not None:
        shown["clip_norm"] = s["clip_norm"]
    return {k: v if isinstance(v, numbers.Real | str | None) else _text(v) for k, v in shown.items()}


def _text(value: object) -> str:
    if isinstance(value, Schedule) or not callable(value):
        return str(value)
    return getattr(value, "__name__", type(value).__name__)


def device_type() -> str:
    """The kind of device that jobs run on."""
    address = cluster.address()
    return cluster.device_type(address) if address else problems.pick_device().type


def stacks_seeds(s: Mapping) -> bool:
    """Whether runs that differ in seed alone are trained as one stack."""
    return device_type() != "cpu" or _seeds_pay(s["problem"])


_seeds_pay = functools.lru_cache(maxsize=64)(stack.seeds_pay)


def shares_order(s: Mapping) -> bool:
    """Whether runs that differ in rate alone are trained as one stack: on a CPU, where they share each minibatch."""
    if s["target"] or device_type() != "cpu" or cluster.address():  # a target ends each at a step of its own
        return False
    return _order_pays(s["problem"])


_order_pays = functools.lru_cache(maxsize=64)(stack.sharing_pays)


def stack_of(s: Mapping, content: Mapping) -> str:
    """Name the stack in which a run is trained: all seeds of a setting, all rates of a seed, or the run alone."""
    left_out = {"seed"} if stacks_seeds(s) else {"lr"} if shares_order(s) else set()
    return key_of({k: v for k, v in content.items() if k not in left_out})


def start(content: Mapping) -> str:
    """Name a run's untrained network and its data, by the run's content."""
    of_start = (*OF_PROBLEM, "problem", "code", "data", "seed", "device", "numerics")
    return key_of({k: content[k] for k in of_start if k in content})


def known_code() -> dict[str, str]:
    """The present code of the built-in nets, for ``KNOWN_CODE``."""
    return {model: _code_of_net(entry, tuple(kernels.KERNELS.values())) for model, entry in nets.NETS.items()}


if __name__ == "__main__":
    print(known_code())
