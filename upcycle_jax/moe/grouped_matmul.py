"""Products of rows that are sorted by expert with that expert's matrix: no capacity, no masked
products, static shapes.

Rows of one expert follow each other: a run. Runs are padded to multiples of `ALIGNMENT` rows. A run
is worked off in blocks of falling sizes, as many of each size as fit:

    rows    [ e0 e0 e0 .. | e1 e1 e1 e1 e1 e1 .. | e2 .. | unused ]      R rows in all
    blocks  [     32      |     64     |    32   |   32  |        ]

The sizes of blocks are known when the program is compiled, their number only at run time. Work
therefore follows the number of rows that there are. Memory is reserved for the worst case, R rows.

Axis legend: N tokens, K experts per token, E experts, R rows (a static bound), d and f sizes of
matrices.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.partitioning import active_platform

BLOCKS = (1024, 256, 64, 32)
"""Rows of a block: as many of the first size as fit, then of the next."""
ALIGNMENT = BLOCKS[-1]
"""Every run is padded to a multiple of it: blocks of the last size leave no row over."""


@flax.struct.dataclass
class SortedRows:
    """Where each choice of each token sits among the rows.

    Attributes:
      choice: int32 `[R]`, which choice (token * K + k) a row holds; N * K marks an empty row.
      row: int32 `[N, K]`, the row of each choice; R where no choice is made.
      sizes: int32 `[E]`, rows of each expert's run, padding included. Runs follow each other from
        row 0 on.
    """

    choice: jax.Array
    row: jax.Array
    sizes: jax.Array


def sort_rows(expert: jax.Array, *, num_experts: int, alignment: int) -> SortedRows:
    """Sorts choices by expert, tokens in order.

    Args:
      expert: int32 `[N, K]`, in `[0, E]`; E marks a choice that is not made.
      num_experts: E.
      alignment: what every run's size is a multiple of.
    """
    num_choices = expert.size
    # A token chooses an expert at most once: with fewer experts than K, not all of its choices are
    # made.
    at_most = expert.shape[0] * min(expert.shape[1], num_experts)
    num_rows = _up_to(at_most + num_experts * (alignment - 1), alignment)  # R
    experts, choice = _by_expert(expert.reshape(-1), num_experts)
    # [E + 1]: where each expert's run starts among the sorted choices, which have no padding.
    starts = jnp.searchsorted(experts, jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(
        jnp.int32
    )
    # [E]: with padding, a run's size and where it starts among the rows.
    sizes = _up_to(starts[1:] - starts[:-1], alignment)
    offsets = jnp.cumsum(sizes) - sizes
    # [N * K]: the row of each sorted choice: its run's start there, plus its place in the run.
    made = experts < num_experts
    run = jnp.minimum(experts, num_experts - 1)
    row = jnp.where(
        made, offsets[run] + jnp.arange(num_choices, dtype=jnp.int32) - starts[run], num_rows
    )
    return SortedRows(
        choice=jnp.full(num_rows, num_choices, jnp.int32).at[row].set(choice, mode="drop"),
        row=jnp.zeros(num_choices, jnp.int32).at[choice].set(row).reshape(expert.shape),
        sizes=sizes,
    )


def _by_expert(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Int32 `[N * K]`, `[N * K]`: the experts in order, and whose choice each is. Tokens of one
    expert stay in order; choices that are not made (E) come last.
    """
    size = expert.size
    choice = jnp.arange(size, dtype=jnp.int32)
    if active_platform() != "cpu" or (num_experts + 1) * size > jnp.iinfo(jnp.int32).max:
        experts, choice = jax.lax.sort_key_val(expert, choice, is_stable=True)
        return experts, choice
    # Both in one number: XLA for CPUs sorts single numbers several times as fast as pairs.
    both = jax.lax.sort(expert * size + choice, is_stable=False)
    return both // size, both % size


def expert_of_row(rows: SortedRows) -> jax.Array:
    """Int32 `[R]`: the expert of the run that each row is in; E after the last run."""
    ends = jnp.cumsum(rows.sizes)
    return jnp.searchsorted(ends, jnp.arange(rows.choice.size), side="right").astype(jnp.int32)


