"""The training loop and its fast paths. Stands on problems."""
