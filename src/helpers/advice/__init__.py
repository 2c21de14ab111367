"""Which batch size should I use? Measured on the problem itself, phase by phase, then combined into a range.

``advise(problem)`` runs the phases; ``advise.from_loop(model, optimizer, loader, loss)`` takes a loop's own objects.
"""

from helpers.advice.advise import Advice, advise
from helpers.advice.answer import Answer
from helpers.advice.interval import Interval, number

__all__ = ["Advice", "Answer", "Interval", "advise", "number"]
