"""How the bias that balances experts without a loss (arXiv 2408.15664) moves after a step."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def moved(bias: jax.Array, chosen: jax.Array, *, rate: float) -> jax.Array:
    """The bias `[E]` after a step. It moves by `rate`: up for experts that were chosen less often
    than the mean, down for those that were chosen more often.

    Args:
      bias: float32 `[E]`, before the step.
      chosen: float32 `[E]`, how many tokens of the step's whole batch chose each expert: exact
        integers, so that the sign does not depend on how the batch was divided.
      rate: see `Router.balance_rate`.
    """
    counts = chosen.astype(jnp.int32)
    return bias + rate * jnp.sign(jnp.sum(counts) - counts.size * counts).astype(bias.dtype)


def with_moved_biases(
    params: Mapping[str, jax.Array],
    before: Mapping[str, jax.Array],
    chosen: Mapping[str, jax.Array],
    rates: Mapping[str, float],
    paths: Mapping[str, str],
) -> dict[str, jax.Array]:
    """Parameters whose selection biases are moved from their values before the step. What the
    optimizer did to these is discarded.

    Args:
      params: by path, after the optimizer.
      before: by path, before it.
      chosen: by layer, see `moved`.
      rates: by layer, of the layers that have a bias.
      paths: of the biases, by layer.
    """
    biases = {
        paths[layer]: moved(before[paths[layer]], chosen[layer], rate=rate)
        for layer, rate in rates.items()
    }
    return {**params, **biases}
