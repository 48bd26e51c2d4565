"""Optimizers, schedules, the pure train step, restoring, evaluation and the loop around them."""
