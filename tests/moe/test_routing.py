"""Routing of one group, worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_jax.moe.dispatch import Assignment
from upcycle_jax.moe.routing import ExpertsChoose, Group, Router, Routing, TokensChoose

S = 4
# Rows are tokens, columns experts; every row sums to 1, so log(P) are logits whose softmax is P.
P = np.array(
    [
        [0.5, 0.3, 0.2],
        [0.6, 0.1, 0.3],
        [0.4, 0.35, 0.25],
        [0.1, 0.7, 0.2],
    ],
    np.float32,
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def routed(router: Router, capacity: int, logits, real, counted) -> Routing:
    group = Group(logits, logits.shape[1], real, counted, jnp.sum(counted))
    return router.route(group, capacity=capacity)


def route(router: Router, probabilities, *, capacity, real=None, counted=None) -> Routing:
    probabilities = jnp.asarray(probabilities, jnp.float32)
    real = jnp.ones(len(probabilities), bool) if real is None else jnp.asarray(real)
    counted = real.astype(jnp.float32) if counted is None else jnp.asarray(counted, jnp.float32)
    return routed(router, capacity, jnp.log(probabilities), real, counted)


def as_dense(assignment: Assignment, group_size: int) -> np.ndarray:
    """Combine weights `[S, E]`; a token that is dispatched with weight 0 would show as 0."""
    dense = np.zeros((group_size + 1, assignment.token_index.shape[0]), np.float32)
    weight = np.asarray(assignment.combine_weight)
    for expert, row in enumerate(np.asarray(assignment.token_index)):
        for slot, token in enumerate(row):
            dense[token, expert] += weight[expert, slot]
    return dense[:group_size]


def test_experts_take_their_best_tokens():
    routing = route(ExpertsChoose(), P, capacity=2)
    # Column 0: 0.6 (token 1), 0.5 (token 0). Column 1: 0.7 (3), 0.35 (2). Column 2: 0.3 (1), 0.25
    # (2).
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[1, 0], [3, 2], [1, 2]])
    np.testing.assert_allclose(
        routing.dispatcher.combine_weight, [[0.6, 0.5], [0.7, 0.35], [0.3, 0.25]], rtol=1e-6
    )
    assert routing.auxiliary_loss == 0.0
    # Every token has at least one expert.
    assert (routing.offered, routing.dropped) == (4.0, 0.0)


def test_experts_choose_renormalised():
    routing = route(ExpertsChoose(renormalize=True), P, capacity=2)
    # Token 0: expert 0 alone, 1. Token 1: experts 0 and 2, 0.6 / 0.9 and 0.3 / 0.9. Token 2:
    # experts 1 and 2, 0.35 / 0.6 and
    # 0.25 / 0.6. Token 3: expert 1 alone, 1.
    expected = [[1, 0, 0], [2 / 3, 0, 1 / 3], [0, 0.35 / 0.6, 0.25 / 0.6], [0, 1, 0]]
    np.testing.assert_allclose(as_dense(routing.dispatcher, S), expected, rtol=1e-5)


def test_tokens_without_an_expert_keep_nothing():
    routing = route(ExpertsChoose(renormalize=True), P, capacity=1)
    # Experts take tokens 1, 3, 1: tokens 0 and 2 get none.
    np.testing.assert_allclose(
        as_dense(routing.dispatcher, S),
        [[0, 0, 0], [2 / 3, 0, 1 / 3], [0, 0, 0], [0, 1, 0]],
        rtol=1e-5,
    )
    assert (routing.offered, routing.dropped) == (4.0, 2.0)


def test_experts_choose_ties_go_to_the_lowest_token():
    routing = route(ExpertsChoose(), np.full((4, 2), 0.5), capacity=2)
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[0, 1], [0, 1]])


def test_experts_choose_padding_takes_no_slot_when_ignored():
    routing = route(ExpertsChoose(), P, capacity=3, real=[True, False, True, False])
    # Tokens 0 and 2 are all there is; the third slot of each expert stays empty (index S).
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[0, 2, S], [2, 0, S], [2, 0, S]])
    np.testing.assert_allclose(routing.dispatcher.combine_weight[:, 2], 0.0)


def test_top_2_with_room_for_all():
    routing = route(TokensChoose(num_selected_experts=2), P, capacity=4)
    # First choices: 0, 0, 0, 1. Second choices: 1, 2, 1, 2.
    expected = [[0.5, 0.3, 0], [0.6, 0, 0.3], [0.4, 0.35, 0], [0, 0.7, 0.2]]
    np.testing.assert_allclose(as_dense(routing.dispatcher, S), expected, rtol=1e-6)
    # k-major: expert 1 lists token 3 (first choice) before tokens 0 and 2 (second choices).
    np.testing.assert_array_equal(
        routing.dispatcher.token_index, [[0, 1, 2, S], [3, 0, 2, S], [1, 3, S, S]]
    )
    assert (routing.offered, routing.dropped) == (8.0, 0.0)


def test_overflow_is_dropped_in_token_order_first_choices_first():
    routing = route(TokensChoose(num_selected_experts=2), P, capacity=2)
    # Expert 0 wants 0, 1, 2: token 2 is too many. Expert 1 wants 3, then 0, 2 as second choices:
    # token 2 is too many again.
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[0, 1], [3, 0], [1, 3]])
    np.testing.assert_allclose(
        as_dense(routing.dispatcher, S),
        [[0.5, 0.3, 0], [0.6, 0, 0.3], [0, 0, 0], [0, 0.7, 0.2]],
        rtol=1e-6,
    )
    assert (routing.offered, routing.dropped) == (8.0, 2.0)


def test_batch_prioritised_order_serves_confident_tokens_first():
    routing = route(TokensChoose(num_selected_experts=2, batch_prioritized=True), P, capacity=2)
    # Confidence 0.5, 0.6, 0.4, 0.7 orders tokens 3, 1, 0, 2. Expert 0's first choices come as 1, 0,
    # (2 dropped). Expert 1: 3, then second choices 0, (2 dropped). Expert 2: second choices 3, 1.
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[1, 0], [3, 0], [3, 1]])
    weights = [[0.6, 0.5], [0.7, 0.3], [0.2, 0.3]]
    np.testing.assert_allclose(routing.dispatcher.combine_weight, weights, rtol=1e-6)


def test_switch_drops_by_position_and_by_confidence():
    # Three tokens want expert 0, which has one slot: the first in order, or the most confident
    # (token 1).
    plain = route(TokensChoose(num_selected_experts=1), P, capacity=1)
    np.testing.assert_array_equal(plain.dispatcher.token_index, [[0], [3], [S]])
    prioritised = route(TokensChoose(num_selected_experts=1, batch_prioritized=True), P, capacity=1)
    np.testing.assert_array_equal(prioritised.dispatcher.token_index, [[1], [3], [S]])


def test_tokens_choose_renormalised_over_the_experts_that_process_them():
    routing = route(TokensChoose(num_selected_experts=2, renormalize=True), P, capacity=2)
    # As in the overflow case: token 0 keeps 0.5 and 0.3, token 1 0.6 and 0.3, token 2 nothing,
    # token 3 0.7 and 0.2.
    expected = [
        [0.5 / 0.8, 0.3 / 0.8, 0],
        [0.6 / 0.9, 0, 0.3 / 0.9],
        [0, 0, 0],
        [0, 0.7 / 0.9, 0.2 / 0.9],
    ]
    np.testing.assert_allclose(as_dense(routing.dispatcher, S), expected, rtol=1e-5)


def test_softmax_after_top_k():
    routing = route(
        TokensChoose(num_selected_experts=2, softmax_order="after_top_k"), P, capacity=4
    )
    # The softmax over two log-probabilities is their ratio: the same as renormalising.
    expected = [
        [0.5 / 0.8, 0.3 / 0.8, 0],
        [0.6 / 0.9, 0, 0.3 / 0.9],
        [0.4 / 0.75, 0.35 / 0.75, 0],
        [0, 0.7 / 0.9, 0.2 / 0.9],
    ]
    np.testing.assert_allclose(as_dense(routing.dispatcher, S), expected, rtol=1e-5)


def test_tokens_choose_ties_go_to_the_lowest_expert():
    routing = route(TokensChoose(num_selected_experts=2), np.full((3, 4), 0.25), capacity=3)
    np.testing.assert_array_equal(
        routing.dispatcher.token_index, [[0, 1, 2], [0, 1, 2], [3, 3, 3], [3, 3, 3]]
    )


def test_tokens_choose_padding_takes_no_slot_when_ignored():
    routing = route(
        TokensChoose(num_selected_experts=1), P, capacity=2, real=[False, True, True, True]
    )
    # Without token 0, expert 0 has room for tokens 1 and 2.
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[1, 2], [3, S], [S, S]])
    assert (routing.offered, routing.dropped) == (3.0, 0.0)


def test_padding_takes_slots_by_default():
    # Routed but not counted: token 0 fills a slot of expert 0, so token 2 is dropped.
    routing = route(
        TokensChoose(num_selected_experts=1), P, capacity=2, real=[True] * 4, counted=[0, 1, 1, 1]
    )
    np.testing.assert_array_equal(routing.dispatcher.token_index, [[0, 1], [3, S], [S, S]])
    assert (routing.offered, routing.dropped) == (3.0, 1.0)


def test_auxiliary_loss_by_hand():
    routing = route(TokensChoose(num_selected_experts=1), P, capacity=1)
    # First choices 0, 0, 0, 1: f = (3/4, 1/4, 0). Mean probabilities p = (1.6, 1.45, 0.95) / 4 =
    # (0.4, 0.3625, 0.2375). E^2 * mean(f p) = 9 * (0.3 + 0.090625 + 0) / 3 = 1.171875, drops or
    # not.
    np.testing.assert_allclose(routing.auxiliary_loss, 1.171875, rtol=1e-6)


def test_auxiliary_loss_is_k_at_balance():
    # Four tokens, four experts, K=2: token i prefers experts i and i+1, so each expert is wanted
    # twice.
    p = np.full((4, 4), 0.1)
    for i in range(4):
        p[i, i], p[i, (i + 1) % 4] = 0.5, 0.3
    routing = route(TokensChoose(num_selected_experts=2), p, capacity=4)
    np.testing.assert_allclose(routing.auxiliary_loss, 2.0, rtol=1e-6)


def test_auxiliary_loss_of_real_tokens_alone():
    with_padding = route(
        TokensChoose(num_selected_experts=2), P, capacity=4, real=[True, True, True, False]
    )
    without = route(TokensChoose(num_selected_experts=2), P[:3], capacity=4)
    np.testing.assert_allclose(with_padding.auxiliary_loss, without.auxiliary_loss, rtol=1e-6)


def test_a_group_of_padding_alone_is_finite():
    routing = route(TokensChoose(), P, capacity=4, real=[False] * 4)
    assert routing.auxiliary_loss == 0.0
    np.testing.assert_array_equal(routing.dispatcher.token_index, np.full((3, 4), S))


@pytest.mark.parametrize(("k", "message"), [(0, "at least 1, got 0")])
def test_bad_k(k, message):
    with pytest.raises(ValueError, match=message):
        TokensChoose(num_selected_experts=k)


def test_bad_softmax_order():
    with pytest.raises(ValueError, match="before_top_k.*after_top_k.*got 'never'"):
        TokensChoose(softmax_order="never")


# Tokens, experts, capacity, choices, prioritised: any two settings meet somewhere. Each row is a
# program of its own.
GROUPS = [
    (5, 3, 1, 1, False),
    (5, 3, 3, 2, True),
    (5, 3, 5, 3, True),
    (8, 4, 1, 2, True),
    (8, 4, 3, 3, False),
    (8, 4, 5, 1, True),
    (16, 4, 1, 3, True),
    (16, 4, 3, 1, True),
    (16, 4, 5, 2, False),
]


@st.composite
def groups(draw, num_tokens, num_experts):
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties happen.
    logits = (
        rng.integers(-2, 3, (num_tokens, num_experts))
        if draw(st.booleans())
        else rng.normal(size=(num_tokens, num_experts))
    )
    return np.asarray(logits, np.float32), rng.random(num_tokens) < 0.7


def reference_tokens_choose(logits, k, capacity, real, prioritised):
    """Slots handed out one by one, as the words say it."""
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
    preferences = np.argsort(-p, axis=1, kind="stable")[:, :k]
    order = np.argsort(-p.max(axis=1), kind="stable") if prioritised else np.arange(len(p))
    experts = [[] for _ in range(p.shape[1])]
    for choice in range(k):
        for token in order:
            expert = preferences[token, choice]
            if real[token] and len(experts[expert]) < capacity:
                experts[expert].append(token)
    return experts, p


@pytest.mark.parametrize(("num_tokens", "num_experts", "capacity", "k", "prioritised"), GROUPS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_tokens_choose_equals_handing_out_slots_one_by_one(
    num_tokens, num_experts, capacity, k, prioritised, data
):
    logits, real = data.draw(groups(num_tokens, num_experts))
    router = TokensChoose(num_selected_experts=k, batch_prioritized=prioritised)
    routing = routed(router, capacity, logits, real, np.float32(real))
    experts, p = reference_tokens_choose(logits, k, capacity, real, prioritised)
    index = np.asarray(routing.dispatcher.token_index)
    weight = np.asarray(routing.dispatcher.combine_weight)
    for e, tokens in enumerate(experts):
        np.testing.assert_array_equal(index[e], tokens + [len(p)] * (capacity - len(tokens)))
        np.testing.assert_allclose(weight[e, : len(tokens)], p[tokens, e], rtol=1e-5)
    assert float(routing.offered - routing.dropped) == sum(len(tokens) for tokens in experts)


@pytest.mark.parametrize(("num_tokens", "num_experts", "capacity"), [row[:3] for row in GROUPS])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_experts_choose_fills_every_slot_it_can(num_tokens, num_experts, capacity, data):
    logits, real = data.draw(groups(num_tokens, num_experts))
    routing = routed(ExpertsChoose(), capacity, logits, real, np.float32(real))
    index = np.asarray(routing.dispatcher.token_index)
    assert ((index < len(logits)).sum(axis=1) == min(capacity, real.sum())).all()
    for row in index:
        tokens = row[row < len(logits)]
        assert len(set(tokens)) == len(tokens) and real[tokens].all()
