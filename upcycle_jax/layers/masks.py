"""Attention masks (bool, True where attention is allowed) and the additive bias made of them."""

import jax
import jax.numpy as jnp

MASKED = -1e10
"""Additive bias of a forbidden pair, T5X's value: finite, so that a row without any allowed key
stays finite.
"""


def padding_mask(query_valid: jax.Array, key_valid: jax.Array) -> jax.Array:
    """Bool `[batch, 1, queries, keys]`: both tokens are real.

    Args:
      query_valid: bool `[batch, queries]`.
      key_valid: bool `[batch, keys]`.
    """
    return query_valid[:, None, :, None] & key_valid[:, None, None, :]


def segment_mask(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Bool `[batch, 1, queries, keys]`: both tokens belong to the same packed example.

    Args:
      query_segments: int `[batch, queries]`.
      key_segments: int `[batch, keys]`.
    """
    return query_segments[:, None, :, None] == key_segments[:, None, None, :]


def causal_mask(length: int) -> jax.Array:
    """Bool `[1, 1, length, length]`: the key is not after the query."""
    index = jnp.arange(length)
    return (index[:, None] >= index[None, :])[None, None]


def t5x_decoder_positions(input_tokens: jax.Array) -> jax.Array:
    """Bool `[batch, length]`: positions whose states Flaxformer's decoder keeps; the others it
    zeroes.

    It looks at the decoder's inputs, since the id of padding is also the one that begins a
    sequence: a position is kept where its input is above 0, or the next position's is, or it is
    the first. In a row that is not packed that is one position more than there are targets: the
    one whose input is the last target.

    Args:
      input_tokens: int `[batch, length]`, the decoder's inputs.
    """
    real = input_tokens > 0
    next_real = jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    first = jnp.arange(input_tokens.shape[1]) == 0
    return real | next_real | first


def to_bias(mask: jax.Array) -> jax.Array:
    """Float32 additive bias of a bool mask: 0 where allowed, `MASKED` elsewhere."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)
