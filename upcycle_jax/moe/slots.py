"""Every expert's MLP on the slots of that expert: all at once, or, on a CPU, one after the other.

Axis legend: G groups, E experts, C slots per expert and group, d and f sizes of matrices.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.partitioning import EXPERT, active_mesh_shape, active_platform

LARGE = 2**17
"""Elements of an expert's matrix from which on a loop is worth its iterations: 0.5 MiB of float32, what a core's caches hold."""


def init_experts(expert: MlpBlock, inputs: jax.Array, *, num_experts: int) -> jax.Array:
    """Makes the parameters of E experts, those of one with a leading E, and applies them: `[G, E, C, d]` to the same shape."""
    lifted = nn.vmap(
        lambda expert, x: expert(x),
        in_axes=1,
        out_axes=1,
        axis_size=num_experts,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: axes.EXPERT},
    )
    return lifted(expert, inputs)


def apply_experts(expert: MlpBlock, params: Any, inputs: jax.Array, *, dropout_key: jax.Array | None) -> jax.Array:
    """Outputs `[G, E, C, d]` of `[G, E, C, d]`: expert e on row e.

    Args:
      expert: one expert, without parameters of its own.
      params: theirs, with a leading E.
      inputs: the slots.
      dropout_key: of all experts' dropout; None for none.
    """
    keys = None if dropout_key is None else jax.random.split(dropout_key, inputs.shape[1])

    def one(params: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return expert.apply({"params": params}, x, key is None, rngs={} if key is None else {"dropout": key})  # type: ignore[return-value]

    if not loops(inputs.shape[-1] * expert.hidden):
        return jax.vmap(one, in_axes=(0, 1, None if keys is None else 0), out_axes=1)(params, inputs, keys)
    # The backward pass has the products of the forward pass at hand and computes activations again: that costs less than to store and load
    # them.
    kept = jax.checkpoint(one, policy=jax.checkpoint_policies.checkpoint_dots, prevent_cse=False)
    outputs = jax.lax.map(lambda of_one: kept(*of_one), (params, jnp.moveaxis(inputs, 1, 0), keys))
    return jnp.moveaxis(outputs, 0, 1)


def loops(matrix_size: int) -> bool:
    """Whether experts with matrices of so many elements are applied one by one where the program will run: on CPUs, unless experts are
    split over devices. An expert's matrices and activations then stay in cache from one product to the next, where products of all
    experts write and read all activations (docs/benchmarks.md). An accelerator needs the large product."""
    return matrix_size >= LARGE and active_platform() == "cpu" and active_mesh_shape().get(EXPERT, 1) == 1
