"""The report of a run on one page: the answer in six sentences, the ledger, the findings, the cells of every notebook.

It reads only the run's folder (run.json, claims.csv, figures, executed notebooks). Every figure on it leads to the cell
that computed it, to the table behind it, and to the command that makes it again.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from companion import pages
from companion.parameters import OUTPUTS
from helpers.ledger import claims, inference, rules
from helpers.problems import TEST_SIZES

REFERENCE = OUTPUTS / "reference"


@dataclass(frozen=True)
class Mean:
    """A mean of the ledger; formats as the mean and half its interval."""

    mean: float
    half: float

    def __format__(self, spec: str) -> str:
        half = f" ± {self.half:{spec.lstrip('+')}}" if math.isfinite(self.half) and self.half else ""
        return f"{self.mean:{spec}}{half}".replace("-", "−", 1 if self.mean < 0 else 0)


def write(folder: Path, file: Path | None = None, reference: Path = REFERENCE) -> Path:
    """Write the report of the run in ``folder``, by default as its ``index.html``. ValueError where it is no run."""
    run, table = read(folder)
    other = None
    if reference.resolve() != folder.resolve():
        with contextlib.suppress(ValueError):  # none, or an older one: a run is reported without it
            other = read(reference)[1]
    notebooks = [_notebook(folder, run, one, table, reference if other is not None else None)
                 for one in run["notebooks"]]  # fmt: skip
    ledger = _ledger(run, table, notebooks, folder, other)
    by_name = {claim["claim"]: claim for claim in ledger}
    drawn = {f["name"]: f for n in notebooks for f in n["figures"]}
    said = sentences()
    findings = [
        one | {"figure": drawn.get(one["figure"]), "notebook": one["claims"][0]["notebook"]}
        for one in filled_in(said["findings"], table, by_name)
    ]
    sizes = [TEST_SIZES[n.get("dataset")] for n in run["notebooks"] if n.get("dataset") in TEST_SIZES]
    page = pages.render(
        "report.html.j2", run=run, notebooks=notebooks, claims=ledger, verdicts=rules.VERDICTS,
        counts={v: sum(c["verdict"] == v for c in ledger) for v in rules.VERDICTS},
        answer=filled_in(said["answer"], table, by_name), findings=findings, chance=chance(table),
        carrying=[drawn[name] for name in said["figures"] if name in drawn],
        images=max(sizes, default=0), tables=sorted(f.name for f in (folder / "tables").glob("*.parquet")),
        provenance=json.dumps(run, indent=1, ensure_ascii=False),
    )  # fmt: skip
    return pages.write(file or folder / "index.html", page)


def read(folder: Path) -> tuple[dict, pd.DataFrame]:
    """The record and the ledger of a run. ValueError where ``folder`` is no run."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        names = [n["name"] for n in run["notebooks"]] + [f"{run['profile']}{run['seconds']:.0f}"]
        file = folder / "claims.csv"
        table = rules.read(file) if file.exists() else pd.DataFrame(columns=rules.COLUMNS)
        missing = set(rules.COLUMNS) - set(table)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of a run: {error!r}; companion run writes one") from None
    if not all(re.fullmatch(r"[\w.-]+", name) for name in names):  # it names files
        raise ValueError(f"{folder / 'run.json'} holds a notebook's name that is none")
    if missing:
        raise ValueError(f"{folder / 'claims.csv'} lacks the columns {', '.join(sorted(missing))}: an older run's?")
    return run, table


def sentences() -> dict[str, list]:
    """The sentences of the page, and the names of its first figures."""
    return yaml.safe_load((Path(__file__).parent / "sentences.yml").read_text(encoding="utf-8"))


def filled_in(sentences: Sequence[Mapping], table: pd.DataFrame, ledger: Mapping) -> list[dict]:
    """The sentences whose claims this run judged, with its figures in their places and the claims behind them."""
    rows = table[table["verdict"] != rules.NOT_JUDGED].to_dict("records")
    means = {(row["claim"], row["part"]): Mean(row["ours"], row["high"] - row["ours"]) for row in rows}
    labels = {
        f"{name}/{key}": (name, part.label) for name, one in claims.CLAIMS.items() for key, part in one.parts.items()
    }
    p = {figure: means[label] for figure, label in labels.items() if label in means}
    found = []
    for sentence in sentences:
        figures = re.findall(r"p\[(.+?)\]", sentence["text"])
        if all(figure in p for figure in figures):
            judged = [ledger[name] for name in dict.fromkeys(figure.split("/")[0] for figure in figures)]
            holds = all(claim["verdict"] == rules.REPRODUCED for claim in judged)
            text = f"{sentence['text'].format(p=p)} {sentence.get('then', '') if holds else ''}".strip()
            found.append({**sentence, "text": text, "claims": judged})
    return found


