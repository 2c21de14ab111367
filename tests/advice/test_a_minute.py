"""A minute's advice on two nets of a real size, by the command, on a CPU."""

import json
import subprocess
import sys

import pytest

COMPANION = [sys.executable, "-c", "from companion.cli import main; main()"]
MODULE = """
import torch
import torchvision
from torch import nn
from helpers import Dataset, Net, Problem

generator = torch.Generator().manual_seed(0)
images = torch.randn(2000, 3, 32, 32, generator=generator)
resnet = Problem(
    Dataset.of(images[:1800], (images[:1800, 0].mean((1, 2)) > 0).long(),
               images[1800:], (images[1800:, 0].mean((1, 2)) > 0).long(), name="noise", device="cpu"),
    Net(lambda: torchvision.models.resnet18(num_classes=10)),
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, symbols=96, width=128, layers=4, context=64):
        super().__init__()
        self.embedding, self.position = nn.Embedding(symbols, width), nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks, self.norm = nn.Sequential(*(Block(width) for _ in range(layers))), nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


text = (torch.arange(65 * 1200).reshape(1200, 65) * 7 + torch.randint(3, (1200, 65), generator=generator)) % 96
gpt = Problem(Dataset.of(text[:1000, :-1], text[:1000, 1:], text[1000:, :-1], text[1000:, 1:], device="cpu"),
              Net(GPT))
"""


@pytest.mark.soak
@pytest.mark.parametrize("name", ["resnet", "gpt"])
def test_a_minute_is_enough_for_a_first_answer(name, tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    command = [*COMPANION, "advise", f"mine:{name}", "--minutes", "1", "--batch-size", "32", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/advice.json").read_text())
    assert {"contract", "memory", "speed"} <= set(found["phases"])
    if name == "resnet":  # the first of its twenty BatchNorms
        assert found["phases"]["contract"]["cause"] == "bn1 (BatchNorm2d)" and "bn1" in found["not_measured"]["noise"]
    else:
        assert found["phases"]["contract"]["tied"] == ["head.weight"] and found["answer"]["critical"]["low"] > 0
