"""The report of a run as one page: the answer in six sentences, the ledger, what was found, every notebook's cells.

It reads what the run left in its folder (run.json, claims.csv, figures, executed notebooks) and asks nothing else: any
figure on it leads to the cell that computed it, to the table behind it, and to the command that makes it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from companion import pages
from helpers.ledger import claims, inference, rules
from helpers.problems import data

REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
CARRYING = ("02_three_axes", "03_walk_and_frozen", "05_switching")  # the three figures of the first screen


@dataclass(frozen=True)
class Sentence:
    """Words around figures of the ledger, ``{p[claim/part key]}``: what they say holds whatever those come to.

    ``then`` follows where every claim of the sentence is reproduced.
    """

    text: str
    title: str = ""
    figure: str = ""
    then: str = ""

    @property
    def claims(self) -> list[str]:
        return list(dict.fromkeys(figure.split("/")[0] for figure in self.figures))

    @property
    def figures(self) -> list[str]:
        return re.findall(r"p\[(.+?)\]", self.text)


ANSWER = (
    Sentence(
        "At equal passes and an equal learning rate, batch 64 ends at {p[sweep-accuracy/64]:.2f} % test accuracy, "
        "batch 256 at {p[sweep-accuracy/256]:.2f} %, batch 1024 at {p[sweep-accuracy/1024]:.2f} %."
    ),
    Sentence(
        "After equally many steps instead, batch 1024 is {p[equal-steps/accuracy]:+.2f} points from "
        "batch 64 and has travelled {p[equal-steps/distance]:.3f} times as far."
    ),
    Sentence(
        "With 10 times the learning rate batch 1024 ends at {p[lr-repairs/1024x10]:.2f} %, "
        "{p[lr-repairs/gain]:+.2f} points on its own at the lower rate."
    ),
    Sentence(
        "Train minus test accuracy, the gap by which the write-up measures generalisation, is {p[sweep-gap/64]:.2f} "
        "points at batch 64 and {p[sweep-gap/1024]:.2f} at batch 1024."
    ),
    Sentence(
        "A run that leaves batch 1024 for batch 64 ends {p[switch-recovers/batch-gain]:+.2f} "
        "points from one that goes on; left early or late, it ends {p[early-switch/early-late]:+.2f} points apart."
    ),
    Sentence(
        "The summed gradient of 1,024 examples is {p[walk-norm-grows/1024/64]:.2f} times as long in one batch as in "
        "batches of 64 while the weights move, and the same to {p[frozen-norm-flat/largest-deviation]:.0e} when they "
        "are held."
    ),
)

FINDINGS = (
    Sentence(
        "A trial that takes a step after each minibatch finds a norm {p[walk-norm-grows/64/2]:.2f} times as large at "
        "batch 64 as at 2, and {p[walk-norm-grows/1024/64]:.2f} times as large at 1024 as at 64. With the weights "
        "held, no two splits of the same examples differ by more than {p[frozen-norm-flat/largest-deviation]:.0e}: a "
        "sum does not depend on its order. All of the growth is the weights moving inside the trial.",
        "Does the gradient grow with the batch?",
        "03_walk_and_frozen",
    ),
    Sentence(
        "The gap between train and test accuracy is {p[sweep-gap/64]:.2f} points at batch 64, "
        "{p[sweep-gap/256]:.2f} at 256 and {p[sweep-gap/1024]:.2f} at 1024; test accuracy is "
        "{p[sweep-accuracy/64]:.2f}, {p[sweep-accuracy/256]:.2f} and {p[sweep-accuracy/1024]:.2f} %.",
        "Which batch has the largest generalisation gap?",
        "02_gap",
        "By that metric the largest batch generalises best; what it lacks is training.",
    ),
    Sentence(
        "At equal epochs batch 64 and 1024 are {p[sweep-accuracy/64-256]:.2f} + {p[sweep-accuracy/256-1024]:.2f} "
        "points apart, by way of 256; at equal steps {p[equal-steps/accuracy]:+.2f}, and their weights "
        "have gone {p[equal-steps/distance]:.3f} times as far.",
        "Is it the batch, or the number of steps?",
        "02_three_axes",
        "Accuracy at equal epochs is steps in disguise.",
    ),
    Sentence(
        "At learning rate 0.01 Adam ends at {p[adam-leaves/0.01-end/start]:.2f} times the radius it starts at, "
        "at the usual 0.001 at {p[adam-leaves/0.001-end/start]:.2f} times; its test accuracy at 0.001 is "
        "{p[adam-leaves/accuracy-0.001-0.01]:+.2f} points from that at 0.01.",
        "Does Adam end far away, and worse?",
        "04_radius",
        "A verdict on Adam that does not give its learning rate is a verdict on the rate.",
    ),
    Sentence(
        "Over the eight sizes, the change of test accuracy from epoch to epoch and the size correlate by "
        "{p[blobs-tension/noise-falls]:+.2f} (Spearman). Batch 450 of 500 examples leaves a last minibatch of 50; the "
        "figure sets beside the eight those sizes that divide 500.",
        "Why is the largest minibatch of the toy problem noisy again?",
        "01_tension",
    ),
    Sentence(
        "The large batch's solution has {p[sharp-large/lambda]:.2f} times the small one's λ_max; once "
        "both rates are retuned, that ratio is {p[sharp-large/retuned]:.2f} times what it was. The "
        "figure sets λ_max against the train loss that each run has reached.",
        "Are the minima of large batches sharp, or merely early?",
        "08_sharpness_and_loss",
    ),
    Sentence(
        "From the best rate of the small batch plain SGD gains {p[rules/sgd-sqrt-none]:+.2f} points by the "
        "square-root rule and {p[rules/sgd-linear-sqrt]:+.2f} more by the linear one; SGD with momentum gains "
        "{p[rules/momentum-linear-none]:+.2f} by the linear rule. The figure shows each from lower rates too.",
        "When does the linear rule help?",
        "06_rules_by_start",
    ),
)


class _Figures(dict):
    """The ledger's means by ``claim/part key``, of the parts that were judged; formats as mean ± half the interval."""

    @dataclass(frozen=True)
    class Mean:
        mean: float
        half: float

        def __format__(self, spec: str) -> str:
            half = f" ± {self.half:{spec.lstrip('+')}}" if math.isfinite(self.half) and self.half else ""
            return f"{self.mean:{spec}}{half}".replace("-", "−", 1 if self.mean < 0 else 0)

    def __init__(self, table: pd.DataFrame):
        super().__init__()
        judged = {(r["claim"], r["part"]): r for r in table.to_dict("records") if r["verdict"] != rules.NOT_JUDGED}
        for claim_id, claim in claims.CLAIMS.items():
            for key, part in claim.parts.items():
                if row := judged.get((claim_id, part.label)):
                    self[f"{claim_id}/{key}"] = self.Mean(row["ours"], row["high"] - row["ours"])


