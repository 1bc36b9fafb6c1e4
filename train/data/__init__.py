"""Training data: the sprite world, rendered on demand from seeds."""
