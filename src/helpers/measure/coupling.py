"""How the examples of a minibatch act on each other: accumulated gradients, and one example's loss in many batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from helpers.engine.training import Training
from helpers.measure import geometry


def accumulation_error(training: Training, micro_batch_sizes: Sequence[int]) -> pd.DataFrame:
    """How far the next minibatch's gradient, accumulated from micro-batches, is from the whole batch's.

    Columns ``micro``, ``seed`` and ``difference``, the distance relative to the whole gradient's norm.
    """
    training, frames = training.branch(), []
    training.micro_batch_size = None
    whole = training.minibatch_gradient()
    for size in micro_batch_sizes:
        training.micro_batch_size = size
        pieces = training.minibatch_gradient()
        gap = geometry.weight_norm({name: pieces[name] - whole[name] for name in whole}) / geometry.weight_norm(whole)
        frames.append(pd.DataFrame({"micro": size, "seed": training.seeds, "difference": gap.numpy()}))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def losses_in_batches(training: Training, size: int, trials: int) -> np.ndarray:
    """The first test example's training-mode loss in batches with ``size - 1`` training examples: ``(trials, seeds)``.

    The other examples are drawn with replacement, by a generator seeded with ``size``.
    """
    stack, data = training.branch().stack.train(), training.dataset
    generator, losses = torch.Generator().manual_seed(size), []
    for _ in range(trials):
        others = torch.randint(data.num_train, (size - 1,), generator=generator).to(data.device)
        inputs = torch.cat([data.test_inputs[:1], data.train_inputs[others]])
        targets = torch.cat([data.test_targets[:1], data.train_targets[others]])
        losses.append(stack.losses(inputs, targets)[:, 0])
    return torch.stack(losses).cpu().double().numpy()
