import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from helpers import book as books
from helpers.book import Book, missing
from helpers.ledger import rules


class Data:
    name, num_train, device, fingerprint, description = "digits", 1000, "cpu", "abc", "digits, 1,000 examples"


@pytest.fixture
def book(tmp_path):
    return Book("02_mnist_sweep", Data, profile="quick", output_dir=tmp_path, epochs=5)


@pytest.fixture
def shown(monkeypatch):
    texts = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: texts.append(markdown.data))
    return texts


def test_the_line_about_itself_is_also_kept_as_facts(book, tmp_path):
    assert "profile quick" in book.provenance and book.provenance.endswith("digits, 1,000 examples")
    facts = json.loads((tmp_path / "provenance/02_mnist_sweep.json").read_text())
    assert facts == {"device": "cpu", "dataset": "digits", "fingerprint": "abc"}


def test_a_figure_is_filed_under_the_notebooks_number(book, tmp_path):
    fig = Figure()
    fig.subplots().set_title("It falls", loc="left")
    assert book.figure(fig, "three_axes", "n = 3") is None
    with Image.open(tmp_path / "figures/02_three_axes.png") as image:
        assert (image.info["Title"], image.info["Description"]) == ("It falls", "n = 3")
    assert (tmp_path / "figures/02_three_axes.svg").exists()


def test_a_table_keeps_numbers_and_writes_objects_as_text(book, tmp_path):
    frame = pd.DataFrame({"x": [1.5, 2.5], "lr": [{0: 0.1}, None]}, index=[7, 9])
    book.table(frame, "history")
    back = pd.read_parquet(tmp_path / "tables/02_history.parquet")
    assert back["x"].tolist() == [1.5, 2.5] and back["lr"].fillna("").tolist() == ["{0: 0.1}", ""]
    assert frame["lr"][7] == {0: 0.1}


@pytest.mark.parametrize("name", ["", "a/b", "..", "µ"])
def test_a_name_that_is_no_file_name_is_refused(book, name):
    with pytest.raises(ValueError, match="expected letters, digits"):
        book.table(pd.DataFrame(), name)
    with pytest.raises(ValueError, match="expected letters, digits"):
        book.figure(Figure(), name, "")


def test_verdicts_are_saved_and_shown(book, tmp_path):
    accuracy = pd.Series(
        [98.0, 97.0, 97.9, 97.1], index=pd.MultiIndex.from_product([[64, 1024], [0, 1]], names=["batch_size", "seed"])
    )
    a = book.per_seed(accuracy)
    sizes = {str(b): a[b] for b in (64, 256, 1024)}
    book.judge("sweep-accuracy", {"64-256": a[64] - a[256], "256-1024": a[256] - a[1024], **sizes})
    book.judge("cnn-sweep", {"accuracy-falls": [-1.0, -1.0]}, num_train=60_000)
    html = book.ledger().to_html()
    table = rules.read(tmp_path / "claims/02_mnist_sweep.csv")
    assert table["verdict"].tolist() == [
        *[rules.NOT_JUDGED] * 2,
        "inconclusive",
        rules.NOT_JUDGED,
        *["inconclusive"] * 2,
    ]
    assert table["why"][0] == "the chosen parameters have no run with batch size 256" and table["why"][0] in html
    assert table["counts"].tolist() == [False, False, False, False, False, True]  # num_train and epochs are reduced


def test_a_missing_figure_makes_every_result_missing():
    none = missing("why")
    for result in (none - 1, 1 - none, none / np.ones(2), np.ones(2) / none, 100 * (np.ones(2) - none) + none):
        assert result == none


def test_figures_a_seed_are_found_by_their_setting():
    frame = pd.DataFrame(
        {"batch_size": 64, "lr": [0.1, 0.1, 0.01, 0.01], "seed": [1, 0, 0, 1], "x": [1.0, 2.0, 3.0, 4.0]}
    )
    x = Book.per_seed(frame.set_index(["batch_size", "lr", "seed"]).x)
    assert x[64, 0.1].tolist() == [2.0, 1.0] and (x[64, 0.01] - x[64, 0.1]).tolist() == [1.0, 3.0]
    assert x[64, 0.1] - x[32, 0.1] == missing("the chosen parameters have no run with batch size 32, lr 0.1")


def test_the_ends_of_a_sweep_are_said_in_words():
    one = pd.Series([0.5, np.nan], index=[8, 16])
    assert Book.across(one) == "0.5 at batch 8 and – at batch 16"
    assert Book.across(one[:1]) == "0.5 at batch 8"


def test_without_a_folder_it_writes_below_outputs(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(books, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Book("02_x", Data).folder == tmp_path / "outputs/notebooks/02_x"
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir("/")
    assert Book("02_x", Data).folder == tmp_path / "outputs/notebooks/02_x"
    (tmp_path / "notebooks").mkdir()
    for name, title in [("01_b", "# Second\n"), ("00_a", "# First: 1 < 2\nmore")]:
        cells = [{"cell_type": "markdown", "source": title.splitlines(keepends=True)}]
        (tmp_path / f"notebooks/{name}.ipynb").write_text(json.dumps({"cells": cells}))
    Book("02_x", Data).contents()
    assert shown == ["- [00_a](00_a.ipynb): First: 1 < 2\n- [01_b](01_b.ipynb): Second"]


def test_prose_is_displayed_as_markdown(book, shown):
    book.say(f"**{1.5:.2f}**")
    assert shown == ["**1.50**"]


@pytest.mark.parametrize("caption", ["of digits", lambda: "of digits"])
def test_the_labs_picture_is_saved_whenever_it_pauses(book, tmp_path, caption):
    class Lab:
        def keep(self, made):
            self.made = made

        def figure(self):
            return Figure()

    lab = Lab()
    book.lab(lab, "live", caption)
    assert isinstance(lab.made(), Figure)
    with Image.open(tmp_path / "figures/02_live.png") as image:
        assert image.info["Description"] == "of digits"
