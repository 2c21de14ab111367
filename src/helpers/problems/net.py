"""Networks: a recipe that makes one ordinary module, the same one for the same seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from helpers.problems import fingerprint


class Net:
    """A network, by the function that makes it.

    factory: makes a fresh ``nn.Module``; it runs under the seed's own generator state, so that the initial weights
        depend on the seed alone.
    key: a name for columns and captions; it must be given where the factory's code cannot be hashed.
    Raises TypeError for a factory that cannot be called without arguments.

    >>> net = Net(lambda: nn.Linear(2, 3))
    >>> torch.equal(net.module(0).weight, net.module(0).weight)
    True
    """

    def __init__(self, factory: Callable[[], nn.Module], key: str | None = None):
        if isinstance(factory, nn.Module):
            raise TypeError(
                f"Net({type(factory).__name__}(...)) is one module, and every seed needs weights of its own; "
                f"give a function that makes one: Net(lambda: {type(factory).__name__}(...))"
            )
        if not callable(factory):
            raise TypeError(f"Net needs a function that makes a module, not {factory!r}")
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise TypeError(f"the factory must be callable without arguments ({error}); wrap it in a lambda") from None
        except ValueError:  # a callable without a signature: its first call tells
            pass
        self.factory, self.key = factory, key

    @property
    def name(self) -> str:
        """The key, else the factory's name."""
        named = getattr(self.factory, "__name__", type(self.factory).__name__)
        return self.key or ("net" if named == "<lambda>" else named)

    def module(self, seed: int) -> nn.Module:
        """Make a module on the CPU whose initial weights depend on ``seed`` alone; leaves torch's generator alone."""
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            with torch.device("cpu"):
                module = self.factory()
        finally:
            torch.set_rng_state(before)
        if not isinstance(module, nn.Module):
            raise TypeError(f"the factory made a {type(module).__name__}; expected a torch.nn.Module")
        return module

    @property
    def content(self) -> dict[str, str | None]:
        """The net as part of a result's key. Raises TypeError for a factory that can be neither hashed nor named."""
        try:
            return {"key": self.key, "code": fingerprint.of(self.factory)}
        except TypeError as error:
            if self.key is None:
                raise TypeError(
                    f"this net's code cannot be hashed ({error}); name its content: Net(..., key='...')"
                ) from None
            return {"key": self.key, "code": None}
