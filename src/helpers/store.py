"""Results on disk by content key: a tidy frame (Parquet), arrays where asked for (npz), settings and checksums (JSON).

An entry is a folder that appears in one rename, so a reader sees all of it or nothing. Nothing is pickled. An entry
whose checksum fails is named, set aside, and counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[2]


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

        ``about`` (versions, device) is kept beside the content without being part of the key.
        """
        key = key_of(content)
        for name, array in (arrays or {}).items():
            if np.asarray(array).dtype.hasobject:
                raise TypeError(f"array {name!r} holds Python objects; nothing is pickled, so only numbers are stored")
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=self.folder) as new:
            entry = Path(new) / key
            entry.mkdir()
            frame.to_parquet(entry / "frame.parquet", index=False)
            if arrays:
                np.savez(entry / "arrays.npz", **arrays)
            sums = {file.name: _sha256(file) for file in sorted(entry.iterdir())}
            record = {"content": content, "about": about or {}, "arrays": sorted(arrays or {}), "sha256": sums}
            (entry / "entry.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            with FileLock(self.folder / ".lock"):
                if (self.folder / key).exists():
                    os.rename(self.folder / key, Path(new) / "old")
                os.rename(entry, self.folder / key)
        return key

    def has(self, key: str, arrays: Iterable[str] = ()) -> bool:
        """Whether the entry is there, whole, with at least these arrays."""
        record = self._record(key)
        return record is not None and set(arrays) <= set(record["arrays"])

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
            return {name: file[name] for name in file.files}

    def _record(self, key: str) -> dict | None:
        """The verified record of an entry, or None; a damaged entry is moved to ``damaged/`` with a warning."""
        entry = self.folder / key
        if not entry.exists():
            return None
        try:
            return _verified(entry)
        except _DAMAGE:
            pass  # or replaced while it was read: under the lock it holds still
        with FileLock(self.folder / ".lock"):
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


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _verified(entry: Path) -> dict:
    """The record of an entry, after its checksums and its key; raises one of ``_DAMAGE`` where they do not fit."""
    record = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
    if key_of(record["content"]) != entry.name:
        raise ValueError("entry.json says another content than its key")
    for name, sha256 in record["sha256"].items():
        if _sha256(entry / name) != sha256:
            raise ValueError(f"{name} differs from its checksum")
    return record


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
