"""The live lab: sliders that act on a training while it runs."""

from helpers.live.lab import Lab, in_browser

__all__ = ["Lab", "in_browser"]
