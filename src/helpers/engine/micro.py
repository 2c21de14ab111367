"""Gradients summed over micro-batches, so that only one of them is in memory; smaller ones where that is too much."""

from __future__ import annotations

import warnings

import torch

from helpers.engine.stack import Stack
from helpers.problems.nets import parts


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: by its class, or in the words of an allocator."""
    # oneDNN, which convolves on a CPU, says no more than that it could not create what it wanted the memory for.
    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


def _write(stack: Stack, values: list[torch.Tensor]) -> None:
    for buffer, value in zip(stack.buffers(), values):
        buffer.copy_(value)


class MicroBatches:
    """Gradients of minibatches, in micro-batches of at most ``size`` examples (None: whole minibatches)."""

    def __init__(self, size: int | None):
        self.size = size

    def gradient(self, stack: Stack, indices: torch.Tensor, step: int) -> torch.Tensor:
        """Leave the minibatch's gradient in the stack; returns its mean losses ``(replicas,)``.

        If the batch does not fit in memory, retry with half the micro-batch size and keep that size.
        """
        before = [buffer.clone() for buffer in stack.buffers()]
        while True:
            size = min(self.size or indices.shape[1], indices.shape[1])
            try:
                if size == indices.shape[1] and stack.closed_form:
                    return stack.backpropagate(*stack.batch(indices))
                stack.clear()
                return self._accumulate(stack, indices, size, before, step)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not exhausted(error):
                    raise
                reason = str(error).split("\n")[0]
            # Outside of `except`, whose error would keep alive what did fit.
            self.size = size // 2
            _write(stack, before)
            self._warn(stack, size, reason, step)

    def _accumulate(self, stack: Stack, indices: torch.Tensor, size: int, before: list, step: int) -> torch.Tensor:
        batch = indices.shape[1]
        if size == batch:
            return stack.backward(*stack.batch(indices), step=(step, 0))
        # A kernel's ghost batches stay whole where their size divides the micro-batch's.
        split = parts(batch, size) if stack.kernel is not None and before else size
        moved = [torch.zeros_like(value) for value in before if stack.kernel is not None]
        total: torch.Tensor | float = 0.0
        for number, part in enumerate(indices.split(split, dim=1)):
            share = part.shape[1] / batch
            if moved:
                _write(stack, before)
            total = total + stack.backward(*stack.batch(part), share, step=(step, number)) * share
            for mean, value in zip(moved, stack.buffers()):
                mean.add_(value, alpha=share)
        if moved:  # the running statistics move by the mean move
            _write(stack, moved)
        return total

    def _warn(self, stack: Stack, size: int, reason: str, step: int) -> None:
        layer, same = stack.train().batch_statistics(), "the gradients are the same sums"
        ghost = getattr(
            next((m for m in stack.roots[0].modules() if hasattr(m, "norm_batch_size")), None), "norm_batch_size", None
        )
        if layer is not None and (ghost is None or self.size % ghost):
            same = f"but batch statistics are now over at most {self.size} examples, so the gradients differ"
        warnings.warn(
            f"step {step + 1}: {size} examples at once do not fit in memory ({reason}); from here on "
            f"micro_batch_size is {self.size}: {same}", stacklevel=6,
        )  # fmt: skip
