"""Hugging Face T5 folders: which files count, what config.json states, where tensors belong, and
the reader.
"""

from upcycle_jax.checkpoints.huggingface.reader import HuggingFaceReader

__all__ = ["HuggingFaceReader"]
