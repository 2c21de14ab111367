"""The ``companion`` command."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from companion import __version__

FOLDER = click.Path(path_type=Path)
JOBS = click.option("--jobs", type=int, help="Processes side by side, in all.  [default: one a core]")
CLUSTER = click.option("--cluster", metavar="ADDRESS", help="Train on the workers of this Dask scheduler.")
SHARED = (
    click.option("--profile", default="laptop", show_default=True, help="Values: quick, laptop, paper, reference."),
    click.option("--dataset", default="auto", show_default=True,
                 help="auto (MNIST if it can be had, else digits), mnist, fashion_mnist, kmnist, digits."),
    JOBS,
    CLUSTER,
    click.option("--timeout", type=int, metavar="SECONDS", help="A cell that takes longer fails."),
    click.option("-p", "pairs", multiple=True, metavar="NAME=VALUE",
                 help="Set a parameter of every notebook that has it; problem=my_module:problem runs it on yours."),
)  # fmt: skip


def _shared(command):
    for option in reversed(SHARED):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="companion")
def main() -> None:
    """How does the batch size change training? Execute the notebooks, and report on them."""


@contextlib.contextmanager
def _one_line_errors():
    """End with one line: bad input with exit code 2, a full or read-only disk with 1, an interrupt with 130."""
    from companion.parameters import BadInput
    from helpers.sweep import processes

    try:
        with processes.interruptible():
            yield
    except BadInput as error:
        click.echo(f"companion: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        way_out = "Finished results are kept; make room, or choose another folder with --out, and run again."
        click.echo(f"companion: {where}{error.strerror or error}. {way_out}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("companion: stopped", err=True)
        sys.exit(130)


@main.command()
@_shared
@click.option("--only", default="", metavar="02,04", help="Only these notebooks, by number or name.")
@click.option("--out", type=FOLDER, help="A new folder for the results.  [default: outputs/runs/<time>-<profile>]")
def run(profile, dataset, only, jobs, cluster, timeout, out, pairs) -> None:
    """Execute the notebooks and write a report with every figure and verdict."""
    from companion import parameters
    from companion import run as runs

    with _one_line_errors():
        names, given = [name.strip() for name in only.split(",") if name.strip()], parameters.parse_given(pairs)
        sys.exit(runs.run(profile, dataset, only=names, given=given, jobs=jobs, cluster=cluster, timeout=timeout,
                          out=out, say=_say))  # fmt: skip


@main.command()
@click.argument("problem", metavar="MODULE:PROBLEM")
@click.option("--minutes", type=float, default=10, show_default=True,
              help="Time it may take: 1 for a rough answer, 10 with branches, 60 along a pilot run.")  # fmt: skip
@click.option("--batch-size", type=int, default=64, show_default=True, help="The present batch size.")
@click.option("--lr", type=float, default=3e-4, show_default=True, help="The present learning rate.")
@click.option("--optimizer", default="adamw", show_default=True, help="sgd, adam, adamw, or module:factory.")
@click.option(
    "--out", type=FOLDER, help="A new folder for the page and its data.  [default: outputs/advice/<time>-<module>]"
)
def advise(problem, minutes, batch_size, lr, optimizer, out) -> None:
    """Measure which batch size to train your own PROBLEM at, and write a page with the reasons."""
    from companion import advice

    with _one_line_errors():
        sys.exit(advice.advise(problem, minutes=minutes, batch_size=batch_size, lr=lr, optimizer=optimizer, out=out,
                               say=_say))  # fmt: skip


@main.command()
@click.argument("notebook", required=False)
@click.option("--grid", "grids", multiple=True, metavar="NAME=A,B",
              help="lr=0.01,0.1, batch_sizes=[64,256],[1024], seed=0:5, or a YAML file; several multiply.")  # fmt: skip
@_shared
@click.option("--out", type=FOLDER, help="A new folder for the results.  [default: outputs/reruns/<time>-<notebook>]")
@click.option("--resume", is_flag=True, help="Go on with the rerun in --out; its finished points are not run again.")
@click.option("--dry-run", "dry", is_flag=True, help="Only list the points.")
@click.pass_context
def rerun(context, notebook, grids, profile, dataset, jobs, cluster, timeout, out, resume, dry, pairs) -> None:
    """Execute one NOTEBOOK at every point of a grid of its parameters, and compare them on a page."""
    from dataclasses import replace

    from companion import grid, parameters

    with _one_line_errors():
        if resume:
            fixed = ("notebook", "grids", "profile", "dataset", "pairs")
            set_anew = [name for name in fixed if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
            if out is None or set_anew:
                text = "--resume wants --out, the folder of a rerun, which knows its notebook, grid and parameters"
                raise parameters.BadInput(f"{text}; only --jobs, --cluster and --timeout may change")
            changed = {"jobs": jobs, "cluster": cluster, "timeout": timeout}
            request = replace(grid.record(out)["request"], **{k: v for k, v in changed.items() if v is not None})
        elif notebook is None:
            raise parameters.BadInput(f"which notebook? Choose from: {', '.join(parameters.notebooks())}")
        else:
            given = parameters.parse_given(pairs)
            request = grid.Request(notebook, grid.parse_grids(grids), profile, dataset, given, jobs, cluster, timeout)
        sys.exit(grid.rerun(request, out=out, resume=resume, dry=dry, say=_say))


@main.command()
@click.argument("folder", type=FOLDER, required=False)
def status(folder: Path | None) -> None:
    """Show which points of the rerun in FOLDER are finished; without FOLDER, the store of trained runs."""
    from companion import grid, parameters
    from helpers.sweep.store import Store, size

    with _one_line_errors():
        if folder is None:
            store = Store()
            used = size(store.folder) if store.folder.exists() else 0
            _say(f"{len(store.all_keys())} results, {_bytes(used)}, in {store.folder}")
            _say("\n".join(str(f.parent) for f in sorted(parameters.OUTPUTS.glob("reruns/*/rerun.json"))))
            return
        about = grid.status(folder)
        for p in about["points"]:
            _say(f"{p['name']:<60} {p['status']:<8} {p['seconds']:6.0f} s" + f": {p['error']}" * bool(p["error"]))
        statuses = [p["status"] for p in about["points"]]
        _say(f"{about['notebook']}: " + ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)))
        if set(statuses) != {"ok"} and not about["at_work"]:
            _say(f"To go on: companion rerun --resume --out {folder}")


@main.command()
@click.option("--yes", is_flag=True, help="Delete them.")
def clean(yes: bool) -> None:
    """List files of the store that can be deleted: damaged or abandoned results, and those of older versions."""
    from helpers.engine.training import NUMERICS
    from helpers.sweep.store import Store, remove, size

    with _one_line_errors():
        waste = [(size(path), reason, path) for reason, path in Store().waste({"numerics": NUMERICS})]
        for number, reason, path in waste:
            _say(f"{_bytes(number):>10}  {reason}: {path}")
            if yes:
                remove(path)
        total = _bytes(sum(number for number, _, _ in waste))
        can_go = f"{total} can be deleted: companion clean --yes" if waste else "nothing to delete"
        _say(f"{total} deleted" if yes else can_go)


@main.command()
@click.argument("folder", metavar="RUN", type=FOLDER)
@click.option("--to", "file", type=FOLDER, help="Another file.  [default: RUN/index.html]")
def report(folder: Path, file: Path | None) -> None:
    """Write the report of a RUN's folder again: the answer, the ledger and the notebooks on one page."""
    from companion import report as reports

    with _one_line_errors(), _files_of_a_run(folder):
        _say(f"{reports.write(folder, file)}")


