"""``companion advise``: advice on a problem of one's own, as a page of one file, as data, and in ten lines."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import traceback
from collections.abc import Callable
from pathlib import Path

from companion import pages
from companion.executor import machine, new_folder
from companion.parameters import BadInput
from helpers import advice, problems


def advise(spec: str, *, minutes: float, batch_size: int, lr: float, optimizer: str, out: Path | None,
           say: Callable[[str], object]) -> int:  # fmt: skip
    """Measure, print the summary, and write ``index.html`` and ``advice.json`` into ``out``, a new folder.

    Returns 0; 1 where the user's own code raised, with its traceback; 130 where an interrupt left phases out. Raises
    BadInput, with nothing written, for a problem that cannot be advised on.
    """
    folder = None
    try:
        problem = problems.find(spec)
        if ":" in optimizer:
            optimizer = problems.locate(optimizer, "optimizer")
        folder = new_folder(out, "advice", spec.partition(":")[0])
        found = advice.advise(problem, optimizer=optimizer, batch_size=batch_size, lr=lr, minutes=minutes, say=say)
    except Exception as error:
        if folder is not None:
            folder.rmdir()
        if _raised_here(error):
            raise BadInput(str(error)) from None
        say(traceback.format_exc().rstrip())
        say(f"companion: {spec} raised {type(error).__name__}: {' '.join(str(error).split())}")
        return 1
    page = write(found, folder, spec)
    say("\n" + "\n".join(found.summary()) + f"\n\n{page}")
    return 130 if found.interrupted else 0


def _raised_here(error: Exception) -> bool:
    """Whether the package refused a request, in contrast to an exception of the user's code."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = {Path(advice.__file__).parents[1], Path(__file__).parent} & {*Path(last).parents}
    return bool(ours) and isinstance(error, ValueError | TypeError | problems.DataError)


def write(found: advice.Advice, folder: Path, spec: str) -> Path:
    """Write the advice as ``advice.json`` and as a page that needs no other file; returns the page."""
    data = found.to_dict()
    pages.write(folder / "advice.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
    measured = [
        {"name": name, "id": name.replace(" ", "-"), "sentence": one["sentence"], "seconds": data["seconds"][name],
         "values": json.dumps({k: v for k, v in one.items() if k not in ("sentence", "frame")}, indent=1,
                              ensure_ascii=False)}
        for name, one in data["phases"].items()
    ]  # fmt: skip
    lines = [(line, phase.replace(" ", "-") if phase in data["phases"] else "") for line, phase in found.lines()]
    page = pages.render("advice.html.j2", spec=spec, advice=data, lines=lines, measured=measured, machine=machine(),
                        figure=_figure(found), number=advice.number)  # fmt: skip
    return pages.write(folder / "index.html", page)


def _figure(found: advice.Advice) -> str:
    """The price of a batch, the price of a step and the losses of branches, as far as they are known: PNG in base64."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from helpers import plots
    from helpers.measure import critical

    plots.use_style()
    speed = found.phases.get("speed")
    branches = [one for name, one in found.phases.items() if name.startswith("critical")][-1:]
    known = [found.answer is not None, speed is not None, bool(branches)]
    if not any(known):
        return ""
    fig, panels = plt.subplots(1, sum(known), figsize=(5.2 * sum(known) + 1, 4.4), squeeze=False)
    axes = iter(panels[0])
    if found.answer is not None:
        low, high = found.answer.low, found.answer.high
        ax = plots.price_of_batch(found.table, low, high, found.about["batch_size"], ax=next(axes))
        ax.set_title(f"Batches from {low:,} to {high:,} take the least time, to 10 %")
    if speed is not None:
        sizes, ax = np.array([*speed.seconds], dtype=float), next(axes)
        ax.plot(sizes, 1e3 * np.array([*speed.seconds.values()]), "o", color="#0072b2", label="median step")
        plots.theory(ax, sizes, lambda b: 1e3 * (speed.fixed + speed.per_example * b), "a + b·B")
        plots.batch_size_axis(ax, [int(b) for b in sizes]).set(yscale="log", ylabel="milliseconds a step")
        ax.set_title(f"A step's fixed part is worth {speed.turning} examples")
        ax.legend()
    for one in branches:
        end = critical.at_the_end(one.frame).groupby(["batch_size", "lr"]).loss.mean().groupby("batch_size").min()
        ax = next(axes)
        ax.plot(end.index, end, "o-", color="#d55e00")
        plots.batch_size_axis(ax, end.index.tolist()).set(ylabel="held-out loss")
        ax.set_title(f"Loss after {one.examples:,} examples, each size at its best rate")
    with contextlib.closing(io.BytesIO()) as picture:
        fig.savefig(picture, format="png")
        plt.close(fig)
        return base64.b64encode(picture.getvalue()).decode()
