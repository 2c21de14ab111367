"""What a notebook makes is seen: no table is lost inside a cell, and what the prose announces stands below it."""

import ast
import re

import nbformat
import pandas as pd
import pytest
from pandas.io.formats.style import Styler

from companion import parameters

PATHS = parameters.notebooks()
_FRAMES = (pd.DataFrame, pd.Series, Styler, pd.api.typing.DataFrameGroupBy, pd.api.typing.SeriesGroupBy)
# Methods that make a new frame; other objects have methods of these names that act in place.
_MAKES_A_FRAME = {name for kind in _FRAMES for name in dir(kind) if name[0] != "_"} - {
    "append", "clear", "hist", "insert", "plot", "pop", "show", "update", "where",
}  # fmt: skip


def _code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def makes_something_to_show(statement):
    """Whether a statement is an expression that IPython would show at the end of a cell: a frame, or a bare value."""
    if not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Constant):
        return False
    call = statement.value
    if not isinstance(call, ast.Call):
        return True
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in _MAKES_A_FRAME | {"DataFrame", "Markdown", "Series", "ledger"}


def lost(source):
    """The lines of a cell whose value nobody sees: frames made before the last statement, or before a semicolon."""
    body = ast.parse(source).body
    silenced = body[-1:] if source.rstrip().endswith(";") else []
    return [ast.unparse(s) for s in body[:-1] + silenced if makes_something_to_show(s)]


def shows_a_table(source):
    """Whether a cell ends in a frame or calls what displays one."""
    ends = makes_something_to_show(ast.parse(source).body[-1]) and not source.rstrip().endswith(";")
    return ends or re.search(r"\b(display|lab\.keep)\(", source) is not None


def announced(source):
    """Whether a cell's prose ends in a colon, and so announces a table."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "book.say":
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if texts and texts[-1].rstrip().endswith(":"):
                return True
    return False


def promises(cells):
    """Each markdown cell that announces something below, as (kind, text, the code cells up to the next markdown)."""
    for i, cell in enumerate(cells):
        following = []
        for other in cells[i + 1 :]:
            if other.cell_type == "code":
                following.append(other)
            elif i > 0:  # the first cell speaks of the whole notebook
                break
        for kind in ("table", "figure"):
            words = rf"\b({kind}|{kind}s)\b[^.]*\bbelow\b|\bbelow\b[^.]*\b{kind}\b"
            if cell.cell_type == "markdown" and re.search(words, cell.source):
                yield kind, cell.source, following


def wrong(cells):
    """List what is made but not seen, or announced but not made."""
    found = [f"lost: {line}" for cell in _code(cells) for line in lost(cell.source)]
    found += [
        f"announced without a table: {cell.source[:60]}"
        for cell in _code(cells)
        if announced(cell.source) and not shows_a_table(cell.source)
    ]
    for kind, text, following in promises(cells):
        makes = shows_a_table if kind == "table" else lambda source: re.search(r"book\.(figure|lab)\(", source)
        if not any(makes(cell.source) for cell in following):
            found.append(f"no {kind} below: {text[:60]}")
    return found


def unseen(executed):
    """The cells of an executed notebook that make a figure or a table, or say something, without an output of it."""
    found = []
    for cell in _code(executed.cells):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        body = ast.parse(cell.source).body
        if re.search(r"\bbook\.figure\(", cell.source) and "image/png" not in kinds:
            found.append(f"no picture: {cell.source[:60]}")
        if re.search(r"^book\.say\(", cell.source, re.M) and "text/markdown" not in kinds:
            found.append(f"nothing said: {cell.source[:60]}")
        shown = body and makes_something_to_show(body[-1]) and not cell.source.rstrip().endswith(";")
        if shown and not kinds:
            found.append(f"nothing shown: {cell.source[-60:]}")
    return found


@pytest.mark.parametrize("name", PATHS)
def test_what_is_made_is_seen_and_what_is_announced_is_made(name):
    assert wrong(nbformat.read(PATHS[name], as_version=4).cells) == []


CELLS = {
    "pd.DataFrame({n: end.loc[at] for n, at in names.items()}).T.assign(setting=1)\nbook.table(history, 'history')": 1,
    "best.groupby('batch_size').lr.mean().round(3)\nx = 1": 1,
    "table\nbook.ledger()": 1,
    "table.round(2);": 1,
    "book.ledger()\nx = 1": 1,
    "table if x else None\nprint(1)": 1,
    "book.table(history, 'history')\ntable.round(2)": 0,
    "axes.plot(x, y)\nrows.append(1)\naxes.set_title('')\naxes.legend()\nplots.theory(axes, x, y, '')": 0,
    "widgets.interact(look, rate=rates);": 0,
}


@pytest.mark.parametrize("source", CELLS)
def test_a_frame_before_the_end_of_its_cell_is_lost(source):
    assert len(lost(source)) == CELLS[source]


def _notebook(*cells):
    makers = {"md": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    return [makers[kind](source) for kind, source in cells]


def test_prose_that_announces_a_table_or_a_figure_needs_one_before_the_next_prose():
    prose = ("md", "# Title"), ("md", "How far that holds is in the table below.")
    assert wrong(_notebook(*prose, ("code", "x = 1"), ("code", "frame.round(2)"))) == []
    (found,) = wrong(_notebook(*prose, ("code", "x = 1"), ("md", "Next."), ("code", "frame.round(2)")))
    assert found.startswith("no table below")
    title = ("md", "# Title\n\nThe figure below has both.")
    assert wrong(_notebook(title, ("md", "Text."), ("code", "book.figure(fig, 'both', '')"))) == []
    assert wrong(_notebook(title, ("md", "Text."), ("code", "frame.round(2)")))


def test_prose_of_a_cell_that_ends_in_a_colon_needs_a_table_in_that_cell():
    said = "book.say(f'Of {n} runs all reach it. By target:')"
    assert wrong(_notebook(("code", f"{said}\nframe.round(2)"))) == []
    assert wrong(_notebook(("code", said)))


def test_an_executed_cell_without_its_output_is_found():
    cells = _notebook(("code", "book.figure(fig, 'a', '')"), ("code", "frame.round(2)"), ("code", "book.say('Yes.')"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert len(unseen(notebook)) == 3
    for cell, kind in zip(cells, ("image/png", "text/html", "text/markdown")):
        cell.outputs = [nbformat.v4.new_output("display_data", {kind: "…"})]
    assert unseen(notebook) == []
