"""What a notebook imports. Importing the package imports no other library; its names are loaded when asked for."""

import importlib

_HOMES = {
    **dict.fromkeys(("Dataset", "Net", "Problem", "Solution"), "helpers.problems"),
    "Training": "helpers.engine.training", "schedule": "helpers.engine.schedules",
    "advise": "helpers.advice", "Lab": "helpers.live", "Book": "helpers.book", "missing": "helpers.book",
}  # fmt: skip
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")
