"""A net's key changes when its code does, and not otherwise."""

import abc
import collections
import copy
import functools
import importlib
import linecache
import logging
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import Net
from helpers.problems import fingerprint

WIDTH = 3


def make(source, name="f", **values):
    """Run a source as a notebook's cell is run, its lines known to ``inspect``; returns what it calls ``name``."""
    file = f"<cell {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    room = {"__name__": "__main__", "nn": nn, "torch": torch, **values}
    exec(compile(source, file, "exec"), room)
    return room[name]


FUNCTION = "def f(x):\n    y = x + 1\n    return y * 2\n"


def test_comments_layout_and_docstrings_do_not_count():
    same = [
        "def f(x):\n    # why\n    y = x + 1\n\n    return y * 2  # twice\n",
        'def f(x):\n    """Doc."""\n    y = (x\n         + 1)\n    return (y * 2)\n',
    ]
    assert {fingerprint.of(make(source)) for source in (FUNCTION, *same)} == {fingerprint.of(make(FUNCTION))}


CHANGES = {
    "body": (FUNCTION, FUNCTION.replace("+ 1", "+ 2")),
    "default": ("def f(x=1):\n    return x\n", "def f(x=2):\n    return x\n"),
    "keyword default": ("def f(*, x=1):\n    return x\n", "def f(*, x=2):\n    return x\n"),
    "global": ("G = 1\ndef f():\n    return G\n", "G = 2\ndef f():\n    return G\n"),
    "global of a nested function": (
        "G = 1\ndef f():\n    def g():\n        return G\n    return g()\n",
        "G = 2\ndef f():\n    def g():\n        return G\n    return g()\n",
    ),
    "nested function": (
        "def f():\n    def g():\n        return 1\n    return g()\n",
        "def f():\n    def g():\n        return 2\n    return g()\n",
    ),
    "function that it calls": (
        "def g():\n    return 1\ndef f():\n    return g()\n",
        "def g():\n    return 2\ndef f():\n    return g()\n",
    ),
    "method of a class": (
        "class N(nn.Module):\n    def forward(self, x):\n        return x\ndef f():\n    return N()\n",
        "class N(nn.Module):\n    def forward(self, x):\n        return -x\ndef f():\n    return N()\n",
    ),
    "attribute of a class": (
        "class N(nn.Module):\n    a = 1\nf = N\n",
        "class N(nn.Module):\n    a = 2\nf = N\n",
    ),
    "base of a class": (
        "class B(nn.Module):\n    a = 1\nclass N(B):\n    pass\nf = N\n",
        "class B(nn.Module):\n    a = 2\nclass N(B):\n    pass\nf = N\n",
    ),
    "property": (
        "class N:\n    @property\n    def p(self):\n        return 1\nf = N\n",
        "class N:\n    @property\n    def p(self):\n        return 2\nf = N\n",
    ),
    "static method": (
        "class N:\n    @staticmethod\n    def p():\n        return 1\nf = N\n",
        "class N:\n    @staticmethod\n    def p():\n        return 2\nf = N\n",
    ),
    "cached function": (
        "import functools\n@functools.cache\ndef f():\n    return 1\n",
        "import functools\n@functools.cache\ndef f():\n    return 2\n",
    ),
    "method of a named tuple": (
        "import typing\nclass f(typing.NamedTuple):\n    a: int\n    def m(self):\n        return 1\n",
        "import typing\nclass f(typing.NamedTuple):\n    a: int\n    def m(self):\n        return 2\n",
    ),
    "field of a named tuple": (
        "import typing\nclass f(typing.NamedTuple):\n    a: int\n",
        "import typing\nclass f(typing.NamedTuple):\n    b: int\n",
    ),
    "lambda": ("f = lambda x: x + 1\n", "f = lambda x: x + 2\n"),
    "lambda in a call": (
        "f = (lambda g: g)(lambda: nn.Linear(2, 3))\n",
        "f = (lambda g: g)(lambda: nn.Linear(2, 4))\n",
    ),
    "class that it inherits by name": ("f = nn.Linear\n", "f = nn.Bilinear\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_code_counts(change):
    first, second = CHANGES[change]
    assert fingerprint.of(make(first)) == fingerprint.of(make(first)), "not the same twice"
    assert fingerprint.of(make(first)) != fingerprint.of(make(second))


@pytest.mark.parametrize(
    ("own", "inner", "same"),
    [
        ("import inner_h6\n# why\ndef g():\n    return inner_h6.h()\n", "def h():\n    return 1\n", True),
        ("import inner_h6\ndef g():\n    return -inner_h6.h()\n", "def h():\n    return 1\n", False),
        ("import inner_h6\ndef g():\n    return inner_h6.h()\n", "def h():\n    return 2\n", False),
    ],
)
def test_modules_of_ones_own_count_by_their_code_and_by_what_they_import(tmp_path, monkeypatch, own, inner, same):
    def of(folder, own, inner):
        folder.mkdir()
        (folder / "own_h6.py").write_text(own)
        (folder / "inner_h6.py").write_text(inner)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            module = importlib.import_module("own_h6")
        found = fingerprint.of(make("def f():\n    return own_h6.g()\n", own_h6=module))
        for name in ("own_h6", "inner_h6"):
            del sys.modules[name]
        return found

    before = "import inner_h6\ndef g():\n    return inner_h6.h()\n"
    first = of(tmp_path / "a", before, "def h():\n    return 1\n")
    assert (first == of(tmp_path / "b", own, inner)) == same


def test_what_a_function_closes_over_counts():
    def closing(value):
        def factory():
            return nn.Linear(2, value)

        return factory

    assert fingerprint.of(closing(3)) == fingerprint.of(closing(3))
    assert fingerprint.of(closing(3)) != fingerprint.of(closing(4))
    assert fingerprint.of(closing(torch.ones(3))) != fingerprint.of(closing(torch.zeros(3)))


def test_two_lambdas_on_one_line_differ():
    first, second = (lambda: nn.Linear(2, 3)), (lambda: nn.Linear(2, 4))
    assert fingerprint.of(first) != fingerprint.of(second)


def test_a_lambda_with_another_operation_or_another_global_differs():
    assert fingerprint.of(lambda x: x + x) != fingerprint.of(lambda x: x * x)
    assert fingerprint.of(lambda x: x.relu()) != fingerprint.of(lambda x: x.tanh())
    assert fingerprint.of(lambda: torch.relu) != fingerprint.of(lambda: torch.tanh)
    assert fingerprint.of(lambda: WIDTH) == fingerprint.of(lambda: WIDTH)


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def make(self):
        return nn.Linear(2, self.scale)

    def __call__(self):
        return self.make()


def test_instances_and_their_methods_count_by_what_they_hold():
    assert fingerprint.of(Scaled(2)) == fingerprint.of(Scaled(2))
    assert fingerprint.of(Scaled(2)) != fingerprint.of(Scaled(3))
    assert fingerprint.of(Scaled(2).make) != fingerprint.of(Scaled(3).make)


class Base(abc.ABC):
    @abc.abstractmethod
    def make(self):
        pass


class Concrete(Base):
    def make(self):
        return nn.Linear(2, 3)


@pytest.mark.parametrize("value", [Scaled(2), Concrete()])
def test_a_hash_is_the_same_after_the_class_was_used(value):
    before = fingerprint.of(value)
    isinstance(copy.deepcopy(value), Base)
    pickle.dumps(value)
    assert fingerprint.of(value) == before


def test_partials_count_by_function_and_arguments():
    hashes = [fingerprint.of(one) for one in (
        functools.partial(nn.Linear, 2), functools.partial(nn.Linear, 3), functools.partial(nn.Linear, in_features=2),
        functools.partial(nn.Bilinear, 2),
    )]  # fmt: skip
    assert len(set(hashes)) == 4
    assert fingerprint.of(functools.partial(nn.Linear, 2)) == hashes[0]


def test_values_count_by_type_shape_and_content():
    values = [
        1, 1.0, True, "1", b"1", None, [1], (1,), {1}, {1: 1}, {1: 2}, {2: 1}, [[1], 2], [1, [2]], torch.ones(2),
        torch.ones(2, 1), torch.ones(2).double(), np.zeros(2), torch.float32,
    ]  # fmt: skip
    assert len({fingerprint.of(value) for value in values}) == len(values)
    assert fingerprint.of({3, 1, 2}) == fingerprint.of({2, 3, 1})
    assert fingerprint.of(torch.ones(2)) == fingerprint.of(torch.ones(4)[::2])


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "make",
    [
        Slotted, re.compile, Path, collections.deque, collections.OrderedDict.fromkeys, slice, logging.getLogger,
        np.random.default_rng, lambda a: Pair(a, 1), lambda a: lambda: Pair(a, 1), lambda a: dataclass(type(a, (), {})),
    ],
)  # fmt: skip
def test_objects_count_by_their_content(make):
    values = ("x", "y") if make is not np.random.default_rng else (1, 2)
    first, again, other = (fingerprint.of(make(value)) for value in (values[0], values[0], values[1]))
    assert first == again != other


def test_a_recursive_structure_ends():
    nested = [1]
    nested.append(nested)
    assert fingerprint.of(nested) == fingerprint.of(nested)
    recursive = make("def f(n):\n    return n and f(n - 1)\n")
    assert fingerprint.of(recursive) == fingerprint.of(make("def f(n):\n    return n and f(n - 1)\n"))


def test_a_weight_of_a_module_counts():
    torch.manual_seed(0)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint.of(a) != fingerprint.of(b)


def test_what_has_no_content_is_refused_without_a_key_and_named_by_it(tmp_path):
    with (tmp_path / "file").open("w") as stream:
        with pytest.raises(TypeError, match=r"cannot be hashed .*; name its content: Net\(\.\.\., key='\.\.\.'\)"):
            _ = Net(lambda: stream and nn.Linear(2, 2)).content
        assert Net(lambda: stream and nn.Linear(2, 2), key="mine").content == {"key": "mine", "code": None}
