"""Experts applied one by one and all at once are the same function of the same parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import slots
from upcycle_jax.moe.config import MoeConfig
from upcycle_jax.moe.layer import REPORTS, MoeLayer
from upcycle_jax.partitioning import Partitioner

CONFIG = MoeConfig(num_experts=4, group_size=16)


def outputs_and_gradients(stack: str, dropout_rate: float = 0.0, dtype=jnp.float32):
    layer = MoeLayer(CONFIG, stack, hidden=12, dropout_rate=dropout_rate, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (4, 16, 8))
    variables = nn.meta.unbox(layer.init(jax.random.key(1), x))

    def loss(params, x):
        y, _ = layer.apply(
            {"params": params},
            x,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=[REPORTS],
        )
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        variables["params"], x
    )
    return y, gradients


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_one_by_one_equals_all_at_once(monkeypatch, stack, dropout_rate):
    at_once = outputs_and_gradients(stack, dropout_rate)
    monkeypatch.setattr(slots, "LARGE", 0)
    looped = outputs_and_gradients(stack, dropout_rate)
    assert jax.tree.structure(looped) == jax.tree.structure(at_once)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), looped, at_once
    )


def test_bfloat16_experts_have_float32_gradients_either_way(monkeypatch):
    at_once = outputs_and_gradients("encoder", dtype=jnp.bfloat16)
    monkeypatch.setattr(slots, "LARGE", 0)
    looped = outputs_and_gradients("encoder", dtype=jnp.bfloat16)
    assert jax.tree.map(jnp.dtype, looped) == jax.tree.map(jnp.dtype, at_once)
    # bfloat16 has 8 bits: the forms round products and their sums at different places.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype("f4"), b.astype("f4"), rtol=0.05, atol=0.05
        ),
        looped,
        at_once,
    )


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_loop_over_experts_with_groups_on_several_devices(monkeypatch, stack):
    # Four rows of 16 tokens are four groups, one per device.
    at_once = outputs_and_gradients(stack)
    monkeypatch.setattr(slots, "LARGE", 0)
    with Partitioner(devices=tuple(jax.devices()[:4])).activate():
        assert slots.loops(1)
        looped = outputs_and_gradients(stack)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), looped, at_once
    )


def test_only_large_experts_on_a_cpu_that_holds_all_of_them_are_looped_over():
    assert slots.loops(slots.LARGE) and not slots.loops(slots.LARGE - 1)
    with Partitioner(num_expert_partitions=1).activate():
        assert slots.loops(slots.LARGE)
    with Partitioner(num_expert_partitions=4).activate():
        assert not slots.loops(slots.LARGE)
