"""Rules that judge the claims, and the table of verdicts that a notebook makes.

A part is *reproduced* when the 95 % interval of its mean over seeds lies inside its range, *not reproduced* when it
lies wholly outside, otherwise *inconclusive*. A part that quotes a published figure is judged in the source's own
set-up only; a claim is judged by the parts that count. Too few seeds, another dataset, or too small a set-up make a
part inconclusive, with the reason. A part that the chosen parameters do not measure is *not judged*, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from helpers.ledger.claims import CLAIMS, SETUPS, Part

VERDICTS = REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_JUDGED = (
    "reproduced", "not reproduced", "inconclusive", "not judged"
)  # fmt: skip
MIN_SEEDS = 3
COLUMNS = (
    "claim", "statement", "source", "notebook", "part", "measured", "published", "known", "ours", "low", "high", "n",
    "rule", "above", "below", "exact", "verdict", "why", "counts",
)  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """Stands for the figures of a part that the chosen parameters do not measure; so does any result computed from it.

    >>> np.log10(missing("no batch 64") / np.ones(3))
    Missing(reason='no batch 64')
    """

    reason: str

    def _itself(self, *others: object, **options: object) -> Missing:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _itself
    __array_ufunc__ = _itself


missing = Missing  # as notebooks call it: ``missing("batch 64 is not among batch_sizes")``


class PerSeed(dict):
    """One figure a seed by setting, for ``judge``: ``a = PerSeed(series)``, then ``a[64, 0.01]``.

    series: indexed by the settings and, last, the seed. A setting that was not run gives ``missing``, with the reason.
    """

    def __init__(self, series: pd.Series):
        *self.names, _ = series.index.names
        super().__init__({key[0] if len(key) == 1 else key: one.to_numpy()
                          for key, one in series.sort_index().groupby(level=self.names)})  # fmt: skip

    def __missing__(self, key: object) -> Missing:
        keys = key if isinstance(key, tuple) else (key,)
        setting = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(self.names, keys))
        return missing(f"the chosen parameters have no run with {setting}")


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its Student-t interval over seeds: (mean, low, high); the bounds are NaN for fewer than two seeds."""
    x = np.asarray(values, dtype=float)
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2 or not np.isfinite(x).all():
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return mean, mean - half, mean + half


class Ledger:
    """The verdicts of one notebook. ``used``: the settings it trained with, to compare with the claims' set-ups."""

    def __init__(self, notebook: str, dataset: str, **used: object):
        self.notebook, self.used, self.rows = notebook, {"dataset": dataset, **used}, []

    def judge(self, claim_id: str, measured: Mapping[str, Sequence[float] | Missing], **used: object) -> None:
        """Judge a claim by its parts: as ``Book.judge``."""
        claim = CLAIMS[claim_id]
        if set(measured) != set(claim.parts):
            raise KeyError(f"{claim_id} is judged by {sorted(claim.parts)}; got {sorted(measured)}")
        setup = SETUPS[claim.setup]
        other, reduced = self._differs(setup.must_match, used), self._differs(setup.scale, used)
        for key, part in claim.parts.items():
            given = measured[key]
            values = np.asarray([] if isinstance(given, Missing) else given, dtype=float)
            mean, low, high = interval(values)
            verdict, why = _verdict(part, values, low, high, other, reduced)
            counts = not (part.exact and reduced)
            if isinstance(given, Missing):
                verdict, why, counts = NOT_JUDGED, given.reason, False
            self.rows.append({
                "claim": claim_id, "statement": claim.statement, "source": claim.source, "notebook": self.notebook,
                "part": part.label, "measured": part.measured, "published": part.published, "known": part.known,
                "ours": mean, "low": low, "high": high, "n": len(values),
                "rule": part.rule, "above": part.low, "below": part.high, "exact": part.exact,
                "verdict": verdict, "why": why, "counts": counts,
            })  # fmt: skip

    def _differs(self, settings: Mapping[str, object], used: Mapping[str, object]) -> str:
        used = {**self.used, **used}
        return ", ".join(
            f"{name} {used[name]} instead of {value}"
            for name, value in settings.items()
            if name in used and used[name] != value
        )

    def table(self) -> pd.DataFrame:
        """One row per part: the claim, the published figure, ours with its interval, n, the rule and the verdict."""
        return pd.DataFrame(self.rows)

    def save(self, folder: str | Path) -> Path:
        """Write the table as ``claims/<notebook>.csv`` under ``folder``."""
        file = Path(folder) / "claims" / f"{self.notebook}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.table().to_csv(file, index=False)
        return file


