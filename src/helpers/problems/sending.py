"""Objects for other processes: a problem travels whole, with the modules of its user, which a worker may not have."""

from __future__ import annotations

import pickle
import sys

import cloudpickle

from helpers.problems.fingerprint import is_library


def packed(value: object) -> bytes:
    """Pickle an object with the user's own code in it. Raises ValueError for what cannot be sent.

    >>> import cloudpickle
    >>> cloudpickle.loads(packed(lambda: 3))()
    3
    """
    own = [m for name, m in list(sys.modules.items()) if name != "__main__" and not _is_everywhere(m)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(value)
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ValueError(f"this problem cannot be sent to another process ({error}); run it with jobs=1") from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _is_everywhere(module: object) -> bool:
    """Whether a worker has the module too: Python's, an installed one, or this package."""
    name = getattr(module, "__name__", None)
    return not isinstance(name, str) or name.split(".")[0] in ("helpers", "companion") or is_library(module)
