"""RMS layer norm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes


class RMSNorm(nn.Module):
    """T5's layer norm: `x / sqrt(mean(x^2) + epsilon) * scale`, without mean subtraction or bias.

    Attributes:
      epsilon: added to the mean square.
      dtype: dtype of the result; the norm itself is computed in float32.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of `[..., d]`."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return y.astype(self.dtype) * jnp.asarray(scale, self.dtype)
