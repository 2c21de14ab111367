"""The rooms of the house: every import points down, notebooks import no runner, and no file grows past reading."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each room may import, itself aside.
MAY = {
    "helpers.problems": set(),
    "helpers.engine": {"helpers.problems"},
    "helpers.measure": {"helpers.problems", "helpers.engine"},
    "helpers.sweep": {"helpers.problems", "helpers.engine", "helpers.measure"},
    "helpers.ledger": {"helpers.problems", "helpers.engine", "helpers.measure", "helpers.sweep"},
    "helpers.advice": {"helpers.problems", "helpers.engine", "helpers.measure"},
    "helpers.plots": set(),
    "helpers.live": {"helpers.problems", "helpers.engine", "helpers.measure", "helpers.plots"},
    "helpers.book": {"helpers.ledger", "helpers.plots"},
    "companion": {
        f"helpers.{room}" for room in ("problems", "engine", "measure", "sweep", "ledger", "plots", "book", "advice")
    },
}
FILES = sorted(p for p in (ROOT / "src").rglob("*.py") if p.parent.name != "src")


def room_of(module):
    parts = module.split(".")
    return "companion" if parts[0] == "companion" else ".".join(parts[:2]) if parts[0] == "helpers" else None


def imports(text):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("helpers", "companion"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "src")))
def test_every_import_points_down(file):
    module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    if room == "helpers":  # the package's own first page, which loads its names when they are asked for
        return
    others = {room_of(name) for name in imports(file.read_text(encoding="utf-8"))} - {None, room}
    assert others <= MAY[room]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "src")))
def test_a_file_says_first_what_it_is_and_stays_readable(file):
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 430


def test_no_notebook_imports_the_runner():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert not any(name.split(".")[0] == "companion" for name in imports(code)), notebook.name


def test_production_code_mocks_nothing():
    for file in FILES:
        assert not any(name.startswith("unittest") for name in imports(file.read_text(encoding="utf-8"))), file
