"""The ``companion`` command."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from companion import __version__

PROFILE = click.option(
    "--profile", default="laptop", show_default=True, help="Values: quick, laptop, paper, reference."
)
DATASET = click.option(
    "--dataset",
    default="auto",
    show_default=True,
    help="auto (MNIST if it can be had, else digits), mnist, fashion_mnist, kmnist, digits.",
)
JOBS = click.option("--jobs", type=int, default=None, help="Processes side by side.  [default: one a core]")
CLUSTER = click.option(
    "--cluster", default=None, metavar="ADDRESS", help="Train on the workers of this Dask scheduler."
)
TIMEOUT = click.option("--timeout", type=int, default=None, metavar="SECONDS", help="A cell that takes longer fails.")
PAIRS = click.option(
    "-p", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a parameter of every notebook that has it."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="companion")
def main() -> None:
    """What does the batch size do to training? Notebooks, run headlessly."""


@contextlib.contextmanager
def _one_line_errors():
    """Bad input ends with 2, a full or read-only disk with 1, Ctrl-C with 130; each says one line and what to do."""
    from companion import runs
    from helpers.sweep import processes

    try:
        with processes.interruptible():
            yield
    except runs.BadInput as error:
        click.echo(f"companion: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        way_out = "What is finished is kept; make room, or choose another folder with --out, and run again."
        click.echo(f"companion: {where}{error.strerror or error}. {way_out}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("\ncompanion: stopped. Finished trainings are kept; the same command goes on from them.", err=True)
        sys.exit(130)


@main.command()
@PROFILE
@DATASET
@click.option("--only", default="", metavar="02,04", help="Only these notebooks, by number or name.")
@JOBS
@CLUSTER
@TIMEOUT
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="A new folder for the results.  [default: outputs/runs/<time>-<profile>]")  # fmt: skip
@PAIRS
def run(profile, dataset, only, jobs, cluster, timeout, out, pairs) -> None:
    """Execute the notebooks and write an index page with every figure and verdict."""
    from companion import runs

    with _one_line_errors():
        names, given = [name.strip() for name in only.split(",") if name.strip()], runs.parse_given(pairs)
        sys.exit(runs.run(profile, dataset, only=names, given=given, jobs=jobs, cluster=cluster, timeout=timeout,
                          out=out, say=_say))  # fmt: skip


@main.command()
@click.argument("notebook", required=False)
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="NAME=A,B",
    help="lr=0.01,0.1 or batch_sizes=[64,256],[1024] or seed=0:5 or a YAML file; several: their product.",
)
@PROFILE
@DATASET
@JOBS
@CLUSTER
@TIMEOUT
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="A new folder for the results.  [default: outputs/reruns/<time>-<notebook>]")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the rerun in --out; what is finished there is not run again.")
@click.option("--dry-run", "dry", is_flag=True, help="Print the plan and the time it takes, and run nothing.")
@PAIRS
def rerun(notebook, grids, profile, dataset, jobs, cluster, timeout, out, resume, dry, pairs) -> None:
    """Execute one NOTEBOOK at every point of a grid of its parameters, and compare them on a page."""
    from companion import reruns, runs

    with _one_line_errors():
        if resume and out is None:
            raise runs.BadInput("--resume wants --out, the folder of the rerun to go on with")
        if notebook is None and not resume:
            raise runs.BadInput(f"which notebook? Choose from: {', '.join(runs.notebooks())}")
        if notebook is None:
            request = reruns.request_of(out)
        else:
            parsed, given = reruns.parse_grids(grids), runs.parse_given(pairs)
            request = reruns.Request(notebook, parsed, profile, dataset, given, jobs, cluster, timeout)
        sys.exit(reruns.rerun(request, out=out, resume=resume, dry=dry, say=_say))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def status(folder: Path | None) -> None:
    """What a rerun's FOLDER holds: what is done, failed and left; without it, the store of trained runs."""
    from companion import reruns, runs
    from helpers.sweep.store import Store, size

    with _one_line_errors():
        if folder is None:
            store = Store()
            used = size(store.folder) if store.folder.exists() else 0
            _say(f"{len(store.all_keys())} results, {_bytes(used)}, in {store.folder}")
            _say("\n".join(str(f.parent) for f in sorted(runs.OUTPUTS.glob("reruns/*/rerun.json"))))
            return
        about = reruns.status(folder)
        for p in about["points"]:
            error = f": {p['error']}" if p["error"] else ""
            _say(f"{p['name']:<60} {p['status']:<8} {p['seconds']:6.0f} s{error}")
        counts = {
            s: sum(p["status"] == s for p in about["points"]) for s in ("ok", "FAILED", "running", "stopped", "waiting")
        }
        _say(f"{about['notebook']}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n))
        if counts["ok"] < len(about["points"]) and not about["at_work"]:
            _say(f"To go on: companion rerun --resume --out {folder}")


@main.command()
@click.option("--yes", is_flag=True, help="Remove it; without this, only say what and how much.")
@click.option("--runs", "old", is_flag=True, help="Also all runs and reruns under outputs/ but the newest of each.")
def clean(yes: bool, old: bool) -> None:
    """What can go: damaged results set aside, what killed processes left, results that no present version reads."""
    from companion import runs
    from helpers.engine.training import NUMERICS
    from helpers.sweep.store import Store, Waste, remove, size

    with _one_line_errors():
        waste = Store().waste({"numerics": NUMERICS})
        for kind in ("runs", "reruns") if old else ():
            folders = sorted((f for f in runs.OUTPUTS.glob(f"{kind}/*") if f.is_dir()), key=lambda f: f.stat().st_mtime)
            waste += [Waste(f"an older one of {kind}", folder, size(folder)) for folder in folders[:-1]]
        for one in waste:
            _say(f"{_bytes(one.bytes):>10}  {one.what}: {one.path}")
            if yes:
                remove(one.path)
        total = _bytes(sum(one.bytes for one in waste))
        can_go = f"{total} can go; companion clean --yes removes it" if waste else "nothing to remove"
        _say(f"{total} freed" if yes else can_go)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", "file", type=click.Path(path_type=Path), default=None,
              help="Another file.  [default: RUN/index.html]")  # fmt: skip
