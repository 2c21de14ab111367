"""The runs of a session: one on show, perhaps a pinned one beside it, and the previous one. No thread, no clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from helpers.engine.schedules import check_above, check_examples
from helpers.engine.training import Training
from helpers.live.probe import TestDraw
from helpers.live.settings import LIVE, SETTINGS, one_of
from helpers.live.trace import Run
from helpers.problems import Dataset, Problem

Problems = Problem | Sequence[Problem] | Mapping[str, Problem]


def by_name(given: Problems) -> dict[str, Problem]:
    """Return the problems to choose from. Raises TypeError for anything but problems."""
    named = isinstance(given, Mapping)
    listed = list(given.values() if named else given if isinstance(given, Sequence) else [given])
    if not listed or not all(isinstance(problem, Problem) for problem in listed):
        raise TypeError(f"expected a Problem, a list of them, or a dict name → Problem, not {given!r}; built-in "
                        "problems are problems.named('blobs', 'shen_mlp') and the like")  # fmt: skip
    if named:
        return {str(name): problem for name, problem in given.items()}
    names = [f"{problem.net.name} on {problem.dataset.name}" for problem in listed]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return {f"{name} ({n + 1})" if n else name: problem for name, n, problem in zip(names, before, listed)}


class Wish(NamedTuple):
    """A change that a control asked for, when training was at ``steps``, at the Unix time ``at``."""

    name: str
    value: object
    steps: int
    at: float


class Runs:
    """Runs that see the same examples at the same time. Parameters: see ``Session``."""

    def __init__(self, given: Problems, *, seed: int = 0, test_examples: int = 1000, **settings: object):
        self.problems, self.test_examples = by_name(given), test_examples
        if unknown := set(settings) - set(SETTINGS):
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)} and seed")
        name, self.problem = next(iter(self.problems.items()))
        self.settings = {"problem": name, "seed": seed} | {n: settings.get(n, s.default) for n, s in SETTINGS.items()}
        self.settings |= {name: self.checked(name, self.settings[name]) for name in SETTINGS}
        self.test: TestDraw | None = None
        self.pinned_batch_size: int | None = None
        self.runs: tuple[Run, ...] = ()
        self.previous: Run | None = None
        self.builds = 0  # how often training has started over
        self.start_over()

    @property
    def dataset(self) -> Dataset:
        return self.problem.dataset

    @property
    def history(self) -> pd.DataFrame:
        """``Run.history`` of every run, told apart by the column ``run``: this one, pinned, previous."""
        return pd.concat([run.history().assign(run=name) for name, run in self.named_runs().items()], ignore_index=True)

    @property
    def diverged(self) -> bool:
        return any(run.diverged for run in self.runs)

    def named_runs(self) -> dict[str, Run]:
        """The runs by name, the previous one first, so that it is drawn below the others."""
        found = {"previous": self.previous} | dict(zip(("this run", "pinned"), self.runs))
        return {name: run for name, run in found.items() if run is not None}

    def checked(self, name: str, value: object) -> object:
        """Return ``value`` in the type of its setting. Raises ValueError for an unknown setting or a bad value."""
        if name in SETTINGS:
            return SETTINGS[name].check(value, self.settings, self.dataset.num_train)
        if name == "problem":
            return one_of(name, value, tuple(self.problems))
        if name == "pinned_batch_size":
            return value if value is None else check_examples(name, value, self.dataset.num_train)
        if name == "epochs_per_second":
            return value if value == 0 else check_above(name, value)
        raise ValueError(f"no control is called {name!r}")

    def apply(self, wish: Wish) -> bool:
        """Set a live setting or pin, else start over; return whether it has started over."""
        if wish.name == "pinned_batch_size":
            self._pin(wish)
        elif wish.name in LIVE:
            self.settings[wish.name] = wish.value  # kept by a reset too
            for run in self.runs if wish.name != "batch_size" else self.runs[:1]:
                run.move(*wish)
        else:
            self.start_over(**({} if wish.name == "reset" else {wish.name: wish.value}))
            return True
        return False

    def advance(self) -> None:
        """Take one step of the run that has seen the fewest examples."""
        min(self.runs, key=lambda run: run.training.examples_seen).training.step()

    def advance_main(self) -> None:
        """Take one step of the run on show; a pinned run follows as far as it is behind."""
        main = self.runs[0].training
        steps = main.steps
        while main.steps == steps or any(run.training.examples_seen < main.examples_seen for run in self.runs):
            self.advance()

    def take(self, measure: bool) -> None:
        """Keep the losses since the last call, and measure if asked to."""
        for run in self.runs:
            run.take()
            if measure:
                run.measure(self.test)

    def start_over(self, **changed: object) -> None:
        """Build everything anew with ``changed`` settings; if that fails, everything stays as it was."""
        settings = self.settings | changed
        problem = self.problems[settings["problem"]]
        if settings["optimizer"] != "sgd":
            settings["momentum"] = 0.0
        settings["batch_size"] = min(settings["batch_size"], problem.num_train)
        training = Training(problem, seeds=[settings["seed"]], **{name: settings[name] for name in SETTINGS})
        test = self.test if self.test and self.test.problem is problem else TestDraw(problem, self.test_examples)
        run = Run(training, settings)
        run.measure(test)  # before anybody sees it
        for old in self.runs:
            old.take()
        if problem is not self.problem:
            self.previous = None
        elif self.runs and self.runs[0].training.steps:
            self.previous = self.runs[0]
        self.settings, self.problem, self.test, self.runs = settings, problem, test, (run,)
        if self.pinned_batch_size is not None:
            self._pin(Wish("pinned_batch_size", min(self.pinned_batch_size, problem.num_train), 0, time.time()))
        self.builds += 1

    def _pin(self, wish: Wish) -> None:
        self.pinned_batch_size, main = wish.value, self.runs[0]  # kept by a reset too
        if wish.value is None:
            self.runs = (main,)
            return
        if len(self.runs) == 1:
            main.take()
            self.runs = (main, Run(main.training.branch(), main.settings, main.moves))
        self.runs[1].move("batch_size", *wish[1:])
