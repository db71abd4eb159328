"""What a run will need, foretold before any weights are loaded, and what is wrong with it before it starts."""
