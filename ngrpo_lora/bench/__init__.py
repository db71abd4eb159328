"""Measurements: what a setting saves, what a model costs, how large a solver's error is, what a GPU does with it all."""
