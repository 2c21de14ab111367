"""The notebook's own object: figures, tables, prose with figures filled in, and verdicts, filed under its number."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers import plots
from helpers.ledger import rules
from helpers.ledger.rules import missing

__all__ = ["Book", "missing"]
PROJECT = Path(__file__).resolve().parents[2]


class Book:
    """One notebook's results.

    name: the notebook's, number first, such as ``"02_mnist_sweep"``; every file it writes begins with the number.
    dataset: the ``Dataset`` that it trains on.
    profile: the profile that set its parameters.
    output_dir: where the files go; ``""`` for ``outputs/notebooks/<name>`` of the project, or of the working directory
        outside a project.
    used: further settings it trained with, to compare with those of the claims.
    """

    def __init__(self, name: str, dataset, *, profile: str = "none", output_dir: str | Path = "", **used: object):
        self.name, self.dataset, self.profile = name, dataset, profile
        project = PROJECT if (PROJECT / "pyproject.toml").exists() else Path.cwd()
        self.folder = Path(output_dir) if output_dir else project / "outputs" / "notebooks" / name
        self._notebooks = project / "notebooks"
        self._ledger = rules.Ledger(name, dataset.name, **{"num_train": dataset.num_train} | used)

    def _filed(self, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"{name!r} names a file; expected letters, digits, - and _")
        return f"{self.name.split('_')[0]}_{name}"

    @property
    def provenance(self) -> str:
        """The line a notebook prints about itself: versions, device, profile, data; also saved for ``run.json``."""
        data = self.dataset
        facts = {"device": str(data.device), "dataset": data.name, "fingerprint": data.fingerprint}
        self._write("provenance", f"{self.name}.json").write_text(json.dumps(facts), encoding="utf-8")
        versions = " · ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchvision", "numpy"))
        where = f"Python {platform.python_version()} · {versions} · {data.device} · profile {self.profile}"
        return f"{where} · {data.description}"

    def figure(self, figure: Axes | Figure, name: str, caption: str) -> None:
        """Save a figure as ``figures/<number>_<name>.png`` and ``.svg``, with its caption, and display it."""
        from IPython.display import Image, display

        saved = plots.save(figure, self._filed(name), self.folder, caption)
        display(Image(self.folder / "figures" / f"{self._filed(name)}.png"))
        plt.close(saved)  # or the cell would draw it again

    def table(self, frame: pd.DataFrame, name: str) -> None:
        """Save a tidy table as ``tables/<number>_<name>.parquet``; values that Parquet has no type for become text."""
        plain = frame.reset_index(drop=True)
        for column in (name for name in plain if plain[name].dtype == object):
            plain[column] = plain[column].map(str).where(plain[column].notna())
        plain.to_parquet(self._write("tables", f"{self._filed(name)}.parquet"), index=False)

    def say(self, text: str) -> None:
        """Display Markdown: prose whose figures are computed."""
        from IPython.display import Markdown, display

        display(Markdown(text))

    @staticmethod
    def across(values: pd.Series, form: str = "{:.3g}") -> str:
        """Say the values at the smallest and the largest batch size, means over the rest, for a title or a sentence.

        values: its first index level is the batch size. form: how a value is written.

        >>> Book.across(pd.Series([0.981, 0.979, 0.952], index=[64, 64, 1024]), "{:.1%}")
        '98.0% at batch 64 and 95.2% at batch 1024'
        """
        means = values.groupby(level=0).mean().sort_index()
        ends = dict.fromkeys([means.index[0], means.index[-1]])
        return " and ".join(f"{form.format(means[b]) if pd.notna(means[b]) else '–'} at batch {b}" for b in ends)

    per_seed = rules.PerSeed

    def judge(self, claim: str, measured: Mapping[str, object], **used: object) -> None:
        """Judge a claim.

        measured: by part key one figure a seed, or ``missing(reason)`` for a part that this run does not measure.
        used: settings that differ from the book's for this claim.
        Raises KeyError unless the keys are those of the claim.
        """
        self._ledger.judge(claim, measured, **used)

    def ledger(self):
        """Save the verdicts as ``claims/<name>.csv`` and return them as a styled table."""
        self._ledger.save(self.folder)
        return rules.show(self._ledger.table())

    def lab(self, lab, name: str, caption: str | Callable[[], str]) -> None:
        """Display and save the live lab's picture, anew whenever training pauses.

        caption: text, or a function that returns it where it depends on the lab's state.
        """
        filed = self._filed(name)
        lab.keep(lambda: plots.save(lab.figure(), filed, self.folder, caption() if callable(caption) else caption))

    def contents(self) -> None:
        """Display the project's notebooks in reading order, each with a link and its title."""
        lines = []
        for path in sorted(self._notebooks.glob("[0-9][0-9]_*.ipynb")):
            first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
            lines.append(f"- [{path.stem}]({path.name}): {first.splitlines()[0].removeprefix('# ')}")
        self.say("\n".join(lines))

    def _write(self, kind: str, name: str) -> Path:
        file = self.folder / kind / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file
