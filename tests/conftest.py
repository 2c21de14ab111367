"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def store_folder(tmp_path, monkeypatch):
    """Every test has a result store of its own."""
    monkeypatch.setenv("COMPANION_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def mnist_root():
    """The folder of a real MNIST; the test is skipped where there is none."""
    root = os.environ.get("COMPANION_DATA")
    if not root or not (Path(root) / "MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip("no MNIST in $COMPANION_DATA: set it to a folder that holds MNIST/raw")
    return Path(root)