def token_of_row(rows: SortedRows) -> jax.Array:
    """Int32 `[R]`: the token that each row holds; N for an empty row."""
    num_tokens, per_token = rows.row.shape
    return jnp.where(rows.choice < rows.row.size, rows.choice // per_token, num_tokens)


@jax.custom_vjp
def to_rows(tokens: jax.Array, rows: SortedRows) -> jax.Array:
    """Gathers tokens `[N, d]` into rows `[R, d]`; empty rows are zero.

    Automatic differentiation would scatter rows into tokens, one after the other. As it is known
    which rows hold a token, its gradient is a gather, too.
    """
    return take(tokens, token_of_row(rows))


def _to_rows_backward(rows: SortedRows, grad: jax.Array) -> tuple[jax.Array, None]:
    summed = jnp.sum(take(grad, rows.row), axis=1, dtype=jnp.float32)
    return summed.astype(grad.dtype), None


to_rows.defvjp(lambda tokens, rows: (to_rows(tokens, rows), rows), _to_rows_backward)


@jax.custom_vjp
def to_choices(values: jax.Array, rows: SortedRows) -> jax.Array:
    """Gathers rows `[R, d]` into the choices that they hold, `[N, K, d]`; choices that are not made
    are zero. Its gradient is a gather, as that of `to_rows`.
    """
    return take(values, rows.row)


def _to_choices_backward(rows: SortedRows, grad: jax.Array) -> tuple[jax.Array, None]:
    return take(grad.reshape(-1, grad.shape[-1]), rows.choice), None


to_choices.defvjp(lambda values, rows: (to_choices(values, rows), rows), _to_choices_backward)


@jax.custom_vjp
def block_dot(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """`[R, d]` times each row's expert's matrix of `[E, d, f]`: `[R, f]` in the dtype of `x`,
    accumulated in float32.

    Args:
      x: rows, sorted by expert.
      kernels: one matrix per expert.
      sizes: int32 `[E]`, multiples of `ALIGNMENT`. Rows beyond their sum give zero.
    """
    return _rows_times(x, kernels, sizes, contract=1)


def _rows_times(x: jax.Array, kernels: jax.Array, sizes: jax.Array, *, contract: int) -> jax.Array:
    """Rows `[R, .]` times kernels `[E, d, f]`, contracted with their axis `contract`, 1 or 2."""

    def one_expert(e: jax.Array, out: jax.Array) -> jax.Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, e, keepdims=False)

        def one_block(at: jax.Array, size: int, out: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice_in_dim(x, at, size)  # [size, .]
            # contract 1: block [size, d] @ kernel [d, f]; 2: block [size, f] @ kernel.T [f, d].
            product = jax.lax.dot_general(
                block,
                kernel,
                (((1,), (contract - 1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), at, 0)

        return _over_blocks(offsets[e], sizes[e], one_block, out, at_most=x.shape[0])

    offsets = jnp.cumsum(sizes) - sizes
    out = jnp.zeros((x.shape[0], kernels.shape[3 - contract]), x.dtype)
    return jax.lax.fori_loop(0, kernels.shape[0], one_expert, out)


def _sums_of_products(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    """Gradients of the kernels, float32 `[E, d, f]`: for every expert its rows of `x` `[., d]`,
    transposed, times its rows of `grad` `[., f]`.
    """

    def one_expert(e: jax.Array, out: jax.Array) -> jax.Array:
        def one_block(at: jax.Array, size: int, total: jax.Array) -> jax.Array:
            # [size, d] and [size, f], contracted over rows: [d, f].
            left, right = (jax.lax.dynamic_slice_in_dim(a, at, size) for a in (x, grad))
            return total + jax.lax.dot_general(
                left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        total = _over_blocks(
            offsets[e],
            sizes[e],
            one_block,
            jnp.zeros(out.shape[1:], jnp.float32),
            at_most=x.shape[0],
        )
        return jax.lax.dynamic_update_index_in_dim(out, total, e, 0)

    offsets = jnp.cumsum(sizes) - sizes
    return jax.lax.fori_loop(
        0, sizes.size, one_expert, jnp.zeros((sizes.size, x.shape[1], grad.shape[1]), jnp.float32)
    )


def _over_blocks(
    start: jax.Array, size: jax.Array, one_block: Any, carry: jax.Array, *, at_most: int
) -> jax.Array:
    """Folds `one_block(first row, rows, carry)` over the blocks of one run.

    Args:
      start: the first row of the run.
      size: its rows.
      one_block: see above.
      carry: before the first block.
      at_most: all rows that there can be; larger blocks are left out.
    """
    for rows in (rows for rows in BLOCKS if rows <= at_most):
        count = size // rows  # a traced number: a loop, not an unrolled list, runs so many blocks
        body = functools.partial(
            lambda i, carry, rows, start: one_block(start + i * rows, rows, carry),
            rows=rows,
            start=start,
        )
        carry = jax.lax.fori_loop(0, count, body, carry)
        start, size = start + count * rows, size - count * rows
    return carry


def _block_dot_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, sizes = saved
    return (
        _rows_times(grad, kernels, sizes, contract=2),
        _sums_of_products(x, grad, sizes).astype(kernels.dtype),
        None,
    )


block_dot.defvjp(
    lambda x, kernels, sizes: (block_dot(x, kernels, sizes), (x, kernels, sizes)),
    _block_dot_backward,
)


def ragged_dot(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """As `block_dot`, by `jax.lax.ragged_dot`; sizes may be any."""
    product = jax.lax.ragged_dot(x, kernels, sizes, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
    # What `ragged_dot` gives for rows after the last run depends on the implementation.
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], product, 0)


@functools.cache
def ragged_dot_is_masked(platform: str) -> bool:
    """Whether `jax.lax.ragged_dot` becomes one masked product over all rows per expert on a
    platform: E times the work that is needed.

    On TPUs it is an instruction. Elsewhere a small product is compiled and its FLOPs are read. For
    a platform that this process does not have the answer is yes. In JAX 0.10 it is also yes on
    CPUs, and on NVIDIA GPUs unless JAX is told to use its Triton kernel.
    """
    if platform == "tpu":
        return False
    if platform != jax.default_backend():
        return True
    experts, rows, size = 8, 256, 64
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, size), (experts, size, size))
    ]
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    cost = jax.jit(jax.lax.ragged_dot).lower(*shapes, sizes).compile().cost_analysis()
    return dict(cost or {}).get("flops", 0.0) > experts / 2 * 2 * rows * size * size


def take(values: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers along the first axis; zero where the index is beyond the end."""
    return values.at[index].get(mode="fill", fill_value=0)


def _up_to(number: Any, multiple: int) -> Any:
    return (number + multiple - 1) // multiple * multiple
