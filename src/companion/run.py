"""Runs: notebooks executed without a browser, into one folder with figures, claims and a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from companion import executor, pages, parameters
from companion.parameters import Planned


def run(
    profile: str = "laptop",
    dataset: str = "auto",
    *,
    only: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    timeout: int | None = None,
    out: str | Path | None = None,
    folder: Path = parameters.NOTEBOOKS,
    say=print,
) -> int:
    """Execute notebooks into a folder; returns 0, or 1 where one failed (the others still run).

    only, given: see ``parameters.plan``.
    jobs: processes in all, by default one a core (see ``executor.execute``).
    cluster: address of a Dask scheduler on whose workers to train instead.
    timeout: seconds after which a cell fails.
    out: a new folder; by default one named after the time and the profile.

    Raises BadInput, with nothing written, for a request that cannot be run.
    """
    planned, real, note = parameters.on_dataset(
        profile, dataset, lambda name: parameters.plan(profile, name, only=only, given=given, folder=folder)
    )
    environment = executor.environment_of(planned, jobs, cluster, timeout)
    out = executor.new_folder(out, "runs", profile)
    for item in planned:
        item.folder = out
    about = {
        "profile": profile,
        "dataset": real,
        "dataset_note": note,
        "given": dict(given or {}),
        **executor.machine(),
    }
    say(f"profile {profile} on {(given or {}).get('problem') or real}")
    with executor.alone(out):
        return executor.execute(
            planned, out, environment, note=note, timeout=timeout, say=say,
            finish=lambda seconds: _finish(planned, out, {**about, "seconds": round(seconds, 1)}),
            go_on="A run into a new folder trains only the rest.",
        )  # fmt: skip


def _finish(planned: Sequence[Planned], out: Path, about: dict[str, object]) -> Path:
    """Write claims.csv, run.json and the report."""
    import pandas as pd

    from companion import report
    from helpers.ledger import rules

    tables = [rules.read(f) for f in sorted((out / "claims").glob("*.csv"))]
    if tables:
        pages.write(out / "claims.csv", pd.concat(tables, ignore_index=True).to_csv(index=False))
    about["notebooks"] = []
    for p in planned:
        file = out / "provenance" / f"{p.name}.json"
        about["notebooks"].append({
            "name": p.name, "title": p.title, "status": p.status, "error": p.error, "seconds": round(p.seconds, 1),
            "parameters": p.parameters, **(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}),
        })  # fmt: skip
    pages.write(out / "run.json", json.dumps(about, indent=1))
    return report.write(out)
