"""Causal self-attention of decoder-only language models: rotary positions, grouped queries,
windows, and caches of keys and values.

Axis legend: B rows, L queries, M keys, H query heads, KV heads of keys and values, D size of a
head, C places of a cache.
"""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import cpu_attention, projection
from upcycle_jax.layers.attention import GROWING_CACHE
from upcycle_jax.layers.norm import RMSNorm
from upcycle_jax.layers.rope import rotate
from upcycle_jax.partitioning import constrain

Implementation = Literal["xla", "cudnn"]
"""Of `jax.nn.dot_product_attention`: 'cudnn' is a flash attention of NVIDIA GPUs, in 16 bits."""


@flax.struct.dataclass
class Prefill:
    """The first positions of all sequences of a batch, which begin the caches.

    Attributes:
      room: positions of a row, those to come included.
    """

    room: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class NextPosition:
    """One more position of all sequences of a batch, which end side by side.

    Attributes:
      index: int32 scalar, the position's index in the rows, from 0.
      starts: int32 `[B]`, index of the first token of each sequence; before it stands padding.
      room: as of `Prefill`.
    """

    index: jax.Array
    starts: jax.Array
    room: int = flax.struct.field(pytree_node=False)


CachedStep = Prefill | NextPosition
"""What cached decoding computes at once."""

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


def masked_logits(
    logits: jax.Array, mask: jax.Array, *, scale: float, softcap: float | None
) -> jax.Array:
    """cap(scale logits) where bool `mask` allows it, else a number whose softmax is zero."""
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(mask, logits, _FORBIDDEN)


def attention_weights(
    logits: jax.Array, mask: jax.Array, *, scale: float, softcap: float | None
) -> jax.Array:
    """softmax(cap(scale logits)) over the last axis, of what bool `mask` allows; float32."""
    return jax.nn.softmax(masked_logits(logits, mask, scale=scale, softcap=softcap), axis=-1)


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
    drops = dropout is not None and dropout.rate > 0 and not deterministic
    if not drops and cpu_attention.is_faster(query, key, value):
        # The H / KV heads that read the same keys, one after the other: [B, H / KV * L, KV, D].
        stacked = grouped.transpose(0, 3, 1, 2, 4).reshape(rows, -1, kv_heads, head_dim)
        logits = cpu_attention.scores(stacked, key)  # [B, KV, H / KV * L, M]
        by_head = logits.reshape(rows, heads, length, -1)
        by_head = masked_logits(by_head, mask, scale=scale, softcap=softcap)
        attended = cpu_attention.attended(by_head.reshape(logits.shape), value)
        attended = attended.reshape(rows, -1, length, kv_heads, head_dim)
        return attended.transpose(0, 2, 3, 1, 4).reshape(rows, length, heads, head_dim)
    logits = jnp.einsum("blkgd,bmkd->bkglm", grouped.astype(jnp.float32), key.astype(jnp.float32))
    weights = attention_weights(logits, mask[:, :, None], scale=scale, softcap=softcap)
    weights = weights.astype(value.dtype)
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
        step: CachedStep | None = None,
    ) -> jax.Array:
        """Maps `[B, L, d]` to the same shape.

        Args:
          x: the sequence; with a `NextPosition` that position alone.
          angles: float32 `[B or 1, L, R/2]` of the rotary embedding (`Rope.angles`); None: none.
          mask: bool `[B, 1, L or 1, L]`, pairs that are allowed beside the causal order; not looked
            at with a `NextPosition`, which says it itself.
          amplitude: `Rope.amplitude`.
          deterministic: no dropout.
          step: decode with a cache of keys and values; None: without.
        """
        query = self._heads("query", x, self.num_heads)
        key = self._heads("key", x, self.num_kv_heads)
        value = self._heads("value", x, self.num_kv_heads, normed=False)
        if angles is not None:
            query, key = rotate(query, angles, amplitude), rotate(key, angles, amplitude)
        if isinstance(step, NextPosition):
            key, value = self._appended("key", key, step), self._appended("value", value, step)
            attended = self._attend_cached(query, key, value, step)
        else:
            if step is not None:
                self._keep("key", key, step)
                self._keep("value", value, step)
            attended = self._attend(query, key, value, mask, deterministic=deterministic)
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
        *,
        deterministic: bool,
    ) -> jax.Array:
        """`[B, L, H, D]`, of queries and keys of the same positions."""
        drops = self.dropout_rate > 0 and not deterministic
        plain = not drops and self.softcap is None
        by_hand = self.implementation == "xla" and cpu_attention.is_faster(query, key, value)
        if plain and not by_hand:
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
        index = jnp.arange(query.shape[1])
        return capped_attention(
            query,
            key,
            value,
            visible(index, index, self.window, mask),
            scale=self.scale,
            softcap=self.softcap,
            dropout=projection.dropout(self.dropout_rate) if drops else None,
            deterministic=deterministic,
        )

    def _attend_cached(
        self, query: jax.Array, key: jax.Array, value: jax.Array, step: NextPosition
    ) -> jax.Array:
        """`[B, 1, H, D]`, of one query `[B, 1, H, D]` and the places of a cache `[B, KV, C, D]`."""
        rows, kv_heads, places, head_dim = key.shape
        # The index that a place holds: the last one up to the query's that belongs there. A
        # sliding layer has places for its window alone, and so all of them are in it.
        index = step.index - (step.index - jnp.arange(places)) % places  # [C], < 0: none yet
        held = index >= step.starts[:, None]  # [B, C]
        # Query head h reads the keys of head h // (H / KV).
        grouped = query.reshape(rows, kv_heads, self.num_heads // kv_heads, head_dim)
        logits = jnp.einsum("bkgd,bkcd->bkgc", grouped, key, preferred_element_type=jnp.float32)
        weights = attention_weights(
            logits, held[:, None, None], scale=self.scale, softcap=self.softcap
        )
        attended = jnp.einsum("bkgc,bkcd->bkgd", weights.astype(value.dtype), value)
        return attended.reshape(query.shape)

    def _keep(self, name: str, new: jax.Array, step: Prefill) -> None:
        """Begins a cache with the keys or values `[B, L, KV, D]` of the first L indices: index i in
        place i modulo the places; of a sliding layer the last ones, as many as its window.
        """
        length = new.shape[1]
        places = step.room if self.window is None else min(self.window, step.room)
        last = new[:, max(length - places, 0) :].swapaxes(1, 2)  # [B, KV, at most C, D]
        kept = jnp.pad(last, ((0, 0), (0, 0), (0, places - last.shape[2]), (0, 0)))
        if length > places:
            kept = jnp.roll(kept, length % places, axis=2)
        self.put_variable(GROWING_CACHE, f"cached_{name}", kept)

    def _appended(self, name: str, new: jax.Array, step: NextPosition) -> jax.Array:
        """The cache `[B, KV, C, D]` with the step's key or value `[B, 1, KV, D]` in its place."""
        cached: jax.Array = self.get_variable(GROWING_CACHE, f"cached_{name}")
        place = step.index % cached.shape[2]
        cached = jax.lax.dynamic_update_slice_in_dim(cached, new.swapaxes(1, 2), place, axis=2)
        self.put_variable(GROWING_CACHE, f"cached_{name}", cached)
        return cached

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
