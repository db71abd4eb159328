"""What a run leaves on disk: metrics, scores, and checkpoints and pictures that are written whole or not at all."""
