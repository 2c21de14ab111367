"""Data: examples for training and for testing, each an input and its target, on one device."""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, default_collate


class DataError(RuntimeError):
    """Data that is missing, damaged or unusable; the message says which and the way out."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, or the best there is: cuda, then mps, then cpu."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class Dataset(abc.ABC):
    """Training and test examples. ``Dataset.of`` takes tensors, ``Dataset.of_map`` a map-style dataset.

    ``batch(indices, split)`` gives the inputs and targets of some examples; ``fingerprint`` identifies the content.
    """

    in_memory = False
    name: str
    device: torch.device
    num_train: int
    num_test: int
    fingerprint: str

    @staticmethod
    def of(x, y, x_test=None, y_test=None, *, name: str = "data", device: str | torch.device | None = None) -> Tensors:
        """Make a dataset of tensors or arrays whose first axis counts examples.

        x, y: training inputs and targets. Floating inputs become float32, integers int64.
        x_test, y_test: the test set; without one, test measures are NaN.
        name: shown in captions and columns.
        device: where the tensors go; by default the best there is.
        Raises DataError for lengths that differ, no examples, or values that are not finite.

        >>> Dataset.of(torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)).num_train
        8
        """
        if (x_test is None) != (y_test is None):
            raise DataError("a test set needs both x_test and y_test; only one was given")
        pairs = [("x", x), ("y", y)] + ([] if x_test is None else [("x_test", x_test), ("y_test", y_test)])
        tensors = [_tensor(label, values, pick_device(device)) for label, values in pairs]
        for (inputs_name, _), inputs, targets in zip(pairs[::2], tensors[::2], tensors[1::2]):
            if len(inputs) != len(targets) or not len(inputs):
                raise DataError(
                    f"{inputs_name} has {len(inputs)} examples and its targets {len(targets)}; expected as many, not 0"
                )
        tensors += [tensor[:0] for tensor in tensors[: 4 - len(tensors)]]
        return Tensors(name, *tensors)

    @staticmethod
    def of_map(
        train_set,
        test_set=None,
        *,
        collate_fn: Callable[[list], tuple[Any, Any]] | None = None,
        name: str = "data",
        key: str | None = None,
        device: str | torch.device | None = None,
    ) -> Mapped:
        """Make a dataset of map-style datasets, whose items are pairs (input, target).

        train_set, test_set: anything with ``len()`` and ``[index]``.
        collate_fn: list of items → (inputs, targets), as DataLoader's; inputs are a tensor, a tuple (passed on as
            positional arguments) or a dict (as keyword arguments).
        key: identifies the content in the store; by default every item is read once and hashed.
        Raises DataError for an empty training set.
        """
        for items in (train_set, test_set):
            if items is not None and not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
                raise DataError(f"a {type(items).__name__} is not map-style; expected len(items) and items[index]")
        if not len(train_set):
            raise DataError("the training set is empty; expected at least 1 example")
        return Mapped(name, train_set, test_set, collate_fn, key, pick_device(device))

    def size(self, split: str) -> int:
        """Count the examples of ``"train"`` or ``"test"``."""
        return self.num_train if split == "train" else self.num_test

    @abc.abstractmethod
    def batch(self, indices: torch.Tensor, split: str = "train") -> tuple[Any, Any]:
        """Return inputs and targets of the examples ``indices``, int64 ``(n,)``."""

    @abc.abstractmethod
    def select(self, train: torch.Tensor, test: torch.Tensor, test_split: str = "test") -> Dataset:
        """Make a dataset of the training examples ``train``, tested on the examples ``test`` of ``test_split``."""

    @property
    def description(self) -> str:
        """The data in a caption's words."""
        return f"{self.name}, {self.num_train:,} training and {self.num_test:,} test examples"


