"""The record of a training: losses of its minibatches, evaluations along the way, and the step of a divergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

_SHARED = ("steps", "epochs", "examples_seen", "seconds", "batch_size_now")
_EVALUATED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


class History:
    """Rows of measures, a value a replica each."""

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.rows: list[dict[str, object]] = []
        self.diverged_at = torch.full((replicas,), math.nan, dtype=torch.float64)
        self._losses: list[tuple[np.ndarray, torch.Tensor]] = []

    def add_losses(self, sizes: np.ndarray, losses: torch.Tensor) -> None:
        """Note minibatches' sizes and their mean losses ``(minibatches, replicas)``."""
        self._losses.append((sizes, losses))

    def wait(self) -> None:
        """Wait for the device to finish the last step."""
        if self._losses:
            float(self._losses[-1][1][-1, 0])

    def take_losses(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand out, once, sizes ``(steps,)`` and losses ``(steps, replicas)`` since the last record or call."""
        if not self._losses:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, self.replicas, dtype=torch.float64)
        sizes = torch.from_numpy(np.concatenate([sizes for sizes, _ in self._losses])).double()
        losses = torch.cat([losses for _, losses in self._losses]).cpu().double()
        first_step = steps - len(sizes) + 1
        bad = ~losses.isfinite()
        at = torch.where(bad.any(0), (first_step + bad.int().argmax(0)).double(), math.nan)
        self.diverged_at = torch.where(self.diverged_at.isnan(), at, self.diverged_at)
        self._losses.clear()
        return sizes, losses

    def add(self, axes: Mapping[str, object], evaluated: Mapping[str, torch.Tensor],
            measured: Mapping[str, torch.Tensor]) -> None:  # fmt: skip
        """Add a row: the axes of now, the evaluation, NaN where there was none, and measures of the weights."""
        steps = axes["steps"]
        sizes, losses = self.take_losses(steps)
        # Averaged by examples; NaN before the first step. Row by row, for a sum over rows has a stack's own bits.
        running = torch.stack([one.sum() for one in (losses.T * sizes).contiguous()]) / sizes.sum()
        loss = next(v for k, v in evaluated.items() if k.endswith("_loss"))
        self.diverged_at = torch.where(self.diverged_at.isnan() & ~loss.isfinite(), float(steps), self.diverged_at)
        evaluated = {**dict.fromkeys(_EVALUATED, torch.full_like(loss, math.nan)), **evaluated}
        self.rows.append({
            **axes, "minibatch_loss": running, **evaluated,
            "generalization_gap": evaluated["train_accuracy"] - evaluated["test_accuracy"],
            "diverged_at": self.diverged_at.clone(), **{name: value.cpu().double() for name, value in measured.items()},
        })  # fmt: skip

    def frame(self, seeds: Sequence[int]) -> pd.DataFrame:
        """One row per record and replica, replica by replica."""
        columns: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(itertools.chain(*self.rows)):
            values = [row.get(name, math.nan) for row in self.rows]
            if any(torch.is_tensor(value) for value in values):
                each = [torch.as_tensor(value, dtype=torch.float64).expand(self.replicas) for value in values]
                columns[name] = torch.stack(each, 1).flatten().numpy()
            else:
                columns[name] = np.tile(values, self.replicas)
        return pd.DataFrame(columns).assign(seed=np.repeat(seeds, len(self.rows)), replicas=self.replicas)

    def resume(self, groups: Sequence[pd.DataFrame]) -> dict[str, object]:
        """Take over the rows of ``frame``, one frame a replica; returns the last row."""
        shared = [k for k in groups[0] if k in _SHARED or (k == "lr_now" and _all_equal(groups))]
        columns = {
            k: groups[0][k] if k in shared else torch.tensor(np.stack([g[k].to_numpy(float) for g in groups], 1))
            for k in groups[0]
        }
        self.rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        self.diverged_at = self.rows[-1]["diverged_at"].clone()
        return self.rows[-1]


def _all_equal(groups: Sequence[pd.DataFrame]) -> bool:
    return all((group["lr_now"].to_numpy() == groups[0]["lr_now"].to_numpy()).all() for group in groups)
