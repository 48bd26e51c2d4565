"""The hand-written derivatives are those of the plain form."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.layers import cpu_attention
from upcycle_jax.layers.attention import MultiHeadDotProductAttention
from upcycle_jax.layers.causal_attention import GroupedQueryAttention
from upcycle_jax.layers.full_attention import FullAttention


def _arrays(lengths: dict[str, int]) -> list[np.ndarray]:
    """`[2, length, 3, 4]` each."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, length, 3, 4)).astype(np.float32) for length in lengths.values()]


def _plain(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    logits = jnp.einsum("blnd,bmnd->bnlm", query, key) + bias
    return jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(logits, axis=-1), value)


def _by_hand(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    return cpu_attention.attended(cpu_attention.scores(query, key) + bias, value)


def test_a_case_worked_by_hand():
    # Logits ln 3 and 0: numerators 1 and 1/3 (the largest is subtracted), weights 3/4 and 1/4. Of
    # values 8 and 4 that is 7. A logit's gradient is w (g - mean g) with g the values: 3/4 (8 - 7)
    # and 1/4 (4 - 7); a value's is its weight.
    logits = jnp.log(jnp.array([3.0, 1.0])).reshape(1, 1, 1, 2)
    value = jnp.array([8.0, 4.0]).reshape(1, 2, 1, 1)
    out, pull = jax.vjp(cpu_attention.attended, logits, value)
    of_logits, of_value = pull(jnp.ones_like(out))
    np.testing.assert_allclose(out.ravel(), [7.0], rtol=1e-6)
    np.testing.assert_allclose(of_logits.ravel(), [0.75, -0.75], rtol=1e-5)
    np.testing.assert_allclose(of_value.ravel(), [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 2)])
def test_values_and_gradients_are_those_of_the_plain_form(queries, keys):
    query, key, value, grad = _arrays(
        {"query": queries, "key": keys, "value": keys, "grad": queries}
    )
    bias = np.random.default_rng(1).normal(size=(2, 3, queries, keys)).astype(np.float32)
    # A forbidden pair, and a query that may attend to nothing: its logits are all the same in
    # float32, where what is added to -1e10 is lost.
    bias[0, :, 0, 1] = bias[1, :, 2] = -1e10

    @functools.partial(jax.jit, static_argnums=0)
    def run(function):
        out, pull = jax.vjp(function, query, key, value, bias)
        return out, *pull(grad)

    for ours, plain in zip(run(_by_hand), run(_plain), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_it_serves_float32_on_cpus_where_there_is_more_than_one_query():
    many, one = jnp.zeros((2, 4, 3, 8)), jnp.zeros((2, 1, 3, 8))
    assert cpu_attention.is_faster(many, many, many)
    assert not cpu_attention.is_faster(one, many, many)
    assert not cpu_attention.is_faster(many, many, many.astype(jnp.bfloat16))


X = jax.random.normal(jax.random.key(2), (2, 6, 16))


def _grouped(softcap: float | None = None):
    layer = GroupedQueryAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, scale=0.5, window=4, softcap=softcap
    )
    angles = jnp.arange(6.0)[None, :, None] * jnp.array([1.0, 0.1, 0.01, 0.001])  # [1, L, D / 2]
    visible = jnp.arange(6)[None, None, None] >= jnp.array([0, 2])[:, None, None, None]
    return layer, (angles, visible)


LAYERS = {
    "T5": (
        MultiHeadDotProductAttention(num_heads=2, head_dim=8),
        (X, jax.random.normal(jax.random.key(3), (1, 2, 6, 6))),
    ),
    "grouped queries, rotary, a window": _grouped(),
    "the same with a cap": _grouped(softcap=2.0),
    "vision": (FullAttention(num_heads=2), (X,)),
}


@functools.cache
def _parameters(family):
    layer, rest = LAYERS[family]
    return nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), X, *rest)["params"])


def _values_and_gradients(family, form):
    layer, rest = LAYERS[family]

    def twice(params, x):
        def one(x, _):
            return x + layer.apply({"params": params}, x, *rest), None

        if form == "plain loop":
            return one(one(x, None)[0], None)[0]
        return jax.lax.scan(jax.checkpoint(one), x, None, length=2)[0]

    weights = jnp.cos(jnp.arange(X.size).reshape(X.shape))
    loss = lambda params, x: jnp.sum(twice(params, x) * weights)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(_parameters(family), X)


@functools.cache
def _of_the_plain_form(family):
    """In a plain loop, in which nothing is computed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "is_faster", lambda *_: False)
        return _values_and_gradients(family, "plain loop")


@pytest.mark.parametrize("form", ["plain loop", "computed again, scanned"])
@pytest.mark.parametrize("family", LAYERS)
def test_layers_of_every_family_have_the_gradients_of_the_plain_form(family, form):
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5),
        _values_and_gradients(family, form),
        _of_the_plain_form(family),
    )
