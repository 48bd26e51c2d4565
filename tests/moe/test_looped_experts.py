"""Experts applied one by one and all at once are the same function of the same parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import looped_experts
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose
from upcycle_jax.partitioning import Partitioner

SETTINGS = MoeSettings(num_experts=4, group_size=16)
BOTH_WAYS = pytest.mark.parametrize(
    "router", [ExpertsChoose(), TokensChoose()], ids=["experts", "tokens"]
)


@functools.cache
def parameters(router, dtype):
    """Of the layer, and what it is applied to; drawn with NumPy, which compiles nothing."""
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 16, 8)).astype(np.float32)
    layer = MoeLayer(SETTINGS, router, hidden=12, dtype=dtype)
    specs = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(1), x))["params"]
    draw = lambda leaf: random.normal(0, leaf.shape[-2] ** -0.5, leaf.shape).astype(leaf.dtype)
    return jax.tree.map(draw, specs), x


def outputs_and_gradients(router, dropout_rate: float = 0.0, dtype=jnp.float32):
    layer = MoeLayer(SETTINGS, router, hidden=12, dropout_rate=dropout_rate, dtype=dtype)

    def loss(params, x):
        y, _ = layer.apply(
            {"params": params},
            x,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=[LAYER_STATS],
        )
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        *parameters(router, dtype)
    )
    return y, gradients


all_at_once = functools.cache(outputs_and_gradients)
"""Where no test has asked for the loop yet."""


# Without dropout the forms are compared on several devices.
@BOTH_WAYS
@pytest.mark.parametrize("dropout_rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_one_by_one_equals_all_at_once(monkeypatch, router, dropout_rate):
    at_once = all_at_once(router, dropout_rate)
    monkeypatch.setattr(looped_experts, "LARGE", 0)
    looped = outputs_and_gradients(router, dropout_rate)
    assert jax.tree.structure(looped) == jax.tree.structure(at_once)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), looped, at_once
    )


def test_bfloat16_experts_have_float32_gradients_either_way(monkeypatch):
    at_once = outputs_and_gradients(ExpertsChoose(), dtype=jnp.bfloat16)
    monkeypatch.setattr(looped_experts, "LARGE", 0)
    looped = outputs_and_gradients(ExpertsChoose(), dtype=jnp.bfloat16)
    assert jax.tree.map(jnp.dtype, looped) == jax.tree.map(jnp.dtype, at_once)
    # bfloat16 has 8 bits: the forms round products and their sums at different places.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype("f4"), b.astype("f4"), rtol=0.05, atol=0.05
        ),
        looped,
        at_once,
    )


@BOTH_WAYS
def test_a_loop_over_experts_with_groups_on_several_devices(monkeypatch, router):
    # Four rows of 16 tokens are four groups, one per device.
    at_once = all_at_once(router, 0.0)
    monkeypatch.setattr(looped_experts, "LARGE", 0)
    with Partitioner(devices=tuple(jax.devices()[:4])).activate():
        assert looped_experts.is_faster(1)
        looped = outputs_and_gradients(router)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), looped, at_once
    )


def test_only_large_experts_on_a_cpu_that_holds_all_of_them_are_looped_over():
    assert looped_experts.is_faster(looped_experts.LARGE) and not looped_experts.is_faster(
        looped_experts.LARGE - 1
    )
    with Partitioner(num_expert_partitions=1).activate():
        assert looped_experts.is_faster(looped_experts.LARGE)
    with Partitioner(num_expert_partitions=4).activate():
        assert not looped_experts.is_faster(looped_experts.LARGE)
