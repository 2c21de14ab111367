"""The command ``companion advise``: what it writes, and what it refuses."""

import json
import re

import pytest
from click.testing import CliRunner

from companion import cli

MODULE = """
import torch
from torch import nn
from helpers import Dataset, Net, Problem

x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
data = Dataset.of(x[:300], (x[:300, 0] > 0).long(), x[300:], (x[300:, 0] > 0).long(), name="<b>halves", device="cpu")
problem = Problem(data, Net(lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))))
momentum = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Broken(nn.Linear):
    def forward(self, x):
        return x @ self.weights


broken = Problem(data, Net(lambda: Broken(20, 2)))
"""


pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "advised.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "advised", raising=False)

    def run(*arguments):
        return CliRunner().invoke(cli.main, ["advise", *arguments, "--minutes", "0.02", "--out", "out"])

    return run


def test_it_writes_one_page_and_its_data_and_says_ten_lines(command, tmp_path):
    done = command("advised:problem", "--batch-size", "16", "--lr", "0.1", "--optimizer", "advised:momentum")
    assert done.exit_code == 0, done.output
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["advice.json", "index.html"]
    data, page = json.loads((tmp_path / "out/advice.json").read_text()), (tmp_path / "out/index.html").read_text()
    assert len(data["summary"]) == 10 and all(line in done.output for line in data["summary"])
    assert set(data["answer"]["decay_rates"]) == {"momentum"}
    assert "<script" not in page and not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert "<b>halves" not in page and "&lt;b&gt;halves" in page
    links = set(re.findall(r'href="#([\w-]+)"', page))
    assert {"speed", "noise", "memory"} <= links <= set(re.findall(r'id="([\w-]+)"', page))


@pytest.mark.parametrize(("arguments", "message"), [
    (["advised:nothing"], "cannot be found"), (["advised:problem", "--batch-size", "301"], "batch_size is 301"),
    (["advised:problem", "--optimizer", "lion"], "unknown optimizer"), (["advised:data"], "expected a Problem"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, arguments, message):
    done = command(*arguments)
    lines = [line for line in done.output.splitlines() if line.startswith("companion: ")]
    assert done.exit_code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_users_exception_keeps_its_traceback(command, tmp_path):
    done = command("advised:broken")
    assert done.exit_code == 1 and "return x @ self.weights" in done.output
    assert "companion: advised:broken raised AttributeError: 'Broken' object has no attribute 'weights'" in done.output
    assert not (tmp_path / "out").exists()
