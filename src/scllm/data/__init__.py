"""Floor 1: cells and tokens, without torch."""
