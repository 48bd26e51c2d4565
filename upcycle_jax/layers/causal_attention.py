"""Causal self-attention of decoder-only language models: rotary positions, grouped queries,
windows.

Axis legend: B rows, L queries, M keys, H query heads, KV heads of keys and values, D size of a
head.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection
from upcycle_jax.layers.attention import GROWING_CACHE, DecodingStep
from upcycle_jax.layers.norm import RMSNorm
from upcycle_jax.layers.rope import rotate
from upcycle_jax.partitioning import constrain

Implementation = Literal["xla", "cudnn"]
"""Of `jax.nn.dot_product_attention`: 'cudnn' is a flash attention of NVIDIA GPUs, in 16 bits."""

_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def visible(
    queries: jax.Array, keys: jax.Array, window: int | None, mask: jax.Array | None = None
) -> jax.Array:
    """Bool `[1 or B, 1, L, M]`: the key is not after the query, and within the window.

    Args:
      queries: int `[L]`, indices of the queries.
      keys: int `[M]`, indices of the keys.
      window: keys that a query sees at most, its own included; None for all before it.
      mask: bool `[B, 1, L or 1, M]`, further conditions.
    """
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    return allowed[None, None] if mask is None else allowed[None, None] & mask


def capped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: nn.Dropout | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """softmax(cap(scale query key^T)) value, with cap(x) = softcap tanh(x / softcap); what
    `jax.nn.dot_product_attention` has no words for. Logits and softmax are float32.

    Args:
      query: `[B, L, H, D]`.
      key: `[B, M, KV, D]`.
      value: `[B, M, KV, D]`.
      mask: bool, broadcastable to `[B, 1, L, M]`.
      scale: factor of the logits.
      softcap: None for no cap.
      dropout: of the attention probabilities.
      deterministic: no dropout.

    Returns:
      `[B, L, H, D]` in the value's dtype.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Query head h reads the keys of head h // (H / KV).
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("blkgd,bmkd->bkglm", grouped.astype(jnp.float32), key.astype(jnp.float32))
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, None], logits, _FORBIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights, deterministic=deterministic)
    attended = jnp.einsum("bkglm,bmkd->blkgd", weights, value)
    return attended.reshape(rows, length, heads, head_dim)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with `query`, `key`, `value` and `out` projections, whose kernels are
    flattened to `[embed, heads * head_dim]`.

    Attributes:
      num_heads: H.
      num_kv_heads: KV, which divides H (Ainslie et al., arXiv 2305.13245).
      head_dim: D.
      scale: factor of the logits.
      window: keys that a query sees, its own included; None for all before it.
      qkv_bias: the projections to queries, keys and values have biases.
      out_bias: `out` has one.
      qk_norm: RMS norm of queries and keys: by 'head', of the whole 'projection', or None.
      qk_norm_plus_one: see `RMSNorm.plus_one`.
      norm_epsilon: of that norm.
      clip: queries, keys and values are clipped to plus and minus this; None: not.
      softcap: see `capped_attention`.
      dropout_rate: dropout of attention probabilities.
      implementation: see `Implementation`; of plain attention alone.
      dtype: dtype of the computation.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    qk_norm_plus_one: bool = False
    norm_epsilon: float = 1e-6
    clip: float | None = None
    softcap: float | None = None
    dropout_rate: float = 0.0
    implementation: Implementation = "xla"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | None,
        mask: jax.Array | None = None,
        *,
        amplitude: float = 1.0,
        deterministic: bool = True,
        step: DecodingStep | None = None,
    ) -> jax.Array:
        """Maps `[B, L, d]` to the same shape.

        Args:
          x: the sequence; with a step, its positions from `step.index` on.
          angles: float32 `[B or 1, L, R/2]` of the rotary embedding (`Rope.angles`); None: none.
          mask: bool `[B, 1, L or 1, M]`, pairs that are allowed beside the causal order.
          amplitude: `Rope.amplitude`.
          deterministic: no dropout.
          step: decode with a cache of keys and values; M is then `step.max_length`.
        """
        query = self._heads("query", x, self.num_heads)
        key = self._heads("key", x, self.num_kv_heads)
        value = self._heads("value", x, self.num_kv_heads, normed=False)
        if angles is not None:
            query, key = rotate(query, angles, amplitude), rotate(key, angles, amplitude)
        start: jax.Array | int = 0
        if step is not None:
            key, value = self._appended("key", key, step), self._appended("value", value, step)
            start = step.index
        attended = self._attend(query, key, value, mask, start, deterministic=deterministic)
        attended = attended.reshape(*x.shape[:2], self.num_heads * self.head_dim)
        out = projection.Projection(
            x.shape[-1],
            (axes.JOINED_KV, axes.EMBED),
            projection.ATTENTION_INIT,
            dtype=self.dtype,
            use_bias=self.out_bias,
            name="out",
        )
        return out(attended)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        start: jax.Array | int,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """`[B, L, H, D]`; `start` is the index of the first query among the keys."""
        drops = self.dropout_rate > 0 and not deterministic
        whole = query.shape[1] == key.shape[1]
        if whole and not drops and self.softcap is None:
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=self.scale,
                is_causal=True,
                local_window_size=None if self.window is None else (self.window - 1, 0),
                implementation=self.implementation,
            )
        queries = start + jnp.arange(query.shape[1])
        allowed = visible(queries, jnp.arange(key.shape[1]), self.window, mask)
        if not drops and self.softcap is None:
            return jax.nn.dot_product_attention(query, key, value, mask=allowed, scale=self.scale)
        return capped_attention(
            query,
            key,
            value,
            allowed,
            scale=self.scale,
            softcap=self.softcap,
            dropout=projection.dropout(self.dropout_rate) if drops else None,
            deterministic=deterministic,
        )

    def _appended(self, name: str, new: jax.Array, step: DecodingStep) -> jax.Array:
        """All keys or values so far `[B, M, KV, D]`: `new` `[B, L, KV, D]` from the step's index
        on, zeros after it.
        """
        shape = (new.shape[0], step.max_length, *new.shape[2:])
        variable = self.variable(GROWING_CACHE, f"cached_{name}", jnp.zeros, shape, new.dtype)
        variable.value = jax.lax.dynamic_update_slice_in_dim(
            variable.value, new, step.index, axis=1
        )
        return variable.value

    def _heads(self, name: str, x: jax.Array, heads: int, *, normed: bool = True) -> jax.Array:
        """`[B, L, heads, D]`, normed and clipped."""
        flat = projection.Projection(
            heads * self.head_dim,
            (axes.EMBED, axes.JOINED_KV),
            projection.ATTENTION_INIT,
            dtype=self.dtype,
            use_bias=self.qkv_bias,
            name=name,
        )(x)
        if normed and self.qk_norm == "projection":
            flat = self._norm(name, axes.JOINED_KV)(flat)
        if self.clip is not None:
            flat = jnp.clip(flat, -self.clip, self.clip)
        split = flat.reshape(*x.shape[:2], heads, self.head_dim)
        if normed and self.qk_norm == "head":
            split = self._norm(name, axes.UNMODELED)(split)
        return constrain(split, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None))

    def _norm(self, name: str, axis: str) -> RMSNorm:
        return RMSNorm(
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
            plus_one=self.qk_norm_plus_one,
            axis=axis,
            name=f"{name}_norm",
        )
