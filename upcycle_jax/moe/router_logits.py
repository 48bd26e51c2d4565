"""The parameters of a router, and its logits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers.projection import Projection


class RouterLogits(nn.Module):
    """The router's kernel `router_weights/w/kernel [d, columns]`, N(0, 0.02), without a bias in the
    logits; and a separate bias for the selection of experts.

    Attributes:
      columns: E for most routers, see `Router.logit_columns`; without columns there is no kernel.
      biased_experts: E for routers with a `Router.balance_rate`, which have a parameter `bias`
        `[E]`; 0 for the others.
    """

    columns: int
    biased_experts: int = 0

    def setup(self) -> None:
        if self.columns:
            self.router_weights = _RouterWeights(self.columns)
        if self.biased_experts:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (axes.UNMODELED,))
            bias: Any = self.param("bias", init, (self.biased_experts,), jnp.float32)
            self.bias = bias

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Float32 logits `[..., columns]` of `[..., d]`.

        Inputs are cast to float32 before the product: rounding router logits to bfloat16 makes
        training unstable (Switch Transformer, section 2.4, "selective precision").
        """
        if not self.columns:
            return jnp.zeros((*tokens.shape[:-1], 0), jnp.float32)
        return self.router_weights(tokens.astype(jnp.float32))

    def selection_bias(self) -> jax.Array | None:
        """Float32 `[E]`, or None; no gradient reaches it."""
        return jax.lax.stop_gradient(self.bias) if self.biased_experts else None


class _RouterWeights(nn.Module):
    """Gives the kernel its place in T5X's parameter tree."""

    columns: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return Projection(
            self.columns, (axes.EMBED, axes.UNMODELED), init, dtype=jnp.float32, name="w"
        )(tokens)
