"""What is trained: data, networks and losses as objects. Imports nothing else of the package."""

from helpers.problems.builtin import TEST_SIZES, TRAIN_SIZES, choose, find, load, locate, named, resolve
from helpers.problems.dataset import DataError, Dataset, pick_device
from helpers.problems.net import Net
from helpers.problems.problem import LOSSES, Problem, Solution

__all__ = [
    "LOSSES", "TEST_SIZES", "TRAIN_SIZES", "DataError", "Dataset", "Net", "Problem", "Solution", "choose", "find",
    "load", "locate", "named", "pick_device", "resolve",
]  # fmt: skip
