"""Every expert's MLP: on slots, all experts at once, or, on a CPU, on the tokens themselves, one
expert after the other.

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
from upcycle_jax.layers.projection import sums
from upcycle_jax.moe.dispatch import Assignment
from upcycle_jax.partitioning import EXPERT, active_mesh_shape, active_platform

LARGE = 2**17
"""Elements of an expert's matrix from which on a loop is worth its iterations: 0.5 MiB of float32,
what a core's caches hold.
"""


@flax.struct.dataclass
class _Saved:
    """What the backward pass of a loop needs.

    Attributes:
      kernels: `MlpBlock`'s, `[E, ., .]`.
      tokens: `[G, S, d]`.
      index: int32 `[E, G, C]`, of the token in each slot.
      weight: float32 `[E, G, C]`, combine weights.
      scale: of hidden units, `[E, G, 1, f]`.
      products: of slots with the input kernels, each `[E, G * C, f]`.
    """

    kernels: dict[str, jax.Array]
    tokens: jax.Array
    index: jax.Array
    weight: jax.Array
    scale: jax.Array | None
    products: tuple[jax.Array, ...]


def init_experts(expert: MlpBlock, inputs: jax.Array, *, num_experts: int) -> jax.Array:
    """Makes the parameters of E experts, those of one with a leading E, and applies them: `[G, E,
    C, d]` to the same shape.
    """
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


def apply_experts(
    expert: MlpBlock, params: Any, inputs: jax.Array, *, hidden_scale: jax.Array | None = None
) -> jax.Array:
    """Outputs `[G, E, C, d]` of `[G, E, C, d]`: expert e on row e.

    Args:
      expert: one expert, without parameters of its own and without dropout.
      params: theirs, with a leading E.
      inputs: the slots.
      hidden_scale: `[G, E, 1, f]`, factor on the hidden units of each expert (dropout); None for
        none.
    """

    def one(params: Any, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        return expert.apply({"params": params}, x, hidden_scale=scale)  # type: ignore[return-value]

    return jax.vmap(one, in_axes=(0, 1, None if hidden_scale is None else 1), out_axes=1)(
        params, inputs, hidden_scale
    )


def loops(matrix_size: int) -> bool:
    """Whether experts with matrices of so many elements had better be applied one by one where the
    program will run.

    On CPUs, unless experts are split over devices: an expert's matrices and activations then stay
    in cache from one product to the next, where products of all experts write and read all
    activations (docs/benchmarks.md). An accelerator needs the large product.
    """
    return (
        matrix_size >= LARGE
        and active_platform() == "cpu"
        and active_mesh_shape().get(EXPERT, 1) == 1
    )


def one_by_one(
    expert: MlpBlock,
    params: Any,
    tokens: jax.Array,
    assignment: Assignment,
    *,
    hidden_scale: jax.Array | None = None,
) -> jax.Array:
    """Sends tokens through experts in a loop over these, and adds up what comes back: float32 `[G,
    S, d]`.

    Args:
      expert: one expert, without parameters of its own and without dropout.
      params: theirs, with a leading E.
      tokens: `[G, S, d]`.
      assignment: of every group, with a leading G.
      hidden_scale: `[G, E, 1, f]`, factor on the hidden units of each expert (dropout); None for
        none.
    """
    kernels = {name: leaf["kernel"] for name, leaf in params.items()}
    by_expert = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 1, 0),
        (assignment.token_index, assignment.combine_weight, hidden_scale),
    )
    return _one_by_one(expert.activations, kernels, tokens.astype(expert.dtype), *by_expert)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_by_one(
    activations: tuple[str, ...],
    kernels: dict[str, jax.Array],
    tokens: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
) -> jax.Array:
    """`one_by_one`, differentiated by hand: what to keep and what to compute again decides its
    speed. The last three have a leading E.
    """
    return _one_by_one_forward(activations, kernels, tokens, index, weight, scale)[0]


def _one_by_one_forward(
    activations: tuple[str, ...],
    kernels: dict[str, jax.Array],
    tokens: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    def one(total: jax.Array, of_one: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        kernels, index, weight, scale = of_one
        x = _rows_of(tokens, index)
        products = tuple(
            x @ kernels[name].astype(x.dtype) for name in input_kernel_names(activations)
        )
        outputs = _hidden(products, scale, activations) @ kernels["wo"].astype(x.dtype)
        return (
            _add_rows(total, index, outputs.astype(jnp.float32) * weight.reshape(-1, 1)),
            products,
        )

    outputs, products = jax.lax.scan(
        one, jnp.zeros(tokens.shape, jnp.float32), (kernels, index, weight, scale)
    )
    return outputs, _Saved(kernels, tokens, index, weight, scale, products)


def _one_by_one_backward(
    activations: tuple[str, ...], saved: _Saved, grad: jax.Array
) -> tuple[Any, jax.Array, None, jax.Array, None]:
    """Activations are computed again, which costs less than to store and load them. The kernels'
    gradients are made behind the loop: inside it, memory for E matrices would be cleared first and
    every matrix copied there.
    """
    names = input_kernel_names(activations)
    dtype = saved.tokens.dtype
    grad = grad.astype(dtype)

    def one(of_tokens: jax.Array, of_one: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        kernels, index, weight, scale, products = of_one
        hidden, pull = jax.vjp(lambda products: _hidden(products, scale, activations), products)
        of_hidden = jnp.dot(
            _rows_of(grad, index), kernels["wo"].astype(dtype).T, preferred_element_type=jnp.float32
        )
        # The output's product with its gradient, which is the weight's, is the hidden activations'
        # with theirs.
        of_weight = sums(hidden.astype(jnp.float32) * of_hidden).reshape(weight.shape)
        weight = weight.reshape(-1, 1)
        (of_products,) = pull((of_hidden * weight).astype(dtype))
        of_x = sum(
            g @ kernels[name].astype(dtype).T for name, g in zip(names, of_products, strict=True)
        )
        return _add_rows(of_tokens, index, of_x.astype(jnp.float32)), (
            of_products,
            hidden * weight.astype(dtype),
            of_weight,
        )

    def of_kernel(name: str, left: jax.Array, right: jax.Array) -> jax.Array:
        product = jnp.einsum("ena,enb->eab", left, right, preferred_element_type=jnp.float32)
        return product.astype(saved.kernels[name].dtype)

    scanned = saved.kernels, saved.index, saved.weight, saved.scale, saved.products
    of_tokens, (of_products, hidden, of_weight) = jax.lax.scan(
        one, jnp.zeros(grad.shape, jnp.float32), scanned
    )
    rows, of_outputs = (
        jax.vmap(lambda index, vectors=vectors: _rows_of(vectors, index))(saved.index)
        for vectors in (saved.tokens, grad)
    )
    of_kernels = {
        name: of_kernel(name, rows, g) for name, g in zip(names, of_products, strict=True)
    }
    return (
        of_kernels | {"wo": of_kernel("wo", hidden, of_outputs)},
        of_tokens.astype(dtype),
        None,
        of_weight,
        None,
    )


_one_by_one.defvjp(_one_by_one_forward, _one_by_one_backward)


def _rows_of(vectors: jax.Array, index: jax.Array) -> jax.Array:
    """Of `[G, S, d]` those at `[G, C]`: `[G * C, d]`; zero where the index is S."""
    taken = jax.vmap(lambda vectors, index: vectors.at[index].get(mode="fill", fill_value=0))(
        vectors, index
    )
    return taken.reshape(-1, vectors.shape[-1])


def _add_rows(vectors: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds rows `[G * C, d]` to `[G, S, d]` at `[G, C]`; not where the index is S."""
    rows = rows.reshape(*index.shape, -1)
    return jax.vmap(lambda vectors, index, rows: vectors.at[index].add(rows, mode="drop"))(
        vectors, index, rows
    )


def _hidden(
    products: Sequence[jax.Array], scale: jax.Array | None, activations: Sequence[str]
) -> jax.Array:
    """Hidden activations `[N, f]` of one expert; `scale` is `[G, 1, f]`."""
    hidden = gated(products, activations)
    if scale is None:
        return hidden
    return (
        hidden.reshape(scale.shape[0], -1, hidden.shape[-1]) * scale.astype(hidden.dtype)
    ).reshape(hidden.shape)