@click.option("--export", "into", type=click.Path(path_type=Path), default=None,
              help="Copy what is small enough to commit (figures, claims, tables) to this folder.")  # fmt: skip
@click.option("--readme", type=click.Path(path_type=Path), default=None, help="Make this README's summary of it anew.")
def report(folder: Path, file: Path | None, into: Path | None, readme: Path | None) -> None:
    """Write the report of a RUN's folder again: the answer, the ledger, the notebooks, in one page."""
    from companion import pages, runs
    from companion import report as reports

    with _one_line_errors():
        try:
            _say(f"{reports.write(folder, file)}")
            if into is not None:
                reports.export(folder, into)
                _say(f"{into}")
            if readme is not None:
                pages.write(readme, reports.update(readme.read_text(encoding="utf-8"), folder))
                _say(f"{readme}")
        except (ValueError, LookupError, TypeError) as error:  # files that a run did not write
            raise runs.BadInput(f"{folder}: {error}") from None


@main.command()
@JOBS
@CLUSTER
def verify(jobs: int | None, cluster: str | None) -> None:
    """Train the cheap part of the committed reference again: does this machine agree within the intervals?"""
    from unittest import mock

    from companion import report as reports
    from companion import runs, verify

    with _one_line_errors(), mock.patch.dict(os.environ, runs.environment_for(jobs, cluster, None)):
        try:
            found = verify.compare(reports.REFERENCE, say=_say)
        except ValueError as error:
            raise runs.BadInput(str(error)) from None
        _say(found.round({"p": 3}).to_string(index=False))
        agree = int(found["agrees"].sum())
        _say(f"{agree} of {len(found)} agree with the reference" + " within the intervals" * (agree == len(found)))
        sys.exit(0 if agree == len(found) else 1)


@main.command()
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lab(arguments: tuple[str, ...]) -> None:
    """JupyterLab at the first notebook, on this machine alone and behind a token; ARGUMENTS (after --) go to it."""
    from jupyterlab.labapp import LabApp

    from companion import runs

    root = ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    # In this process, so that Ctrl-C is Jupyter's: it asks, and ends its kernels.
    sys.exit(LabApp.launch_instance([
        "--ip=127.0.0.1", f"--ServerApp.root_dir={runs.PROJECT}",
        "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb", *root, *arguments,
    ]))  # fmt: skip


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"


def _say(text: str) -> None:
    if text:
        click.echo(text)
        sys.stdout.flush()
