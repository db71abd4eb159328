"""Measurements: what a setting saves, what a model costs, how large a solver's error is, and what a GPU makes of it."""