def write(folder: Path, file: Path | None = None, reference: Path = REFERENCE) -> Path:
    """Write the report of a run's ``folder``, as its ``index.html`` or another file. ValueError where it is no run."""
    run, table = _read(folder)
    other = None
    if reference.resolve() != folder.resolve():
        with contextlib.suppress(ValueError):  # none, or an older one: a run is reported without it
            other = _read(reference)[1]
    notebooks = [_notebook(folder, run, one, table, reference if other is not None else None)
                 for one in run["notebooks"]]  # fmt: skip
    ledger = _ledger(run, table, notebooks, folder, other)
    by_name = {claim["claim"]: claim for claim in ledger}
    drawn = {f["name"]: f for n in notebooks for f in n["figures"]}
    findings = [
        said | {"figure": drawn.get(s.figure), "notebook": by_name[s.claims[0]]["notebook"], "title": s.title}
        for s, said in _said(FINDINGS, table, by_name)
    ]
    sizes = [data.TEST_SIZES[n.get("dataset")] for n in run["notebooks"] if n.get("dataset") in data.TEST_SIZES]
    page = pages.render(
        "report.html.j2", run=run, notebooks=notebooks, claims=ledger, verdicts=rules.VERDICTS,
        counts={v: sum(c["verdict"] == v for c in ledger) for v in rules.VERDICTS},
        answer=[said for _, said in _said(ANSWER, table, by_name)],
        carrying=[drawn[name] for name in CARRYING if name in drawn], findings=findings, chance=chance(table),
        images=max(sizes, default=0), tables=sorted(f.name for f in (folder / "tables").glob("*.parquet")),
        provenance=json.dumps(run, indent=1, ensure_ascii=False),
    )  # fmt: skip
    return pages.write(file or folder / "index.html", page)


