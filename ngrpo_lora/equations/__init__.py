"""The paper's equations, and those of its baselines, as pure functions of tensors."""
