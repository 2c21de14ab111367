"""The claims of the write-ups, read from ``claims/*.yml`` and checked while they load; ``rules`` judges them.

A claim has parts; each is one figure a seed and a range that was fixed before its result was seen. To add a claim, add
an entry to its source's file; to use it, name its part keys in ``Book.judge``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).with_name("claims")
ACCURACY = "test accuracy, %"
KNOWN = ("stated", "read off", "inferred", "checked", "an identity")


@dataclass(frozen=True)
class Setup:
    """The settings of a source. Other values of ``must_match`` settle no part; other values of ``scale`` settle only
    the parts that quote no published figure."""

    must_match: Mapping[str, object]
    scale: Mapping[str, object]


@dataclass(frozen=True)
class Part:
    """One figure a seed, the range that holds its mean if the claim is true, and the published value.

    ``label``: its name for readers; ``known``: how the published value is known, one of KNOWN; ``exact``: judged in
    the source's own set-up only.
    """

    label: str
    measured: str
    low: float
    high: float
    published: str = ""
    known: str = ""
    exact: bool = False

    @property
    def rule(self) -> str:
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"above {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """A statement of a write-up, its source, the name of its set-up, and the parts that settle it, by key."""

    statement: str
    source: str
    setup: str
    parts: Mapping[str, Part]


def load(folder: Path = FOLDER) -> tuple[dict[str, Setup], dict[str, Claim]]:
    """Read the set-ups and the claims of a folder. Raises ValueError, naming file and entry, for a malformed one."""
    setups, claims = {}, {}
    for name, value in (_read(folder / "setups.yml") or {}).items():
        _fields(f"setups.yml: {name}", value, {}, {"must_match": dict, "scale": dict})
        setups[name] = Setup(value.get("must_match", {}), value.get("scale", {}))
    for file in sorted(set(folder.glob("*.yml")) - {folder / "setups.yml"}):
        for entry in _read(file) or []:
            where = f"{file.name}: {entry.get('claim') if isinstance(entry, dict) else entry}"
            _fields(where, entry, {"claim": str, "statement": str, "source": str, "setup": str, "parts": list}, {})
            _expect(entry["claim"] not in claims, where, "a claim of that name exists already")
            _expect(entry["setup"] in setups, where, f"unknown setup {entry['setup']!r}; one of {', '.join(setups)}")
            parts: dict[str, Part] = {}
            for value in entry["parts"]:
                key, part = _part(where, value)
                _expect(key not in parts, where, f"two parts have the key {key!r}")
                parts[key] = part
            _expect(bool(parts), where, "a claim needs at least one part")
            claims[entry["claim"]] = Claim(entry["statement"], entry["source"], entry["setup"], parts)
    return setups, claims


def _part(where: str, value: dict) -> tuple[str, Part]:
    number = (int, float)
    by_margin = isinstance(value, dict) and "margin" in value
    bounds = {"published": number, "margin": number} if by_margin else {"published": str}
    optional = {} if by_margin else {"low": number, "high": number, "exact": bool}
    where = f"{where}: {value.get('key') if isinstance(value, dict) else value}"
    _fields(where, value, {"key": str, "label": str, "measured": str, "known": str} | bounds, optional)
    _expect(re.fullmatch(r"[!-~]+", value["key"]) is not None, where, "a key is plain ASCII without spaces")
    _expect(value["known"] in KNOWN, where, f"known is {value['known']!r}; expected one of {', '.join(KNOWN)}")
    published, low, high = value["published"], value.get("low", -math.inf), value.get("high", math.inf)
    if by_margin:
        low, high, published = published - value["margin"], published + value["margin"], f"{published:g}"
    _expect(low < high and math.isfinite(low) | math.isfinite(high), where, f"low {low} and high {high} are no range")
    exact = by_margin or value.get("exact", False)
    return value["key"], Part(
        value["label"], value["measured"], float(low), float(high), published, value["known"], exact
    )


def _read(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file.name}: {' '.join(str(error).split())}") from None


def _fields(where: str, value: object, required: Mapping, optional: Mapping) -> None:
    _expect(isinstance(value, dict), where, f"is {value!r}; expected fields and values")
    for name, kind in {**required, **optional}.items():
        if name in value or name in required:
            held = value.get(name)
            typed = isinstance(held, kind) and isinstance(held, bool) == (kind is bool) and held != ""
            expected = "a number" if kind == (int, float) else f"a {kind.__name__}"
            _expect(typed, where, f"{name} is {held!r}; expected {expected}")
    unknown = set(value) - set(required) - set(optional)
    _expect(not unknown, where, f"unknown field {', '.join(map(str, sorted(unknown, key=str)))}")


def _expect(holds: bool, where: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {message}")


SETUPS, CLAIMS = load()
