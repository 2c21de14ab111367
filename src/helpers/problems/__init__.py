"""What is trained: data, networks and losses as objects. Imports nothing else of the package."""