def _notebook(folder: Path, run: Mapping, one: Mapping, table: pd.DataFrame, reference: Path | None) -> dict:
    name, executed = one["name"], folder / f"{one['name']}.ipynb"
    found = {
        "name": name, "number": name.split("_")[0], "status": one["status"], "error": one["error"], "reference": None,
        "seconds": one["seconds"], "title": one.get("title") or name, "figures": pages.figures(folder, name),
        "executed": executed.exists(), "command": command(run, name), "cells": "", "judged": {},
        "claims": (table["notebook"] == name).any(), "dataset": one.get("dataset"),
    }  # fmt: skip
    found["pictures"] = found["figures"]  # above its cells: the main one beside the reference's, and any no cell shows
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
    """The command that makes a notebook's results again; a reference made in parts holds runs of several kinds."""
    of = next((one for one in run["notebooks"] if one["name"] == notebook), {})
    profile, given = of.get("profile", run["profile"]), of.get("given", run.get("given", {}))
    arguments = ["companion", "run", "--profile", profile, "--dataset", run["dataset"]]
    arguments += ["--only", notebook.split("_")[0]]
    for name, value in given.items():
        arguments += ["-p", f"{name}={json.dumps(value)}"]
    return shlex.join(map(str, arguments))


def _ledger(
    run: Mapping, table: pd.DataFrame, notebooks: Sequence[Mapping], folder: Path, reference: pd.DataFrame | None
) -> list[dict]:
    by_name = {n["name"]: n for n in notebooks}
    others = {} if reference is None else {
        (row["claim"], row["part"]): f"{row['ours [95 %]']}, n = {row['n']}: {row['verdict']}"
        for row in rules.readable(reference).to_dict("records")
    }  # fmt: skip
    rows: dict[str, list[dict]] = {}
    for row, shown in zip(table.to_dict("records"), rules.readable(table).to_dict("records")):
        own = figures_of(row, by_name.get(row["notebook"], {}).get("dataset"))
        own |= {"ours": shown["ours [95 %]"], "counts": row["counts"]}
        own["reference"] = others.get((row["claim"], row["part"]), "")
        rows.setdefault(row["claim"], []).append(shown | own)
    found = []
    for claim in rules.summary(table).to_dict("records"):
        number, notebook = claim["notebook"].split("_")[0], by_name.get(claim["notebook"], {})
        found.append(claim | {
            "number": number, "parts": rows[claim["claim"]], "cell": notebook.get("judged", {}).get(claim["claim"]),
            "tables": sorted(f.name for f in (folder / "tables").glob(f"{number}_*.parquet")),
            "command": command(run, claim["notebook"]),
        })  # fmt: skip
    return found


def figures_of(row: Mapping, dataset: str | None) -> dict[str, str]:
    """Inference about a part, as text: sampling error, place of the published run, seeds needed; "" for none."""
    std = inference.spread(row["ours"], row["high"], row["n"])
    of_accuracy = row["measured"] in (claims.ACCURACY, "final test accuracy") and dataset in TEST_SIZES
    percent = 100 if row["measured"] == claims.ACCURACY else 1
    images = percent * inference.sampling_error(row["ours"] / percent, TEST_SIZES[dataset]) if of_accuracy else 0
    share, published = math.nan, re.fullmatch(r"[\d.]+", str(row["published"]))  # one run's figure, not a difference
    if row["exact"] and published and row["counts"] and not str(row["why"]).startswith("another"):
        share = inference.place(float(row["published"]), row["ours"], std, row["n"])
    needed = inference.seeds_needed(row["ours"], std, row["above"], row["below"])
    return {
        "images": f"{images:.2g}" if images > 0 else "",
        "place": "" if math.isnan(share) else f"above {share:.1%} of ours",
        "needed": "" if math.isnan(needed) else f"{needed:.0f}" if math.isfinite(needed) else "> 1,000",
    }  # fmt: skip


def chance(table: pd.DataFrame) -> dict[str, float]:
    """How many parts count and are decided, how many of them by chance at most, and how many stand together."""
    decided = table[table["counts"] & table["verdict"].isin([rules.REPRODUCED, rules.NOT_REPRODUCED])]
    p_values = [
        inference.p_value(row["ours"], inference.spread(row["ours"], row["high"], row["n"]), row["n"], row["above"],
                          row["below"], outside=row["verdict"] == rules.NOT_REPRODUCED)
        for row in decided.to_dict("records")
    ]  # fmt: skip
    expected = (1 - inference.LEVEL) / 2 * len(decided)
    return {"decided": len(decided), "expected": expected, "survive": int(inference.survive(p_values).sum())}
