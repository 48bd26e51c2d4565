"""Experts applied to their runs of sorted rows, one after the other: the fast form for large
matrices on CPUs.

A run is worked off as a head of any multiple of the step, then blocks of 16 steps:

    run     [ 21 steps, padding included         ]
    parts   [ head: 5 steps | block: 16 steps    ]

Few large products come closer to what the cores can do than many small ones, and a part's
activations go through the whole MLP while they are in the caches. For every size of a head there
is a loop of no or one iteration: XLA updates what a loop carries in place, where it may copy what
a conditional takes. The loops are differentiated by hand, because what they keep and what they
compute again decides their speed (docs/benchmarks.md).

Axis legend: N tokens, K experts per token, E experts, R rows (a static bound), n rows of a part, d
and f sizes of an expert's matrices.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.layers.mlp import gated, input_kernel_names
from upcycle_jax.layers.projection import sums
from upcycle_jax.moe.grouped_matmul import SortedRows, take, to_rows, token_of_row
from upcycle_jax.partitioning import active_platform

STEPS = 16
"""Steps of the largest part: one loop is compiled for each size of a part."""
_MIN_STEP, _MAX_STEP = 8, 64

Leaves = dict[str, jax.Array]


def is_faster() -> bool:
    """Whether the parts of runs are the faster form where the program will run."""
    return active_platform() == "cpu"


def rows_per_step(num_choices: int, num_experts: int) -> int:
    """What runs are padded to multiples of, a power of two: near a tenth of a run of mean size, of
    which half is padding on average.
    """
    mean = max(num_choices, 1) / num_experts
    return min(max(2 ** round(math.log2(mean / 10)), _MIN_STEP), _MAX_STEP)


def apply(
    tokens: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    rows: SortedRows,
    *,
    step: int,
    activations: tuple[str, ...],
    hidden_scale: jax.Array | None = None,
    biases: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
    """For each token the weighted sum of the outputs of its experts: float32 `[N, d]`.

    Args:
      tokens: `[N, d]` in the dtype of the computation.
      weight: float32 `[N, K]`.
      kernels: `wi` or `wi_0, wi_1, ...` `[E, d, f]` and `wo` `[E, f, d]`, in that dtype.
      rows: where the choices sit, aligned to `step`.
      step: from `rows_per_step`.
      activations: one per input kernel.
      hidden_scale: `[E, f]`, factor on the hidden units (dropout), which has no gradient; None for
        none.
      biases: `[E, f]`, and `[E, d]` of `wo`; None or empty for none.
    """
    outputs = _mlp(
        activations,
        step,
        to_rows(tokens, rows),
        dict(kernels),
        dict(biases or {}),
        hidden_scale,
        rows,
    )
    return _weighted_sums(outputs, weight, rows)


@jax.custom_vjp
def _weighted_sums(outputs: jax.Array, weight: jax.Array, rows: SortedRows) -> jax.Array:
    """Of the rows `[R, d]` of each token's choices: float32 `[N, d]`.

    One gather per choice, which XLA fuses with the sum: no array of all choices is written.
    """
    return functools.reduce(
        jnp.add,
        [
            take(outputs, row).astype(jnp.float32) * weight[:, k, None]
            for k, row in enumerate(rows.row.T)
        ],
    )


def _weighted_sums_backward(
    saved: tuple[jax.Array, jax.Array, SortedRows], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    outputs, weight, rows = saved
    of_outputs = take(grad, token_of_row(rows)) * take(weight.reshape(-1), rows.choice)[:, None]
    of_weight = [sums(take(outputs, row).astype(jnp.float32) * grad) for row in rows.row.T]
    return of_outputs.astype(outputs.dtype), jnp.stack(of_weight, axis=1), None


_weighted_sums.defvjp(
    lambda outputs, weight, rows: (_weighted_sums(outputs, weight, rows), (outputs, weight, rows)),
    _weighted_sums_backward,
)


@flax.struct.dataclass
class _Saved:
    """What the backward pass needs.

    Attributes:
      x: `[R, d]`, tokens in rows.
      products: of rows with each input kernel, biases included, `[R, f]`.
      kernels: `[E, ., .]`.
      biases: `[E, .]`.
      scale: of hidden units, `[E, f]`.
      rows: where the choices sit.
    """

    x: jax.Array
    products: tuple[jax.Array, ...]
    kernels: Leaves
    biases: Leaves
    scale: jax.Array | None
    rows: SortedRows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(
    activations: tuple[str, ...],
    step: int,
    x: jax.Array,
    kernels: Leaves,
    biases: Leaves,
    scale: jax.Array | None,
    rows: SortedRows,
) -> jax.Array:
    """`MlpBlock` on rows `[R, d]`, each with its own expert's matrices and biases."""
    return _forward(activations, step, x, kernels, biases, scale, rows, keep=False)[0]


