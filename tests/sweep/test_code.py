"""Results belong to the code that made them, and code of one's own reaches every worker."""

import functools
import importlib
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch
from torch import nn

from helpers import Dataset, Net, Problem, Training, problems, sweep
from helpers.engine import kernels
from helpers.problems import nets
from helpers.sweep import jobs, settings, trainings
from helpers.sweep.store import Store

SMALL = {"dataset": "digits", "num_train": 100, "model": "small_mlp", "batch_size": 50, "epochs": 1}


@pytest.fixture
def trained(monkeypatch):
    """The jobs that were not in the store."""
    real, made = trainings._train, []
    monkeypatch.setattr(trainings, "_train", lambda *given: made.append(given) or real(*given))
    return made


# A key holds the code


def test_the_known_code_is_that_of_the_built_in_nets():
    present = {model: code for model, code in settings.known_code().items() if model in settings.KNOWN_CODE}
    assert present == settings.KNOWN_CODE, (
        "the code of the built-in nets or of their fast paths has changed: raise NUMERICS in engine/training.py, so "
        "that the store's results of the old code are computed again; or, where every bit is the same, only update "
        "KNOWN_CODE in sweep/settings.py by what `python -m helpers.sweep.settings` prints"
    )


class Tanh(nets.MLP):
    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class Halved(kernels.MLP):
    def forward(self, x):
        return super().forward(x) / 2

    closed_form = False


def widened(monkeypatch):
    wide = functools.partial(nets.MLP, hidden=(64,), initialise=nets.he_uniform_then_xavier_uniform)
    monkeypatch.setitem(nets.NETS, "small_mlp", wide)


def replaced(monkeypatch):
    other = functools.partial(Tanh, hidden=(128,), initialise=nets.he_uniform_then_xavier_uniform)
    monkeypatch.setitem(nets.NETS, "small_mlp", other)


def another_fast_path(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, nets.MLP, Halved)


def edited_in_place(monkeypatch):
    monkeypatch.setattr(nets.MLP, "__init__", functools.partialmethod(_fewer, nets.MLP.__init__))


def _fewer(self, init, input_shape, num_classes, hidden, *rest, **options):
    init(self, input_shape, num_classes, (32,), *rest, **options)


@pytest.mark.parametrize("change", [widened, replaced, another_fast_path, edited_in_place])
def test_a_net_changed_under_its_name_never_gives_the_old_results(monkeypatch, trained, change):
    before = sweep.run([SMALL], 1)
    with monkeypatch.context() as patch:
        change(patch)
        after = sweep.run([SMALL], 1)
        direct = Training(problems.named("digits", "small_mlp", num_train=100), batch_size=50).advance(epochs=1)
    assert len(trained) == 2 and after["run"].iloc[0] != before["run"].iloc[0]
    assert after["train_loss"].tolist() == pytest.approx(direct.history["train_loss"].tolist(), rel=1e-5)
    assert after["train_loss"].iloc[0] != before["train_loss"].iloc[0]
    pd.testing.assert_frame_equal(sweep.run([SMALL], 1), before)
    assert len(trained) == 2


def test_a_problem_keeps_the_net_that_it_was_made_of(monkeypatch):
    given = {"problem": problems.named("digits", "small_mlp", num_train=100), "batch_size": 50, "epochs": 1}
    before = sweep.run([given], 1)
    widened(monkeypatch)
    assert sweep.run([given], 1)["run"].tolist() == before["run"].tolist()


def test_names_and_the_problem_they_make_are_one_run():
    of_training = {"batch_size": 50, "epochs": 1}
    given = {"problem": problems.named("digits", "small_mlp", num_train=100), **of_training}
    frame = sweep.run([SMALL, given], 1)
    assert frame["run"].nunique() == 1
    with pytest.raises(ValueError, match="model is part of the problem; leave it out beside problem="):
        sweep.run([{**given, "model": "small_mlp"}], 1)


X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
DATA = Dataset.of(X, (X.sum(1) > 0).long(), X[:10], (X[:10].sum(1) > 0).long(), name="signs", device="cpu")


def mine(width=8, data=DATA, loss=nn.functional.cross_entropy):
    return Problem(data, Net(lambda: nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))), loss)


