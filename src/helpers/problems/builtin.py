"""Built-in problems by name: blobs, digits, MNIST and its relatives × the nets of ``nets``.

Names stand in the command line, in parameters cells and here; everything else takes objects.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import struct
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from helpers.problems import nets
from helpers.problems.dataset import DataError, Tensors, pick_device
from helpers.problems.net import Net
from helpers.problems.problem import LOSSES, Problem

PROJECT = Path(__file__).resolve().parents[3]


def _digits() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images[:, None].astype(np.uint8)
    train, test, train_targets, test_targets = train_test_split(
        images, digits.target, test_size=500, stratify=digits.target, random_state=0
    )
    return train, train_targets, test, test_targets


def _blobs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import make_blobs

    inputs, targets = make_blobs(n_samples=1000, centers=3, n_features=2, cluster_std=2, random_state=2)
    return inputs[:500], targets[:500], inputs[500:], targets[500:]


class BuiltIn(NamedTuple):
    """A built-in dataset: its sizes, known without reading it, and how to read and scale its inputs.

    largest, mean, std: the largest raw value; mean and standard deviation of the training inputs divided by it.
    read: returns the raw arrays x, y, x_test, y_test; None for the torchvision class of that name.
    """

    num_train: int
    num_test: int
    largest: float
    mean: float
    std: float
    read: Callable[[], tuple[np.ndarray, ...]] | None = None


# To add a dataset, add its row here. MNIST's mean and deviation are the write-up's.
DATASETS = {
    "mnist": BuiltIn(60_000, 10_000, 255.0, 0.1307, 0.3081),
    "fashion_mnist": BuiltIn(60_000, 10_000, 255.0, 0.2860, 0.3530),
    "kmnist": BuiltIn(60_000, 10_000, 255.0, 0.1918, 0.3483),
    "digits": BuiltIn(1_297, 500, 16.0, 0.3053, 0.3763, _digits),
    "blobs": BuiltIn(500, 500, 1.0, 0.0, 1.0, _blobs),
}
TRAIN_SIZES = {name: one.num_train for name, one in DATASETS.items()}
TEST_SIZES = {name: one.num_test for name, one in DATASETS.items()}

# torchvision verifies the archives only; these are the unpacked files of the original MNIST.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def named(
    dataset: str = "mnist",
    model: str = "shen_mlp",
    *,
    num_train: int | None = None,
    subset_seed: int = 0,
    norm: str = "none",
    norm_batch_size: int | None = None,
    loss: str = "cross_entropy",
    device: str | torch.device | None = None,
) -> Problem:
    """Make a built-in problem from names.

    dataset: ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``, ``"digits"``, ``"blobs"``, or ``"auto"``.
    model: one of ``nets.NETS``.
    num_train, subset_seed: see ``load``.
    norm: ``"batch"`` or ``"group"`` after each hidden layer, before its ReLU; ``"none"`` by default.
    norm_batch_size: examples that share batch statistics; None for the whole minibatch.
    loss: ``"cross_entropy"`` or ``"squared"``.
    Raises ValueError for an unknown name, or inputs that the net cannot take; DataError for data that cannot be had.

    >>> named("blobs", "brownlee_mlp").num_train
    500
    """
    if model not in nets.NETS:
        raise ValueError(f"unknown model {model!r}; choose one of: {', '.join(nets.NETS)}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose one of: {', '.join(LOSSES)}")
    nets.check_norm(norm, norm_batch_size)
    data = load(dataset, num_train=num_train, subset_seed=subset_seed, device=device)
    options = {} if norm == "none" else {"norm": norm, "norm_batch_size": norm_batch_size}
    factory = functools.partial(_build, nets.NETS[model], data.input_shape, data.num_classes, **options)
    names = {"dataset": data.name, "num_train": data.num_train, "subset_seed": subset_seed, "model": model,
             "norm": norm, "norm_batch_size": norm_batch_size, "loss": loss}  # fmt: skip
    return Problem(data, Net(factory, key=model), LOSSES[loss], names=names)


def _build(entry: Callable[..., nn.Module], *arguments: object, **options: object) -> nn.Module:
    return entry(*arguments, **options)  # a function of its own, so that the entry of ``NETS`` stays to be told apart


def choose(spec: str, dataset: str = "auto", model: str = "shen_mlp", **options: object) -> Problem:
    """Find the problem that a parameters cell asks for: ``"my_module:problem"``, or ``""`` for the built-in names.

    ``problem`` is a ``Problem``, or a function that makes one; its module is looked for in the working directory too.
    Raises ValueError, in one line, for what cannot be found.
    """
    if not spec:
        return named(dataset, model, **options)
    problem = find(spec)
    problem.check()
    return problem


def find(spec: str) -> Problem:
    """The problem of ``"my_module:problem"``, not checked yet; ``choose`` says more."""
    found = locate(spec)
    problem = found() if callable(found) else found
    if not isinstance(problem, Problem):
        raise ValueError(f"{spec} is a {type(problem).__name__}; expected a Problem, or a function that makes one")
    return problem


def locate(spec: str, what: str = "problem") -> object:
    """The object of ``"my_module:name"``, whose module is looked for in the working directory too.

    what: names it in the error, a ValueError.
    """
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"{what} is {spec!r}; expected module:name, such as my_module:{what}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {spec!r} cannot be found: {error}") from None


def data_root(root: str | Path | None = None) -> Path:
    """Where datasets lie: ``root``, else ``$COMPANION_DATA``, else ``data/`` of the project."""
    chosen = root or os.environ.get("COMPANION_DATA")
    if chosen:
        return Path(chosen).expanduser()
    return (PROJECT if (PROJECT / "pyproject.toml").exists() else Path.cwd()) / "data"


def load(
    name: str = "auto",
    *,
    num_train: int | None = None,
    subset_seed: int = 0,
    device: str | torch.device | None = None,
    root: str | Path | None = None,
) -> Tensors:
    """Load a built-in dataset into memory, downloading it where that is needed.

    name: ``"auto"`` is MNIST where it can be had, else digits.
    num_train: training examples to keep, drawn by ``subset_seed``, stratified by class; the test set stays whole.
    device: by default the best there is.
    root: folder of the files, see ``data_root``.
    Raises ValueError for an unknown name or an impossible subset, DataError for files that are missing or damaged.
    """
    name, note = resolve(name, root)
    if note:  # the stand-in has fewer examples
        warnings.warn(note, stacklevel=2)
        num_train = num_train and min(num_train, TRAIN_SIZES[name])
    return _load(name, num_train, subset_seed, str(pick_device(device)), str(data_root(root)))


@functools.lru_cache(maxsize=4)
def _load(name: str, num_train: int | None, subset_seed: int, device: str, root: str) -> Tensors:
    _, _, largest, mean, std, read = DATASETS[name]
    inputs, targets, test_inputs, test_targets = read() if read else _torchvision(name, root)
    if num_train is not None and num_train != len(targets):
        keep = _stratified(targets, num_train, subset_seed)
        inputs, targets = inputs[keep], targets[keep]
    content = hashlib.sha256(name.encode())
    for array in (inputs, targets, test_inputs, test_targets):
        content.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(np.ascontiguousarray(x)).to(device).float().div_(largest).sub_(mean).div_(std)
        return x, torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64)).to(device)

    return Tensors(
        name,
        *tensors(inputs, targets),
        *tensors(test_inputs, test_targets),
        fingerprint=content.hexdigest()[:16],
        label="digits (8×8, not MNIST)" if name == "digits" else None,
        reload=functools.partial(load, name, num_train=num_train, subset_seed=subset_seed),
    )


def resolve(name: str, root: str | Path | None = None) -> tuple[str, str]:
    """Return the dataset that ``name`` stands for and, where ``"auto"`` had to settle for digits, why (else ``""``).

    Verifies the files of a torchvision dataset, and downloads them where they are missing.
    """
    if name != "auto" and name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose one of: auto, {', '.join(DATASETS)}")
    if name != "auto" and DATASETS[name].read:
        return name, ""
    real = "mnist" if name == "auto" else name
    if _verify(real, data_root(root)):
        return real, ""
    try:
        download(real, root)
    except DataError as error:
        if name != "auto":
            raise
        return "digits", f"MNIST IS NOT HERE: scikit-learn's 8×8 digits stand in for it. {error}"
    return real, ""


def download(name: str, root: str | Path | None = None, *, patience: float = 8.0) -> None:
    """Download a torchvision dataset, and verify it before it takes its place.

    patience: seconds without a byte after which it gives up.
    Raises DataError that says which files go where.
    """
    cls, folder = _torchvision_class(name), data_root(root)
    raw = folder / cls.__name__ / "raw"
    archives = [archive for archive, _ in cls.resources]
    by_hand = f"To add it by hand, put {', '.join(archives)} (or the same files unpacked) into {raw}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder, ignore_cleanup_errors=True) as incoming:
            new = Path(incoming) / cls.__name__ / "raw"
            new.mkdir(parents=True)
            for archive in archives:
                if (raw / archive).exists():
                    os.link(raw / archive, new / archive)
            _within(patience, lambda: cls(incoming, download=True), Path(incoming))
            raw.mkdir(parents=True, exist_ok=True)
            for file in sorted(new.iterdir()):
                os.replace(file, raw / file.name)
    except (OSError, RuntimeError, EOFError, zlib.error) as error:
        raise DataError(f"{cls.__name__} could not be downloaded into {raw} ({error}). {by_hand}.") from error


def _within(patience: float, act, growing: Path) -> None:
    """Call ``act``; OSError once ``growing`` has not grown for so many seconds: a name look-up has no time limit."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except Exception as error:
            failed.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    last, since = -1, time.monotonic()
    while worker.is_alive():
        worker.join(0.1)
        size = sum(file.stat().st_size for file in growing.rglob("*") if file.is_file())
        if size != last:
            last, since = size, time.monotonic()
        elif time.monotonic() - since > patience:
            raise OSError(f"nothing arrived within {patience:g} s")
    if failed:
        raise OSError(str(failed[0])) from failed[0]


