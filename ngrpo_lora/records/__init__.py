"""What a run leaves on disk, each file written whole or not at all."""
