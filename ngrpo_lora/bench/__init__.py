"""Measurements: how much time a setting saves, what a model costs, and how large a solver's error is."""
