"""The examples in docstrings give what they say."""

import doctest
import functools
import importlib
import pkgutil

import pytest
from tqdm import tqdm

import companion
import helpers

MODULES = [
    module.name
    for package in (helpers, companion)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch):
    monkeypatch.setattr("helpers.sweep.jobs.tqdm", functools.partial(tqdm, disable=True))
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0
