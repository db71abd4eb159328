"""Runs on the Hub: what is pushed and when, and the model card that explains it there."""
