"""RMS norm and layer norm."""

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
      plus_one: scale by 1 + the parameter, which begins at 0 (Gemma), in float32.
      axis: logical axis of the parameter.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    plus_one: bool = False
    axis: str = axes.EMBED

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of `[..., d]`."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(
                nn.initializers.zeros if self.plus_one else nn.initializers.ones, (self.axis,)
            ),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if self.plus_one:
            return (y * (1.0 + jnp.asarray(scale))).astype(self.dtype)
        return y.astype(self.dtype) * jnp.asarray(scale, self.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias` (Ba et al., arXiv 1607.06450).

    Attributes:
      epsilon: added to the variance.
      dtype: dtype of the result; the norm itself is computed in float32.
      parametric: with `scale` and `bias`; without them OLMo 1 has it.
      axis: logical axis of the parameters.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    parametric: bool = True
    axis: str = axes.EMBED

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of `[..., d]`."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if self.parametric:
            y = y * self._vector("scale", nn.initializers.ones, x.shape[-1])
            y = y + self._vector("bias", nn.initializers.zeros, x.shape[-1])
        return y.astype(self.dtype)

    def _vector(self, name: str, init: Any, size: int) -> jax.Array:
        boxed = nn.with_logical_partitioning(init, (self.axis,))
        return jnp.asarray(self.param(name, boxed, (size,), jnp.float32))
