"""Hugging Face folders, config.json with safetensors files: read as if they were checkpoints of
ours, and written (`writer`). What a model's tensors mean, one folder per family knows (`families`).
"""

from upcycle_jax.checkpoints.huggingface.reader import HuggingFaceReader

__all__ = ["HuggingFaceReader"]