def _forward(
    activations: tuple[str, ...],
    step: int,
    x: jax.Array,
    kernels: Leaves,
    biases: Leaves,
    scale: jax.Array | None,
    rows: SortedRows,
    *,
    keep: bool = True,
) -> tuple[jax.Array, _Saved]:
    """The result, and with `keep` what the backward pass needs."""
    names = input_kernel_names(activations)

    def one_part(e: jax.Array, at: jax.Array, n: int, carry: Any) -> Any:
        outputs, kept = carry
        of_one = _OfOne(*(_at(e, leaves) for leaves in (kernels, biases, scale)))
        products = tuple(of_one.product(_part(x, at, n), name) for name in names)
        out = of_one.product(_hidden(products, of_one.scale, activations), "wo")
        return _put(outputs, out, at), tuple(map(_put, kept, products, [at] * len(kept)))

    hidden = [(len(x), kernels[name].shape[2]) for name in names if keep]
    outputs, *kept = _to_be_filled([x.shape, *hidden], x.dtype, rows)
    outputs, kept = _over_runs(rows, step, one_part, one_part, (outputs, tuple(kept)))
    return outputs, _Saved(x, kept, kernels, biases, scale, rows)


def _backward(
    activations: tuple[str, ...], step: int, saved: _Saved, grad: jax.Array
) -> tuple[jax.Array, Leaves, Leaves, None, None]:
    """Gradients of `x`, `kernels` and `biases`; none of `scale` and `rows`."""
    names, dtype = input_kernel_names(activations), saved.x.dtype

    def one_part(e: jax.Array, at: jax.Array, n: int, carry: Any, *, first: bool) -> Any:
        # Rows of `of_x` hold the gradients of outputs until those of `x` take their place.
        of_x, of_kernels, of_biases = carry
        of_one = _OfOne(*(_at(e, leaves) for leaves in (saved.kernels, saved.biases, saved.scale)))
        x, g = _part(saved.x, at, n), _part(of_x, at, n)
        products = tuple(_part(leaf, at, n) for leaf in saved.products)
        hidden, pull = jax.vjp(lambda p: _hidden(p, of_one.scale, activations), products)
        (of_products,) = pull(_dot(g, of_one.kernels["wo"], 1, 1).astype(dtype))
        by_name = dict(zip(names, of_products, strict=True))
        of_rows = functools.reduce(
            jnp.add, [_dot(p, of_one.kernels[name], 1, 1) for name, p in by_name.items()]
        )

        # XLA for CPUs has a faster product for [d, n] times [n, f] than for [n, d] transposed. The
        # barrier keeps it from making one of the other.
        columns = jax.lax.optimization_barrier(x.T)

        def added(total: Leaves, parts: Leaves) -> Leaves:
            # The first part of a run is put where there are zeros.
            old = {} if first else _at(e, total)
            new = {name: part if first else old[name] + part for name, part in parts.items()}
            return {name: _put(total[name], leaf[None], e) for name, leaf in new.items()}

        of_biases = added(
            of_biases,
            {
                name: jnp.sum(part, axis=0, dtype=jnp.float32)
                for name, part in (by_name | {"wo": g}).items()
                if name in of_biases
            },
        )
        of_kernels = added(
            of_kernels,
            {name: _dot(columns, p, 1, 0) for name, p in by_name.items()}
            | {"wo": _dot(hidden, g, 0, 0)},
        )
        return _put(of_x, of_rows, at), of_kernels, of_biases

    def zeros(leaves: Leaves) -> Leaves:
        shapes = [leaf.shape for leaf in leaves.values()]
        return dict(zip(leaves, _to_be_filled(shapes, jnp.float32, saved.rows), strict=True))

    def like(leaves: Leaves, gradients: Leaves) -> Leaves:
        return {name: g.astype(leaves[name].dtype) for name, g in gradients.items()}

    of_x, of_kernels, of_biases = _over_runs(
        saved.rows,
        step,
        functools.partial(one_part, first=True),
        functools.partial(one_part, first=False),
        (grad, zeros(saved.kernels), zeros(saved.biases)),
    )
    return of_x, like(saved.kernels, of_kernels), like(saved.biases, of_biases), None, None