class Tensors(Dataset):
    """A dataset in memory: four tensors. ``reload`` makes a built-in one again where it is sent to a worker."""

    in_memory = True

    def __init__(
        self,
        name: str,
        train_inputs: torch.Tensor,
        train_targets: torch.Tensor,
        test_inputs: torch.Tensor,
        test_targets: torch.Tensor,
        *,
        fingerprint: str | None = None,
        label: str | None = None,
        reload: Callable[[], Tensors] | None = None,
    ):
        self.name, self.reload, self._label = name, reload, label or name
        self.train_inputs, self.train_targets = train_inputs, train_targets
        self.test_inputs, self.test_targets = test_inputs, test_targets
        if fingerprint is not None:
            self.fingerprint = fingerprint

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every tensor, whatever the device."""
        content = hashlib.sha256()
        for tensor in (self.train_inputs, self.train_targets, self.test_inputs, self.test_targets):
            array = tensor.cpu().contiguous().numpy()
            content.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return content.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return self.train_inputs.device

    @property
    def num_train(self) -> int:
        return len(self.train_targets)

    @property
    def num_test(self) -> int:
        return len(self.test_targets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train_inputs.shape[1:])

    @property
    def num_classes(self) -> int:
        """One more than the largest label. Raises DataError where targets are not whole numbers."""
        if self.train_targets.is_floating_point():
            raise DataError(f"{self.name} has real targets, so it has no classes; use a net of your own for it")
        return int(self.train_targets.max()) + 1

    @property
    def description(self) -> str:
        return super().description.replace(self.name, self._label, 1)

    def batch(self, indices: torch.Tensor, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets; here ``indices`` may have several axes, such as one of replicas."""
        inputs, targets = self.tensors(split)
        if indices.dim() == 1:
            return inputs.index_select(0, indices), targets.index_select(0, indices)
        flat = indices.reshape(-1)
        return tuple(t.index_select(0, flat).unflatten(0, indices.shape) for t in (inputs, targets))

    def tensors(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all inputs and targets of a split."""
        return (self.train_inputs, self.train_targets) if split == "train" else (self.test_inputs, self.test_targets)

    def select(self, train: torch.Tensor, test: torch.Tensor, test_split: str = "test") -> Tensors:
        pairs = (train.to(self.device), "train"), (test.to(self.device), test_split)
        return Tensors(self.name, *(values for indices, split in pairs for values in self.batch(indices, split)))

    def __reduce__(self):
        if self.reload is not None:
            return self.reload, ()
        tensors = (*self.tensors("train"), *self.tensors("test"))
        return _on_this_device, (self.name, self.fingerprint, *(t.cpu() for t in tensors))


def _on_this_device(name: str, fingerprint: str, *tensors: torch.Tensor) -> Tensors:
    return Tensors(name, *(t.to(pick_device()) for t in tensors), fingerprint=fingerprint)


class Mapped(Dataset):
    """A map-style dataset, read item by item."""

    def __init__(self, name: str, train_set, test_set, collate_fn, key: str | None, device: torch.device):
        self.name, self.device, self.key = name, device, key
        self._sets = {"train": train_set, "test": () if test_set is None else test_set}
        self._collate_fn = collate_fn or default_collate
        self.num_train, self.num_test = len(train_set), len(self._sets["test"])

    def batch(self, indices: torch.Tensor, split: str = "train") -> tuple[Any, Any]:
        chosen = [self._sets[split][index] for index in indices.tolist()]
        try:
            inputs, targets = self._collate_fn(chosen)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"items of {self.name} do not make a pair (inputs, targets): {reason}; give a collate_fn"
            ) from error
        inputs, targets = _to(inputs, self.device), _to(targets, self.device)
        bad = [t for t in _leaves((inputs, targets)) if t.is_floating_point() and not t.isfinite().all()]
        if bad:
            raise DataError(f"{self.name}: NaN or infinity among the {split} examples {_few(indices.tolist())}")
        return inputs, targets

    def select(self, train: torch.Tensor, test: torch.Tensor, test_split: str = "test") -> Mapped:
        sets = Subset(self._sets["train"], train.tolist()), Subset(self._sets[test_split], test.tolist())
        return Mapped(self.name, *sets, self._collate_fn, self.key, self.device)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of ``key``, else of every item. Raises DataError where an item differs from one read to the next."""
        content = hashlib.sha256(f"{self.num_train} {self.num_test} {self.key}".encode())
        for split, items in self._sets.items() if self.key is None else ():
            if len(items) and _bytes(items[0]) != _bytes(items[0]):
                raise DataError(f"item 0 of {self.name} ({split}) changes from read to read; give of_map(..., key=...)")
            for index in range(len(items)):
                content.update(_bytes(items[index]))
        return content.hexdigest()[:16]

    def __getstate__(self):
        return {**self.__dict__, "fingerprint": self.fingerprint}


def _tensor(label: str, values, device: torch.device) -> torch.Tensor:
    if isinstance(values, tuple | dict):
        raise DataError(f"{label} is a {type(values).__name__}; several inputs an example need Dataset.of_map")
    try:
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    except (TypeError, ValueError) as error:
        raise DataError(f"{label} is no tensor or array ({error}); use Dataset.of_map for anything else") from None
    if not tensor.dim():
        raise DataError(f"{label} is a single number; expected a tensor whose first axis counts examples")
    tensor = tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else torch.int64)
    if tensor.is_floating_point():
        bad = (~tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else ~tensor.isfinite()).nonzero()
        if len(bad):
            raise DataError(
                f"{label} has NaN or infinity in {len(bad)} of {len(tensor)} examples: {_few(bad[:, 0].tolist())}"
            )
    return tensor.contiguous()


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + ("…" if len(numbers) > 5 else "")


def _leaves(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


def _to(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(part, device) for name, part in value.items()}
    return tuple(_to(part, device) for part in value) if isinstance(value, list | tuple) else value


def _bytes(item) -> bytes:
    from helpers.problems import fingerprint

    return fingerprint.of(item).encode()
