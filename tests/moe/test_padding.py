"""Padding takes no expert's place and has no weight in any loss, statistic or bias, with every
router and under every policy; T5X mode keeps Flaxformer's way.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe.balance import moved
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.moe.layer_stats import LAYER_STATS
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    HashTop1,
    LossFreeTopK,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)

ROUTERS = [
    ExpertsChoose(),
    TokensChoose(),
    TokensChoose(renormalize=True, batch_prioritized=True),
    SwitchTop1(),
    SigmoidTopK(),
    LossFreeTopK(),
    HashTop1(),
    DroplessTopK(),
    SoftMoe(),
]
NAMES = [f"{type(router).__name__}{i}" for i, router in enumerate(ROUTERS)]
WIDTH, LENGTH = 4, 4
# Four rows with tokens, two of nothing but padding; groups of 8 tokens are two rows each.
LENGTHS = np.array([4, 2, 1, 3, 0, 0])
VALID = np.arange(LENGTH) < LENGTHS[:, None]


def make(router, router_scale=0.5, **settings):
    """A layer whose experts run short of room, as a function of tokens, realness and ids; its
    parameters are drawn once.
    """
    moe = {"num_experts": 4, "group_size": 8, "min_expert_capacity": 1}
    factors = dict.fromkeys(("train_expert_capacity_factor", "eval_expert_capacity_factor"), 0.5)
    layer = MoeLayer(MoeSettings(**moe | factors | settings), router, hidden=4)
    x, ids = jnp.zeros((2, LENGTH, WIDTH)), jnp.zeros((2, LENGTH), jnp.int32)
    rng = np.random.default_rng(0)
    params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, None, ids)["params"])
    params = {
        name: jax.tree.map(
            lambda leaf, s=router_scale if name == "router" else 0.5: jnp.asarray(
                s * rng.normal(size=leaf.shape), jnp.float32
            ),
            tree,
        )
        for name, tree in params.items()
    }

    @functools.partial(jax.jit, static_argnames="train")
    def run(x, valid, ids, *, train):
        y, left = layer.apply({"params": params}, x, valid, ids, train=train, mutable=[LAYER_STATS])
        return y, left[LAYER_STATS]["stats"]

    return run


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*VALID.shape, WIDTH)).astype(np.float32)
    return np.where(VALID[..., None], x, 0), np.where(VALID, rng.integers(1, 99, VALID.shape), 0)


def close(got, want, leave_out=()):
    assert jax.tree.structure(got) == jax.tree.structure(want)  # None: what nobody asks for
    for name, value in vars(want).items():
        if value is not None and name not in leave_out:
            np.testing.assert_allclose(getattr(got, name), value, atol=1e-6, err_msg=name)


# Alone in its sequence a router does what it does in a group; those that differ most are enough.
# The group of a soft router is a sequence in either case.
INDEPENDENT = (ExpertsChoose, DroplessTopK)
# Tokens that choose differ in what they prefer, not in what padding does: of them those with an
# order, a loss or a bias of their own are enough.
OTHERS = (TokensChoose(), SwitchTop1(), SigmoidTopK())
CASES = [
    pytest.param(
        router,
        independent,
        id=f"{name}-{'independent' if independent else 'grouped'}",
        marks=[pytest.mark.slow]
        if router in OTHERS or (independent and type(router) not in INDEPENDENT)
        else [],
    )
    for router, name in zip(ROUTERS, NAMES, strict=True)
    for independent in (False, True)
]


@pytest.mark.parametrize(("router", "independent"), CASES)
def test_padding_changes_no_real_token_and_no_statistic(router, independent):
    run = make(router, independent=independent)
    x, ids = tokens()
    train = not independent
    y, stats = run(x, VALID, ids, train=train)

    # Whatever stands at padded positions: large vectors that every expert would like to have.
    rng = np.random.default_rng(1)
    garbage = np.where(VALID[..., None], x, 9 * rng.normal(size=x.shape).astype(np.float32))
    other_y, other = run(garbage, VALID, np.where(VALID, ids, 7), train=train)
    np.testing.assert_allclose(other_y[VALID], y[VALID], atol=1e-6)
    close(other, stats)
    # A bias that balances moves likewise.
    np.testing.assert_array_equal(
        moved(jnp.zeros(4), other.chosen, rate=0.1), moved(jnp.zeros(4), stats.chosen, rate=0.1)
    )

    # Rows of padding less. They have slots of their own, which stay empty.
    fewer_y, fewer = run(x[:4], VALID[:4], ids[:4], train=train)
    np.testing.assert_allclose(y[:4][VALID[:4]], fewer_y[VALID[:4]], atol=1e-6)
    close(stats, fewer, leave_out=("capacity",))
    # Only what is real is counted, and nothing is processed beside it.
    assert float(stats.tokens) == VALID.sum() == 10
    assert float(jnp.sum(stats.load)) <= 10 * 4 + 1e-3
    assert not np.any(y[~VALID])


def test_padding_takes_places_in_t5x_mode_and_where_it_is_asked_for():
    # Every second token is padding, and with a router of zeros all logits tie: everyone asks for
    # expert 0, whose one slot goes to the first of a group in token order. A group of 8 serves one
    # token; Flaxformer makes groups of 2 here (a multiple of 4 experts, 8 tokens), of one real
    # token each.
    valid = np.array([[False, True] * 2] * 2)
    x, ids = np.where(valid[..., None], np.ones((2, 4, WIDTH), np.float32), 0), valid.astype(int)
    ignoring, off = {"ignore_padding_tokens": True}, {"ignore_padding_tokens": False}
    for settings, served, counted in (
        ({}, 1, 4),
        (off, 0, 4),
        ({"t5x_mode": True}, 0, 8),
        ({"t5x_mode": True} | off, 0, 8),
        ({"t5x_mode": True} | ignoring, 4, 4),
    ):
        run = make(TokensChoose(num_selected_experts=1), router_scale=0.0, **settings)
        y, stats = run(x, valid, ids, train=True)
        assert np.any(y[valid], axis=-1).sum() == served, settings
        assert float(stats.tokens) == counted, settings
