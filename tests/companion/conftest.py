"""A run that several test files read."""

import os

import pytest
from filelock import FileLock

from companion import run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Notebooks 02 and 05 at quick scale, executed once for all processes that run tests."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / "run.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_STORE", str(root / "run-store"))
        if not (root / "run").exists():
            assert run.run("quick", only=["02", "05"], given={"seed": 1}, out=root / "run", say=str) == 0
    return root / "run"
