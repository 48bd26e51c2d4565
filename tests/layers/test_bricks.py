"""Norm, MLP, embedding and projections, by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from upcycle_jax.layers.embedding import Embed
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.norm import RMSNorm
from upcycle_jax.layers.projection import Projection


def test_rms_norm_by_hand():
    # Mean square of (3, 4) is 12.5; no mean is subtracted.
    y = RMSNorm().apply({"params": {"scale": jnp.array([1.0, 2.0])}}, jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(y, np.array([3.0, 8.0]) / np.sqrt(12.5 + 1e-6), rtol=1e-6)


def test_rms_norm_of_zero_is_zero():
    np.testing.assert_array_equal(
        RMSNorm().apply({"params": {"scale": jnp.ones(3)}}, jnp.zeros((2, 3))), np.zeros((2, 3))
    )


def test_rms_norm_is_computed_in_float32():
    # The square of 300 overflows nothing, but its bfloat16 sum over 1000 entries would be far off.
    x = jnp.full((1, 1000), 300.0, jnp.bfloat16)
    y = RMSNorm(dtype=jnp.bfloat16).apply({"params": {"scale": jnp.ones(1000)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, rtol=1e-2)


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_gated_mlp_by_hand():
    rng = np.random.default_rng(0)
    wi_0, wi_1, wo = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.normal(size=(5, 3))
    x = rng.normal(size=(2, 4, 3))
    params = {
        "wi_0": {"kernel": jnp.asarray(wi_0)},
        "wi_1": {"kernel": jnp.asarray(wi_1)},
        "wo": {"kernel": jnp.asarray(wo)},
    }
    y = MlpBlock(hidden=5).apply({"params": params}, jnp.asarray(x))
    want = (tanh_gelu(x @ wi_0) * (x @ wi_1)) @ wo
    np.testing.assert_allclose(y, want, atol=1e-5)
    # The exact GELU is a different function.
    exact = (x @ wi_0) * 0.5 * (1 + special.erf((x @ wi_0) / np.sqrt(2)))
    assert np.abs((exact * (x @ wi_1)) @ wo - y).max() > 1e-4


def test_t5_1_0_mlp_has_one_input_kernel():
    variables = MlpBlock(hidden=5, activations=("relu",)).init(
        jax.random.key(0), jnp.ones((1, 2, 3))
    )
    assert set(variables["params"]) == {"wi", "wo"}


def test_mlp_dropout_is_shared_along_the_length():
    mlp = MlpBlock(hidden=64, dropout_rate=0.5)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (2, 1, 8)), (2, 6, 8))
    params = mlp.init(jax.random.key(1), x)
    y = mlp.apply(params, x, False, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)


def test_embedding_looks_up_and_refuses_what_is_outside():
    table = jnp.arange(6.0).reshape(3, 2)
    embed = Embed(vocab_size=3, features=2)
    y = embed.apply({"params": {"embedding": table}}, jnp.array([[2, 0, 3]]))
    np.testing.assert_array_equal(y[0, :2], [[4, 5], [0, 1]])
    assert np.isnan(y[0, 2]).all()


def test_embedding_as_output():
    table = jnp.arange(6.0).reshape(3, 2)
    logits = Embed(vocab_size=3, features=2).apply(
        {"params": {"embedding": table}}, jnp.array([[1.0, -1.0]]), method="attend"
    )
    np.testing.assert_array_equal(logits, [[-1.0, -1.0, -1.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_float32_with_logical_axes_whatever_the_activations(dtype):
    module = Projection(features=4, kernel_axes=("embed", "mlp"), dtype=dtype)
    variables = module.init(jax.random.key(0), jnp.ones((2, 3)))
    kernel = variables["params"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned) and kernel.names == ("embed", "mlp")
    assert kernel.value.dtype == jnp.float32
    assert module.apply(variables, jnp.ones((2, 3))).dtype == dtype
