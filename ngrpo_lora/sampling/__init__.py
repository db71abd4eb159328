"""From prompt, seed and settings to a picture, the same one on every machine of a kind."""
