"""Every expert's MLP on the slots of that expert: all at once, or, on a CPU, one after the other.

Axis legend: G groups, E experts, C slots per expert and group, d and f sizes of matrices.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers.mlp import MlpBlock, gated, input_kernel_names
from upcycle_jax.partitioning import EXPERT, active_mesh_shape, active_platform

LARGE = 2**17
"""Elements of an expert's matrix from which on a loop is worth its iterations: 0.5 MiB of float32, what a core's caches hold."""


@flax.struct.dataclass
class _Saved:
    """What the backward pass of a loop needs.

    Attributes:
      kernels: `MlpBlock`'s, `[E, ., .]`.
      rows: slots, `[E, N, d]`.
      products: of rows with the input kernels, each `[E, N, f]`.
      scale: of hidden units, `[E, G, 1, f]`.
    """

    kernels: dict[str, jax.Array]
    rows: jax.Array
    products: tuple[jax.Array, ...]
    scale: jax.Array | None


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


def apply_experts(expert: MlpBlock, params: Any, inputs: jax.Array, *, hidden_scale: jax.Array | None = None) -> jax.Array:
    """Outputs `[G, E, C, d]` of `[G, E, C, d]`: expert e on row e.

    Args:
      expert: one expert, without parameters of its own and without dropout.
      params: theirs, with a leading E.
      inputs: the slots.
      hidden_scale: `[G, E, 1, f]`, factor on the hidden units of each expert (dropout); None for none.
    """
    if loops(inputs.shape[-1] * expert.hidden):
        kernels = {name: leaf["kernel"] for name, leaf in params.items()}
        return _one_by_one(expert.activations, jnp.dtype(expert.dtype), kernels, inputs.astype(expert.dtype), hidden_scale)

    def one(params: Any, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        return expert.apply({"params": params}, x, hidden_scale=scale)  # type: ignore[return-value]

    return jax.vmap(one, in_axes=(0, 1, None if hidden_scale is None else 1), out_axes=1)(params, inputs, hidden_scale)


def loops(matrix_size: int) -> bool:
    """Whether experts with matrices of so many elements are applied one by one where the program will run: on CPUs, unless experts are
    split over devices. An expert's matrices and activations then stay in cache from one product to the next, where products of all
    experts write and read all activations (docs/benchmarks.md). An accelerator needs the large product."""
    return matrix_size >= LARGE and active_platform() == "cpu" and active_mesh_shape().get(EXPERT, 1) == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one_by_one(
    activations: tuple[str, ...], dtype: Any, kernels: dict[str, jax.Array], inputs: jax.Array, hidden_scale: jax.Array | None
) -> jax.Array:
    """`apply_experts` in a loop over experts, differentiated by hand: what to keep and what to compute again decides its speed."""
    return _one_by_one_forward(activations, dtype, kernels, inputs, hidden_scale)[0]


def _one_by_one_forward(
    activations: tuple[str, ...], dtype: Any, kernels: dict[str, jax.Array], inputs: jax.Array, hidden_scale: jax.Array | None
) -> tuple[jax.Array, _Saved]:
    def one(of_one: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        kernels, x, scale = of_one
        products = tuple(x @ kernels[name].astype(dtype) for name in input_kernel_names(activations))
        return _hidden(products, scale, activations) @ kernels["wo"].astype(dtype), products

    rows, scale = _rows(inputs), None if hidden_scale is None else jnp.moveaxis(hidden_scale, 1, 0)
    outputs, products = jax.lax.map(one, (kernels, rows, scale))
    return _slots(outputs, inputs.shape), _Saved(kernels, rows, products, scale)


def _one_by_one_backward(activations: tuple[str, ...], dtype: Any, saved: _Saved, grad: jax.Array) -> tuple[Any, jax.Array, None]:
    """Activations are computed again, which costs less than to store and load them. The kernels' gradients are made behind the loop:
    inside it, memory for E matrices would be cleared first and every matrix copied there."""
    names = input_kernel_names(activations)

    def one(of_one: Any) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        kernels, products, scale, grad = of_one
        hidden, pull = jax.vjp(lambda products: _hidden(products, scale, activations), products)
        (of_products,) = pull(grad @ kernels["wo"].astype(dtype).T)
        of_x = sum(g @ kernels[name].astype(dtype).T for name, g in zip(names, of_products, strict=True))
        return of_x, of_products, hidden

    def of_kernel(name: str, left: jax.Array, right: jax.Array) -> jax.Array:
        product = jnp.einsum("ena,enb->eab", left, right, preferred_element_type=jnp.float32)
        return product.astype(saved.kernels[name].dtype)

    shape = grad.shape
    grad = _rows(grad)
    of_rows, of_products, hidden = jax.lax.map(one, (saved.kernels, saved.products, saved.scale, grad))
    of_kernels = {name: of_kernel(name, saved.rows, g) for name, g in zip(names, of_products, strict=True)}
    return of_kernels | {"wo": of_kernel("wo", hidden, grad)}, _slots(of_rows, shape), None


_one_by_one.defvjp(_one_by_one_forward, _one_by_one_backward)


def _hidden(products: Sequence[jax.Array], scale: jax.Array | None, activations: Sequence[str]) -> jax.Array:
    """Hidden activations `[N, f]` of one expert; `scale` is `[G, 1, f]`."""
    hidden = gated(products, activations)
    if scale is None:
        return hidden
    return (hidden.reshape(scale.shape[0], -1, hidden.shape[-1]) * scale.astype(hidden.dtype)).reshape(hidden.shape)


def _rows(slots: jax.Array) -> jax.Array:
    """`[G, E, C, d]` as `[E, G * C, d]`."""
    return jnp.moveaxis(slots, 1, 0).reshape(slots.shape[1], -1, slots.shape[-1])


def _slots(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse."""
    groups, experts, capacity, _ = shape
    return jnp.moveaxis(rows.reshape(experts, groups, capacity, -1), 0, 1)
