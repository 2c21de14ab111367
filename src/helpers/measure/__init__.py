"""Measurements at fixed weights: gradients, noise, geometry, memory. Stands on engine."""