def _read(folder: Path) -> tuple[dict, pd.DataFrame]:
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        names = [str(n["name"]) for n in run["notebooks"]] + [f"{run['profile']}{run['seconds']:.0f}"]
        table = rules.read(folder / "claims.csv") if (folder / "claims.csv").exists() else rules.empty()
        missing = set(rules.COLUMNS) - set(table)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of a run: {error!r}; companion run writes one") from None
    if missing or not all(names):
        raise ValueError(f"{folder / 'claims.csv'} lacks the columns {', '.join(sorted(missing))}: an older run's?")
    return run, table


def _said(sentences: Sequence[Sentence], table: pd.DataFrame, ledger: Mapping) -> list[tuple[Sentence, dict]]:
    """The sentences whose claims this run judged, with the figures in their places."""
    p = _Figures(table)
    said = []
    for s in sentences:
        if all(figure in p for figure in s.figures):
            judged = [ledger[c] for c in s.claims]
            holds = all(claim["verdict"] == rules.REPRODUCED for claim in judged)
            said.append((s, {"text": f"{s.text.format(p=p)} {s.then if holds else ''}".strip(), "claims": judged}))
    return said


def _notebook(folder: Path, run: Mapping, one: Mapping, table: pd.DataFrame, reference: Path | None) -> dict:
    name, executed = one["name"], folder / f"{one['name']}.ipynb"
    found = {
        "name": name, "number": name.split("_")[0], "status": one["status"], "error": one["error"], "reference": None,
        "seconds": one["seconds"], "title": one.get("title") or name, "figures": pages.figures(folder, name),
        "executed": executed.exists(), "command": command(run, name), "cells": "", "judged": {},
        "claims": (table["notebook"] == name).any(), "dataset": one.get("dataset"),
    }  # fmt: skip
    found["pictures"] = found["figures"]  # beside its cells: the main one by the reference's, and what no cell shows
    if found["executed"]:
        cells = pages.cells(executed, found["figures"])
        found["cells"] = cells.html
        judged = re.compile(r"""judge\(\s*["']([\w-]+)["']""")
        found["judged"] = {claim: cell for cell, source in cells.sources.items() for claim in judged.findall(source)}
        if reference:
            same = (f for f in pages.figures(reference, name) if f["name"] == cells.main_figure)
            found["reference"] = next(same, None)
        beside = cells.main_figure if found["reference"] else ""
        found["pictures"] = [f for f in found["figures"] if f["name"] == beside or f["name"] not in cells.shown]
    return found


def command(run: Mapping, notebook: str) -> str:
    """What makes a notebook's results again; a reference made in parts holds runs of several kinds."""
    run = {**run, **{k: v for one in run["notebooks"] if one["name"] == notebook for k, v in one.items()
                     if k in ("profile", "given")}}  # fmt: skip
    arguments = ["companion", "run", "--profile", run["profile"], "--dataset", run["dataset"]]
    arguments += ["--only", notebook.split("_")[0]]
    for name, value in run.get("given", {}).items():
        arguments += ["-p", f"{name}={json.dumps(value)}"]
    return shlex.join(map(str, arguments))


