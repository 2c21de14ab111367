"""Plans: values from the profile and the command line, checked by what notebooks/parameters.yml declares of them."""

import sys

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import parameters
from companion.parameters import BadInput

OWN = {"dataset": "auto", "problem": "", "num_train": 100, "lr": 0.1, "sizes": [8], "early": 1, "epochs": 3,
       "pair": [1, 2], "note": "x", "flag": True, "output_dir": ""}  # fmt: skip
PROFILES = """
quick: {every: {epochs: 2}, 01_a: {sizes: [4, 16]}}
laptop: {every: {num_train: 1000}}
on_digits: {01_a: {num_train: 500}}
"""
DECLARED = """
every:
  dataset: {one_of: datasets, except: [blobs]}
  num_train: {from: 10, to: dataset_size}
  lr: {above: 0, below: 10}
  sizes: {from: 1, to: num_train}
  epochs: {from: 1}
  early: {from: 1, to: epochs}
  pair: {from: 0, length: 2}
02_b:
  pair: {from: 0, length: 2, repeats: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    code = "\n".join(f"{name} = {value!r}" for name, value in OWN.items())
    for name in ("01_a", "02_b"):
        cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["parameters"]})
        kernel = {"name": "python3", "display_name": "", "language": "python"}
        nbformat.write(
            nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), folder / f"{name}.ipynb"
        )
    (folder / "profiles.yml").write_text(PROFILES)
    (folder / "parameters.yml").write_text(DECLARED)
    return folder


def plan(folder, profile="quick", dataset="digits", only=("01",), **given):
    return parameters.plan(profile, dataset, only=list(only), given=given, folder=folder)


def test_given_values_go_over_the_dataset_and_that_over_the_profile(folder):
    (item,) = plan(folder, "laptop", lr=1)
    assert item.parameters == {"dataset": "digits", "num_train": 500, "lr": 1.0}
    assert plan(folder, only=())[1].parameters == {"dataset": "digits", "epochs": 2}
    assert [item.name for item in plan(folder, only=["1", "02_b"])] == ["01_a", "02_b"]


@pytest.mark.parametrize(("given", "message"), [
    ({"lr": 10.0}, "01_a: lr is 10.0; expected above 0 and below 10"),
    ({"lr": float("nan")}, "lr is nan; expected a finite number"),
    ({"lr": True}, "lr is True; expected float, like 0.1"),
    ({"sizes": [4, 200]}, "sizes is [4, 200]; expected at least 1 and at most 100 (num_train)"),
    ({"sizes": 4}, "sizes is 4; expected a list like [8]"),
    ({"early": 3}, "early is 3; expected at least 1 and at most 2 (epochs)"),
    ({"num_train": 2000}, "num_train is 2000; expected at least 10 and at most 1297 (dataset_size)"),
    ({"pair": [1]}, "pair is [1]; expected exactly 2 values"),
    ({"pair": [1, 1]}, "pair is [1, 1]; expected different values"),
    ({"dataset": "blobs"}, "dataset is 'blobs'; expected one of: auto, mnist, fashion_mnist, kmnist, digits"),
    ({"note": 5}, "note is 5; expected str, like 'x'"),
    ({"other": 5}, "unknown parameter 'other'; these notebooks take: dataset, early, epochs"),
    ({"output_dir": "x"}, "output_dir is set by --out, and not as a parameter"),
    ({"problem": "nowhere:problem"}, "problem is 'nowhere:problem'; expected module:name, importable from"),
])  # fmt: skip
def test_what_is_not_admitted_is_refused_with_value_and_expectation(given, message, folder):
    with pytest.raises(BadInput) as refused:
        plan(folder, **given)
    assert str(refused.value).startswith(message) or message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_section_of_a_notebook_goes_over_the_common_one(folder):
    assert plan(folder, only=["02"], pair=[1, 1])[0].parameters["pair"] == [1, 1]


def test_a_problem_of_ones_own_sets_the_limits(folder, tmp_path, monkeypatch):
    module = "import torch\nfrom helpers import Dataset, Net, Problem\n"
    module += "data = Dataset.of(torch.randn(30, 2), torch.arange(30) % 3)\n"
    module += "problem = Problem(data, Net(lambda: torch.nn.Linear(2, 3), key='linear'))\n"
    (tmp_path / "mine_for_parameters.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    assert plan(folder, problem="mine_for_parameters:problem", sizes=[30])[0].parameters["sizes"] == [30]
    with pytest.raises(BadInput, match=r"sizes is \[31\]; expected at least 1 and at most 30 \(num_train\)"):
        plan(folder, problem="mine_for_parameters:problem", sizes=[31])
    assert "mine_for_parameters" not in sys.modules
    assert parameters.import_path()["PYTHONPATH"].startswith(str(tmp_path))


@pytest.mark.parametrize("text", ["[1", "!!int ''", "!!timestamp x", "a: b: c", "[" * 5000, "2001-99-99", "\0", "*a"])
def test_text_that_is_no_yaml_is_refused_in_one_line(text, folder, tmp_path):
    with pytest.raises(BadInput, match="is not a value"):
        parameters.parse_given([f"lr={text}"])
    for name in ("profiles.yml", "parameters.yml"):
        (tmp_path / name).write_text(f"quick: {text}")
        with pytest.raises(BadInput) as refused:
            parameters.sections(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(refused.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


def planned_as_its_own_types_or_refused(folder, name, value):
    try:
        (item,) = parameters.plan("quick", "digits", only=["01"], given={name: value}, folder=folder)
    except BadInput as error:
        refused = str(error)
        assert "\n" not in refused
    else:
        assert {k: type(v) for k, v in item.parameters.items()} == {k: type(OWN[k]) for k in item.parameters}


NAMES = st.sampled_from([name for name in OWN if name != "problem"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=NAMES, value=VALUES)
def test_any_value_is_planned_or_refused_in_one_line(folder, name, value):
    planned_as_its_own_types_or_refused(folder, name, value)


@pytest.mark.soak
@settings(max_examples=5000, deadline=None, print_blob=True)
@given(name=NAMES, value=VALUES)
def test_any_of_many_values_is_planned_or_refused_in_one_line(folder, name, value):
    planned_as_its_own_types_or_refused(folder, name, value)
