"""Helpers of the batch-size companion: one flat module a noun; importing the package imports no other library."""

__version__ = "0.1.0"
