"""The cache of a layer with a window, place by place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from upcycle_jax.layers.attention import GROWING_CACHE
from upcycle_jax.layers.causal_attention import GroupedQueryAttention, NextPosition, Prefill

ATTENTION = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=3, scale=0.5, window=3)
ROOM = 7
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, ROOM, 8)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(jax.jit(ATTENTION.init)(jax.random.key(0), X, None)["params"])


def places(caches):
    """Keys by place, `[C, rows, heads, D]`."""
    return np.asarray(caches[GROWING_CACHE]["cached_key"]).transpose(2, 0, 1, 3)


# Index i is in place i modulo 3, and the last three are kept: of indices 0 to 4 these are 3, 4, 2;
# of 0 and 1 both, and nothing in place 2.
@pytest.mark.parametrize(("length", "held"), [(5, [3, 4, 2]), (3, [0, 1, 2]), (2, [0, 1, None])])
def test_a_window_is_a_ring(length, held, params):
    @jax.jit
    def two_steps(params):
        _, first = ATTENTION.apply(
            {"params": params}, X[:, :length], None, step=Prefill(ROOM), mutable=[GROWING_CACHE]
        )
        _, second = ATTENTION.apply(
            {"params": params, **first},
            X[:, length : length + 1],
            None,
            step=NextPosition(jnp.int32(length), jnp.zeros(2, jnp.int32), ROOM),
            mutable=[GROWING_CACHE],
        )
        return first, second

    keys = np.asarray(X @ params["key"]["kernel"]).reshape(2, ROOM, 2, 3)
    before, after = two_steps(params)
    for place, index in enumerate(held):
        want = np.zeros((2, 2, 3)) if index is None else keys[:, index]
        np.testing.assert_allclose(places(before)[place], want, atol=1e-6)
    # The next index takes the place of the one that it no longer sees.
    held[length % 3] = length
    for place, index in enumerate(held):
        np.testing.assert_allclose(places(after)[place], keys[:, index], atol=1e-6)


def test_one_position_after_the_other_gives_what_all_at_once_do(params):
    # The second row begins at index 2: what stands before it is not seen.
    starts = jnp.array([0, 2])
    visible = jnp.arange(ROOM) >= starts[:, None]
    mask = visible[:, None, :, None] == visible[:, None, None, :]
    whole = jax.jit(ATTENTION.apply)({"params": params}, X, None, mask)

    @jax.jit
    def steps(params):
        _, caches = ATTENTION.apply(
            {"params": params}, X[:, :2], None, step=Prefill(ROOM), mutable=[GROWING_CACHE]
        )
        outputs = []
        for index in range(2, ROOM):
            output, caches = ATTENTION.apply(
                {"params": params, **caches},
                X[:, index : index + 1],
                None,
                step=NextPosition(jnp.int32(index), starts, ROOM),
                mutable=[GROWING_CACHE],
            )
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    np.testing.assert_allclose(steps(params), whole[:, 2:], atol=1e-5)
