"""Grids of settings × seeds → a tidy frame: jobs, result store, clusters. Stands on measure."""

import importlib

_HOMES = {
    **dict.fromkeys(("run", "measure", "weights", "to_target", "PROTOCOLS"), "helpers.sweep.trainings"),
    "grid": "helpers.sweep.settings",
}


def __getattr__(name: str):
    if name in _HOMES:  # when asked for: the store alone needs no torch
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'helpers.sweep' has no attribute {name!r}")
