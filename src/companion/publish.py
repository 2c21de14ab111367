"""Publishing: the committed reference and the README's summary of it, both made from a run."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from companion import pages, report
from helpers.ledger import rules

BEGIN, END = "<!-- from outputs/reference, by companion publish: begin -->", "<!-- end -->"


def reference(folder: Path, into: Path, limit: int = 150_000) -> None:
    """Copy the results of the run in ``folder`` that are small enough to commit: claims, run.json, tables, figures.

    Results of other notebooks in ``into`` stay, so that a reference can be made in parts.

    limit: bytes of a figure. A larger PNG is written with 256 colours, then smaller; a larger SVG is left out.

    Raises ValueError for a folder that is no run.
    """
    from PIL import Image, PngImagePlugin

    run, table = report.read(folder)
    of = {k: run[k] for k in ("profile", "given", "started") if k in run}
    run["notebooks"], names = [one | of for one in run["notebooks"]], {one["name"] for one in run["notebooks"]}
    if (into / "run.json").exists():
        kept, others = report.read(into)
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


def readme(text: str, folder: Path) -> str:
    """A README with a new summary of the run in ``folder``. Raises ValueError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no place for the summary; expected a line {BEGIN!r} and a later one {END!r}")
    return f"{before}{BEGIN}\n{summary(folder)}\n{END}{after}"


def summary(folder: Path) -> str:
    """The report in short, as Markdown: three figures, the sentences, each claim with one figure and its verdict."""
    run, table = report.read(folder)
    sentences = report.sentences()
    by_name = {claim["claim"]: claim for claim in rules.summary(table).to_dict("records")}
    drawn = {f["name"]: f for n in run["notebooks"] for f in pages.figures(folder, n["name"])}
    shown = [name for name in sentences["figures"] if name in drawn]
    lines = [f"![{drawn[name]['title']}](outputs/reference/figures/{name}.png)" for name in shown]
    lines += [""] + [
        f"{number}. {said['text']} *{'; '.join(_verdict(c) for c in said['claims'])}*"
        for number, said in enumerate(report.filled_in(sentences["answer"], table, by_name), 1)
    ]
    counts = {v: sum(c["verdict"] == v for c in by_name.values()) for v in rules.VERDICTS}
    counted = ", ".join(f"{n} {v}" for v, n in counts.items() if n or v != rules.NOT_JUDGED)
    lines += ["", f"Of {len(by_name)} claims {counted}. A line each, with the first part that counts:", ""]
    lines += ["| claim | source | published | ours [95 %] | n | verdict |", "|---|---|---|---|---|---|"]
    for name, claim in by_name.items():
        parts = table[table["claim"] == name]
        first = rules.readable(parts[parts["counts"]] if parts["counts"].any() else parts).iloc[0]
        cells = [claim["statement"], claim["source"], f"{first['part']}: {first['published']}", first["ours [95 %]"]]
        cells = [str(cell).replace("|", "∣") for cell in (*cells, first["n"], _verdict(claim))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", scales(run)])


def scales(run: Mapping) -> str:
    """The amounts on which each notebook was run, and the machine."""
    words, amounts_of = {"num_train": "images", "epochs": "epochs", "seeds": "seeds"}, {}
    for one in run["notebooks"]:
        amounts = [f"{one['parameters'][name]:,} {word}" for name, word in words.items() if name in one["parameters"]]
        amounts_of.setdefault(", ".join([one.get("dataset") or "no data", *amounts]), []).append(one["name"][:2])
    scale = "; ".join(f"{', '.join(numbers)}: {amounts}" for amounts, numbers in amounts_of.items())
    return f"(Notebooks {scale}. On {run['machine']}.)"


def _verdict(claim: Mapping) -> str:
    """The verdict and, where it is not that of every part, how many it is of."""
    return claim["verdict"] + (f" ({claim['tally']})" if claim["verdict"] != rules.REPRODUCED else "")
