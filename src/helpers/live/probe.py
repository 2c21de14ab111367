"""Probes of a live training: its score on test examples, a picture of its mistakes, and its noise scale."""

from __future__ import annotations

import math

import numpy as np
import torch

from helpers.engine.stack import Stack
from helpers.engine.training import Training
from helpers.measure import noise
from helpers.problems import Problem

_CHUNK = 250  # test examples in one forward pass
_NOISE = 128  # examples in one estimate of the noise scale
_GRID = 60  # points a side of the grid on which decision regions are drawn
_SHOWN = 12  # misclassified images on show


class TestDraw:
    """Test examples of a problem, drawn once: ``most`` of them, or all there are."""

    def __init__(self, problem: Problem, most: int):
        dataset, self.problem = problem.dataset, problem
        chosen = np.sort(np.random.default_rng(0).permutation(dataset.num_test)[:most])
        parts = torch.from_numpy(chosen).to(dataset.device).split(_CHUNK) if len(chosen) else ()
        self.batches, self.size = [dataset.batch(part, "test") for part in parts], len(chosen)

    @torch.no_grad()
    def evaluate(self, stack: Stack) -> tuple[float, float, dict[str, object]]:
        """Return loss, accuracy (NaN where there is none), and the picture that the shape of the inputs allows.

        The picture: ``regions`` of points in a plane, or ``mistakes`` among images; each example must have one class.
        """
        losses, scores, mistakes = [torch.empty(0)], [torch.empty(0)], []
        stack.eval()
        for inputs, targets in self.batches:
            outputs = stack.outputs(inputs)[0]
            losses.append(self.problem.example_losses(outputs, targets).cpu().double())
            score = self.problem.example_scores(outputs, targets)
            if score is None:
                continue
            scores.append(score.cpu())
            if _are_images(inputs) and targets.dim() == 1:
                wrong = (score == 0).nonzero()[: _SHOWN - len(mistakes), 0]
                shown = inputs[wrong].mean(1).cpu().numpy()
                mistakes += zip(shown, targets[wrong].tolist(), outputs[wrong].argmax(1).tolist())
        loss, accuracy, picture = torch.cat(losses).mean().item(), torch.cat(scores).mean().item(), {}
        if not math.isnan(accuracy) and targets.dim() == 1:
            if _are_images(inputs):
                picture = {"mistakes": mistakes}
            elif self.problem.dataset.in_memory and inputs.shape[1:] == (2,) and inputs.is_floating_point():
                picture = {"regions": self._regions(stack)}
        return loss, accuracy, picture

    def _regions(self, stack: Stack) -> np.ndarray:
        points = self.problem.dataset.train_inputs
        low, high = points.min(0).values - 1, points.max(0).values + 1
        x, y = (torch.linspace(float(low[i]), float(high[i]), _GRID, device=points.device) for i in (0, 1))
        grid = torch.stack(torch.meshgrid(x, y.flip(0), indexing="xy"), -1).view(-1, 2)  # the first row is the top
        return stack.outputs(grid)[0].argmax(1).view(_GRID, _GRID).cpu().numpy()


def _are_images(inputs: object) -> bool:
    return isinstance(inputs, torch.Tensor) and inputs.dim() == 4


class NoiseScale:
    """A running estimate of B_simple = tr Σ / |G|²: the ratio of decaying sums, over about ten estimates."""

    def __init__(self):
        self.refusal = ""  # why it cannot be estimated
        self._sums = np.zeros(3)  # weight, tr Σ, |G|²

    @property
    def value(self) -> float:
        """inf where |G|² does not stand out of the noise; NaN before the first estimate."""
        weight, variance, squared = self._sums
        return math.nan if not weight else float(variance / squared) if squared > 0 else math.inf

    def add(self, training: Training) -> None:
        """Estimate once more, from examples that depend on the step alone."""
        if self.refusal:
            return
        dataset, generator = training.dataset, torch.Generator().manual_seed(training.steps)
        chosen = torch.randint(dataset.num_train, (_NOISE,), generator=generator).to(dataset.device)
        try:
            found = torch.stack(noise.statistics(training.stack.train(), *dataset.batch(chosen)))
        except (ValueError, RuntimeError) as error:  # such as batch statistics, where examples have no gradients
            self.refusal = str(error)
            return
        if found.isfinite().all():
            self._sums = 0.9 * self._sums + np.array([1.0, *found[:, 0].tolist()])
