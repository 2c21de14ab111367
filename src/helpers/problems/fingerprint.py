"""Hashes of code and values: a result's key changes when the code that made it does."""

from __future__ import annotations

import ast
import contextlib
import copyreg
import dis
import enum
import functools
import hashlib
import inspect
import sysconfig
import textwrap
import types
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

_LIBRARIES = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, torch.Size, enum.Enum)
_Pair = namedtuple("_Pair", "a")
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType, type(_Pair.a))
_GENERATED = {*vars(_Pair)} - {"_fields", "_field_defaults"}  # differ from one Python to the next
_NOT_CODE = {
    "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__firstlineno__", "__static_attributes__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__conditional_annotations__",
    "__slotnames__", "__abstractmethods__", "_abc_impl",  # caches
}  # fmt: skip


def of(value: object) -> str:
    """Hash a value: 16 hex digits of data, or of a callable's code, arguments, closure and the code that it calls.

    Code of installed libraries counts by its name. Comments, layout and docstrings do not count. Raises TypeError for
    what has no content to hash, such as an open file or a generator.

    >>> of(lambda x: x + 1) == of(lambda x: x + 1), of(lambda x: x + 1) == of(lambda x: x + 2)
    (True, False)
    """
    digest = _Digest()
    digest.add(value)
    return digest.hash.hexdigest()[:16]


class _Digest:
    def __init__(self):
        self.hash, self._seen = hashlib.sha256(), {}

    def _say(self, *parts: object) -> None:
        for part in parts:
            text = part if isinstance(part, bytes) else str(part).encode()
            self.hash.update(f"{len(text)}:".encode() + text)

    def add(self, value: object) -> None:
        if isinstance(value, _PLAIN):
            return self._say(type(value).__name__, repr(value))
        if id(value) in self._seen:
            return self._say("seen", self._seen[id(value)][0])
        self._seen[id(value)] = (len(self._seen), value)  # held, so that no other object gets its id
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().numpy()
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            return self._say("array", value.dtype, value.shape, value.tobytes())
        if isinstance(value, Mapping):
            self._say("mapping", len(value))
            return self._all(part for pair in value.items() for part in pair)
        if isinstance(value, set | frozenset):
            return self._say("set", *sorted(of(part) for part in value))
        if isinstance(value, list | tuple):
            self._say(type(value).__name__, len(value))
            return self._all(value)
        if isinstance(value, functools.partial):
            return self._all(("partial", value.func, value.args, value.keywords))
        if isinstance(value, types.CodeType):
            self._say("code", value.co_code, value.co_names, value.co_varnames)
            return self._all(value.co_consts)
        if isinstance(value, types.ModuleType):
            return self._module(value)
        return self._code_or_object(value)

    def _all(self, values) -> None:
        for value in values:
            self.add(value)

    def _module(self, module: types.ModuleType) -> None:
        self._say("module", module.__name__)
        if not is_library(module):
            self._say(_without_docstrings(Path(module.__file__).read_text(encoding="utf-8")))
            code = types.ModuleType | types.FunctionType | type
            imported = (v for v in vars(module).values() if isinstance(v, code) and inspect.getmodule(v) is not module)
            self._all(v for v in imported if not is_library(inspect.getmodule(v)))

    def _code_or_object(self, value: object) -> None:
        if isinstance(value, types.MethodType):
            return self._all((value.__func__, value.__self__))
        if isinstance(value, classmethod | staticmethod | property | functools.cached_property):
            return self._all(getattr(value, name, None) for name in ("__func__", "fget", "fset", "func"))
        if hasattr(value, "__wrapped__") and not isinstance(value, types.FunctionType):  # as functools.cache makes it
            return self._all((type(value), value.__wrapped__))
        if callable(value) and hasattr(value, "__qualname__") and _of_library(value):
            return self._say("library", value.__module__, value.__qualname__)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            self._say("class", value.__qualname__)
            self._all(value.__bases__)
            left_out = _NOT_CODE | (_GENERATED if issubclass(value, tuple) and hasattr(value, "_fields") else set())
            parts = {n: part for n, part in sorted(vars(value).items()) if n not in left_out}
            return self.add({n: part for n, part in parts.items() if not isinstance(part, _SLOTS)})
        try:
            reduce = copyreg.dispatch_table.get(type(value))  # as pickle would see it
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except TypeError:
            raise TypeError(f"{type(value).__name__} has no content that can be hashed") from None
        if isinstance(reduced, str):
            return self._say("name", type(value).__qualname__, reduced)
        make, arguments, *state = reduced
        return self._all((make, arguments, *(list(part) if isinstance(part, Iterator) else part for part in state)))

    def _function(self, function: types.FunctionType) -> None:
        self._say("function", function.__name__)
        self.add(_source(function) or function.__code__)
        self._all((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                self.add(cell.cell_contents)
        for name in sorted(_names(function.__code__) & set(function.__globals__)):
            self._say(name)
            self.add(function.__globals__[name])


def _of_library(value) -> bool:
    return not isinstance(value, types.FunctionType | type) or is_library(inspect.getmodule(value))


def is_library(module: types.ModuleType | None) -> bool:
    """Whether a module is installed, or part of Python."""
    file = getattr(module, "__file__", None)
    return module is not None and module.__name__ != "__main__" and (file is None or file.startswith(_LIBRARIES))


def _names(code: types.CodeType) -> set[str]:
    """The global names that the code reads; ``co_names`` has those of attributes too."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*map(_names, inner))


def _source(function: types.FunctionType) -> str | None:
    """The function's source without comments, layout and docstrings; None where its byte code has to do."""
    if function.__name__ == "<lambda>":
        return None  # its lines hold more than itself
    try:
        return _without_docstrings(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return repr(_plain(tree))


def _plain(node: object) -> object:
    """A syntax tree as tuples, without the empty fields that differ from one Python to the next."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return node
    return type(node).__name__, [(name, _plain(part)) for name, part in ast.iter_fields(node) if part not in (None, [])]
