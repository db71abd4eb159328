"""Runs on the Hub: what is pushed, when, and how it explains itself there."""
