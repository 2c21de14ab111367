"""Fixtures that several test files share."""

import os
import shutil
from pathlib import Path

# Tests run side by side: threads that wait for each other would take them many times as long. Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("soak", derandomize=False, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("COMPANION_HYPOTHESIS", "seeded"))

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("browser")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def store_folder(tmp_path, monkeypatch):
    """Every test has a result store of its own."""
    monkeypatch.setenv("COMPANION_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def steady(monkeypatch):
    """Steps of a known price, whatever else the machine does: 1 ms and 20 µs an example, but for a few per cent."""
    import numpy as np

    from helpers.advice import speed

    rng = np.random.default_rng(0)

    def steps(subject, size):
        seconds = (1e-3 + 2e-5 * size) * np.exp(0.02 * rng.normal(size=7))
        return np.stack([0 * seconds, seconds], axis=1)

    monkeypatch.setattr(speed, "_steps", steps)


@pytest.fixture
def mnist_root():
    """The folder of a real MNIST; the test is skipped where there is none."""
    root = os.environ.get("COMPANION_DATA")
    if not root or not (Path(root) / "MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip("no MNIST in $COMPANION_DATA: set it to a folder that holds MNIST/raw")
    return Path(root)


@pytest.fixture(scope="session")
def browser():
    """A real Chromium; where there is none the test is skipped, or fails if COMPANION_BROWSER=required."""
    if CHROMIUM is None:
        if os.environ.get("COMPANION_BROWSER") == "required":
            pytest.fail("no Chromium on this machine, and COMPANION_BROWSER=required asks for one")
        pytest.skip("no Chromium on this machine: apt-get install chromium, or the like")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