def files_of(name: str, root: str | Path | None = None) -> dict[str, bytes]:
    """Pack the files of a torchvision dataset by name, for workers on other machines; scikit-learn's have none."""
    if name not in DATASETS or DATASETS[name].read:
        return {}
    raw = data_root(root) / _torchvision_class(name).__name__ / "raw"
    names = [archive.removesuffix(".gz") for archive, _ in _torchvision_class(name).resources]
    return {file: zlib.compress((raw / file).read_bytes(), 1) for file in names}


def put_files(name: str, files: Mapping[str, bytes], root: str | Path | None = None) -> None:
    """Unpack the files of ``files_of`` where the dataset is missing. Raises DataError where they cannot be written."""
    raw = data_root(root) / _torchvision_class(name).__name__ / "raw"
    if _verify(name, data_root(root)):
        return
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=raw) as new:
            for file, packed in files.items():
                (Path(new) / file).write_bytes(zlib.decompress(packed))
                os.replace(Path(new) / file, raw / file)
    except OSError as error:
        raise DataError(f"{name} cannot be written into {raw}: {error.strerror}; set $COMPANION_DATA") from error


def _torchvision_class(name: str):
    # Imported here: torchvision takes seconds, and digits and blobs do without it.
    from torchvision import datasets

    return {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]


