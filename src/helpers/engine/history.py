"""The record of a training: losses of its minibatches, evaluations along the way, and the step of a divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch

_SHARED = ("steps", "epochs", "examples_seen", "seconds", "batch_size_now")


class History:
    """Rows of measures, a value a replica each."""

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.rows: list[dict[str, object]] = []
        self.diverged_at = torch.full((replicas,), math.nan, dtype=torch.float64)
        self._losses: list[tuple[int, torch.Tensor]] = []

    def add_loss(self, size: int, losses: torch.Tensor) -> None:
        """Note a minibatch's size and its mean losses ``(replicas,)``."""
        self._losses.append((size, losses))

    def wait(self) -> None:
        """Wait for the device to finish the last step."""
        if self._losses:
            float(self._losses[-1][1][0])

    def take_losses(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand out, once, sizes ``(steps,)`` and losses ``(steps, replicas)`` since the last record or call."""
        if not self._losses:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, self.replicas, dtype=torch.float64)
        sizes = torch.tensor([size for size, _ in self._losses], dtype=torch.float64)
        losses = torch.stack([loss for _, loss in self._losses]).cpu().double()
        first_step = steps - len(self._losses) + 1
        bad = ~losses.isfinite()
        at = torch.where(bad.any(0), (first_step + bad.int().argmax(0)).double(), math.nan)
        self.diverged_at = torch.where(self.diverged_at.isnan(), at, self.diverged_at)
        self._losses.clear()
        return sizes, losses

    def add(self, axes: Mapping[str, object], evaluated: Mapping[str, torch.Tensor],
            measured: Mapping[str, torch.Tensor]) -> None:  # fmt: skip
        """Add a row: the axes of now, the evaluation of both splits, and measures of the weights."""
        steps = axes["steps"]
        sizes, losses = self.take_losses(steps)
        running = (losses * sizes[:, None]).sum(0) / sizes.sum()  # averaged by examples; NaN before the first step
        train_loss = evaluated["train_loss"]
        self.diverged_at = torch.where(
            self.diverged_at.isnan() & ~train_loss.isfinite(), float(steps), self.diverged_at
        )
        self.rows.append({
            **axes, "minibatch_loss": running, **evaluated,
            "generalization_gap": evaluated["train_accuracy"] - evaluated["test_accuracy"],
            "diverged_at": self.diverged_at.clone(), **{name: value.cpu().double() for name, value in measured.items()},
        })  # fmt: skip

    def frame(self, seeds: Sequence[int]) -> pd.DataFrame:
        """One row per record and replica, replica by replica."""
        frames = []
        for replica, seed in enumerate(seeds):
            rows = [{k: v[replica].item() if torch.is_tensor(v) else v for k, v in r.items()} for r in self.rows]
            frames.append(pd.DataFrame(rows).assign(seed=seed, replicas=self.replicas))
        return pd.concat(frames, ignore_index=True)

    def resume(self, groups: Sequence[pd.DataFrame]) -> dict[str, object]:
        """Take over the rows of ``frame``, one frame a replica; returns the last row."""
        shared = [k for k in groups[0] if k in _SHARED or (k == "lr_now" and _all_equal(groups))]
        self.rows = [
            {k: groups[0][k].iloc[i] if k in shared else torch.tensor([float(g[k].iloc[i]) for g in groups],
                                                                     dtype=torch.float64) for k in groups[0]}
            for i in range(len(groups[0]))
        ]  # fmt: skip
        self.diverged_at = self.rows[-1]["diverged_at"].clone()
        return self.rows[-1]


def _all_equal(groups: Sequence[pd.DataFrame]) -> bool:
    return all((group["lr_now"].to_numpy() == groups[0]["lr_now"].to_numpy()).all() for group in groups)
