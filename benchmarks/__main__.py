"""``python -m benchmarks``: time the rows, print the table, and write it beside its JSON and figure."""

from __future__ import annotations

import contextlib
import datetime
import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click
import joblib
import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.rows import ROWS, Bench
from benchmarks.timing import Skipped
from helpers.problems import builtin


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--rows", default="", metavar="walk,start", help=f"Only these rows, of: {', '.join(ROWS)}.")
@click.option("--pairs", type=int, default=5, show_default=True, help="Measured repetitions of each side.")
@click.option("--smoke", is_flag=True, help="Tiny sizes, on digits: does it all work? The figures mean nothing.")
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="A new folder for the results.  [default: outputs/benchmarks/<time>]")  # fmt: skip
def command(rows: str, pairs: int, smoke: bool, out: Path | None) -> int:
    """How fast is it, against what one would otherwise use? Ratios, each measured in one run."""
    names = [name.strip() for name in rows.split(",") if name.strip()] or list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise click.UsageError(f"unknown row {unknown[0]!r}; choose from: {', '.join(ROWS)}")
    if pairs < 1:
        raise click.UsageError(f"--pairs is {pairs}; expected a whole number from 1 on")
    out = out or builtin.PROJECT / "outputs/benchmarks" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"--out: {out} is there already; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--out: {error}") from error
    torch.set_num_threads(joblib.cpu_count())  # both sides get all cores
    run = report.Run(Bench(pairs, smoke))
    for name in tqdm(names, desc="rows", file=sys.stderr):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the sweeps' own progress
                run.lines += ROWS[name](run.bench)
        except Skipped as reason:
            run.skipped[name] = str(reason)
        except ModuleNotFoundError as error:
            run.skipped[name] = f"needs {error.name}; `make benchmark` installs it"
        except Exception as error:  # the other rows are worth their minutes all the same
            traceback.print_exc()
            run.failed[name] = f"{type(error).__name__}: {error}"
    run.write(out)
    click.echo(f"{run.text()}\n\nWritten to {out}")
    return 1 if run.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where sides differ in their results, 2 for bad input, said in one line."""
    try:
        return command.main(arguments, prog_name="make benchmark", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"benchmark: {error.format_message()}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nbenchmark: stopped; nothing is written", err=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
