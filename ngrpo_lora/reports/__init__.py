"""A run's records as pictures, curves and tables."""
