"""Gather and scatter against the plain one-hot einsum form, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import dispatch
from upcycle_jax.moe.routing import ExpertsChoose, Group, TokensChoose

S, D, E, C = 12, 5, 3, 4


def routed(router, logits):
    return router.route(
        Group(logits, E, jnp.ones(S, bool), jnp.ones(S), jnp.float32(S)), capacity=C
    ).plan


def einsum_moe(tokens, logits, expert_kernels, router):
    """The oracle: a dispatch mask and a combine array of `[S, E, C]`, two einsums."""
    assignment = routed(router, logits)
    mask = jax.nn.one_hot(assignment.token_index, S)  # [E, C, S]; index S gives a row of zeros
    inputs = jnp.einsum("sd,ecs->ecd", tokens, mask)
    outputs = jnp.tanh(jnp.einsum("ecd,edf->ecf", inputs, expert_kernels))
    return jnp.einsum("ecf,ecs,ec->sf", outputs, mask, assignment.combine_weight)


def gather_moe(tokens, logits, expert_kernels, router):
    assignment = routed(router, logits)
    inputs = dispatch.dispatch(tokens, assignment)
    outputs = jnp.tanh(jnp.einsum("ecd,edf->ecf", inputs, expert_kernels))
    return dispatch.combine(outputs, assignment, group_size=S)


ROUTERS = [
    ExpertsChoose(),
    ExpertsChoose(renormalize=True),
    TokensChoose(),
    TokensChoose(renormalize=True),
    TokensChoose(softmax_order="after_top_k"),
    TokensChoose(num_selected_experts=1, batch_prioritized=True),
]


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_gather_equals_one_hot_einsum(router):
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = jax.random.normal(keys[0], (S, D))
    logits = jax.random.normal(keys[1], (S, E))
    kernels = jax.random.normal(keys[2], (E, D, D))
    out = jax.random.normal(keys[3], (S, D))

    def loss(form):
        return lambda *args: jnp.sum(form(*args, router) * out)

    np.testing.assert_allclose(
        gather_moe(tokens, logits, kernels, router),
        einsum_moe(tokens, logits, kernels, router),
        atol=1e-5,
    )
    got = jax.jit(jax.grad(loss(gather_moe), argnums=(0, 1, 2)))(tokens, logits, kernels)
    want = jax.jit(jax.grad(loss(einsum_moe), argnums=(0, 1, 2)))(tokens, logits, kernels)
    for g, w, name in zip(got, want, ("tokens", "logits", "kernels"), strict=True):
        assert np.abs(w).max() > 0, name
        np.testing.assert_allclose(g, w, atol=1e-5, err_msg=name)


def test_identity_experts_return_tokens_times_their_summed_weights():
    tokens = jax.random.normal(jax.random.key(0), (S, D))
    logits = jax.random.normal(jax.random.key(1), (S, E))
    assignment = routed(TokensChoose(), logits)
    y = dispatch.combine(dispatch.dispatch(tokens, assignment), assignment, group_size=S)
    np.testing.assert_allclose(y, tokens * assignment.weight_per_token(S)[:, None], atol=1e-6)


def test_empty_slots_are_zero_and_add_nothing():
    # Two tokens, one expert, three slots: token 1, empty, token 0.
    assignment = dispatch.Assignment(
        token_index=jnp.array([[1, 2, 0]]), combine_weight=jnp.array([[0.5, 0.0, 2.0]])
    )
    tokens = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    np.testing.assert_array_equal(
        dispatch.dispatch(tokens, assignment), [[[2, 20], [0, 0], [1, 10]]]
    )
    # A nonsense output in the empty slot must not reach any token.
    outputs = jnp.array([[[2.0, 20.0], [7.0, 7.0], [1.0, 10.0]]])
    np.testing.assert_allclose(
        dispatch.combine(outputs, assignment, group_size=2), [[2.0, 20.0], [1.0, 10.0]]
    )
    np.testing.assert_array_equal(assignment.experts_per_token(2), [1, 1])


def test_combining_accumulates_in_float32():
    # 1 + 64 * 2^-9: in bfloat16 each addition of 2^-9 to 1 would round away.
    assignment = dispatch.Assignment(
        token_index=jnp.zeros((65, 1), jnp.int32), combine_weight=jnp.ones((65, 1))
    )
    outputs = jnp.full((65, 1, 1), 2.0**-9, jnp.bfloat16).at[0].set(1.0)
    y = dispatch.combine(outputs, assignment, group_size=1)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 1.125)


def test_renormalising_underflowed_weights_gives_zero_not_nan():
    assignment = dispatch.Assignment(
        token_index=jnp.array([[0, 1]]), combine_weight=jnp.array([[0.0, 0.25]])
    )
    weights = dispatch.renormalized(assignment, group_size=2).combine_weight
    np.testing.assert_allclose(weights, [[0.0, 1.0]])
    gradient = jax.grad(
        lambda w: dispatch.renormalized(
            assignment.replace(combine_weight=w), group_size=2
        ).combine_weight.sum()
    )
    assert np.isfinite(gradient(assignment.combine_weight)).all()
