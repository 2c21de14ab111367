"""The ledger: each claim of the write-ups, the rule that judges it (fixed before its result was seen), and verdicts.

Every part of a claim is one figure a seed. The rule is a range: *reproduced* when the 95 % interval of the mean over
seeds lies inside it, *not reproduced* when it lies wholly outside, else *inconclusive*. A part that quotes a published
figure is judged in the exact set-up alone; a claim is judged by its parts that count. Too few seeds, another dataset,
or a set-up too small make it inconclusive, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

VERDICTS = REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
MIN_SEEDS = 3
COLUMNS = (
    "claim", "statement", "source", "notebook", "part", "measured", "published", "known", "ours", "low", "high", "n",
    "rule", "above", "below", "exact", "verdict", "why", "counts",
)  # fmt: skip

# What the write-ups trained. A difference in scale leaves the parts that quote no figure; any other leaves none.
_SCALE = {
    "shen": ("num_train", "epochs", "draw_size"), "brownlee": (), "cnn": ("num_train",), "mnist": ("num_train",),
    "any": (),
}  # fmt: skip
SETUPS = {
    "shen": {"dataset": "mnist", "num_train": 60_000, "epochs": 30, "batch_sizes": [64, 256, 1024], "lr": 0.01}
    | {"draw_size": 1024},
    "brownlee": {"dataset": "blobs", "epochs": 200, "lr": 0.01, "momentum": 0.9},
    "cnn": {"dataset": "mnist", "num_train": 60_000, "batch_sizes": [32, 64, 128, 256, 512, 1024]},
    "mnist": {"dataset": "mnist", "num_train": 60_000},
    "any": {},
}


@dataclass(frozen=True)
class Part:
    """One figure a seed, the range that a true claim puts its mean in, and what was published of it.

    ``known``: how the published figure is known (stated, read off a plot, inferred, checked by us, an identity).
    ``exact``: judged in the exact set-up alone.
    """

    measured: str
    low: float
    high: float
    published: str = ""
    known: str = ""
    exact: bool = False

    @property
    def rule(self) -> str:
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"above {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """A statement of a write-up, where it was made, the set-up it was made in, and the parts that settle it."""

    statement: str
    source: str
    setup: str
    parts: Mapping[str, Part]


def _near(measured: str, published: float, margin: float, known: str) -> Part:
    return Part(measured, published - margin, published + margin, f"{published:g}", known, exact=True)


ACCURACY, _POINTS = "test accuracy, %", "points of test accuracy"
_MARGIN = 0.3  # points: a published figure is read off a plot to ±0.1, and one run's seed moves it by about as much

CLAIMS: dict[str, Claim] = {
    "blobs-flavours": Claim(
        "Full batch is slow and quiet, batch 1 unstable until its rate is cut, batch 32 in between",
        "Brownlee 2019", "brownlee",
        {
            "full batch": _near("final test accuracy", 0.830, 0.03, "stated"),
            "batch 1, lr 0.001": _near("final test accuracy", 0.824, 0.03, "stated"),
            "batch 32": _near("final test accuracy", 0.812, 0.03, "stated"),
            "batch 1 below full batch": Part("difference, test accuracy", 0.0, math.inf, "0.830 − 0.606", "stated"),
            "batch 1 unstable": Part("std over the last half, ÷ full batch's", 3.0, math.inf, "unstable", "stated"),
            "batch 1, lr 0.001: to 80 %": Part("epochs to 80 % test accuracy", -math.inf, 25, "25", "stated"),
        },
    ),
    "blobs-tension": Claim(
        "From batch 4 to 450 the curve gets steadier and slower",
        "Brownlee 2019", "brownlee",
        {
            "noise falls": Part("rank correlation of change per epoch and size", -math.inf, -0.7, "falls", "read off"),
            "epochs rise": Part("rank correlation of epochs to 80 % and size", 0.7, math.inf, "rises", "read off"),
        },
    ),
    "sweep-accuracy": Claim(
        "A larger batch ends at lower test accuracy, at equal learning rate and epochs",
        "Shen 2018", "shen",
        {
            "64 − 256": Part(_POINTS, 0.0, math.inf, "97.9 − 97.2", "read off"),
            "256 − 1024": Part(_POINTS, 0.0, math.inf, "97.2 − 95.2", "read off"),
            "64": _near(ACCURACY, 97.9, _MARGIN, "read off"),
            "256": _near(ACCURACY, 97.2, _MARGIN, "read off"),
            "1024": _near(ACCURACY, 95.2, _MARGIN, "read off"),
        },
    ),
    "sweep-gap": Claim(
        "The generalisation gap (train − test accuracy) is smaller for larger batches",
        "Shen 2018", "shen",
        {
            "64 − 1024": Part("points of gap", 0.0, math.inf, "2.0 − 0.3", "read off"),
            "64": _near("gap, points", 2.0, _MARGIN, "read off"),
            "256": _near("gap, points", 1.2, _MARGIN, "read off"),
            "1024": _near("gap, points", 0.3, _MARGIN, "read off"),
        },
    ),
    "lr-repairs": Claim(
        "Batch 1024 recovers with the learning rate × 10",
        "Shen 2018", "shen",
        {
            "gain of × 10": Part(_POINTS, 0.0, math.inf, "97.8 − 95.2", "read off"),
            "64 − (1024 at × 10)": Part(_POINTS, -_MARGIN, _MARGIN, "97.9 − 97.8", "read off", exact=True),
            "1024 at × 10": _near(ACCURACY, 97.8, _MARGIN, "read off"),
        },
    ),
    "equal-steps": Claim(
        "At equal numbers of steps, instead of epochs, accuracy and distance travelled agree",
        "Shen 2018; Hoffer 2017", "shen",
        {
            "1024 − 64 at equal steps": Part(_POINTS, -_MARGIN, _MARGIN, "0", "inferred"),
            "distance 1024 ÷ 64 at equal steps": Part("ratio of distances", 0.9, 1.1, "1", "inferred"),
        },
    ),
    "cnn-sweep": Claim(
        "Six CNNs, batch 32 to 1024: accuracy falls with batch size at equal learning rate and epochs",
        "third write-up", "cnn",
        {"accuracy falls": Part("rank correlation of test accuracy and size", -math.inf, -0.8, "falls", "inferred")},
    ),
    "walk-norm-grows": Claim(
        "The summed gradient grows with the batch size (early checkpoint, with steps inside a trial)",
        "Shen 2018", "shen",
        {
            "64 ÷ 2": Part("ratio of mean norms", 1.0, math.inf, "0.25 ÷ 0.16", "checked"),
            "1024 ÷ 64": Part("ratio of mean norms", 1.0, math.inf, "0.34 ÷ 0.25", "checked"),
        },
    ),
    "frozen-norm-flat": Claim(
        "At frozen weights the same sum does not depend on how it is split",
        "an identity", "shen",
        {"largest deviation": Part("relative, over all splits", -math.inf, 1e-5, "0.343 for every split", "checked")},
    ),
    "late-nonmonotone": Claim(
        "At the late checkpoint the walk's norm first falls with batch size, then rises",
        "Shen 2018", "shen",
        {
            "8 ÷ 1": Part("ratio of mean norms", -math.inf, 1.0, "below 1", "read off", exact=True),
            "1024 ÷ 8": Part("ratio of mean norms", 1.0, math.inf, "above 1", "read off", exact=True),
        },
    ),
    "norm-spread": Claim(
        "The walk's norm spreads more, relative to its mean, for larger batches",
        "Shen 2018", "shen",
        {"1024 ÷ 2": Part("ratio of std/mean over trials", 1.0, math.inf, "above 1", "read off")},
    ),
    "early-larger": Claim(
        "Gradients are larger early in training than late",
        "Shen 2018", "shen",
        {"early ÷ late at 1024": Part("ratio of mean norms", 1.0, math.inf, "above 1", "read off")},
    ),
    "tail-entries": Claim(
        "Large gradient entries are far commoner at batch 1024 than at 2",
        "Shen 2018", "shen",
        {
            "commoner": Part("log₁₀ ratio of P(|g| > 0.0082)", 0.0, math.inf, "above 0", "read off"),
            "how far": Part("log₁₀ ratio of P(|g| > 0.0082)", 2.0, 3.0, "2 to 3", "read off", exact=True),
        },
    ),
    "noise-half-power": Claim(
        "At fixed weights the noise of a minibatch's gradient falls as B^−½",
        "statistics", "shen",
        {"slope": Part("log-log slope of noise against B", -0.52, -0.48, "−0.5", "stated")},
    ),
    "init-norm": Claim(
        "Weights start at radius 44 and SGD leaves them near it",
        "Shen 2018", "shen",
        {
            "at initialisation": Part("‖w₀‖", 43.85, 44.05, "44", "stated"),
            "at the end": Part("‖w‖ (64, lr 0.01)", 43.0, 46.0, "44", "stated"),
        },
    ),
    "sgd-sphere": Claim(
        "SGD moves along the sphere it starts on",
        "Shen 2018", "shen",
        {"‖w‖ end ÷ start": Part("ratio, farthest from 1 over batch sizes", 0.95, 1.05, "1", "inferred")},
    ),
    "adam-leaves": Claim(
        "Adam leaves the sphere; how far hangs on its learning rate",
        "Shen 2018", "shen",
        {
            "lr 0.01: end ÷ start": Part("ratio of radii", 2.0, math.inf, "258 ÷ 44", "stated"),
            "lr 0.001: end ÷ start": Part("ratio of radii", -math.inf, 2.0, "much smaller", "inferred"),
            "lr 0.01: ‖w‖ at the end": _near("‖w‖ (64)", 258, 26, "stated"),
            "accuracy, lr 0.001 − 0.01": Part(_POINTS, 0.0, math.inf, "above 0", "inferred"),
        },
    ),
    "distance-epochs": Claim(
        "At equal epochs a larger batch travels less; a learning rate × 10 makes up for it",
        "Shen 2018", "shen",
        {
            "64 ÷ 1024": Part("ratio of distances", 1.0, math.inf, "above 1", "inferred"),
            "(1024 at × 10) ÷ 1024": Part("ratio of distances", 1.0, math.inf, "above 1", "inferred"),
            "(1024 at × 10) ÷ 64": Part("ratio of distances", 0.75, 1.33, "1", "inferred"),
        },
    ),
    "distance-power": Claim(
        "Distance grows like a power of time, not like its logarithm",
        "Shen 2018; Hoffer 2017", "shen",
        {"residuals, log ÷ power": Part("ratio of fit residuals (64, lr 0.01)", 1.0, math.inf, "above 1", "inferred")},
    ),
    "switch-recovers": Claim(
        "A large-batch run is not stuck: a switch to batch 64, or to lr × 10, recovers; going on does not",
        "Shen 2018", "shen",
        {
            "to batch 64, gain over control": Part(_POINTS, 0.0, math.inf, "98.0 − 96.3", "read off"),
            "to lr × 10, gain over control": Part(_POINTS, 0.0, math.inf, "97.9 − 96.3", "read off"),
            "to batch 64": _near(ACCURACY, 98.0, _MARGIN, "read off"),
            "to lr × 10": _near(ACCURACY, 97.9, _MARGIN, "read off"),
            "control": _near(ACCURACY, 96.3, _MARGIN, "read off"),
        },
    ),
    "early-switch": Claim(
        "Switching after 2 epochs ends where switching after 30 does",
        "Shen 2018", "shen",
        {
            "early − late": Part(_POINTS, -_MARGIN, _MARGIN, "98.1 − 98.0", "read off"),
            "early": _near(ACCURACY, 98.1, _MARGIN, "read off"),
        },
    ),
    "rules": Claim(
        "At a large batch the linear rule does best, then the square root, then none; warm-up helps",
        "Goyal 2017; Masters & Luschi 2018; Malladi 2022", "mnist",
        {
            "SGD: √ − none": Part(_POINTS, 0.0, math.inf, "41.67 − 26.22 (ResNet-50, error)", "stated"),
            "SGD: linear − √": Part(_POINTS, 0.0, math.inf, "26.22 − 24.84 (ResNet-50, error)", "stated"),
            "SGD: warm-up − linear": Part(_POINTS, 0.0, math.inf, "24.84 − 23.74 (ResNet-50, error)", "stated"),
            "momentum: linear − none": Part(_POINTS, 0.0, math.inf, "41.67 − 24.84 (ResNet-50, error)", "stated"),
            "Adam: √ − linear": Part(_POINTS, 0.0, math.inf, "above 0", "inferred"),
        },
    ),
    "adapted-length": Claim(
        "With as many updates as the small batch, and the square-root rule, the large batch generalises as well",
        "Hoffer 2017", "mnist",
        {
            "adapted − equal epochs": Part(_POINTS, 0.0, math.inf, "98.53 − 97.05", "stated"),
            "adapted − small": Part(_POINTS, -_MARGIN, math.inf, "98.53 − 98.27", "stated"),
        },
    ),
    "lr-range": Claim(
        "The range of learning rates that trains shrinks as the batch grows",
        "Masters & Luschi 2018", "mnist",
        {
            "octaves": Part("octaves that train, largest batch − smallest", -math.inf, 0.0, "0 or below", "inferred"),
            "highest rate per example": Part("ratio, largest batch ÷ smallest", -math.inf, 1.0, "below 1", "read off"),
        },
    ),
    "stale-gradient": Claim(
        "n steps of size m and one of size nm part as the base rate and n grow, and agree as the rate goes to 0",
        "Masters & Luschi 2018, eq. 7–9", "any",
        {
            "order in the rate": Part("log-log slope of relative distance, small rates", 0.9, 1.1, "→ 0", "inferred"),
            "grows with n": Part("rank correlation of relative distance and n", 0.9, math.inf, "grows", "inferred"),
        },
    ),
    "batch-vs-decay": Claim(
        "Raising the batch × 5 does what dropping the rate ÷ 5 does, with fewer updates",
        "Smith 2017", "mnist",
        {
            "raised − dropped": Part(_POINTS, -_MARGIN, _MARGIN, "0", "stated"),
            "updates, raised ÷ dropped": Part("ratio", -math.inf, 1.0, "far fewer", "stated"),
        },
    ),
    "adam-beta2": Claim(
        "Adam at batch 1 to 16 does better with the half-life of β₂ fixed in examples than with β₂ fixed",
        "Marek 2025", "mnist",
        {
            "batch 1, best rate of each": Part(_POINTS, 0.0, math.inf, "above 0", "inferred"),
            "batch 1, mean over rates": Part(_POINTS, 0.0, math.inf, "above 0", "inferred"),
            "batch 1 to 16, worst": Part(_POINTS, -_MARGIN, math.inf, "0 or above", "inferred"),
        },
    ),
    "noise-scale": Claim(
        "The gradient noise scale tr Σ ÷ |G|² rises in training, and is of order 10³ on MNIST",
        "McCandlish 2018", "mnist",
        {
            "two-batch ÷ exact": Part("ratio of estimates at fixed weights", 0.9, 1.1, "1", "stated"),
            "late ÷ early": Part("ratio of noise scales", 1.0, math.inf, "rises", "stated"),
            "order": Part("log₁₀ of the median along training", 2.0, 4.0, "2.95 (about 900)", "stated"),
        },
    ),
    "three-regions": Claim(
        "Steps to a target, the rate retuned at each size: first ∝ 1/B, then flat; the knee is near the noise scale",
        "Shallue 2019; McCandlish 2018", "mnist",
        {
            "slope, smallest sizes": Part("log-log slope of steps against B", -1.15, -0.85, "−1", "stated"),
            "slope, largest sizes": Part("log-log slope of steps against B", -0.3, 0.1, "0", "stated"),
            "critical batch ÷ noise scale": Part("log₁₀ of the ratio", -1.0, 1.0, "0", "stated"),
        },
    ),
    "sharp-large": Claim(
        "The large-batch solution is sharper and generalises less; less so once its rate is retuned",
        "Keskar 2016; Shallue 2019", "mnist",
        {
            "λ_max, large ÷ small": Part("ratio", 1.0, math.inf, "above 1", "inferred"),
            "sharpness, large ÷ small": Part("ratio, ε 10⁻³, all weights", 1.0, math.inf, "205 ÷ 1.23", "stated"),
            "rise along the line, large ÷ small": Part("ratio, train loss", 1.0, math.inf, "above 1", "read off"),
            "small − large": Part(_POINTS, 0.0, math.inf, "98.03 − 97.81", "stated"),
            "λ_max ratio, retuned ÷ not": Part("ratio of ratios", -math.inf, 1.0, "weaker", "inferred"),
        },
    ),
    "reparametrisation": Claim(
        "Sharpness is not of the function: rescaled layers compute the same and curve otherwise",
        "Dinh 2017", "any",
        {
            "same function": Part("largest relative change of a logit", -math.inf, 1e-5, "0", "an identity"),
            "other λ_max": Part("ratio after rescaling", 2.0, math.inf, "any", "an identity"),
        },
    ),
    "stability-edge": Claim(
        "Full-batch descent sharpens until λ_max·η ≈ 2, and stays there; smaller batches stay below",
        "Cohen 2021; Andreyev 2024", "mnist",
        {
            "full batch": Part("λ_max·η, median over the last quarter", 1.8, 2.2, "2", "stated"),
            "full − small batch": Part("difference of λ_max·η", 0.0, math.inf, "above 0", "stated"),
        },
    ),
    "accumulate": Claim(
        "Gradients accumulated over micro-batches equal the large batch's, but not under batch normalisation",
        "an identity", "any",
        {
            "no normalisation": Part("relative difference of gradients", -math.inf, 1e-6, "0", "an identity"),
            "group": Part("relative difference of gradients", -math.inf, 1e-6, "0", "an identity"),
            "batch": Part("relative difference of gradients", 1e-2, math.inf, "not 0", "stated"),
            "ghost batches": Part("relative difference of gradients", -math.inf, 1e-6, "0", "an identity"),
        },
    ),
    "batch-dependence": Claim(
        "Under batch normalisation an example's loss depends on the others in its batch",
        "Ioffe & Szegedy 2015", "any",
        {
            "batch": Part("std ÷ mean of one example's loss over batches", 1e-2, math.inf, "not 0", "inferred"),
            "group": Part("std ÷ mean of one example's loss over batches", -math.inf, 1e-5, "0", "an identity"),
        },
    ),
    "norm-batch": Claim(
        "Batch statistics over few examples generalise best, whatever the size of the step's batch",
        "Masters & Luschi 2018; Hoffer 2017", "mnist",
        {
            "8 − whole batch": Part(_POINTS, 0.0, math.inf, "above 0 (best 4–8 on CIFAR)", "read off"),
            "8 − 2": Part(_POINTS, 0.0, math.inf, "above 0", "read off"),
        },
    ),
    "memory": Claim(
        "Memory is a straight line in the micro-batch and flat in the number of accumulation steps",
        "an identity", "any",
        {
            "saved bytes": Part("largest relative residual of the line", -math.inf, 1e-3, "0", "an identity"),
            "peak, predicted ÷ measured": Part("ratio, at a size not fitted", 0.85, 1.15, "1", "inferred"),
            "peak, many steps ÷ one": Part("ratio at one micro-batch", 0.85, 1.15, "1", "inferred"),
        },
    ),
}  # fmt: skip


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

    def judge(self, claim_id: str, measured: Mapping[str, Sequence[float]]) -> None:
        """Judge a claim by its parts: ``measured[part]`` holds one figure a seed. KeyError unless the parts match."""
        claim = CLAIMS[claim_id]
        if set(measured) != set(claim.parts):
            raise KeyError(f"{claim_id} is judged by {sorted(claim.parts)}; got {sorted(measured)}")
        for name, part in claim.parts.items():
            values = np.asarray(measured[name], dtype=float)
            mean, low, high = interval(values)
            verdict, why = self._verdict(claim, part, values, low, high)
            self.rows.append({
                "claim": claim_id, "statement": claim.statement, "source": claim.source, "notebook": self.notebook,
                "part": name, "measured": part.measured, "published": part.published, "known": part.known,
                "ours": mean, "low": low, "high": high, "n": len(values),
                "rule": part.rule, "above": part.low, "below": part.high, "exact": part.exact,
                "verdict": verdict, "why": why, "counts": not part.exact or not self._differs(claim, in_scale=True),
            })  # fmt: skip

    def _differs(self, claim: Claim, *, in_scale: bool) -> str:
        return ", ".join(
            f"{name} {self.used[name]} instead of {value}"
            for name, value in SETUPS[claim.setup].items()
            if (name in _SCALE[claim.setup]) == in_scale and name in self.used and self.used[name] != value
        )

    def _verdict(self, claim: Claim, part: Part, values: np.ndarray, low: float, high: float) -> tuple[str, str]:
        if self._differs(claim, in_scale=False):
            return INCONCLUSIVE, f"another set-up: {self._differs(claim, in_scale=False)}"
        if part.exact and self._differs(claim, in_scale=True):
            return INCONCLUSIVE, f"reduced set-up: {self._differs(claim, in_scale=True)}"
        if len(values) < MIN_SEEDS:
            return INCONCLUSIVE, f"too few seeds: {len(values)}, and {MIN_SEEDS} are needed"
        if not np.isfinite(values).all():
            return INCONCLUSIVE, "a seed diverged"
        reduced = self._differs(claim, in_scale=True)
        note = f"at a reduced scale: {reduced}" if reduced else ""
        if part.low <= low and high <= part.high:
            return REPRODUCED, note
        if high < part.low or low > part.high:
            return NOT_REPRODUCED, note
        return INCONCLUSIVE, "the interval reaches across the rule's bound: more seeds are needed"

    def table(self) -> pd.DataFrame:
        """One row per part: the claim, the published figure, ours with its interval, n, the rule and the verdict."""
        return pd.DataFrame(self.rows)

    def save(self, folder: str | Path) -> Path:
        """Write the table as ``claims/<notebook>.csv`` under ``folder``."""
        file = Path(folder) / "claims" / f"{self.notebook}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.table().to_csv(file, index=False)
        return file


def empty() -> pd.DataFrame:
    """A ledger's table without a row."""
    return pd.DataFrame(columns=COLUMNS)


