"""The ``companion`` command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from helpers import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="companion")
def main() -> None:
    """What does the batch size do to training? Notebooks, run headlessly."""


@main.command()
@click.option("--profile", default="laptop", show_default=True, help="Parameter values: quick, laptop, paper.")
@click.option("--dataset", default="auto", show_default=True,
              help="auto (MNIST if it can be had, else digits), mnist, fashion_mnist, kmnist, digits.")  # fmt: skip
@click.option("--only", default="", metavar="02,04", help="Only these notebooks, by number or name.")
@click.option("--jobs", type=int, default=None, help="Processes side by side.  [default: one a core]")
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="A new folder for the results.  [default: outputs/runs/<time>-<profile>]")  # fmt: skip
@click.option("-p", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a parameter of every notebook that has it.")
def run(profile: str, dataset: str, only: str, jobs: int | None, out: Path | None, pairs: tuple[str, ...]) -> None:
    """Execute the notebooks and write an index page with every figure and verdict."""
    from helpers import runs

    try:
        names = [name.strip() for name in only.split(",") if name.strip()]
        code = runs.run(profile, dataset, only=names, given=runs.parse_given(pairs), jobs=jobs, out=out, say=_say)
    except runs.BadInput as error:
        click.echo(f"companion: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("\ncompanion: stopped. Finished trainings are kept; the same command goes on from them.", err=True)
        sys.exit(130)
    sys.exit(code)


def _say(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()
