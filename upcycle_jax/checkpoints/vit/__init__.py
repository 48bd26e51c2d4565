"""Vision transformers as the projects that train them with Flax store them: vit_jax, AugReg,
big_vision and V-MoE, in NumPy archives, in folders of zarr arrays, in V-MoE's own files, and in
Orbax trees.
"""
