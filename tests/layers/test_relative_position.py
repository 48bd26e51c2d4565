"""Relative position buckets and biases, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.layers.relative_position import (
    RelativePositionBiases,
    relative_position_bucket,
    with_mask,
)


def buckets(positions, *, bidirectional):
    return np.asarray(
        relative_position_bucket(np.asarray(positions), bidirectional=bidirectional)
    ).tolist()


def test_causal_buckets():
    # 32 buckets, 16 of them exact: distance n < 16 is bucket n. Keys after the query are bucket 0.
    assert buckets([0, -1, -2, -15, 1, 50], bidirectional=False) == [0, 1, 2, 15, 0, 0]
    # From 16 on: 16 + floor(log(n / 16) / log(128 / 16) * 16). n = 16: 16. n = 20: log(1.25) /
    # log(8) * 16 = 1.717 -> 17. n = 32: 16 / 3 = 5.333 -> 21. n = 63: 10.547 -> 26. n = 64: 2 / 3 *
    # 16 = 10.667 -> 26. n = 100: 14.100 -> 30. n = 127: 15.94 -> 31. n = 128 and more: 31.
    assert buckets([-16, -20, -32, -63, -64, -100, -127, -128, -5000], bidirectional=False) == [
        16,
        17,
        21,
        26,
        26,
        30,
        31,
        31,
        31,
    ]


def test_bidirectional_buckets():
    # 16 buckets per direction, 8 of them exact; keys after the query are offset by 16.
    assert buckets([0, -1, -7, 1, 7], bidirectional=True) == [0, 1, 7, 17, 23]
    # From 8 on: 8 + floor(log(n / 8) / log(128 / 8) * 8). n = 8: 8. n = 12: 1.170 -> 9. n = 16: 2
    # -> 10. n = 90: 6.98 -> 14. n = 128 and more: 15.
    assert buckets([-8, -12, -16, -90, -128, -1000], bidirectional=True) == [8, 9, 10, 14, 15, 15]
    assert buckets([8, 12, 16, 90, 128, 1000], bidirectional=True) == [24, 25, 26, 30, 31, 31]


def test_bias_looks_up_its_table():
    module = RelativePositionBiases(num_heads=2)
    table = jnp.arange(64.0).reshape(2, 32)
    bias = module.apply(
        {"params": {"rel_embedding": table}}, jnp.arange(3), jnp.arange(3), bidirectional=False
    )
    # Head 0: bucket of query - key where that is not negative, else bucket 0; head 1 the same plus
    # 32.
    head_0 = np.array([[0, 0, 0], [1, 0, 0], [2, 1, 0]], np.float32)
    np.testing.assert_array_equal(bias, [[head_0, head_0 + 32]])


def test_a_single_query_gets_the_row_of_the_full_bias():
    # What cached decoding needs: query position 5 against all keys.
    module = RelativePositionBiases(num_heads=2)
    variables = module.init(jax.random.key(0), jnp.arange(8), jnp.arange(8), bidirectional=False)
    full = module.apply(variables, jnp.arange(8), jnp.arange(8), bidirectional=False)
    row = module.apply(variables, jnp.array([5]), jnp.arange(8), bidirectional=False)
    np.testing.assert_array_equal(row[:, :, 0], full[:, :, 5])


def test_the_bias_of_every_row_and_its_gradient():
    # Two rows, one head, one query, two keys; row 1 may not see key 1. The gradient of what the
    # rows share is the sum over rows: 1 + 10 and 2 + 20.
    position = jnp.array([[[[3.0, 5.0]]]])
    mask = jnp.array([[[[True, True]]], [[[True, False]]]])
    bias, pull = jax.vjp(lambda position: with_mask(position, mask), position)
    np.testing.assert_array_equal(bias[:, 0, 0], [[3, 5], [3, np.float32(-1e10)]])
    (gradient,) = pull(jnp.array([[[[1.0, 2.0]]], [[[10.0, 20.0]]]]))
    np.testing.assert_array_equal(gradient, [[[[11, 22]]]])
