"""Algorithm 1: `trainer.py` is the loop, and each of its lines a file of this room."""