def _ledger(
    run: Mapping, table: pd.DataFrame, notebooks: Sequence[Mapping], folder: Path, reference: pd.DataFrame | None
) -> list[dict]:
    by_name = {n["name"]: n for n in notebooks}
    found = []
    for claim in rules.summary(table).to_dict("records") if len(table) else []:
        parts, notebook = table[table["claim"] == claim["claim"]], by_name.get(claim["notebook"], {})
        number = claim["notebook"].split("_")[0]
        rows = []
        for row, shown in zip(parts.to_dict("records"), rules.readable(parts).to_dict("records")):
            rows.append(shown | figures_of(row, notebook.get("dataset")) | {
                "ours": shown["ours [95 %]"], "counts": row["counts"], "reference": _of(reference, row)
            })  # fmt: skip
        found.append(claim | {
            "number": number, "parts": rows, "cell": notebook.get("judged", {}).get(claim["claim"]),
            "tables": sorted(f.name for f in (folder / "tables").glob(f"{number}_*.parquet")),
            "command": command(run, claim["notebook"]),
        })  # fmt: skip
    return found


def _of(reference: pd.DataFrame | None, row: Mapping) -> str:
    """The reference's figure for the same part, and its verdict."""
    if reference is None:
        return ""
    same = reference[(reference["claim"] == row["claim"]) & (reference["part"] == row["part"])]
    shown = rules.readable(same).to_dict("records")
    return f"{shown[0]['ours [95 %]']}, n = {shown[0]['n']}: {shown[0]['verdict']}" if shown else ""


def figures_of(row: Mapping, dataset: str | None) -> dict[str, str]:
    """What inference adds to a part: sampling error, place of the published run, seeds needed; text, "" for none."""
    std = inference.spread(row["ours"], row["high"], row["n"])
    low, high = row["above"], row["below"]
    of_accuracy = row["measured"] in (claims.ACCURACY, "final test accuracy") and dataset in data.TEST_SIZES
    percent = 100 if row["measured"] == claims.ACCURACY else 1
    images = percent * inference.sampling_error(row["ours"] / percent, data.TEST_SIZES[dataset]) if of_accuracy else 0
    share, published = math.nan, re.fullmatch(r"[\d.]+", str(row["published"]))  # one run's figure, not a difference
    if row["exact"] and published and row["counts"] and not str(row["why"]).startswith("another"):
        share = inference.place(float(row["published"]), row["ours"], std, row["n"])
    needed = inference.seeds_needed(row["ours"], std, low, high)
    return {
        "images": f"{images:.2g}" if images > 0 else "",
        "place": "" if math.isnan(share) else f"above {share:.1%} of ours",
        "needed": "" if math.isnan(needed) else f"{needed:.0f}" if math.isfinite(needed) else "> 1,000",
    }  # fmt: skip


def chance(table: pd.DataFrame) -> dict[str, float]:
    """Of the parts that count and are decided: how many, how many by chance at most, and how many stand together."""
    decided = table[table["counts"] & (table["verdict"] != rules.INCONCLUSIVE)]
    p_values = [
        inference.p_value(row["ours"], inference.spread(row["ours"], row["high"], row["n"]), row["n"], row["above"],
                          row["below"], outside=row["verdict"] == rules.NOT_REPRODUCED)
        for row in decided.to_dict("records")
    ]  # fmt: skip
    expected = (1 - inference.LEVEL) / 2 * len(decided)
    return {"decided": len(decided), "expected": expected, "survive": int(inference.survive(p_values).sum())}


BEGIN, END = "<!-- from outputs/reference, by companion report: begin -->", "<!-- end -->"


def summary(folder: Path) -> str:
    """The report in short, as Markdown: three figures, the sentences, each claim with one figure and its verdict."""
    run, table = _read(folder)
    by_name = {claim["claim"]: claim for claim in rules.summary(table).to_dict("records")}
    drawn = {f["name"]: f for n in run["notebooks"] for f in pages.figures(folder, n["name"])}
    lines = [f"![{drawn[name]['title']}](outputs/reference/figures/{name}.png)" for name in CARRYING if name in drawn]
    lines += [""] + [
        f"{number}. {said['text']} *{'; '.join(_verdict(c) for c in said['claims'])}*"
        for number, (_, said) in enumerate(_said(ANSWER, table, by_name), 1)
    ]
    tally = {v: sum(c["verdict"] == v for c in by_name.values()) for v in rules.VERDICTS}
    counts = [f"{n} {v}" for v, n in tally.items() if n or v != rules.NOT_JUDGED]
    lines += ["", f"Of {len(by_name)} claims {', '.join(counts)}. A line each, with the first part that counts:", ""]
    lines += ["| claim | source | published | ours [95 %] | n | verdict |", "|---|---|---|---|---|---|"]
    for name, claim in by_name.items():
        parts = table[table["claim"] == name]
        first = rules.readable(parts[parts["counts"]] if parts["counts"].any() else parts).iloc[0]
        cells = [claim["statement"], claim["source"], f"{first['part']}: {first['published']}", first["ours [95 %]"]]
        cells = [str(cell).replace("|", "∣") for cell in (*cells, first["n"], _verdict(claim))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _scales(run)])


