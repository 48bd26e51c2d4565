"""Attention, by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.layers import masks
from upcycle_jax.layers.attention import MultiHeadDotProductAttention, dot_product_attention


def heads(rows):
    """`[length, head_dim]` to `[1, length, 1, head_dim]`."""
    return jnp.asarray(rows, jnp.float32)[None, :, None, :]


def test_unscaled_softmax_by_hand():
    # One query (log 3, 0) against keys (1, 0) and (0, 0): logits log 3 and 0, weights 3/4 and 1/4.
    # A scale of 1/sqrt(2) would change them.
    out = dot_product_attention(
        heads([[np.log(3), 0.0]]), heads([[1.0, 0.0], [0.0, 0.0]]), heads([[8.0, 0.0], [0.0, 4.0]])
    )
    np.testing.assert_allclose(out[0, 0, 0], [6.0, 1.0], rtol=1e-6)


def test_bias_by_hand():
    # Logits 0 and 0, plus a bias of log 4 on the second key: weights 1/5 and 4/5.
    bias = jnp.array([0.0, np.log(4.0)])[None, None, None, :]
    out = dot_product_attention(
        heads([[0.0, 0.0]]),
        heads([[1.0, 0.0], [0.0, 1.0]]),
        heads([[5.0, 0.0], [0.0, 5.0]]),
        bias=bias,
    )
    np.testing.assert_allclose(out[0, 0, 0], [1.0, 4.0], rtol=1e-6)


def test_a_masked_key_has_no_weight_at_all():
    bias = masks.to_bias(jnp.array([True, False]))[None, None, None, :]
    out = dot_product_attention(
        heads([[1.0]]),
        heads([[1.0], [50.0]]),
        heads([[3.0], [np.inf]]).at[0, 1].set(1e30),
        bias=bias,
    )
    np.testing.assert_array_equal(out[0, 0, 0], [3.0])


def test_masks():
    valid = jnp.array([[True, True, False]])
    np.testing.assert_array_equal(
        masks.padding_mask(valid, valid)[0, 0], [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    )
    np.testing.assert_array_equal(masks.causal_mask(3)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    segments = jnp.array([[1, 1, 2]])
    np.testing.assert_array_equal(
        masks.segment_mask(segments, segments)[0, 0], [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    )


def test_kernels_are_flattened_head_by_head():
    # Two heads of size 1 on d = 2. Identity projections split the input: head h attends with
    # component h alone.
    eye = jnp.eye(2)
    params = {name: {"kernel": eye} for name in ("query", "key", "value", "out")}
    attention = MultiHeadDotProductAttention(num_heads=2, head_dim=1)
    x = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    y = attention.apply({"params": params}, x, x)
    # Query 0: head 0 has logits (1, 0), weights (e, 1) / (e + 1), values (1, 0); head 1 has logits
    # (0, 0), values (0, 2), so 1. Query 1: head 0 has logits (0, 0), so 1/2; head 1 has logits (0,
    # 4), weight e^4 / (e^4 + 1) on the value 2.
    e = np.e
    np.testing.assert_allclose(y[0], [[e / (e + 1), 1.0], [0.5, 2 * e**4 / (e**4 + 1)]], rtol=1e-5)


def test_query_kernel_starts_scaled_by_head_dim():
    # Fan-in initialisation has std 1 / sqrt(d); the query's has std 1 / sqrt(d * head_dim).
    attention = MultiHeadDotProductAttention(num_heads=8, head_dim=16)
    x = jnp.ones((1, 2, 64))
    params = nn.meta.unbox(jax.jit(attention.init)(jax.random.key(0), x, x))["params"]
    assert abs(params["key"]["kernel"].std() * 8 - 1) < 0.05
    assert abs(params["query"]["kernel"].std() * 8 * 4 - 1) < 0.05


def test_dropout_is_shared_by_the_queries_of_a_head():
    attention = MultiHeadDotProductAttention(num_heads=1, head_dim=4, dropout_rate=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 16, 4))
    params = jax.jit(attention.init)(jax.random.key(1), x, x)

    @jax.jit
    def attend(key):
        return attention.apply(params, same, x, deterministic=False, rngs={"dropout": key})

    # Identical queries see identical weights and, with a shared mask, identical results.
    same = jnp.broadcast_to(x[:, :1], x.shape)
    y = attend(jax.random.key(2))
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)
    assert np.abs(y - attend(jax.random.key(3))).max() > 1e-3
