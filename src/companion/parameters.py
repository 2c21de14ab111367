"""Plans: which notebooks to execute with which parameters, all checked before anything is computed.

The values come from ``notebooks/profiles.yml`` and the command line; ``notebooks/parameters.yml`` declares what each
parameter may be.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import operator
import os
import re
import reprlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = PROJECT / "notebooks"
OUTPUTS = PROJECT / "outputs"

_RELATIONS = {
    "from": (operator.ge, "at least"),
    "to": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


class BadInput(ValueError):
    """A request that cannot be run; the message is one line with the value and the expectation."""


@dataclass
class Planned:
    """One notebook to execute with its parameters and, once executed, the outcome."""

    name: str
    path: Path
    parameters: dict[str, object]
    label: str  # its name, or that of a grid's point
    minutes: float = 0.0  # about how long it takes at laptop scale, by its own metadata
    folder: Path = Path()  # where it is executed
    values: dict[str, object] = field(default_factory=dict)  # those of a grid's point
    key: str = ""  # of a grid's point: identifies everything that its outcome depends on
    status: str = "waiting"  # then running; then ok, FAILED or stopped
    error: str = ""
    seconds: float = 0.0
    title: str = ""


def notebooks(folder: Path = NOTEBOOKS) -> dict[str, Path]:
    """The notebooks by name, in reading order. Raises BadInput where there are none."""
    found = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise BadInput(f"no notebooks in {folder}; run from a checkout, installed by pip install -e .")
    return found


@functools.cache
def _read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def defaults(path: Path) -> dict[str, object]:
    """The parameters of a notebook with their default values, from its parameters cell. Raises BadInput without one."""
    try:
        cells = _read(path)["cells"]
        (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ())]
        return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    except (ValueError, SyntaxError, LookupError, AttributeError) as error:
        raise BadInput(f"{path.name}: its parameters cell cannot be read ({error}); it holds literals only") from None


def plan(
    profile: str,
    dataset: str,
    *,
    only: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    folder: Path = NOTEBOOKS,
) -> list[Planned]:
    """The notebooks to execute, each with its checked parameters. Raises BadInput; starts nothing.

    profile: a section of profiles.yml.
    dataset: goes to the notebooks whose own default is ``"auto"``.
    only: names or numbers of notebooks; all by default.
    given: values that override the profile's.
    """
    given, found = dict(given or {}), notebooks(folder)
    wanted = [o.zfill(2) for o in only]
    for o in wanted:
        if not any(o in (name, name.split("_")[0]) for name in found):
            raise BadInput(f"unknown notebook {o!r}; choose from: {', '.join(found)}")
    chosen = [name for name in found if not wanted or name in wanted or name.split("_")[0] in wanted]
    profiles = sections(folder / "profiles.yml")
    names = [name for name in profiles if not name.startswith("on_")]
    if profile not in names:
        raise BadInput(f"unknown profile {profile!r}; choose from: {', '.join(names)}")
    for name, option in (("output_dir", "out"), ("profile", "profile")):
        if name in given:
            raise BadInput(f"{name} is set by --{option}, and not as a parameter")
    known = {parameter for name in chosen for parameter in defaults(found[name])}
    for name in given:
        if name not in known:
            raise BadInput(f"unknown parameter {name!r}; these notebooks take: {', '.join(sorted(known))}")
    planned = []
    for name in chosen:
        own = defaults(found[name])
        values = dict(profiles[profile].get("every", {})) | profiles[profile].get(name, {})
        if own.get("dataset") == "auto":
            values["dataset"] = dataset
            if profile != "quick":  # its values fit digits as they are
                values |= profiles.get(f"on_{dataset}", {}).get(name, {})
        values |= given | {"profile": profile}
        values = {k: _typed(f"{name}: {k}", v, own[k]) for k, v in values.items() if k in own}
        check(name, own | values, folder)
        minutes = _read(found[name])["metadata"].get("companion", {}).get("minutes", 0.0)
        planned.append(Planned(name, found[name], values, name, minutes))
    return planned


def on_dataset(profile: str, dataset: str, make: Callable[[str], list]) -> tuple[list, str, str]:
    """The plan that ``make`` gives for the dataset that is here, its name, and a note where it is a stand-in.

    Bad input is refused before a dataset is looked for, which may take a download. Raises BadInput, also for data
    files that are missing or damaged.
    """
    if dataset == "auto" and profile == "quick":
        dataset = "digits"  # the tests' profile: it needs no network
    make(dataset)
    from helpers import problems

    try:
        real, note = problems.resolve(dataset)
    except (problems.DataError, ValueError) as error:
        raise BadInput(str(error)) from None
    return make(real), real, note


# Checks


def declarations(notebook: str, folder: Path = NOTEBOOKS) -> dict[str, dict[str, object]]:
    """The limits of a notebook's parameters, from parameters.yml; an undeclared parameter is only checked by type."""
    if not (folder / "parameters.yml").exists():
        return {}
    found = sections(folder / "parameters.yml")
    return {**found.get("every", {}), **found.get(notebook, {})}


def check(notebook: str, values: Mapping[str, object], folder: Path = NOTEBOOKS) -> None:
    """Refuse values outside their declared limits, before anything starts. Raises BadInput."""
    declared, scope = declarations(notebook, folder), scope_of(values)
    for name in values:
        for expected, met in expectations(limits(declared.get(name, {}), scope), scope[name]):
            if not met:
                raise BadInput(f"{notebook}: {name} is {reprlib.repr(scope[name])}; expected {expected}")


