"""Attention without a mask, as vision transformers have it: scaled, with biases everywhere.

Axis legend: B images, L queries, M keys, H heads, D size of a head, d width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import cpu_attention, projection
from upcycle_jax.partitioning import constrain

XAVIER: projection.Initializer = nn.initializers.xavier_uniform()


class FullAttention(nn.Module):
    """softmax(query key^T / sqrt(D)) value, with `query`, `key`, `value` and `out` projections,
    whose kernels are flattened to `[d, H * D]`.

    Attributes:
      num_heads: H.
      dtype: dtype of the computation.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, queries_from: jax.Array, keys_from: jax.Array) -> jax.Array:
        """Attends from `[B, L, d]` to `[B, M, d]`; returns `[B, L, d]`."""
        width = queries_from.shape[-1]
        query = self._heads("query", queries_from)
        key, value = self._heads("key", keys_from), self._heads("value", keys_from)
        attended = _attention(query, key, value)
        out = projection.Projection(
            width,
            (axes.JOINED_KV, axes.EMBED),
            XAVIER,
            dtype=self.dtype,
            use_bias=True,
            name="out",
        )
        return out(attended.reshape(*attended.shape[:2], width))

    def _heads(self, name: str, x: jax.Array) -> jax.Array:
        """`[B, L, H, D]`."""
        width = x.shape[-1]
        flat = projection.Projection(
            width,
            (axes.EMBED, axes.JOINED_KV),
            XAVIER,
            dtype=self.dtype,
            use_bias=True,
            name=name,
        )(x)
        heads = flat.reshape(*x.shape[:2], self.num_heads, width // self.num_heads)
        return constrain(heads, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None))


def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(query key^T / sqrt(D)) value, `[B, L, H, D]`."""
    if not cpu_attention.is_faster(query, key, value):
        return jax.nn.dot_product_attention(query, key, value)
    logits = cpu_attention.scores(query, key) * query.shape[-1] ** -0.5
    return cpu_attention.attended(logits, value)
