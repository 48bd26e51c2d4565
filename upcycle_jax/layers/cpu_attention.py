"""Softmax attention differentiated by hand: the fast form on CPUs.

There softmax divides what its numerators attend to, `[..., L, D]`, not a weight for every pair,
`[..., L, M]`, which XLA writes to memory and reads again for each step of it; and no product
contracts the rows of its left side where those are many, for which XLA takes a slower kernel
(docs/benchmarks.md).

Axis legend: B rows, N heads, L queries, M keys, D size of a head.
"""

import jax
import jax.numpy as jnp

from upcycle_jax.partitioning import active_platform


def is_faster(*operands: jax.Array) -> bool:
    """Whether this form is to be taken where the program will run.

    It is on CPUs, in float32: what is rounded between the products of other dtypes is for the
    plain form to say. One query has no products that a form could choose.

    Args:
      operands: queries `[B, L, ...]`, keys and values.
    """
    return (
        active_platform() == "cpu"
        and operands[0].shape[1] > 1
        and all(x.dtype == jnp.float32 for x in operands)
    )


def _product(left: jax.Array, right: jax.Array, of_left: int, of_right: int) -> jax.Array:
    """Contracts an axis of `[B, N, ., .]` with one of another."""
    return jax.lax.dot_general(left, right, (((of_left,), (of_right,)), ((0, 1), (0, 1))))


def _swapped(*arrays: jax.Array) -> list[jax.Array]:
    """`[B, L, N, D]` to `[B, N, L, D]`, and back."""
    return [x.swapaxes(1, 2) for x in arrays]


@jax.custom_vjp
def scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """`query key^T` of every head.

    Args:
      query: `[B, L, N, D]`.
      key: `[B, M, N, D]`.

    Returns:
      `[B, N, L, M]`.
    """
    return _product(query.swapaxes(1, 2), key.swapaxes(1, 2), 3, 3)


def _scores_forward(
    query: jax.Array, key: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return scores(query, key), (query, key)


def _scores_backward(
    saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    query, key = _swapped(*saved)
    of_query = _product(grad, key, 3, 2)  # [B, N, L, D]
    of_key = _product(query, grad, 2, 2)  # [B, N, D, M]
    return of_query.swapaxes(1, 2), of_key.transpose(0, 3, 1, 2)


scores.defvjp(_scores_forward, _scores_backward)


@jax.custom_vjp
def attended(logits: jax.Array, value: jax.Array) -> jax.Array:
    """`softmax(logits) value`.

    Args:
      logits: `[B, N, L, M]`.
      value: `[B, M, N, D]`.

    Returns:
      `[B, L, N, D]`.
    """
    return _attended_forward(logits, value)[0]


def _attended_forward(
    logits: jax.Array, value: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    numerators = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    sums = jnp.sum(numerators, axis=-1, keepdims=True)  # [B, N, L, 1], at least 1
    out = _product(numerators, value.swapaxes(1, 2), 3, 2) / sums  # [B, N, L, D]
    return out.swapaxes(1, 2), (numerators, sums, value, out)


def _attended_backward(
    saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient of a logit with weight w is w (g - sum over the query's keys of w g), where g,
    the weight's own, is grad value^T. That sum is the sum over D of grad times output.
    """
    numerators, sums, value, out = saved
    value, grad = _swapped(value, grad)
    grad = grad / sums
    mean = jnp.sum(grad * out, axis=-1, keepdims=True)  # [B, N, L, 1]
    of_logits = numerators * (_product(grad, value, 3, 3) - mean)
    of_value = _product(grad, numerators, 2, 2)  # [B, N, D, M]
    return of_logits, of_value.transpose(0, 3, 1, 2)


attended.defvjp(_attended_forward, _attended_backward)
