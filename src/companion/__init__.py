"""The ``companion`` command: it executes the notebooks, reports on them and publishes what they found."""

__version__ = "0.1.0"
