"""What a run leaves behind: one table, one JSON, one figure."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import joblib
import matplotlib.pyplot as plt
import psutil
import torch
import yaml

from benchmarks.rows import Bench
from benchmarks.timing import Line
from helpers import plots
from helpers.problems import builtin, pick_device

PACKAGES = (
    "torch", "torchvision", "numpy", "jax", "keras", "tensorflow-cpu", "backpack-for-pytorch", "batch-size-companion",
)  # fmt: skip


def machine() -> dict[str, object]:
    """CPU model, cores, threads, load, device, versions."""
    cpuinfo, device = Path("/proc/cpuinfo"), pick_device()
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": joblib.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg()[0],  # of the minute before: others' work, which slows threads that wait
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@dataclass
class Run:
    """All that a run found. ``skipped`` and ``failed``: rows that are missing from it, with the reason."""

    bench: Bench
    lines: list[Line] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=machine)

    def text(self) -> str:
        """The table, and below it what it was measured on, what was checked, and what is missing from it."""
        about = {**self.machine, **self.machine["versions"]}
        versions = ", ".join(f"{name} {about[name]}" for name in self.machine["versions"])
        notes = dict.fromkeys(f"- {line.row}, {line.case}: {line.note}" for line in self.lines if line.note)
        parts = [
            "SMOKE SIZES: these figures mean nothing." if self.bench.smoke else "",
            table(self.lines),
            "Limit: of mnist-epoch and mnist-roofline, what an engine would reach that did the matrix products of the "
            "same steps, each in the faster of two libraries, and nothing else; of seeds, the rounds of jobs if none "
            "disturbed another; of walk, its arithmetic at the speed of square products; of imports, what the packages "
            "take by themselves.",
            f"Medians over {self.bench.pairs} interleaved pairs, after one unmeasured of each. {about['cpu']}, "
            f"{about['cores']} cores, {about['threads']} threads, {about['device']}; load average before "
            f"{about['load_average']:.1f}; {versions}.",
            "\n".join(notes),
            *(f"SKIPPED {row}: {reason}" for row, reason in self.skipped.items()),
            *(f"FAILED {row}: {reason}" for row, reason in self.failed.items()),
        ]
        return "\n\n".join(part for part in parts if part)

    def write(self, out: Path) -> None:
        """``benchmarks.json``, ``benchmarks.md`` and, where epochs were timed, ``figures/sweep_seconds``."""
        lines = [{**asdict(line), "median": line.median, "reached": line.reached} for line in self.lines]
        content = json.dumps({**asdict(self), "lines": lines}, indent=1, ensure_ascii=False)
        (out / "benchmarks.json").write_text(content, encoding="utf-8")
        (out / "benchmarks.md").write_text(self.text() + "\n", encoding="utf-8")
        epochs = {int(line.case.split()[-1]): line for line in self.lines if line.row == "mnist-epoch"}
        if epochs:
            self._figure({size: line for size, line in epochs.items() if size >= 64}, out)

    def _figure(self, epochs: dict[int, Line], out: Path) -> None:
        """Seconds that notebook 02's sweep takes at paper scale, extrapolated from an epoch each."""
        profiles = (builtin.PROJECT / "notebooks/profiles.yml").read_text(encoding="utf-8")
        paper, timed = yaml.safe_load(profiles)["paper"]["every"], self.bench.epoch_sizes[0]
        factor = paper["num_train"] / timed * paper["epochs"] * paper["seeds"]
        plots.use_style()
        ax, totals = plt.subplots()[1], []
        for side, label, shade in (("theirs", "the loop", "0.45"), ("ours", "this companion", "#0072b2")):
            seconds = [[factor * s for s in getattr(line, side)] for line in epochs.values()]
            seconds.append([sum(pair) for pair in zip(*seconds)])
            middle = [median(s) for s in seconds]
            spread = [[m - min(s) for m, s in zip(middle, seconds)], [max(s) - m for m, s in zip(middle, seconds)]]
            ax.errorbar(range(len(middle)), middle, spread, fmt="o", markersize=9, color=shade, label=label)
            for place, m in enumerate(middle):
                ax.annotate(_duration(m), (place, m), (10, 0), textcoords="offset points", va="center", color=shade)
            totals.append(middle[-1])
        names = [f"batch {size}" for size in epochs] + ["all"]
        ax.set(yscale="log", ylabel="time, extrapolated (log scale)", xticks=range(len(names)), xticklabels=names)
        ticks = [60 * m for m in (1, 5, 15, 30, 60, 120, 300, 600, 1_200, 3_000, 6_000)]
        ax.set_yticks(ticks, [f"{t // 60} min" if t < 3600 else f"{t // 3600} h" for t in ticks])
        ax.minorticks_off()
        ax.margins(x=0.2, y=0.3)
        ax.legend(loc="upper left", ncols=2)
        theirs, ours = totals
        ax.set_title(f"The MNIST sweep at full scale: {_duration(ours)} instead of {_duration(theirs)}")
        caption = (
            f"Shen's network, {paper['num_train']:,} images, {paper['epochs']} epochs, evaluated, × {paper['seeds']} "
            "seeds. The loop: torchvision's dataset, DataLoader, SGD. Extrapolated from one epoch of "
            f"{timed:,} images: median and range of {self.bench.pairs} pairs. {self.machine['cpu']}, "
            f"{self.machine['cores']} cores, {self.machine['device']}."
        )
        plots.save(ax, "sweep_seconds", out, caption)
        plt.close("all")


def table(lines: list[Line]) -> str:
    """An aligned Markdown table."""
    cells = [["row", "case", "against", "ours", "theirs", "median", "min … max", "target", "reached", "limit"]]
    for line in lines:
        values = [f"{v:.3g}{' ' * (line.unit in ('%', 's'))}{line.unit}" for v in (
            line.median, min(line.values), max(line.values), line.target, line.limit or 0.0
        )]  # fmt: skip
        cells.append([
            line.row, line.case, line.against, *(f"{median(s):.3g} s" if s else "" for s in (line.ours, line.theirs)),
            values[0], f"{values[1]} … {values[2]}", f"{'≥' if line.at_least else '≤'} {values[3]}",
            "yes" if line.reached else "no", values[4] if line.limit else "",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) + " |" for row in cells)


def _duration(seconds: float) -> str:
    units = [(length, unit) for length, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * length]
    length, unit = (*units, (1, "s"))[0]
    return f"{seconds / length:.3g} {unit}"
