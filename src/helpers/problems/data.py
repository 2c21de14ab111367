"""Datasets as tensors in memory, normalised, on the device; and the seeded order of their examples."""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import queue
import shutil
import socket
import struct
import tempfile
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[3]

# The training sets' sizes, known without reading them, so that a batch size can be refused before anything starts.
TEST_SIZES = {"mnist": 10_000, "fashion_mnist": 10_000, "kmnist": 10_000, "digits": 500, "blobs": 500}
TRAIN_SIZES = {"mnist": 60_000, "fashion_mnist": 60_000, "kmnist": 60_000, "digits": 1_297, "blobs": 500}

# Mean and standard deviation of the training pixels in [0, 1]. MNIST's are the two numbers of the write-up.
_NORMALISATION = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530), "kmnist": (0.1918, 0.3483)}

# Its own mirrors are in part plain HTTP, and its downloader falls back to that: these are asked instead (see _fetch).
_MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/"],
    "fashion_mnist": ["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"],
    "kmnist": ["https://codh.rois.ac.jp/kmnist/dataset/kmnist/"],
}

# torchvision verifies the archives only; these are the unpacked files of the original MNIST.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class DataError(RuntimeError):
    """A dataset that is missing, damaged or cannot be had; the message names the files and the way out."""


@dataclass(frozen=True)
class Dataset:
    """A classification problem in memory.

    Inputs are float32 ``(examples, *input_shape)``, normalised; targets int64 ``(examples,)``; all on one device.
    ``fingerprint`` identifies the content (subset included), whatever the device.
    """

    name: str
    train_inputs: torch.Tensor
    train_targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    num_classes: int
    fingerprint: str

    @property
    def num_train(self) -> int:
        return len(self.train_targets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train_inputs.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.train_inputs.device

    @property
    def description(self) -> str:
        """What a figure's caption says of the data."""
        name = "digits (8×8, not MNIST)" if self.name == "digits" else self.name
        return f"{name}, {self.num_train:,} training and {len(self.test_targets):,} test examples"


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: cuda, then mps, then cpu."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
) -> Dataset:
    """Load a dataset into memory, downloading it where torchvision has to.

    ``num_train`` keeps that many training examples, drawn by ``subset_seed``, stratified by class; the test set
    stays whole. ``"auto"`` is MNIST where it is or can be had, else digits. Raises ValueError for an unknown name or
    an impossible subset, DataError for files that are missing or damaged.
    """
    name, note = resolve(name, root)
    if note:
        warnings.warn(note, stacklevel=2)
    return _load(name, num_train, subset_seed, str(pick_device(device)), str(data_root(root)))


@functools.lru_cache(maxsize=4)
def _load(name: str, num_train: int | None, subset_seed: int, device: str, root: str) -> Dataset:
    inputs, targets, test_inputs, test_targets = {"digits": _digits, "blobs": _blobs}.get(
        name, lambda: _torchvision(name, root)
    )()
    if num_train is not None and num_train != len(targets):
        keep = _stratified(targets, num_train, subset_seed)
        inputs, targets = inputs[keep], targets[keep]
    content = hashlib.sha256(name.encode())
    for array in (inputs, targets, test_inputs, test_targets):
        content.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    if name in _NORMALISATION:
        scale, (mean, std) = 255.0, _NORMALISATION[name]
    elif name == "digits":
        scale, mean, std = 16.0, 0.3053, 0.3763
    else:
        scale, mean, std = 1.0, 0.0, 1.0

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(np.ascontiguousarray(x)).to(device).float().div_(scale).sub_(mean).div_(std)
        return x, torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64)).to(device)

    return Dataset(
        name,
        *tensors(inputs, targets),
        *tensors(test_inputs, test_targets),
        num_classes=int(targets.max()) + 1,
        fingerprint=content.hexdigest()[:16],
    )


def resolve(name: str, root: str | Path | None = None) -> tuple[str, str]:
    """The dataset that ``name`` stands for, and, where ``"auto"`` had to settle for digits, why (else ``""``).

    Verifies the files of a torchvision dataset, and downloads them where they are missing.
    """
    if name in ("digits", "blobs"):
        return name, ""
    if name != "auto" and name not in TRAIN_SIZES:
        raise ValueError(f"unknown dataset {name!r}; choose one of: auto, {', '.join(TRAIN_SIZES)}")
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
    """Download a torchvision dataset, with its progress bar, and verify it before it takes its place.

    ``patience``: seconds within which one mirror must answer. Raises DataError saying which files go where.
    """
    cls, folder = _torchvision_class(name), data_root(root)
    raw = folder / cls.__name__ / "raw"
    archives = [archive for archive, _ in cls.resources]
    by_hand = f"To add it by hand, put {', '.join(archives)} (or the same files unpacked) into {raw}"
    have_archives = all((raw / archive).exists() for archive in archives)
    if not have_archives and not _answers(_MIRRORS[name], archives[0], patience):
        raise DataError(f"{cls.__name__} is not in {raw}, and no mirror answered within {patience:g} s. {by_hand}.")
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as incoming:
            new = Path(incoming) / cls.__name__ / "raw"
            new.mkdir(parents=True)
            socket.setdefaulttimeout(30.0)  # a mirror that stalls would hang for ever
            for archive, md5 in cls.resources:
                if have_archives and _md5(raw / archive) == md5:
                    shutil.copy2(raw / archive, new / archive)
                else:
                    _fetch(_MIRRORS[name], archive, md5, new / archive)
            cls(incoming, download=True)  # which unpacks them, and asks nobody: each is there with its checksum
            raw.mkdir(parents=True, exist_ok=True)
            for file in sorted(new.iterdir()):
                os.replace(file, raw / file.name)
    except (OSError, RuntimeError, EOFError, zlib.error) as error:
        raise DataError(f"{cls.__name__} could not be downloaded into {raw} ({error}). {by_hand}.") from error
    finally:
        socket.setdefaulttimeout(timeout)


