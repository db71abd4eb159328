"""Measures: what a setting is worth, what a model costs, and what a solver errs by."""
