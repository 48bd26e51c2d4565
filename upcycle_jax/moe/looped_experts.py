"""Experts applied one after the other, on the tokens themselves: the fast form on CPUs.

A loop over experts keeps one expert's matrices and activations in the caches from one product to
the next. Products of all experts at once write all activations to memory and read them again
(docs/benchmarks.md). The loop is differentiated by hand, because what it keeps for the backward
pass and what it computes again decides its speed.

Axis legend: G groups, S tokens per group, E experts, C slots per expert and group, d and f sizes of
an expert's matrices.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.layers.mlp import gated, input_kernel_names
from upcycle_jax.layers.projection import sums
from upcycle_jax.moe import even_load
from upcycle_jax.partitioning import EXPERT, active_mesh_shape, active_platform

LARGE = 2**17
"""Elements of an expert's matrix from which on a loop is worth its iterations: 0.5 MiB of float32,
what a core's caches hold.
"""


def is_faster(matrix_size: int) -> bool:
    """Whether a loop over experts with matrices of `matrix_size` elements is faster than all of
    them at once, where the program will run.

    It is on CPUs, unless experts are split over devices. An accelerator needs the large product.
    """
    return (
        not even_load.is_active()
        and matrix_size >= LARGE
        and active_platform() == "cpu"
        and active_mesh_shape().get(EXPERT, 1) == 1
    )


def apply(
    kernels: dict[str, jax.Array],
    tokens: jax.Array,
    token_index: jax.Array,
    combine_weight: jax.Array,
    *,
    activations: tuple[str, ...],
    hidden_scale: jax.Array | None = None,
    biases: dict[str, jax.Array] | None = None,
) -> jax.Array:
    """For each token the weighted sum of the outputs of the experts that have a slot for it:
    float32 `[G, S, d]`.

    Args:
      kernels: `wi` or `wi_0, wi_1, ...` `[E, d, f]` and `wo` `[E, f, d]`, as `MlpBlock` names them.
      tokens: `[G, S, d]` in the dtype of the computation.
      token_index: int32 `[G, E, C]`, the token in each slot; S marks an empty one.
      combine_weight: float32 `[G, E, C]`.
      activations: one per input kernel.
      hidden_scale: `[G, E, f]`, factor on the hidden units (dropout); None for none.
      biases: `[E, f]`, and `[E, d]` of `wo`, by the names of kernels; None or empty for none.
    """
    # The loop is a scan over the leading axis: E comes first.
    by_expert = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 1, 0), (token_index, combine_weight, hidden_scale)
    )
    return _looped(activations, kernels, biases or {}, tokens, *by_expert)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _looped(
    activations: tuple[str, ...],
    kernels: dict[str, jax.Array],
    biases: dict[str, jax.Array],
    tokens: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
) -> jax.Array:
    """As `apply`, with index and weight `[E, G, C]` and scale `[E, G, f]`."""
    return _forward(activations, kernels, biases, tokens, index, weight, scale)[0]


@flax.struct.dataclass
class _Saved:
    """What the backward pass needs.

    Attributes:
      kernels: `MlpBlock`'s, `[E, ., .]`.
      biases: likewise, `[E, .]`; empty for none.
      tokens: `[G, S, d]`.
      index: int32 `[E, G, C]`, of the token in each slot.
      weight: float32 `[E, G, C]`, combine weights.
      scale: of hidden units, `[E, G, f]`.
      products: of slots with each input kernel, `[E, G * C, f]`.
    """

    kernels: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    tokens: jax.Array
    index: jax.Array
    weight: jax.Array
    scale: jax.Array | None
    products: tuple[jax.Array, ...]


def _forward(
    activations: tuple[str, ...],
    kernels: dict[str, jax.Array],
    biases: dict[str, jax.Array],
    tokens: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    def one(total: jax.Array, of_one: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        # Of one expert: [., .], [.], [G, C], [G, C], [G, f].
        kernels, biases, index, weight, scale = of_one

        def product(x: jax.Array, name: str) -> jax.Array:
            out = x @ kernels[name].astype(x.dtype)
            return out + biases[name].astype(x.dtype) if biases else out

        x = _rows_of(tokens, index)  # [G * C, d]
        products = tuple(product(x, name) for name in input_kernel_names(activations))
        outputs = product(_hidden(products, scale, activations), "wo")
        return (
            _add_rows(total, index, outputs.astype(jnp.float32) * weight.reshape(-1, 1)),
            products,
        )

    outputs, products = jax.lax.scan(
        one, jnp.zeros(tokens.shape, jnp.float32), (kernels, biases, index, weight, scale)
    )
    return outputs, _Saved(kernels, biases, tokens, index, weight, scale, products)


def _backward(
    activations: tuple[str, ...], saved: _Saved, grad: jax.Array
) -> tuple[Any, Any, jax.Array, None, jax.Array, None]:
    """Gradients of `kernels`, `biases`, `tokens`, `index` (none), `weight` and `scale` (none).

    Activations are computed again from the products: that costs less than to store and load them.
    The kernels' gradients are computed after the loop, from rows of all experts that the loop has
    kept. Computed inside, they would be the loop's results: E matrices of zeros, into which every
    step copies one.
    """
    names = input_kernel_names(activations)
    dtype = saved.tokens.dtype
    grad = grad.astype(dtype)

    def one(of_tokens: jax.Array, of_one: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        kernels, biases, index, weight, scale, products = of_one
        # hidden [G * C, f]; `pull` turns its gradient into those of the products.
        hidden, pull = jax.vjp(lambda products: _hidden(products, scale, activations), products)
        of_rows = _rows_of(grad, index)
        of_hidden = jnp.dot(
            of_rows, kernels["wo"].astype(dtype).T, preferred_element_type=jnp.float32
        )
        # A weight's gradient is the output (hidden @ wo) times its gradient. That equals hidden
        # times (gradient @ wo.T), which is at hand: the output need not be computed again.
        of_weight = sums(hidden.astype(jnp.float32) * of_hidden)
        if biases:
            of_weight += sums(of_rows.astype(jnp.float32) * biases["wo"].astype(jnp.float32))
        of_weight = of_weight.reshape(weight.shape)
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
        # Rows n = G * C of every expert: [E, n, a] and [E, n, b] to [E, a, b].
        product = jnp.einsum("ena,enb->eab", left, right, preferred_element_type=jnp.float32)
        return product.astype(saved.kernels[name].dtype)

    def of_bias(name: str, rows: jax.Array) -> jax.Array:
        summed = jnp.sum(rows, axis=1, dtype=jnp.float32)  # [E, n, a] to [E, a]
        return summed.astype(saved.biases[name].dtype)

    scanned = (
        saved.kernels,
        saved.biases,
        saved.index,
        saved.weight,
        saved.scale,
        saved.products,
    )
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
    of_biases = {}
    if saved.biases:
        weight = saved.weight.reshape(len(saved.weight), -1, 1)  # [E, n, 1]
        of_biases = {name: of_bias(name, g) for name, g in zip(names, of_products, strict=True)}
        of_biases["wo"] = of_bias("wo", of_outputs.astype(jnp.float32) * weight)
    return (
        of_kernels | {"wo": of_kernel("wo", hidden, of_outputs)},
        of_biases,
        of_tokens.astype(dtype),
        None,
        of_weight,
        None,
    )


_looped.defvjp(_forward, _backward)


def _rows_of(vectors: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `[G * C, d]` of `[G, S, d]` at the indices `[G, C]`; zero where the index is S."""
    taken = jax.vmap(lambda vectors, index: vectors.at[index].get(mode="fill", fill_value=0))(
        vectors, index
    )
    return taken.reshape(-1, vectors.shape[-1])


def _add_rows(vectors: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds rows `[G * C, d]` to `[G, S, d]` at the indices `[G, C]`; skips those of index S."""
    rows = rows.reshape(*index.shape, -1)
    return jax.vmap(lambda vectors, index, rows: vectors.at[index].add(rows, mode="drop"))(
        vectors, index, rows
    )


def _hidden(
    products: Sequence[jax.Array], scale: jax.Array | None, activations: Sequence[str]
) -> jax.Array:
    """Hidden activations `[G * C, f]` of one expert; `scale` is `[G, f]`."""
    hidden = gated(products, activations)
    if scale is None:
        return hidden
    by_group = hidden.reshape(scale.shape[0], -1, hidden.shape[-1])  # [G, C, f]
    return (by_group * scale[:, None].astype(hidden.dtype)).reshape(hidden.shape)
