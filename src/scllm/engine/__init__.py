"""Floor 3: running models."""
