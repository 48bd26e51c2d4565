"""Forms of dispatch against the definition, a sum over experts of masked products: values and
gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import dispatch, looped_experts
from upcycle_jax.moe.dispatch import Assignment, OneHot, SoftDispatch, TokenChoices
from upcycle_jax.moe.experts import ExpertBank
from upcycle_jax.moe.routing import DroplessTopK, ExpertsChoose, Group, TokensChoose

S, D, E, C, F = 12, 5, 3, 4, 7


def routed(router, logits):
    """The dispatcher of a group, with a leading G of 1."""
    group = Group(logits, E, jnp.ones(S, bool), jnp.ones(S), jnp.float32(S))
    return jax.tree.map(lambda leaf: leaf[None], router.route(group, capacity=C).dispatcher)


def by_definition(tokens, logits, kernels, router):
    """A dispatch mask and a combine array of `[S, E, C]`, two einsums."""
    assignment = jax.tree.map(lambda leaf: leaf[0], routed(router, logits))
    mask = jax.nn.one_hot(assignment.token_index, S)  # [E, C, S]; index S gives a row of zeros
    inputs = jnp.einsum("sd,ecs->ecd", tokens, mask)
    hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", inputs, kernels["wi"]))
    outputs = jnp.einsum("ecf,efd->ecd", hidden, kernels["wo"])
    return jnp.einsum("ecd,ecs,ec->sd", outputs, mask, assignment.combine_weight)


def in_form(form):
    def apply(tokens, logits, kernels, router):
        dispatcher = jax.vmap(lambda one: one.in_form(form, S))(routed(router, logits))
        return dispatcher.apply(ExpertBank(kernels, activations=("relu",)), tokens[None])[0]

    return apply


def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    kernels = {
        "wi": jax.random.normal(keys[2], (E, D, F)),
        "wo": jax.random.normal(keys[3], (E, F, D)),
    }
    tokens, logits = jax.random.normal(keys[0], (S, D)), jax.random.normal(keys[1], (S, E))
    return (tokens, logits, kernels), jax.random.normal(keys[4], (S, D))


# The forms get slots and weights, however they came about: where experts choose, where tokens
# choose several, and one. Other weights of the same slots are left to the longer run.
ROUTERS = [
    ExpertsChoose(renormalize=True),
    TokensChoose(),
    TokensChoose(num_selected_experts=1, batch_prioritized=True),
    *(
        pytest.param(router, marks=pytest.mark.slow)
        for router in (
            ExpertsChoose(),
            TokensChoose(renormalize=True),
            TokensChoose(softmax_order="after_top_k"),
        )
    ),
]


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_every_form_equals_the_definition(router, monkeypatch):
    args, target = problem()

    def run(form):
        def loss(*args):
            out = form(*args, router)
            return jnp.sum(out * target), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)

    (_, want), want_gradients = run(by_definition)
    got = {"gathered": run(in_form("auto")), "one-hot": run(in_form("one_hot"))}
    monkeypatch.setattr(looped_experts, "LARGE", 0)
    got["looped"] = run(in_form("auto"))
    for form, ((_, out), gradients) in got.items():
        np.testing.assert_allclose(out, want, atol=1e-5, err_msg=form)
        for g, w in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
            assert np.abs(w).max() > 0
            np.testing.assert_allclose(g, w, atol=1e-5, err_msg=form)


def test_forms_that_settings_ask_for():
    (_, logits, _), _ = problem()
    slots, choices = routed(TokensChoose(), logits), routed(DroplessTopK(), logits)
    kinds = {
        form: [
            type(jax.eval_shape(jax.vmap(lambda one, form=form: one.in_form(form, S)), made))
            for made in (slots, choices)
        ]
        for form in ("auto", "sorted", "gather", "one_hot")
    }
    assert kinds["auto"] == kinds["sorted"] == [Assignment, TokenChoices]
    assert kinds["gather"] == [Assignment, Assignment]
    assert kinds["one_hot"] == [OneHot, OneHot]


def test_identity_experts_return_tokens_times_their_summed_weights():
    tokens = jax.random.normal(jax.random.key(0), (S, D))
    logits = jax.random.normal(jax.random.key(1), (S, E))
    assignment = jax.tree.map(lambda leaf: leaf[0], routed(TokensChoose(), logits))
    y = dispatch.scatter(dispatch.gather(tokens, assignment.token_index), assignment, S)
    np.testing.assert_allclose(y, tokens * assignment.weight_per_token(S)[:, None], atol=1e-6)


def test_empty_slots_are_zero_and_add_nothing():
    # Two tokens, one expert, three slots: token 1, empty, token 0.
    assignment = dispatch.Assignment(
        token_index=jnp.array([[1, 2, 0]]), combine_weight=jnp.array([[0.5, 0.0, 2.0]])
    )
    tokens = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    np.testing.assert_array_equal(
        dispatch.gather(tokens, assignment.token_index), [[[2, 20], [0, 0], [1, 10]]]
    )
    # A nonsense output in the empty slot must not reach any token.
    outputs = jnp.array([[[2.0, 20.0], [7.0, 7.0], [1.0, 10.0]]])
    np.testing.assert_allclose(dispatch.scatter(outputs, assignment, 2), [[2.0, 20.0], [1.0, 10.0]])
    np.testing.assert_array_equal(assignment.experts_per_token(2), [1, 1])


def test_combining_accumulates_in_float32():
    # 1 + 64 * 2^-9: in bfloat16 each addition of 2^-9 to 1 would round away.
    assignment = dispatch.Assignment(
        token_index=jnp.zeros((65, 1), jnp.int32), combine_weight=jnp.ones((65, 1))
    )
    outputs = jnp.full((65, 1, 1), 2.0**-9, jnp.bfloat16).at[0].set(1.0)
    y = dispatch.scatter(outputs, assignment, 1)
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


INDEX = jnp.array([[0, 2], [1, 3], [3, 0]])
WEIGHTS = jnp.array([[0.5, 0.25], [1.0, 0.0], [0.75, 2.0]])


@pytest.mark.parametrize(
    "dispatcher",
    [
        Assignment(INDEX, WEIGHTS),
        OneHot(INDEX, WEIGHTS),
        TokenChoices(jnp.array([[0, 1], [2, 3], [1, 2]]), WEIGHTS, num_experts=3),
        SoftDispatch(
            jnp.arange(18, dtype=jnp.float32).reshape(3, 3, 2) / 18,
            jnp.arange(18, 0, -1, dtype=jnp.float32).reshape(3, 3, 2) / 18,
        ),
    ],
    ids=lambda dispatcher: type(dispatcher).__name__,
)
def test_parts_add_up_and_copies_merge(dispatcher):
    """Three experts, the first and the last of which are copies of one."""
    tokens = jnp.arange(1, 7, dtype=jnp.float32).reshape(1, 3, 2)

    def outputs(one, factors):
        # Experts that multiply their inputs by a factor.
        eyes = jnp.stack([jnp.eye(2)] * len(factors))
        kernels = {"wi": eyes, "wo": eyes * jnp.asarray(factors)[:, None, None]}
        bank = ExpertBank(kernels, activations=("linear",))
        group = jax.tree.map(lambda leaf: leaf[None], one)
        return jax.jit(lambda group: group.apply(bank, tokens))(group)

    want = outputs(dispatcher, [3.0, 2.0, 3.0])
    parts = outputs(dispatcher.part(0, 1), [3.0]) + outputs(dispatcher.part(1, 2), [2.0, 3.0])
    members = jnp.array([True, False, True])
    merged = outputs(dispatcher.merged(members, 3), [3.0]) + outputs(dispatcher.part(1, 1), [2.0])
    np.testing.assert_allclose(parts, want, rtol=1e-6)
    np.testing.assert_allclose(merged, want, rtol=1e-6)
