"""Token embedding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection


class Embed(nn.Module):
    """Token embedding.

    Attributes:
      vocab_size: rows of the table.
      features: columns of the table.
      dtype: dtype of the vectors.
      stddev: of the normal distribution that the table is drawn from.
    """

    vocab_size: int
    features: int
    dtype: Any = jnp.float32
    stddev: float = 1.0

    def setup(self) -> None:
        init = nn.with_logical_partitioning(
            nn.initializers.normal(self.stddev), (axes.VOCAB, axes.EMBED)
        )
        self.embedding = self.param(
            "embedding", init, (self.vocab_size, self.features), jnp.float32
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Vectors `[..., features]` of int32 tokens `[...]`. A token outside the vocabulary gives
        NaN, not a neighbour's vector.
        """
        return jnp.take(jnp.asarray(self.embedding, self.dtype), tokens, axis=0, mode="fill")

    def attend(self, x: jax.Array) -> jax.Array:
        """Float32 logits `[..., vocab_size]` of `[..., features]`, for models whose output shares
        the table.
        """
        return projection.dot(x.astype(jnp.float32), jnp.asarray(self.embedding, jnp.float32).T)
