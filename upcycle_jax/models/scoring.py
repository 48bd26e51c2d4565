"""Log-probabilities of given targets, a few positions at a time: the logits of all positions, with
a large vocabulary, would be by far the largest array of a program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MOST_LOGITS = 2**26
"""Logits that are held at once, of one position of every row at least: 256 MiB of them."""


def summed_log_probabilities(
    logits_of: Callable[..., Any],
    given: tuple[jax.Array, ...],
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
) -> jax.Array:
    """The log-probability of each row's targets, summed over its positions.

    Args:
      logits_of: makes float32 logits `[B, l, V]` of l positions of arrays `given`; each position's
        depend on that position alone.
      given: arrays `[B, L, ...]`, such as the residual stream after the last layer.
      targets: int32 `[B, L]`.
      weights: float32 `[B, L]`, of each position in the sum.
      vocab_size: V.

    Returns:
      Float32 `[B]`.
    """
    batch, length = targets.shape

    def summed(part: tuple[jax.Array, ...]) -> jax.Array:
        *given, targets, weights = part
        logits = logits_of(*given)  # [B, l, V]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((chosen - jax.nn.logsumexp(logits, axis=-1)) * weights, axis=-1)

    most = max(1, MOST_LOGITS // (batch * vocab_size))
    count = -(-length // most)
    if count == 1:
        return summed((*given, targets, weights))
    at_once = -(-length // count)

    def split(leaf: jax.Array) -> jax.Array:
        """`[B, L, ...]` to `[count, B, at_once, ...]`, filled with zeros, whose weight is 0."""
        filling = [(0, 0)] * leaf.ndim
        filling[1] = (0, count * at_once - length)
        filled = jnp.pad(leaf, filling)
        return jnp.moveaxis(filled.reshape(batch, count, at_once, *leaf.shape[2:]), 1, 0)

    parts = tuple(split(leaf) for leaf in (*given, targets, weights))
    return jnp.sum(jax.lax.map(summed, parts), axis=0)
