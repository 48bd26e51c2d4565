"""Do the copies diverge? How alike the experts of a layer are, from their kernels."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from upcycle_jax import trees
from upcycle_jax.models import layer_names
from upcycle_jax.models.metrics import Mean, Metrics
from upcycle_jax.trees import LeafSpec, Role
from upcycle_jax.types import PyTree

_TINY = 1e-30


def mean_pairwise_cosine(kernel: jax.Array) -> jax.Array:
    """Mean cosine between all pairs of different experts of a kernel `[E, ...]`, float32 scalar; 1
    for copies, about 0 for unrelated ones.

    With u_e the kernels at length 1, the sum over all pairs is |sum_e u_e|^2 - E. No pair is ever
    formed: where experts are spread over devices, what crosses them is one sum of the size of a
    single expert, and E lengths.
    """
    num_experts = kernel.shape[0]
    kernel = kernel.astype(jnp.float32)
    axes = tuple(range(1, kernel.ndim))
    lengths = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=axes, keepdims=True))
    total = jnp.sum(kernel / jnp.maximum(lengths, _TINY), axis=0)
    nonzero = jnp.sum(lengths > _TINY, dtype=jnp.float32)
    return (jnp.sum(jnp.square(total)) - nonzero) / (num_experts * (num_experts - 1))


def metrics(params: PyTree, specs: Mapping[str, LeafSpec]) -> Metrics:
    """`experts/<layer>/similarity` of every MoE layer: the mean over the kernels of its experts;
    nothing for layers of one expert.

    Args:
      params: parameters, nested.
      specs: of the parameters, by path.
    """
    kernels: dict[str, list[jax.Array]] = {}
    flat: Mapping[str, jax.Array] = trees.flatten(params)
    for path, kernel in flat.items():
        place = layer_names.split(path)
        is_kernel = specs[path].role is Role.EXPERT and kernel.ndim > 2  # Biases say little.
        if place is not None and is_kernel and kernel.shape[0] > 1:
            kernels.setdefault(place.layer, []).append(kernel)
    one = jnp.ones((), jnp.float32)
    return {
        f"experts/{layer}/similarity": Mean(
            jnp.mean(jnp.stack([mean_pairwise_cosine(kernel) for kernel in parts])), one
        )
        for layer, parts in kernels.items()
    }
