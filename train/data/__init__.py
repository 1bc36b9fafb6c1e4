"""Training data: the sprite world, made on the fly from seeds."""
