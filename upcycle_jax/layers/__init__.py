"""T5 1.1 bricks in Flax Linen. Parameters are float32, carry logical axes and keep T5X's names."""