def test_a_problem_of_ones_own_is_kept_by_its_content(trained):
    base = {"problem": mine(), "batch_size": 10, "epochs": 2}
    first = sweep.run([base], 2)
    assert set(first["dataset"]) == {"signs"} and set(first["loss"]) == {"cross_entropy"} and len(trained) == 2
    assert sweep.run([{**base, "problem": mine()}], 2)["run"].tolist() == first["run"].tolist()
    assert len(trained) == 2
    others = [
        mine(9), mine(data=Dataset.of(X, (X[:, 0] > 0).long(), device="cpu")),
        mine(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
    ]  # fmt: skip
    runs = {*first["run"], *(sweep.run([{**base, "problem": other}], 1)["run"].iloc[0] for other in others)}
    assert len(runs) == 2 + 3
    direct = Training(mine(), seeds=range(2), batch_size=10).advance(epochs=2).history
    assert first["test_loss"].tolist() == pytest.approx(direct["test_loss"].tolist(), rel=1e-5)


@pytest.mark.parametrize("change", [{"clip_norm": 0.1}, {"optimizer": torch.optim.RMSprop},
                                    {"optimizer": functools.partial(torch.optim.RMSprop, alpha=0.5)}])  # fmt: skip
def test_an_optimizer_of_ones_own_and_clipping_are_part_of_the_key(change):
    base = {"problem": mine(), "batch_size": 10, "epochs": 1, "lr": 0.01}
    frame = sweep.run([base, {**base, **change}], 1)
    assert frame["run"].nunique() == 2
    direct = Training(mine(), batch_size=10, lr=0.01, **change).advance(epochs=1).history
    assert frame["test_loss"].iloc[-1] == pytest.approx(direct["test_loss"].iloc[-1], rel=1e-5)


# Code reaches workers


MODULE = """
import torch
from torch import nn
from helpers import Dataset, Net, Problem
from helper_h6 import widths

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(*pair) for pair in widths())

    def forward(self, x):
        return self.b(self.a(x).tanh())

def problem():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    return Problem(Dataset.of(x, (x.sum(1) > 0).long(), device="cpu"), Net(Mine))
"""


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Two modules that only this process has: their files are gone once they are imported."""
    (tmp_path / "mine_h6.py").write_text(MODULE)
    (tmp_path / "helper_h6.py").write_text("def widths():\n    return (5, 6), (6, 2)\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        module = importlib.import_module("mine_h6")
    settings.fingerprint.of(module.Mine)  # which reads the source
    for file in tmp_path.glob("*_h6.py"):
        file.unlink()
    yield module
    for name in ("mine_h6", "helper_h6"):
        del sys.modules[name]


def assert_workers_train(settings, monkeypatch, tmp_path):
    """Two processes give what one does, to the bit."""
    here = sweep.run(settings, 2, jobs=1, store=Store(tmp_path / "one"))
    monkeypatch.setattr(jobs, "_WORTH_WORKERS", 0.0)
    ran = []
    real = jobs._one_thread
    monkeypatch.setattr(jobs, "_one_thread", lambda: ran.append(1) or real())
    there = sweep.run(settings, 2, jobs=2, store=Store(tmp_path / "two"))
    assert not ran  # the jobs ran elsewhere
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"), check_exact=True)


def test_a_problem_defined_in_a_test_trains_on_two_workers(monkeypatch, tmp_path):
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x):
            return nn.functional.dropout(self.layer(x), 0.2, self.training)

    base = {"problem": Problem(DATA, Net(Local)), "batch_size": 10, "epochs": 2}
    assert_workers_train(sweep.grid(base, lr=[0.1, 0.2]), monkeypatch, tmp_path)


@pytest.mark.slow
def test_a_problem_of_a_module_that_workers_lack_trains_on_them(monkeypatch, tmp_path, own_modules):
    base = {"problem": own_modules.problem(), "batch_size": 10, "epochs": 2}
    assert_workers_train(sweep.grid(base, lr=[0.1, 0.2]), monkeypatch, tmp_path)


def test_a_built_in_net_changed_at_run_time_trains_on_workers(monkeypatch, tmp_path):
    replaced(monkeypatch)
    assert_workers_train(sweep.grid(SMALL, lr=[0.1, 0.2]), monkeypatch, tmp_path)


@pytest.mark.slow
def test_a_problem_of_a_script_trains_on_two_workers(tmp_path):
    script = MODULE.replace(
        "from helper_h6 import widths", "def widths():\n    return (5, 6), (6, 2)"
    ) + textwrap.dedent("""
        if __name__ == "__main__":
            from helpers import sweep
            from helpers.sweep import jobs
            from helpers.sweep.store import Store

            jobs._WORTH_WORKERS = 0.0
            grid = sweep.grid({"problem": problem(), "batch_size": 10, "epochs": 1}, lr=[0.1, 0.2])
            one, two = (sweep.run(grid, 2, jobs=n, store=Store(str(n))).drop(columns="seconds") for n in (1, 2))
            assert one.equals(two)
            print("equal", len(two))
        """)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "equal 8" in done.stdout, done.stderr


def test_what_cannot_be_sent_is_refused_in_one_line(monkeypatch):
    lock = __import__("threading").Lock()
    problem = Problem(DATA, Net(lambda: lock and nn.Linear(5, 2), key="locked"))
    monkeypatch.setattr(jobs, "_WORTH_WORKERS", 0.0)
    with pytest.raises(ValueError, match=r"this problem cannot be sent to another process .*; run it with jobs=1"):
        sweep.run(sweep.grid({"problem": problem, "batch_size": 10, "epochs": 1}, lr=[0.1, 0.2]), 1, jobs=2)