def _scales(run: Mapping) -> str:
    """On how much each notebook was run, as its profile says, and on what machine."""
    words, scales = {"num_train": "images", "epochs": "epochs", "seeds": "seeds"}, {}
    for one in run["notebooks"]:
        amounts = [f"{one['parameters'][name]:,} {word}" for name, word in words.items() if name in one["parameters"]]
        scales.setdefault(", ".join([one.get("dataset") or "no data", *amounts]), []).append(one["name"].split("_")[0])
    scale = "; ".join(f"{', '.join(numbers)}: {what}" for what, numbers in scales.items())
    return f"(Notebooks {scale}. On {run['machine']}.)"


def _verdict(claim: Mapping) -> str:
    """The verdict, and where it is not that of every part, of how many."""
    return claim["verdict"] + (f" ({claim['tally']})" if claim["verdict"] != rules.REPRODUCED else "")


def update(text: str, folder: Path) -> str:
    """A README with its summary of the run in ``folder`` made anew. ValueError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no place for the summary; expected a line {BEGIN!r} and a later one {END!r}")
    return f"{before}{BEGIN}\n{summary(folder)}\n{END}{after}"


def export(folder: Path, into: Path, limit: int = 150_000) -> None:
    """Copy what a run is judged by, small enough to commit: claims, run.json, tables, figures up to ``limit`` bytes.

    What ``into`` holds of other notebooks stays, so that a reference can be made in parts. A larger PNG is written with
    256 colours, then smaller; of the SVGs, those that are no larger than its limit.
    """
    from PIL import Image, PngImagePlugin

    run, table = _read(folder)
    of = {k: run[k] for k in ("profile", "given", "started") if k in run}
    run["notebooks"], names = [one | of for one in run["notebooks"]], {one["name"] for one in run["notebooks"]}
    if (into / "run.json").exists():
        kept, others = _read(into)
        run["notebooks"] += [one for one in kept["notebooks"] if one["name"] not in names]
        table = pd.concat([others[~others["notebook"].isin(names)], table], ignore_index=True)
        run["notebooks"].sort(key=lambda one: one["name"])
        run["seconds"] = round(sum(one["seconds"] for one in run["notebooks"]), 1)
    pages.write(into / "claims.csv", table.sort_values("notebook", kind="stable").to_csv(index=False))
    pages.write(into / "run.json", json.dumps(run, indent=1, ensure_ascii=False))
    for file in sorted((folder / "tables").glob("*.parquet")):
        pages.write(into / "tables" / file.name, file.read_bytes())
    for file in sorted((folder / "figures").glob("*.png")):
        with Image.open(file) as image:
            text, picture, content = PngImagePlugin.PngInfo(), image.convert("RGB"), file.read_bytes()
            for key in ("Title", "Description"):
                text.add_itxt(key, image.info.get(key, ""))
            while len(content) > limit:
                buffer = io.BytesIO()
                picture.quantize(256).save(buffer, "PNG", optimize=True, pnginfo=text)
                content = buffer.getvalue()
                picture = picture.resize((9 * picture.width // 10, 9 * picture.height // 10), Image.Resampling.LANCZOS)
        pages.write(into / "figures" / file.name, content)
        drawing = file.with_suffix(".svg")
        if drawing.exists() and drawing.stat().st_size <= limit:
            pages.write(into / "figures" / drawing.name, drawing.read_bytes())
