"""environment.yml, pyproject.toml and constraints.txt say the same."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(r) for r in PROJECT["dependencies"]]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_environment_has_the_same_packages_with_the_same_bounds():
    conda = dict(re.fullmatch(r"([\w.-]+)(.*)", d).groups() for d in ENVIRONMENT["dependencies"] if isinstance(d, str))
    pip_name = {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in DEPENDENCIES}
    assert conda == {**pip_name, "python": PROJECT["requires-python"], "pip": ""}


def test_environment_ends_with_the_project_itself():
    assert ENVIRONMENT["dependencies"][-1] == {"pip": ["-e ."]}
    assert ENVIRONMENT["name"] == PROJECT["name"] == "batch-size-companion"


def test_every_dependency_has_its_reason():
    text = (ROOT / "environment.yml").read_text().split("dependencies:")[1]
    lines = [line for line in text.splitlines() if re.match(r"  - [\w.-]+", line)]
    assert len(lines) == len(DEPENDENCIES) + 3  # python, pip, and the pip section's own line
    without = [line for line in lines if " # " not in line and line.strip() != "- pip:"]
    assert without == []


def test_constraints_pin_every_dependency_within_its_bounds():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pins.items()}
    extras = [Requirement(r) for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in DEPENDENCIES + extras:
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_lower_bounds_only():
    for requirement in DEPENDENCIES:
        assert [s.operator for s in requirement.specifier] == [">="], requirement


def test_what_only_a_cluster_or_the_benchmarks_need_has_its_reason_and_the_same_bounds():
    listed = re.findall(r"^#   - ([\w.-]+)(\S+)  # .+$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    extras = PROJECT["optional-dependencies"]
    extra = [Requirement(r) for r in extras["cluster"] + extras["benchmark"]]
    assert listed == [(r.name, str(r.specifier)) for r in extra]
