"""T5's relative position bias."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import axes
from upcycle_jax.layers import masks
from upcycle_jax.partitioning import active_platform


def relative_position_bucket(
    relative_position: jax.Array | np.ndarray,
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> jax.Array:
    """Bucket of each relative position.

    Half of the buckets hold one distance each; the rest grow logarithmically up to `max_distance`,
    and the last holds everything beyond. Bidirectional stacks give one half of all buckets to keys
    after the query; causal stacks map all of those to bucket 0.

    Args:
      relative_position: int array of key position minus query position.
      bidirectional: whether keys after the query are attended to.
      num_buckets: total number of buckets.
      max_distance: distance from which on all positions share the last bucket.

    Returns:
      int32 array of the same shape, in `[0, num_buckets)`.
    """
    distance = -jnp.asarray(relative_position, jnp.int32)
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance < 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    num_exact = num_buckets // 2
    # epsilon keeps the logarithm finite where the exact branch is taken anyway.
    ratio = distance.astype(jnp.float32) / num_exact + np.finfo(np.float32).eps
    growth = jnp.log(ratio) / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    coarse = jnp.minimum(num_exact + growth.astype(jnp.int32), num_buckets - 1)
    return offset + jnp.where(distance < num_exact, distance, coarse)


class RelativePositionBiases(nn.Module):
    """A learned bias per head and bucket of relative positions, added to attention logits; shared
    by the layers of a stack.

    Attributes:
      num_heads: attention heads.
      num_buckets: buckets of relative positions.
      max_distance: distance from which on all positions share the last bucket.
      dtype: dtype of the bias.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query_positions: jax.Array, key_positions: jax.Array, *, bidirectional: bool
    ) -> jax.Array:
        """Bias `[1, heads, queries, keys]` for int positions `[queries]` and `[keys]`."""
        init = nn.with_logical_partitioning(
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (axes.HEADS, axes.RELPOS_BUCKETS),
        )
        table = self.param("rel_embedding", init, (self.num_heads, self.num_buckets), jnp.float32)
        buckets = relative_position_bucket(
            key_positions[None, :] - query_positions[:, None],
            bidirectional=bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        # A product with one-hot rows instead of a lookup: its gradient is a matmul, not a scatter
        # of queries x keys rows into 32.
        one_hot = jax.nn.one_hot(buckets, self.num_buckets, dtype=self.dtype)
        return jnp.einsum(
            "hb,qkb->hqk",
            jnp.asarray(table, self.dtype),
            one_hot,
            precision=jax.lax.Precision.HIGHEST,
        )[None]


def with_mask(position_bias: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of both biases, float32 `[batch, heads, queries, keys]`.

    Args:
      position_bias: `[1, heads, queries, keys]`.
      mask: bool `[batch, 1, queries, keys]`, True where attention is allowed.
    """
    bias = masks.to_bias(mask)
    if active_platform() != "cpu":
        return position_bias + bias
    return _repeated(position_bias.astype(bias.dtype), mask.shape[0]) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeated(x: jax.Array, rows: int) -> jax.Array:
    """`[1, ...]` to `[rows, ...]`. The gradient is summed by a product with ones: XLA's reduction
    for CPUs took a third of a small model's train step (docs/benchmarks.md).
    """
    return jnp.broadcast_to(x, (rows, *x.shape[1:]))


def _repeated_forward(x: jax.Array, rows: int) -> tuple[jax.Array, None]:
    return _repeated(x, rows), None


def _repeated_backward(rows: int, _: None, grad: jax.Array) -> tuple[jax.Array]:
    ones = jnp.ones(rows, grad.dtype)
    return (jax.lax.dot_general(ones, grad, (((0,), (0,)), ((), ())))[None],)


_repeated.defvjp(_repeated_forward, _repeated_backward)
