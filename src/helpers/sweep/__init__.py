"""Grids of settings × seeds → a tidy frame: jobs, result store, clusters. Stands on measure."""
