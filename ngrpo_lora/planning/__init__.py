"""What a run will need, computed before any weights are loaded, and what is wrong with it before it starts."""
