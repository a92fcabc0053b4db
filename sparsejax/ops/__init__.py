"""Floor 1: pure functions of arrays. No flax, no parameters."""
