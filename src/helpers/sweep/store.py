"""Results on disk by content key: a tidy frame (Parquet), arrays where asked for (npz), settings and checksums (JSON).

An entry is a folder that appears in one rename, so a reader sees all of it or nothing. Nothing is pickled. An entry
whose checksum fails is named, set aside, and counts as absent. Who computes an entry claims it first, so that two
runners on one store share the work; a claim ends with its process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

PROJECT = Path(__file__).resolve().parents[3]
FILES = ("frame.parquet", "arrays.npz")
ABANDONED = 3600.0  # seconds without a change after which what a writer left unfinished counts as left behind


class StoreError(OSError):
    """A result that could not be written: the disk is full, or the folder is read-only; the rest is intact."""


def key_of(content: Mapping[str, object]) -> str:
    """The content key: 24 hex digits of the SHA-256 of the canonical JSON. TypeError for what JSON cannot hold."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Store:
    """A folder of results: ``folder``, else ``$COMPANION_STORE``, else ``outputs/store`` of the project."""

    def __init__(self, folder: str | Path | None = None):
        chosen = folder or os.environ.get("COMPANION_STORE")
        base = PROJECT if (PROJECT / "pyproject.toml").exists() else Path.cwd()
        self.folder = Path(chosen).expanduser() if chosen else base / "outputs" / "store"

    def put(
        self,
        content: Mapping[str, object],
        frame: pd.DataFrame,
        arrays: Mapping[str, np.ndarray] | None = None,
        about: Mapping[str, object] | None = None,
    ) -> str:
        """Write an entry, in place of an older one of the same content; returns its key.

        about: versions and device, kept beside the content without being part of the key.
        Raises StoreError where it cannot be written; the store is then as it was.
        """
        key = key_of(content)
        for name, array in (arrays or {}).items():
            if np.asarray(array).dtype.hasobject:
                raise TypeError(f"array {name!r} holds Python objects; nothing is pickled, so only numbers are stored")
        record = {"content": content, "about": about or {}, "arrays": sorted(arrays or {})}
        with _written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self.folder, ignore_cleanup_errors=True) as new:
                entry = Path(new, key)
                entry.mkdir()
                frame.to_parquet(entry / "frame.parquet", index=False)
                if arrays:
                    np.savez(entry / "arrays.npz", **arrays)
                record["sha256"] = {file.name: _sha256(file) for file in sorted(entry.iterdir())}
                (entry / "entry.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
                with FileLock(self.folder / ".lock"):
                    if (self.folder / key).exists():
                        os.rename(self.folder / key, Path(new, "old"))
                    os.rename(entry, self.folder / key)
        return key

    def claim(self, key: str) -> FileLock | None:
        """A held lock on computing the entry, or None while another process holds it; it ends with its process.

        ``settle`` it once the entry has been put, and no file is left of it; else ``release`` it.
        """
        lock = FileLock(self._claim_file(key), thread_local=False)  # joblib takes in one thread what another releases
        with _written(self.folder):
            (self.folder / ".claims").mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return lock

    def settle(self, key: str, lock: FileLock) -> None:
        """Release a claim, and remove its file: whoever waits at it looks for the entry first."""
        self._claim_file(key).unlink(missing_ok=True)
        lock.release()

    def _claim_file(self, key: str) -> Path:
        return self.folder / ".claims" / _checked(key)

    def all_keys(self) -> list[str]:
        """The keys of all entries, whole or not."""
        return sorted(e.name for e in self.folder.glob("[0-9a-f]*") if _KEY.fullmatch(e.name))

    def waste(self, current: Mapping[str, object]) -> list[tuple[str, Path]]:
        """List files that can be deleted, each with the reason: damaged, left by killed writers, or read by nothing.

        current: what the content of an entry must say to be read, such as ``{"numerics": 2}``.
        """
        found = [("set aside as damaged", e) for e in self.folder.glob("damaged/*")]
        left = [e for e in self.folder.glob(".new-*") if time.time() - _changed(e) > ABANDONED]
        for file in self.folder.glob(".claims/*"):
            lock = self.claim(file.name)
            if lock is not None:
                lock.release()
                left.append(file)
        found += [("left by a killed writer", e) for e in left]
        for key in self.all_keys():
            record = self._record(key)
            content = record["content"].get("of", record["content"]) if record else {}
            if any(name in content and content[name] != value for name, value in current.items()):
                found.append(("of older numerics", self.folder / key))
        return found

    def has(self, key: str, arrays: Iterable[str] = ()) -> bool:
        """Whether the entry is there, whole, with at least these arrays, each given by the beginning of its name."""
        record = self._record(key)
        return record is not None and all(any(a.startswith(start) for a in record["arrays"]) for start in arrays)

    def frame(self, key: str) -> pd.DataFrame:
        """The frame of an entry. Raises KeyError where there is none."""
        if self._record(key) is None:
            raise KeyError(f"no entry {key} in {self.folder}")
        return pd.read_parquet(self.folder / key / "frame.parquet")

    def arrays(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of an entry. Raises KeyError where there is none."""
        record = self._record(key)
        if record is None:
            raise KeyError(f"no entry {key} in {self.folder}")
        if not record["arrays"]:
            return {}
        with np.load(self.folder / key / "arrays.npz", allow_pickle=False) as file:
            return dict(file)

    def _record(self, key: str) -> dict | None:
        """The verified record of an entry, or None; a damaged entry is moved to ``damaged/`` with a warning."""
        entry = self.folder / _checked(key)
        if not entry.exists():
            return None
        with contextlib.suppress(*_DAMAGE):  # or replaced while it was read: under the lock it holds still
            return _verified(entry)
        with _written(self.folder), FileLock(self.folder / ".lock"):
            if not entry.exists():
                return None
            try:
                return _verified(entry)
            except _DAMAGE as error:
                aside = self.folder / "damaged" / f"{key}-{time.time_ns()}"
                aside.parent.mkdir(exist_ok=True)
                shutil.move(entry, aside)
                warnings.warn(f"damaged result set aside in {aside} ({error}); it is computed again", stacklevel=3)
                return None


@contextlib.contextmanager
def _written(folder: Path):
    """Turn a write failure into a StoreError that suggests a fix."""
    try:
        yield
    except OSError as error:
        reason = f"a result could not be written into {folder}: {error.strerror or error}"
        way_out = "earlier results are intact; make room there, or name another folder in $COMPANION_STORE"
        raise StoreError(f"{reason}; {way_out}") from error


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _verified(entry: Path) -> dict:
    """The record of an entry, after its checksums and its key; raises one of ``_DAMAGE`` where they do not fit."""
    record = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
    if key_of(record["content"]) != entry.name:
        raise ValueError("entry.json says another content than its key")
    names = record["arrays"]
    wanted = FILES if names else FILES[:1]
    if set(record["sha256"]) != set(wanted):
        raise ValueError(f"entry.json names other files than {', '.join(wanted)}")
    for name, sha256 in record["sha256"].items():
        if _sha256(entry / name) != sha256:
            raise ValueError(f"{name} differs from its checksum")
    if names:
        with np.load(entry / "arrays.npz", allow_pickle=False) as file:
            if sorted(file.files) != names:
                raise ValueError("entry.json lists other arrays than arrays.npz holds")
    return record


_KEY = re.compile("[0-9a-f]{24}")


def _checked(key: str) -> str:
    """The key. Raises ValueError unless it is one: a name with a slash in it would lead out of the store."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a key; expected 24 hex digits, as key_of gives them")
    return key


def size(path: Path) -> int:
    """Count the bytes of a file, or of all files below a folder."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    return max((file.lstat().st_mtime for file in (path, *path.rglob("*"))), default=0.0)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