_mlp.defvjp(_forward, _backward)

_Part = Callable[[jax.Array, jax.Array, int, Any], Any]
"""`part(expert, first row, rows, carry)`."""


def _over_runs(rows: SortedRows, step: int, head: _Part, block: _Part, carry: Any) -> Any:
    """Folds over the parts of all runs: each one's head, then its blocks."""
    largest = STEPS * step
    at_most = -(-len(rows.row) // step) * step  # a token chooses an expert at most once
    offsets = jnp.cumsum(rows.sizes) - rows.sizes

    def one_run(e: jax.Array, carry: Any) -> Any:
        start, size = offsets[e], rows.sizes[e]
        num_blocks = jnp.maximum(size - 1, 0) // largest
        in_head = size - num_blocks * largest
        for n in range(step, min(largest, at_most) + 1, step):
            carry = jax.lax.fori_loop(
                0,
                (in_head == n).astype(jnp.int32),
                # i is 0. Without it XLA would do the work before the loop, were it needed or not.
                lambda i, carry, n=n: head(e, start + i * n, n, carry),
                carry,
            )
        if at_most <= largest:
            return carry
        return jax.lax.fori_loop(
            0,
            num_blocks,
            lambda i, carry: block(e, start + in_head + i * largest, largest, carry),
            carry,
        )

    return jax.lax.fori_loop(0, rows.sizes.size, one_run, carry)


def _to_be_filled(
    shapes: Sequence[tuple[int, ...]], dtype: Any, rows: SortedRows
) -> list[jax.Array]:
    """Arrays of zeros for loops to write to, each of a zero that XLA cannot know: of constant zeros
    it would keep one array per shape, for all layers, and copy that.
    """
    zero = jnp.minimum(rows.sizes, 0)  # [E]
    return [jnp.full(shape, zero[i % zero.size], dtype) for i, shape in enumerate(shapes)]


@flax.struct.dataclass
class _OfOne:
    """One expert.

    Attributes:
      kernels: `[., .]`.
      biases: `[.]`; empty for none.
      scale: `[f]`.
    """

    kernels: Leaves
    biases: Leaves
    scale: jax.Array | None

    def product(self, x: jax.Array, name: str) -> jax.Array:
        out = _dot(x, self.kernels[name], 1, 0).astype(x.dtype)
        return out + self.biases[name] if self.biases else out


def _hidden(
    products: Sequence[jax.Array], scale: jax.Array | None, activations: Sequence[str]
) -> jax.Array:
    """Hidden activations `[n, f]` of one expert."""
    hidden = gated(products, activations)
    return hidden if scale is None else hidden * scale.astype(hidden.dtype)


def _at(e: jax.Array, leaves: Any) -> Any:
    """One expert's slices of arrays `[E, ...]`."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), leaves)


def _part(leaf: jax.Array, at: jax.Array, n: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, at, n)


def _put(leaf: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), at, 0)


def _dot(left: jax.Array, right: jax.Array, of_left: int, of_right: int) -> jax.Array:
    """The product that contracts one axis of each, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((of_left,), (of_right,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
