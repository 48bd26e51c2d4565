"""Multi-head attention of T5: no scaling by 1/sqrt(head_dim), positions only through an additive
bias.
"""

import enum
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import cpu_attention, projection
from upcycle_jax.partitioning import constrain

GROWING_CACHE, FIXED_CACHE = "growing_cache", "fixed_cache"
"""Variable collections of cached decoding: keys and values of self-attention, written at each step,
and of attention to the encoder, written at the first step only. All are `[batch, keys, heads,
head_dim]`.
"""


class Cached(enum.Enum):
    """Which keys and values an attention keeps between decoding steps."""

    GROWING = GROWING_CACHE
    FIXED = FIXED_CACHE


@flax.struct.dataclass
class DecodingStep:
    """One position of all sequences of a batch.

    Attributes:
      index: int32 scalar, the position, from 0.
      max_length: positions for which the caches have room.
    """

    index: jax.Array
    max_length: int = flax.struct.field(pytree_node=False)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    dropout: nn.Dropout | None = None,
    deterministic: bool = True,
    float32_logits: bool = True,
) -> jax.Array:
    """softmax(query key^T + bias) value, unscaled.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, heads, head_dim]`.
      value: `[batch, keys, heads, head_dim]`.
      bias: additive, broadcastable to `[batch, heads, queries, keys]`.
      dropout: applied to the attention probabilities.
      deterministic: no dropout.
      float32_logits: compute logits and softmax in float32 whatever the inputs' dtype.

    Returns:
      `[batch, queries, heads, head_dim]` in the value's dtype.
    """
    if float32_logits:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    drops = dropout is not None and dropout.rate > 0 and not deterministic
    if not drops and cpu_attention.is_faster(query, key, value):
        logits = cpu_attention.scores(query, key)
        logits = logits if bias is None else logits + bias.astype(logits.dtype)
        return cpu_attention.attended(logits, value)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights, deterministic=deterministic)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class MultiHeadDotProductAttention(nn.Module):
    """Attention with `query`, `key`, `value` and `out` projections, whose kernels are flattened to
    `[embed, heads * head_dim]`.

    Attributes:
      num_heads: heads.
      head_dim: size of a head.
      dropout_rate: dropout of attention probabilities, shared by all queries of a head.
      float32_logits: see `dot_product_attention`.
      dtype: dtype of the computation.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    float32_logits: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries_from: jax.Array,
        keys_from: jax.Array,
        bias: jax.Array | None = None,
        *,
        deterministic: bool = True,
        cached: Cached | None = None,
        step: DecodingStep | None = None,
    ) -> jax.Array:
        """Attends from `[batch, queries, d]` to `[batch, keys, d]`; returns `[batch, queries, d]`.

        Args:
          queries_from: the attending sequence.
          keys_from: the attended sequence.
          bias: sum of the position bias and the mask's bias.
          deterministic: no dropout.
          cached: with a step, which keys and values are kept. GROWING: `keys_from` is the token of
            this step, attended with all before it. FIXED: `keys_from` counts in the first step, and
            is not looked at later.
          step: the position to decode, or None without caches.
        """
        query = self._heads(
            "query", queries_from, _scaled(projection.ATTENTION_INIT, self.head_dim**-0.5)
        )
        if step is None or cached is None:
            key, value = self._keys_and_values(keys_from)
        elif cached == Cached.GROWING:
            key, value = self._appended(keys_from, step)
        else:
            key, value = self._kept(keys_from)
        attended = dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            dropout=projection.dropout(self.dropout_rate),
            deterministic=deterministic,
            float32_logits=self.float32_logits,
        )
        attended = attended.reshape(*attended.shape[:2], self.num_heads * self.head_dim)
        out = projection.Projection(
            queries_from.shape[-1],
            (axes.JOINED_KV, axes.EMBED),
            projection.ATTENTION_INIT,
            dtype=self.dtype,
            name="out",
        )
        return out(attended)

    def _keys_and_values(self, keys_from: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[batch, keys, heads, head_dim]`."""
        return self._heads("key", keys_from, projection.ATTENTION_INIT), self._heads(
            "value", keys_from, projection.ATTENTION_INIT
        )

    def _appended(self, keys_from: jax.Array, step: DecodingStep) -> tuple[jax.Array, jax.Array]:
        """All keys and values so far, those of `keys_from` `[batch, 1, d]` at the step's index,
        zeros after them.
        """
        out = []
        for name, new in zip(("key", "value"), self._keys_and_values(keys_from), strict=True):
            shape = (new.shape[0], step.max_length, *new.shape[2:])
            variable = self.variable(GROWING_CACHE, f"cached_{name}", jnp.zeros, shape, new.dtype)
            variable.value = jax.lax.dynamic_update_slice_in_dim(
                variable.value, new, step.index, axis=1
            )
            out.append(variable.value)
        return out[0], out[1]

    def _kept(self, keys_from: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the first step."""
        if not self.has_variable(FIXED_CACHE, "cached_key"):
            key, value = self._keys_and_values(keys_from)
            self.put_variable(FIXED_CACHE, "cached_key", key)
            self.put_variable(FIXED_CACHE, "cached_value", value)
        return self.get_variable(FIXED_CACHE, "cached_key"), self.get_variable(
            FIXED_CACHE, "cached_value"
        )

    def _heads(self, name: str, x: jax.Array, init: projection.Initializer) -> jax.Array:
        flat = projection.Projection(
            self.num_heads * self.head_dim,
            (axes.EMBED, axes.JOINED_KV),
            init,
            dtype=self.dtype,
            name=name,
        )(x)
        heads = flat.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return constrain(heads, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None))


def _scaled(init: projection.Initializer, factor: float) -> projection.Initializer:
    """An initialiser times a factor: T5 puts 1/sqrt(head_dim) into the query kernel at
    initialisation instead of into attention.
    """

    def scaled(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return init(key, shape, dtype) * factor

    return scaled
