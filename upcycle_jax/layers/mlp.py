"""The (gated) MLP: the dense block of a transformer layer, and, lifted over an expert axis, the expert."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection
from upcycle_jax.partitioning import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class MlpBlock(nn.Module):
    """`(act_0(x wi_0) * act_1(x wi_1) * ...) wo`; with a single activation the input kernel is named `wi`, as in T5 1.0.

    Attributes:
      hidden: size of the hidden axis.
      activations: names from `ACTIVATIONS`, one per input kernel.
      hidden_axis: logical axis of the kernels' hidden dimension.
      activation_axes: logical axes of the hidden activations, for their sharding.
      dropout_rate: dropout of the hidden activations.
      dtype: dtype of the computation.
    """

    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    hidden_axis: str = axes.MLP
    activation_axes: tuple[str | None, ...] = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_MLP)
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps `[..., length, d]` to the same shape."""
        gates = []
        for i, name in enumerate(self.activations):
            kernel_name = "wi" if len(self.activations) == 1 else f"wi_{i}"
            y = projection.Projection(self.hidden, (axes.EMBED, self.hidden_axis), dtype=self.dtype, name=kernel_name)(x)
            gates.append(ACTIVATIONS[name](y))
        hidden = constrain(functools.reduce(jnp.multiply, gates), self.activation_axes)
        hidden = projection.dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return projection.Projection(x.shape[-1], (self.hidden_axis, axes.EMBED), dtype=self.dtype, name="wo")(hidden)
