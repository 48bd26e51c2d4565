"""GGUF files, as llama.cpp and its tools write them, read as if they were checkpoints of ours."""

from upcycle_jax.checkpoints.gguf.reader import GgufReader

__all__ = ["GgufReader"]
