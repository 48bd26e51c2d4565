"""Sparse upcycling of dense checkpoints into Mixture-of-Experts models, in the shape of T5X."""

__version__ = "0.1.0"
