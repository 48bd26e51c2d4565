"""Images as sequences of patches.

Axis legend: B images, P patches along a side, N = P * P patches, p side of a patch, c channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection


def patches(images: jax.Array, size: int) -> jax.Array:
    """`[B, N, size * size * c]` of `[B, P * size, P * size, c]`, row by row; a patch is flattened
    row by row, too.
    """
    rows, height, width, channels = images.shape
    grid = images.reshape(rows, height // size, size, width // size, size, channels)
    # [B, P, p, P, p, c] -> [B, P, P, p, p, c]
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, size * size * channels)


class PatchEmbed(nn.Module):
    """A linear map of every patch: a convolution whose stride is its size.

    Attributes:
      patch_size: p.
      features: d.
      use_bias: add a bias.
      dtype: dtype of the computation.
    """

    patch_size: int
    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, N, d]` of `[B, height, width, c]`. The kernel is `[p, p, c, d]`, as that of the
        convolution.
        """
        p, channels = self.patch_size, images.shape[-1]
        init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (None, None, None, axes.EMBED)
        )
        kernel = self.param("kernel", init, (p, p, channels, self.features), jnp.float32)
        flat = jnp.asarray(kernel, self.dtype).reshape(-1, self.features)
        x = projection.dot(patches(images.astype(self.dtype), p), flat)
        if not self.use_bias:
            return x
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED,))
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return x + jnp.asarray(bias, self.dtype)
