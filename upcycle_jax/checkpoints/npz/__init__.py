"""Vision transformers in NumPy archives: vit_jax, AugReg, big_vision and V-MoE."""

from upcycle_jax.checkpoints.npz.reader import NpzReader

__all__ = ["NpzReader"]
