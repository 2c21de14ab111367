"""Whether this machine agrees with the committed reference: its cheap part again, with the same seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from helpers import problems, sweep
from helpers.ledger import inference, rules
from helpers.sweep.store import Store

# Of each reference table, the epoch up to which a run of minutes can follow it.
CHEAP = {"01_sweep": 200, "02_history": 2}
MEASURES = ("test_accuracy", "distance_from_init")
_SETTINGS = (
    "dataset", "num_train", "model", "batch_size", "lr", "optimizer", "momentum", "weight_decay", "norm", "loss"
)  # fmt: skip


def compare(reference: Path, jobs: int | None = None, say: Callable[[str], None] = print) -> pd.DataFrame:
    """Train the cheap part again; a row per setting and measure: the reference's and ours, and the p of Welch's t test.

    ``agrees`` is False where the two differ by more than the spread over seeds explains, the rows being many
    (Benjamini & Hochberg). Raises ValueError where there is no reference, or data of it that this machine lacks.
    """
    rows = []
    for name, epochs in CHEAP.items():
        file = reference / "tables" / f"{name}.parquet"
        if not file.exists():
            raise ValueError(f"{file} is missing; {reference} holds no reference to compare with")
        table = pd.read_parquet(file)
        epochs = min(epochs, int(table.epochs.max()))
        dataset = table.dataset.iloc[0]
        try:
            problems.load(dataset)
        except problems.DataError as error:
            say(f"{name}: not compared. {error}")
            continue
        theirs = table[table.epochs == epochs]
        settings = theirs[list(_SETTINGS)].drop_duplicates().to_dict("records")
        say(f"{name}: {len(settings)} settings × {theirs.seed.nunique()} seeds of {dataset}, up to epoch {epochs}")
        grid = [{**s, "num_train": int(s["num_train"]), "epochs": epochs} for s in settings]
        with tempfile.TemporaryDirectory() as folder:  # the user's store may hold the reference itself
            run = sweep.run(grid, sorted(map(int, theirs.seed.unique())), jobs=jobs, store=Store(folder))
        ours = run[run.epochs == epochs]
        for (batch_size, lr), group in theirs.groupby(["batch_size", "lr"]):
            mine = ours[(ours.batch_size == batch_size) & (ours.lr == lr)]
            rows += [_row(name, epochs, batch_size, lr, m, group[m], mine[m]) for m in MEASURES]
    found = pd.DataFrame(rows)
    return found.assign(agrees=~inference.survive(found["p"]))


def _row(name: str, epoch: int, batch_size: int, lr: float, measure: str, theirs: pd.Series, ours: pd.Series) -> dict:
    same = theirs.to_numpy() == ours.to_numpy()
    p = 1.0 if same.all() else float(np.nan_to_num(stats.ttest_ind(theirs, ours, equal_var=False).pvalue))
    text = {}
    for whose, values in (("reference", theirs), ("here", ours)):
        mean, low, high = rules.interval(values)
        text[whose] = f"{mean:.4g} [{low:.4g}, {high:.4g}]"
    return {"table": name, "epoch": epoch, "batch_size": batch_size, "lr": lr, "measure": measure, **text,
            "n": len(ours), "same to the bit": f"{same.sum()} of {len(same)}", "p": p}  # fmt: skip
