"""Linear projections with flattened kernels, dropout, and the initialisers of T5X's models."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax.partitioning import active_platform

Initializer = Callable[..., jax.Array]

ATTENTION_INIT: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
MLP_INIT: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Projection(nn.Module):
    """`x @ kernel`, plus a bias where there is one.

    Attributes:
      features: size of the output's last axis.
      kernel_axes: logical axes of the kernel `[input features, features]`.
      kernel_init: initialiser of the float32 kernel.
      dtype: dtype of the product; inputs and parameters are cast to it.
      use_bias: adds the float32 parameter `bias` `[features]`, which starts at zero.
    """

    features: int
    kernel_axes: tuple[str, str]
    kernel_init: Initializer = MLP_INIT
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., input features]` to `[..., features]`."""
        init = nn.with_logical_partitioning(self.kernel_init, self.kernel_axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        product = dot(x.astype(self.dtype), jnp.asarray(kernel, self.dtype))
        if not self.use_bias:
            return product
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.kernel_axes[1:])
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return product + jnp.asarray(bias, self.dtype)


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[..., d]` times `[d, f]`: `[..., f]`; where the program will run on CPUs, as a product of
    two matrices.

    The gradient of the kernel then contracts one axis. With several, XLA for CPUs writes transposed
    copies of both factors first, and computes again, transposed, what they are computed from: twice
    the time of an MLP's forward and backward pass (docs/benchmarks.md). XLA for TPUs is better left
    alone: the reshapes cost the train step of T5 1.1 base upcycled 0.8 GiB per device.
    """
    if active_platform() != "cpu":
        return jnp.dot(x, kernel)
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def sums(x: jax.Array) -> jax.Array:
    """Sums over the last axis of float32 `[..., d]`: `[...]`; where the program will run on CPUs,
    as a product with ones.

    XLA's reduction for CPUs waits for threads that other products need at that time, and those wait
    for it (docs/benchmarks.md).
    """
    if active_platform() != "cpu":
        return jnp.sum(x, axis=-1)
    return jnp.dot(x.reshape(-1, x.shape[-1]), jnp.ones((x.shape[-1], 1), x.dtype)).reshape(
        x.shape[:-1]
    )


def dropout(rate: float, *, broadcast: Sequence[int] = (-2,)) -> nn.Dropout:
    """Dropout whose mask is shared along the length axis, as in T5: a hidden unit is dropped for a
    whole sequence or not at all.
    """
    return nn.Dropout(rate=rate, broadcast_dims=tuple(broadcast))
