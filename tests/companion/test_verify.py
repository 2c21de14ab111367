"""Whether a machine agrees with a reference: one that it made itself, and one that was tampered with."""

import pandas as pd
import pytest
from click.testing import CliRunner

from companion import cli, report, verify
from helpers import sweep
from helpers.sweep import trainings

pytestmark = pytest.mark.slow


@pytest.fixture
def reference(tmp_path, monkeypatch):
    base = {"dataset": "digits", "num_train": 400, "model": "small_mlp", "epochs": 3}
    history = sweep.run(sweep.grid(base, batch_size=[16, 64]), 3)
    (tmp_path / "tables").mkdir()
    for name in verify.CHEAP:
        table = history.astype({"betas": str})
        table.to_parquet(tmp_path / "tables" / f"{name}.parquet")
    monkeypatch.setattr(report, "REFERENCE", tmp_path)
    return tmp_path


def test_the_machine_that_made_it_agrees_to_the_bit(reference):
    found = verify.compare(reference, say=str)
    assert len(found) == 2 * 2 * 2 and found.agrees.all()
    assert set(found["same to the bit"]) == {"3 of 3"} and set(found.epoch) == {2, 3}
    result = CliRunner().invoke(cli.main, ["verify"])
    assert result.exit_code == 0 and "8 of 8 agree with the reference within the intervals" in result.output


def test_what_the_store_holds_is_not_taken_for_a_result_of_this_machine(reference, monkeypatch):
    trained = []
    monkeypatch.setattr(trainings, "_train", lambda *a, train=trainings._train: trained.append(1) or train(*a))
    verify.compare(reference, jobs=1, say=str)
    assert len(trained) >= 2 * 2  # though the fixture has stored the very same runs


def test_another_result_is_seen_and_small_differences_are_not(reference):
    file = reference / "tables/02_history.parquet"
    table = pd.read_parquet(file)
    table.loc[table.batch_size == 16, "test_accuracy"] -= 0.3
    table["distance_from_init"] *= 1 + 1e-6
    table.to_parquet(file)
    result = CliRunner().invoke(cli.main, ["verify"])
    assert result.exit_code == 1 and "7 of 8 agree" in result.output
    found = verify.compare(reference, say=str)
    assert found[~found.agrees][["table", "batch_size", "measure"]].values.tolist() == [
        ["02_history", 16, "test_accuracy"]
    ]


def test_without_a_reference_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REFERENCE", tmp_path)
    result = CliRunner().invoke(cli.main, ["verify"])
    assert result.exit_code == 2 and "holds no reference" in result.output
