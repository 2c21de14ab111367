"""The seeded order of the examples: a function of seed and epoch alone, so that runs at any batch size share it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def epoch_order(num_examples: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of the examples in an epoch: int64 ``(num_examples,)``, a function of seed and epoch alone.

    >>> epoch_order(5, seed=0, epoch=1).equal(epoch_order(5, seed=0, epoch=1))
    True
    """
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(state))


class Order:
    """The orders of several seeds side by side; keeps the current epoch's on the device."""

    def __init__(self, num_examples: int, seeds: Sequence[int], device: torch.device):
        self.num_examples, self.seeds, self.device = num_examples, tuple(seeds), device
        self._epoch, self._order = -1, torch.empty(0)

    def next(self, examples_seen: int, batch_size: int) -> torch.Tensor:
        """Return the next minibatch: int64 ``(replicas, batch)``; the last one of an epoch may be shorter.

        Replicas of one seed alone share memory: their axis has stride 0.
        """
        epoch, cursor = divmod(examples_seen, self.num_examples)
        if epoch != self._epoch:
            seeds = self.seeds[:1] if len(set(self.seeds)) == 1 else self.seeds
            order = torch.stack([epoch_order(self.num_examples, seed, epoch) for seed in seeds])
            self._epoch, self._order = epoch, order.to(self.device).expand(len(self.seeds), -1)
        return self._order[:, cursor : cursor + batch_size]