def scope_of(values: Mapping[str, object]) -> dict[str, object]:
    """The values that limits may name: the parameters themselves, and the size of their dataset."""
    if values.get("problem"):
        size = examples_of(values["problem"])
        return {**values, "num_train": size, "dataset_size": size}
    from helpers.problems import TRAIN_SIZES  # here: it imports torch

    size = TRAIN_SIZES.get(values.get("dataset", "blobs"), max(TRAIN_SIZES.values()))  # auto may become the largest
    return {"num_train": size, **values, "dataset_size": size}


def limits(rule: Mapping[str, object], scope: Mapping[str, object]) -> dict[str, object]:
    """A declaration with each name in it replaced: a relation by (number, its name), ``one_of`` by a list."""
    found = dict(rule)
    for key in _RELATIONS.keys() & rule.keys():
        bound = scope[rule[key]] if isinstance(rule[key], str) else rule[key]
        found[key] = max(bound) if isinstance(bound, list) else bound
        found[f"{key} name"] = f" ({rule[key]})" if isinstance(rule[key], str) else ""
    if isinstance(rule.get("one_of"), str):
        from helpers.problems import TRAIN_SIZES, nets

        names = {"datasets": ["auto", *TRAIN_SIZES], "nets": [*nets.NETS]}[rule["one_of"]]
        found["one_of"] = [name for name in names if name not in rule.get("except", ())]
    return found


def expectations(rule: Mapping[str, object], value: object):
    """Each expectation of a rule as text, and whether the value meets it."""
    each = value if isinstance(value, list) else [value]
    yield "at least one value", bool(each)
    yield "different values", bool(rule.get("repeats")) or len(set(each)) == len(each)
    yield f"exactly {rule.get('length')} values", len(each) == rule.get("length", len(each))
    if "one_of" in rule:
        yield f"one of: {', '.join(rule['one_of'])}", all(v in rule["one_of"] for v in each)
    related = [(*_RELATIONS[key], rule[key], rule[f"{key} name"]) for key in _RELATIONS if key in rule]
    text = " and ".join(f"{words} {bound:g}{name}" for _, words, bound, name in related)
    yield text, all(holds(v, bound) for holds, _, bound, _ in related for v in each)


@functools.cache
def examples_of(problem: str) -> int:
    """The number of training examples of a ``my_module:problem``, found from the working directory.

    Another process imports the module, so that its faults stay there. Raises BadInput where it gives no problem.
    """
    code = "import sys; from helpers import problems; print(problems.choose(sys.argv[1]).num_train)"
    environment = {**os.environ, **import_path()}
    done = subprocess.run([sys.executable, "-c", code, problem], env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadInput(f"problem is {problem!r}; expected module:name, importable from {Path.cwd()} ({reason})")
    return int(done.stdout.split()[-1])


def import_path() -> dict[str, str]:
    """The environment variable by which a kernel imports modules from the working directory."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))}


def _typed(where: str, value: object, default: object) -> object:
    """``value`` as the type of the notebook's default, or BadInput."""
    if isinstance(default, float) and type(value) is int:
        value = float(value) if abs(value) < 2**63 else math.inf
    if isinstance(default, list) and isinstance(value, list):
        return [_typed(where, v, default[0]) for v in value]
    if type(value) is not type(default):
        a_list = f"a list like {default}"
        wanted = a_list if isinstance(default, list) else f"{type(default).__name__}, like {default!r}"
        raise BadInput(f"{where} is {reprlib.repr(value)}; expected {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{where} is {value}; expected a finite number")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise BadInput(f"{where} has more than 64 bits; expected a smaller number")
    return value


# Text


def parse_given(pairs: Sequence[str]) -> dict[str, object]:
    """``["lr=0.05", "batch_sizes=[8, 16]"]`` as values, read as YAML. Raises BadInput for other text."""
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"-p {pair!r} is not name=value")
        given[name] = value_of(f"-p {pair!r}", text)
    return given


def value_of(where: str, text: str) -> object:
    """A value written as YAML. Raises BadInput."""
    try:
        return numbers(read_yaml(text))
    except ValueError:
        raise BadInput(f"{where}: {text!r} is not a value") from None


def read_yaml(text: str) -> object:
    """The value of YAML text. Raises ValueError, in one line, for text that has none."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # a tag that does not fit its value ends in any error: !!int "", !!timestamp x
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def numbers(value: object, depth: int = 2) -> object:
    """The value with text such as ``1e-3``, which YAML does not read as a number, as a number."""
    if isinstance(value, list) and depth:
        return [numbers(one, depth - 1) for one in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)e[+-]?\d+|nan", value, re.IGNORECASE):
        return float(value)
    return value


@functools.cache
def sections(file: Path) -> dict[str, dict[str, dict[str, object]]]:
    """A YAML file of sections of mappings. Raises BadInput where it is none."""
    try:
        sections = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: {error}") from None
    found = sections.values() if isinstance(sections, dict) else [None]
    mappings = all(isinstance(one, dict) and all(isinstance(v, dict) for v in one.values()) for one in found)
    if not mappings or not all(isinstance(name, str) for name in sections):
        raise BadInput(f"{file}: expected sections of mappings, such as every: {{lr: {{…}}}}")
    return sections