def files_of(name: str, root: str | Path | None = None) -> dict[str, bytes]:
    """The files of a torchvision dataset that is here, packed, by name; none of one that scikit-learn has."""
    if name not in _NORMALISATION:
        return {}
    raw = data_root(root) / _torchvision_class(name).__name__ / "raw"
    names = [archive.removesuffix(".gz") for archive, _ in _torchvision_class(name).resources]
    return {file: zlib.compress((raw / file).read_bytes(), 1) for file in names}


def put_files(name: str, files: Mapping[str, bytes], root: str | Path | None = None) -> None:
    """Put what ``files_of`` gave elsewhere where the dataset is missing; DataError where it cannot be written."""
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


def epoch_order(num_examples: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of the examples in an epoch: int64 ``(num_examples,)``, a function of seed and epoch alone."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(state))


def _answers(mirrors: list[str], file: str, patience: float) -> bool:
    """Whether a mirror serves ``file``. Daemon threads, because a name look-up can hang far beyond any timeout."""
    replies: queue.Queue[bool] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            with _open(mirror + file, method="HEAD", timeout=patience):
                replies.put(True)
        except (OSError, http.client.HTTPException):
            replies.put(False)

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    deadline = time.monotonic() + patience
    try:
        return any(replies.get(timeout=max(0.0, deadline - time.monotonic())) for _ in mirrors)
    except queue.Empty:
        return False


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to what is not HTTPS."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return super().redirect_request(req, fp, code, msg, headers, _https(newurl))


def _https(url: str) -> str:
    if not url.lower().startswith("https://"):
        raise OSError(f"{url} is not HTTPS")
    return url


def _open(url: str, method: str = "GET", timeout: float = 30.0):
    request = urllib.request.Request(_https(url), method=method, headers={"User-Agent": "companion"})
    return urllib.request.build_opener(_OnlyHttps).open(request, timeout=timeout)


def _fetch(mirrors: list[str], archive: str, md5: str, file: Path) -> None:
    """Download an archive from the first mirror that has it whole; OSError where none has."""
    from tqdm import tqdm

    problems = []
    for mirror in mirrors:
        try:
            with _open(mirror + archive) as reply, file.open("wb") as stream, tqdm(
                total=reply.length, unit="B", unit_scale=True, desc=archive
            ) as bar:  # fmt: skip
                while chunk := reply.read(1 << 16):
                    stream.write(chunk)
                    bar.update(len(chunk))
            if _md5(file) == md5:
                return
            problems.append(f"{mirror}{archive}: its MD5 is not {md5}")
        except (OSError, http.client.HTTPException) as error:
            problems.append(f"{mirror}{archive}: {error}")
        file.unlink(missing_ok=True)
    raise OSError("; ".join(problems))


def _torchvision_class(name: str):
    # Imported here: torchvision takes seconds, and digits and blobs do without it.
    from torchvision import datasets

    return {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]


def _verify(name: str, root: Path) -> bool:
    """Whether the four files are there; raises DataError naming the first that is damaged."""
    raw = root / _torchvision_class(name).__name__ / "raw"
    stats = {file.name: file.stat() for file in raw.glob("*")}
    return _verify_content(name, raw, tuple((f, s.st_size, s.st_mtime_ns) for f, s in sorted(stats.items())))


@functools.lru_cache(maxsize=8)
def _verify_content(name: str, raw: Path, stamps: tuple) -> bool:
    """As above, once for each state of the files: a sweep asks for its dataset hundreds of times."""
    cls, complete = _torchvision_class(name), True
    for archive, archive_md5 in cls.resources:
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
    """What is wrong with an unpacked idx file, or ``""``: by MD5, by its archive's CRC, and by its own header."""
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


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images[:, None].astype(np.uint8)
    train, test, train_targets, test_targets = train_test_split(
        images, digits.target, test_size=500, stratify=digits.target, random_state=0
    )
    return train, train_targets, test, test_targets


def _blobs():
    from sklearn.datasets import make_blobs

    inputs, targets = make_blobs(n_samples=1000, centers=3, n_features=2, cluster_std=2, random_state=2)
    return inputs[:500], targets[:500], inputs[500:], targets[500:]


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
