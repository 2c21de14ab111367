"""The live lab: sliders that act on a training while it runs."""

from helpers.live.lab import Lab

__all__ = ["Lab"]