def read(file: Path) -> pd.DataFrame:
    """A table that ``save`` wrote."""
    return pd.read_csv(file, dtype={"part": str, "published": str})


def _text(column: pd.Series) -> pd.Series:
    return column.map(lambda value: "" if pd.isna(value) else str(value)).astype(str)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One verdict per claim, from the parts that count: all reproduced; else any that is not; else inconclusive.

    ``tally``: how many of them are reproduced.
    """
    rows = []
    for claim_id, parts in table.groupby("claim", sort=False):
        counted = parts[parts["counts"]]
        verdicts = set(counted["verdict"]) or {INCONCLUSIVE}
        verdict = next(iter(verdicts)) if len(verdicts) == 1 else INCONCLUSIVE
        if NOT_REPRODUCED in verdicts:
            verdict = NOT_REPRODUCED
        why = "; ".join(dict.fromkeys(_text((parts if counted.empty else counted)["why"])))
        first = parts.iloc[0]
        rows.append({
            "claim": claim_id, "statement": first["statement"], "source": first["source"],
            "notebook": first["notebook"], "verdict": verdict, "why": why.strip("; "),
            "tally": f"{(counted['verdict'] == REPRODUCED).sum()} of {len(counted)} parts reproduced",
        })  # fmt: skip
    return pd.DataFrame(rows)


def show(table: pd.DataFrame) -> pd.io.formats.style.Styler:
    """The ledger as a reader sees it: ours with its interval in one column, the verdict coloured."""
    colours = {REPRODUCED: "#1b7837", NOT_REPRODUCED: "#b2182b", INCONCLUSIVE: "#666666"}
    return (
        readable(table)
        .style.hide(axis="index")
        .map(lambda v: f"color: {colours.get(v, 'inherit')}; font-weight: bold", subset=["verdict"])
        .set_properties(**{"text-align": "left"})
    )


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with figures rounded and intervals as text, for people."""
    ours = [
        f"{mean:.4g}" + (f" [{low:.4g}, {high:.4g}]" if math.isfinite(low) else "")
        for mean, low, high in zip(table["ours"], table["low"], table["high"])
    ]
    return pd.DataFrame({
        "claim": table["claim"], "part": table["part"], "measured": table["measured"],
        "published": _text(table["published"]) + " (" + _text(table["known"]) + ")",
        "ours [95 %]": ours, "n": table["n"], "rule": table["rule"], "verdict": table["verdict"],
        "why": _text(table["why"]),
    })  # fmt: skip
