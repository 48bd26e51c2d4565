"""Products of rows that are sorted by expert with that expert's matrix, all blocks at once: the
fast form for small matrices on CPUs.

Rows of one expert follow each other, a run, which is padded to whole blocks of one static size:

    rows    [ e0 e0 .. | e0 .. | e1 e1 .. | e1 .. | e1 .. | e2 .. | unused ]      R rows in all
    blocks  [    0     |   1   |    2     |   3   |   4   |   5   |   6    ]

Every block gets a copy of its expert's matrix, and one batched product does the rest. A loop
(`moe.expert_runs`) copies no matrix and computes no unused block, but each of its steps costs as
much as the product of a small block (docs/benchmarks.md).

Axis legend: N tokens, K experts per token, E experts, R rows (a static bound), B blocks, d and f
sizes of matrices.
"""

import functools
import math

import jax
import jax.numpy as jnp

from upcycle_jax.partitioning import active_platform

SMALL = 2**12
"""Elements of an expert's matrix up to which copying it for every block is worth it: of 32 x 64,
not for 64 x 128, with 1,024 rows an expert (docs/benchmarks.md)."""
_MIN_ROWS = 8
_ROWS_OF_A_COPY = 8
"""A block's copy of its matrix, and the block's part of the matrix's gradient, take about the time
of as many rows."""


def is_faster(matrix_size: int) -> bool:
    """Whether one product of all blocks is faster than a loop over them, for experts with matrices
    of `matrix_size` elements, where the program will run.
    """
    return matrix_size <= SMALL and active_platform() == "cpu"


def rows_per_block(num_choices: int, num_experts: int) -> int:
    """Rows of a block, a power of two. Blocks of b rows cost num_choices / b copies of matrices and
    up to num_experts * b empty rows: the sum is least near the root below.
    """
    best = math.sqrt(_ROWS_OF_A_COPY * max(num_choices, 1) / num_experts)
    return max(2 ** round(math.log2(best)), _MIN_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def batched_dot(
    rows_per_block: int, x: jax.Array, kernels: jax.Array, sizes: jax.Array
) -> jax.Array:
    """`[R, d]` times each row's expert's matrix of `[E, d, f]`: `[R, f]` in the dtype of `x`,
    accumulated in float32.

    Args:
      rows_per_block: divides R.
      x: rows, sorted by expert; zero beyond the last run.
      kernels: one matrix per expert.
      sizes: int32 `[E]`, rows of each expert's run: multiples of `rows_per_block`.
    """
    return _forward(rows_per_block, x, kernels, sizes)[0]


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _forward(
    rows_per_block: int, x: jax.Array, kernels: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, _Saved]:
    num_blocks = x.shape[0] // rows_per_block
    # [B]: the expert of each block. Blocks beyond the last run hold zeros and may have any.
    ends = jnp.cumsum(sizes) // rows_per_block
    expert = jnp.sum(jnp.arange(num_blocks)[:, None] >= ends, axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, sizes.size - 1)
    out = _product("bwd,bdf->bwf", _blocks(x, num_blocks), kernels[expert])
    return out.astype(x.dtype).reshape(x.shape[0], -1), (x, kernels, expert)


def _backward(
    rows_per_block: int, saved: _Saved, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, expert = saved
    in_blocks, grads = (_blocks(a, expert.size) for a in (x, grad))
    of_x = _product("bwf,bdf->bwd", grads, kernels[expert])
    if x.shape[1] <= grad.shape[1]:
        of_kernels = _sums_of_products(in_blocks, grads, expert, len(kernels))
    else:
        of_kernels = jnp.swapaxes(_sums_of_products(grads, in_blocks, expert, len(kernels)), 1, 2)
    return of_x.astype(x.dtype).reshape(x.shape), of_kernels.astype(kernels.dtype), None


def _sums_of_products(
    left: jax.Array, right: jax.Array, expert: jax.Array, num_experts: int
) -> jax.Array:
    """Float32 `[E, m, n]`: of blocks `[B, w, m]`, transposed, times blocks `[B, w, n]`, the sum for
    each expert. `left` is transposed in memory: it is best the narrower one.
    """
    # XLA for CPUs has a faster product for [m, w] times [w, n] than for [w, m] transposed. The
    # barrier keeps it from making one of the other.
    columns = jax.lax.optimization_barrier(jnp.swapaxes(left, 1, 2))
    of_blocks = _product("bmw,bwn->bmn", columns, right)
    # [E, B] times [B, m * n].
    theirs = (jnp.arange(num_experts)[:, None] == expert).astype(jnp.float32)
    return (theirs @ of_blocks.reshape(expert.size, -1)).reshape(-1, *of_blocks.shape[1:])


batched_dot.defvjp(_forward, _backward)


def _blocks(rows: jax.Array, num_blocks: int) -> jax.Array:
    """`[R, .]` as `[B, rows of a block, .]`."""
    return rows.reshape(num_blocks, -1, rows.shape[-1])


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