def _verdict(part: Part, values: np.ndarray, low: float, high: float, other: str, reduced: str) -> tuple[str, str]:
    if other:
        return INCONCLUSIVE, f"another set-up: {other}"
    if part.exact and reduced:
        return INCONCLUSIVE, f"reduced set-up: {reduced}"
    if len(values) < MIN_SEEDS:
        return INCONCLUSIVE, f"too few seeds: {len(values)}, and {MIN_SEEDS} are needed"
    if not np.isfinite(values).all():
        return INCONCLUSIVE, "a seed diverged"
    note = f"at a reduced scale: {reduced}" if reduced else ""
    if part.low <= low and high <= part.high:
        return REPRODUCED, note
    if high < part.low or low > part.high:
        return NOT_REPRODUCED, note
    return INCONCLUSIVE, "the interval reaches across the rule's bound: more seeds are needed"


def read(file: Path) -> pd.DataFrame:
    """A table that ``save`` wrote."""
    return pd.read_csv(file, dtype={"part": str, "published": str})


def _text(column: pd.Series) -> pd.Series:
    return column.map(lambda value: "" if pd.isna(value) else str(value)).astype(str)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One verdict per claim, from the parts that count: all reproduced; else any that is not; else inconclusive.

    A claim none of whose counting parts was measured is not judged; one with an unmeasured part is never reproduced.
    ``tally``: how many of the counting parts are reproduced.
    """
    claims, rows = {}, []
    for row in table.to_dict("records"):
        claims.setdefault(row["claim"], []).append(row)
    for claim_id, parts in claims.items():
        counted = [part for part in parts if part["counts"]]
        unmeasured = [part for part in parts if part["verdict"] == NOT_JUDGED and not part["exact"]]
        verdicts = {part["verdict"] for part in counted + unmeasured or parts}
        verdict = next(iter(verdicts)) if len(verdicts) == 1 else INCONCLUSIVE
        if NOT_REPRODUCED in verdicts:
            verdict = NOT_REPRODUCED
        reasons = [part["why"] for part in (counted + unmeasured if counted else parts) if pd.notna(part["why"])]
        reproduced = sum(part["verdict"] == REPRODUCED for part in counted)
        rows.append({
            "claim": claim_id, **{name: parts[0][name] for name in ("statement", "source", "notebook")},
            "verdict": verdict, "why": "; ".join(dict.fromkeys(filter(None, reasons))),
            "tally": f"{reproduced} of {len(counted)} parts reproduced",
        })  # fmt: skip
    return pd.DataFrame(rows)


def show(table: pd.DataFrame) -> pd.io.formats.style.Styler:
    """The ledger as a reader sees it: ours with its interval in one column, the verdict coloured."""
    colours = {REPRODUCED: "#1b7837", NOT_REPRODUCED: "#b2182b", INCONCLUSIVE: "#666666", NOT_JUDGED: "#666666"}
    return (
        readable(table)
        .style.hide(axis="index")
        .map(lambda v: f"color: {colours.get(v, 'inherit')}; font-weight: bold", subset=["verdict"])
        .set_properties(**{"text-align": "left"})
    )


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with figures rounded and intervals as text, for people."""
    ours = [
        (f"{mean:.4g}" if n else "–") + (f" [{low:.4g}, {high:.4g}]" if math.isfinite(low) else "")
        for mean, low, high, n in zip(table["ours"], table["low"], table["high"], table["n"])
    ]
    return pd.DataFrame({
        "claim": table["claim"], "part": table["part"], "measured": table["measured"],
        "published": _text(table["published"]) + " (" + _text(table["known"]) + ")",
        "ours [95 %]": ours, "n": table["n"], "rule": table["rule"], "verdict": table["verdict"],
        "why": _text(table["why"]),
    })  # fmt: skip