@main.command()
@click.argument("folder", metavar="RUN", type=FOLDER)
@click.option("--reference", type=FOLDER, help="Copy the results that are small enough to commit to this folder.")
@click.option("--readme", type=FOLDER, help="Replace the summary in this README.")
def publish(folder: Path, reference: Path | None, readme: Path | None) -> None:
    """Publish the results of a RUN: as the committed reference, as the README's summary."""
    from companion import pages
    from companion import publish as publishing

    with _one_line_errors(), _files_of_a_run(folder):
        if reference is not None:
            publishing.reference(folder, reference)
            _say(f"{reference}")
        if readme is not None:
            pages.write(readme, publishing.readme(readme.read_text(encoding="utf-8"), folder))
            _say(f"{readme}")


@contextlib.contextmanager
def _files_of_a_run(folder: Path):
    from companion.parameters import BadInput

    try:
        yield
    except (ValueError, LookupError, TypeError) as error:  # files that no run wrote
        raise BadInput(f"{folder}: {error}") from None


@main.command()
@JOBS
@CLUSTER
def verify(jobs: int | None, cluster: str | None) -> None:
    """Train the cheap part of the committed reference again: does this machine agree within the intervals?"""
    from companion import executor, verify
    from companion import report as reports

    with _one_line_errors(), _files_of_a_run(reports.REFERENCE):
        os.environ.update(executor.environment_of([], jobs, cluster, None))
        found = verify.compare(reports.REFERENCE, say=_say)
        _say(found.round({"p": 3}).to_string(index=False))
        agree = int(found["agrees"].sum())
        _say(f"{agree} of {len(found)} agree with the reference" + " within the intervals" * (agree == len(found)))
        sys.exit(0 if agree == len(found) else 1)


@main.command()
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lab(arguments: tuple[str, ...]) -> None:
    """Open JupyterLab at the first notebook, for this machine only and behind a token; it takes ARGUMENTS after --."""
    from jupyterlab.labapp import LabApp

    from companion import parameters

    root = ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    # In this process, so that Ctrl-C is Jupyter's: it asks, and ends its kernels.
    sys.exit(LabApp.launch_instance([
        "--ip=127.0.0.1", f"--ServerApp.root_dir={parameters.PROJECT}",
        "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb", *root, *arguments,
    ]))  # fmt: skip


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"


def _say(text: str) -> None:
    try:
        if text:
            click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as `head` does: go on without one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