def _verify(name: str, root: Path) -> bool:
    """Whether the four files are there. Raises DataError that names the first damaged one."""
    raw = root / _torchvision_class(name).__name__ / "raw"
    stats = {file.name: file.stat() for file in raw.glob("*")}
    return _verify_content(name, raw, tuple((f, s.st_size, s.st_mtime_ns) for f, s in sorted(stats.items())))


@functools.lru_cache(maxsize=8)
def _verify_content(name: str, raw: Path, stamps: tuple) -> bool:
    """As above, once for each state of the files: a sweep asks for its dataset hundreds of times."""
    complete = True
    for archive, archive_md5 in _torchvision_class(name).resources:
        packed, file = raw / archive, raw / archive.removesuffix(".gz")
        if packed.exists() and _md5(packed) != archive_md5:
            raise DataError(f"damaged file {packed}: its MD5 is not {archive_md5}. Delete it, and run again.")
        if not file.exists():
            complete = False
            continue
        problem = _damage(file, _MNIST_MD5[file.name] if name == "mnist" else None, packed)
        if problem:
            raise DataError(f"damaged file {file}: {problem}. Delete it, and run again.")
    return complete


def _damage(file: Path, md5: str | None, packed: Path) -> str:
    """Describe the damage of an unpacked idx file, or ``""``: by MD5, by its archive's CRC, by its own header."""
    content = file.read_bytes()
    if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        return f"{len(content):,} bytes whose MD5 is not {md5}"
    if not md5 and packed.exists() and struct.unpack("<I", packed.read_bytes()[-8:-4])[0] != zlib.crc32(content):
        return f"its content differs from {packed.name}"
    examples = 60_000 if file.name.startswith("train") else 10_000
    header = (2051, examples, 28, 28) if "images" in file.name else (2049, examples)
    size = 4 * len(header) + examples * (784 if "images" in file.name else 1)
    if len(content) != size or struct.unpack(f">{len(header)}I", content[: 4 * len(header)]) != header:
        return f"{len(content):,} bytes, where an idx file of {examples:,} examples has {size:,}"
    return ""


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _torchvision(name: str, root: str):
    cls = _torchvision_class(name)
    train, test = cls(root, train=True), cls(root, train=False)
    return (*(x.numpy() for x in (train.data[:, None], train.targets, test.data[:, None], test.targets)),)


def _stratified(targets: np.ndarray, num_train: int, seed: int) -> np.ndarray:
    """Indices of a subset in which each class keeps its share; a larger subset of the same seed contains a smaller."""
    classes = np.unique(targets)
    if not len(classes) <= num_train <= len(targets):
        raise ValueError(f"num_train is {num_train}; expected {len(classes)} (one a class) to {len(targets)}")
    order = np.random.default_rng(seed).permutation(len(targets))
    rank = np.empty(len(targets))
    for c in classes:
        members = np.flatnonzero(targets[order] == c)
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(rank, kind="stable")[:num_train]])
