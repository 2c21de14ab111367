"""Every notebook ends for every value that the check of its parameters admits: its cells, executed off its profile."""

import ast
from contextlib import redirect_stdout
from io import StringIO

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ipywidgets.widgets import interaction

from companion import parameters
from helpers import Lab

PATHS = parameters.notebooks()
NETS = ["small_mlp", "brownlee_mlp"]


@pytest.mark.parametrize("name", PATHS)
def test_every_parameter_is_declared_and_nothing_else_is(name):
    own = parameters.defaults(PATHS[name])
    assert own.keys() <= parameters.declarations(name).keys()
    assert parameters.sections(parameters.NOTEBOOKS / "parameters.yml").get(name, {}).keys() <= own.keys()


def one(name, value, rule):
    """Admitted values of one parameter at a small scale; the simplest is the lowest, or the first of a few."""
    if rule.get("one_of"):
        return st.sampled_from({"dataset": ["digits"], "model": NETS}.get(name, rule["one_of"]))
    kept = value if isinstance(value, list) else [value]
    if isinstance(kept[0], int):
        low, high = rule.get("from", 0), max(kept)
        element = st.integers(low, max(low, min(high, rule.get("to", high))))
    else:
        few = [v * factor for v in kept for factor in (1.0, 0.5, 2.0)]
        each = {key: bound for key, bound in rule.items() if key != "length"}
        element = st.sampled_from([v for v in dict.fromkeys(few) if admits(each, v)])
    if not isinstance(value, list):
        return element
    length = rule.get("length")
    return st.lists(element, min_size=length or 1, max_size=length or 4, unique=not rule.get("repeats"))


def admits(rule, value):
    return all(met for _, met in parameters.expectations(rule, value))


@st.composite
def admitted(draw, name):
    """Parameters of a notebook that its check admits: some as in the quick profile, others not."""
    (planned,) = parameters.plan("quick", "digits", only=[name])
    values = parameters.defaults(PATHS[name]) | planned.parameters
    declared = parameters.declarations(name)
    depends = {
        key: any(bound in values for bound in declared[key].values() if isinstance(bound, str)) for key in values
    }
    order = sorted(values, key=lambda key: (key != "dataset", key != "num_train", depends[key]))
    for key in (key for key in order if key not in ("profile", "output_dir", "problem")):
        rule = parameters.limits(declared[key], parameters.scope_of(values))
        if not admits(rule, values[key]) or not draw(st.booleans(), label=f"keep {key}"):
            values[key] = draw(one(key, values[key], rule), label=key)
    parameters.check(name, values)
    return values


class Kernel:
    """As much of IPython as an interactive callback asks for: what it raises is raised."""

    kernel = None

    def showtraceback(self):
        raise


def execute(name, values):
    """Execute the cells of a notebook in this process, and make what each ends in."""
    space = {"__name__": "__main__", "display": lambda *_, **__: None}
    for cell in nbformat.read(PATHS[name], as_version=4).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ()):
            space |= values
        elif cell.cell_type == "code":
            tree = ast.parse(cell.source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), space)
            shown = eval(compile(ast.Expression(last.value), name, "eval"), space) if last else None
            if hasattr(shown, "_repr_html_"):
                shown._repr_html_()


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """No windows, no workers, no threads of torch, and errors of widgets' callbacks raised."""
    monkeypatch.setenv("COMPANION_JOBS", "1")
    monkeypatch.setattr(interaction, "get_ipython", Kernel)
    monkeypatch.setattr(plt, "show", lambda: None)
    threads, backend = torch.get_num_threads(), plt.get_backend()
    plt.switch_backend("Agg")
    torch.set_num_threads(1)
    yield tmp_path / "out"
    Lab.close_open()
    torch.set_num_threads(threads)
    plt.switch_backend(backend)


def ends(name, quiet, examples, **options):
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), **options)  # fmt: skip
    @given(values=admitted(name))
    def run(values):
        print(values)
        try:
            with redirect_stdout(StringIO()):
                execute(name, {**values, "output_dir": str(quiet)})
        finally:
            plt.close("all")

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_a_notebook_ends_for_values_off_its_profile(name, quiet):
    ends(name, quiet, 2, derandomize=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", PATHS)
def test_a_notebook_ends_for_many_values_off_its_profile(name, quiet):
    ends(name, quiet, 40, derandomize=False, print_blob=True)
