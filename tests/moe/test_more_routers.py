"""Switch, sigmoid gates, the balancing bias, hash, soft and dropless routing of one group, worked
by hand.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import balance, losses
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    Group,
    HashTop1,
    LossFreeTopK,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.moe.routing.fixed import hashed

S = 4
P = np.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.4, 0.35, 0.25], [0.1, 0.7, 0.2]], np.float32)
# Affinities sigmoid(logit): rows need not sum to 1.
A = np.array([[0.8, 0.4, 0.2], [0.9, 0.6, 0.3], [0.5, 0.25, 0.75], [0.7, 0.1, 0.2]], np.float32)


def group(logits, *, num_experts=None, real=None, **more):
    logits = jnp.asarray(logits, jnp.float32)
    real = jnp.ones(len(logits), bool) if real is None else jnp.asarray(real)
    counted = real.astype(jnp.float32)
    return Group(logits, num_experts or logits.shape[1], real, counted, jnp.sum(counted), **more)


@functools.partial(jax.jit, static_argnames=("router", "capacity"))
def route(router, group, *, capacity):
    return router.route(group, capacity=capacity)


def logit(affinity):
    return np.log(affinity) - np.log1p(-affinity)


def dense(dispatcher, num_tokens=S):
    """Combine weights `[S, E]` of slots or of choices."""
    if hasattr(dispatcher, "token_index"):
        out = np.zeros((num_tokens + 1, dispatcher.token_index.shape[0]), np.float32)
        np.add.at(
            out,
            (
                np.asarray(dispatcher.token_index),
                np.arange(dispatcher.token_index.shape[0])[:, None],
            ),
            np.asarray(dispatcher.combine_weight),
        )
        return out[:num_tokens]
    out = np.zeros((num_tokens, dispatcher.num_experts + 1), np.float32)
    np.add.at(
        out,
        (np.arange(num_tokens)[:, None], np.asarray(dispatcher.expert)),
        np.asarray(dispatcher.weight),
    )
    return out[:, : dispatcher.num_experts]


def test_switch_is_top_1_with_the_probability_as_weight():
    routing = route(SwitchTop1(), group(np.log(P)), capacity=2)
    # First choices 0, 0, 0, 1; expert 0 has two slots, so token 2 is dropped.
    np.testing.assert_allclose(
        dense(routing.dispatcher), [[0.5, 0, 0], [0.6, 0, 0], [0, 0, 0], [0, 0.7, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(routing.chosen, [3, 1, 0])
    assert (routing.offered, routing.dropped) == (4.0, 1.0)
    # As in the hand-worked case of top-1: 9 * (3/4 * 0.4 + 1/4 * 0.3625) / 3.
    np.testing.assert_allclose(routing.auxiliary_loss, 1.171875, rtol=1e-6)


def test_switch_equals_top_k_with_k_1():
    logits = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    one, other = (
        route(router, group(logits), capacity=2)
        for router in (SwitchTop1(), TokensChoose(num_selected_experts=1))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_sigmoid_gates_are_renormalised_affinities():
    routing = route(SigmoidTopK(num_selected_experts=2), group(logit(A)), capacity=4)
    # Top two: 0.8, 0.4; 0.9, 0.6; 0.75, 0.5; 0.7, 0.2. Each pair over its sum.
    want = [
        [0.8 / 1.2, 0.4 / 1.2, 0],
        [0.9 / 1.5, 0.6 / 1.5, 0],
        [0.5 / 1.25, 0, 0.75 / 1.25],
        [0.7 / 0.9, 0, 0.2 / 0.9],
    ]
    np.testing.assert_allclose(dense(routing.dispatcher), want, rtol=1e-5)
    # What losses and metrics call probabilities: affinities over their sum, e.g. 0.8 / 1.4.
    np.testing.assert_allclose(routing.probabilities, A / A.sum(axis=1, keepdims=True), rtol=1e-5)


def test_sigmoid_gates_as_they_are_and_scaled():
    plain = route(
        SigmoidTopK(num_selected_experts=1, renormalize=False), group(logit(A)), capacity=4
    )
    np.testing.assert_allclose(
        dense(plain.dispatcher), [[0.8, 0, 0], [0.9, 0, 0], [0, 0, 0.75], [0.7, 0, 0]], rtol=1e-5
    )
    scaled = route(
        SigmoidTopK(num_selected_experts=2, weight_scale=2.5), group(logit(A)), capacity=4
    )
    np.testing.assert_allclose(dense(scaled.dispatcher).sum(axis=1), [2.5] * 4, rtol=1e-5)
    # One slot each: token 0 keeps expert 0 alone, and all of the weight on it.
    tight = route(
        SigmoidTopK(num_selected_experts=2, weight_scale=2.5), group(logit(A[:1])), capacity=1
    )
    np.testing.assert_allclose(
        dense(tight.dispatcher, 1), [[2.5 * 0.8 / 1.2, 2.5 * 0.4 / 1.2, 0]], rtol=1e-5
    )


def test_very_negative_logits_stay_finite():
    routing = route(SigmoidTopK(), group(np.full((4, 3), -200.0)), capacity=4)
    assert np.isfinite(routing.auxiliary_loss) and np.isfinite(routing.probabilities).all()
    np.testing.assert_allclose(routing.probabilities, 1 / 3, rtol=1e-5)


def test_the_bias_chooses_experts_and_changes_no_weight():
    router = LossFreeTopK(num_selected_experts=1, renormalize=False)
    # 0.55 more for expert 1: 0.95, 1.15, 0.8, 0.65 against 0.8, 0.9, 0.75 (expert 2), 0.7: all but
    #   token 3 go there.
    routing = route(router, group(logit(A), bias=jnp.array([0.0, 0.55, 0.0])), capacity=4)
    np.testing.assert_allclose(
        dense(routing.dispatcher), [[0, 0.4, 0], [0, 0.6, 0], [0, 0.25, 0], [0.7, 0, 0]], rtol=1e-5
    )
    np.testing.assert_array_equal(routing.chosen, [1, 3, 0])
    assert routing.auxiliary_loss == 0
    without = route(router, group(logit(A)), capacity=4)
    np.testing.assert_array_equal(without.chosen, [3, 0, 1])


def test_no_gradient_reaches_the_bias():
    def total(bias, logits):
        routing = route(LossFreeTopK(), group(logits, bias=bias), capacity=4)
        return jnp.sum(routing.dispatcher.combine_weight**2)

    of_bias, of_logits = jax.jit(jax.grad(total, argnums=(0, 1)))(
        jnp.array([0.1, 0.0, -0.1]), jnp.asarray(logit(A))
    )
    np.testing.assert_array_equal(of_bias, 0)
    assert np.abs(of_logits).max() > 0


def test_softmax_scores_with_a_bias():
    router = LossFreeTopK(num_selected_experts=1, scores="softmax", renormalize=False)
    routing = route(router, group(np.log(P), bias=jnp.array([-1.0, 0.0, 0.0])), capacity=4)
    np.testing.assert_allclose(
        dense(routing.dispatcher), [[0, 0.3, 0], [0, 0, 0.3], [0, 0.35, 0], [0, 0.7, 0]], rtol=1e-5
    )


def test_a_bias_moves_against_the_load():
    # 12 choices over 4 experts: the mean is 3. Above it down, below it up, at it nothing.
    after = balance.moved(
        jnp.array([0.5, 0.0, 0.0, -0.25]), jnp.array([7.0, 3.0, 2.0, 0.0]), rate=0.125
    )
    np.testing.assert_array_equal(after, [0.375, 0.0, 0.125, -0.125])
    # Nothing was chosen: nothing moves.
    np.testing.assert_array_equal(balance.moved(jnp.ones(3), jnp.zeros(3), rate=0.1), 1)


def test_sums_beyond_float32_integers_keep_their_sign():
    # One token of 16777217 more than its share; in float32 the mean would round to the counts.
    counts = jnp.array([5592406.0, 5592405.0, 5592406.0])
    np.testing.assert_array_equal(balance.moved(jnp.zeros(3), counts, rate=1.0), [-1, 1, -1])


def hash_in_python(token, seed, buckets):
    x = (token + seed * 0x9E3779B9 + 0x9E3779B9) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return (x ^ (x >> 16)) % buckets


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_hash_is_what_integers_give(seed):
    ids = [0, 1, 2, 511, 32127, 2**31 - 1]
    got = hashed(jnp.array(ids, jnp.int32), seed=seed, buckets=7)
    assert got.tolist() == [hash_in_python(token, seed, 7) for token in ids]


def test_the_hash_spreads_a_vocabulary_and_depends_on_the_seed():
    ids = jnp.arange(32128)
    one, other = (np.asarray(hashed(ids, seed=seed, buckets=32)) for seed in (0, 1))
    counts = np.bincount(one, minlength=32)
    # 1004 each on average; independent draws would have a standard deviation of 31.
    assert abs(counts - 1004).max() < 4 * 31
    assert (one == other).mean() < 0.05


def test_hash_routing_follows_ids_alone():
    ids = jnp.array([5, 9, 5, 9])
    routing = route(HashTop1(), group(np.zeros((4, 0)), num_experts=3, token_ids=ids), capacity=4)
    weights = dense(routing.dispatcher)
    np.testing.assert_array_equal(weights.sum(axis=1), 1)
    np.testing.assert_array_equal(weights[0], weights[2])
    assert weights[0].argmax() == hash_in_python(5, 0, 3) and weights[1].argmax() == hash_in_python(
        9, 0, 3
    )
    np.testing.assert_array_equal(routing.probabilities, weights)


def test_dropless_tokens_get_every_expert_they_chose():
    routing = route(DroplessTopK(num_selected_experts=2), group(np.log(P)), capacity=4)
    np.testing.assert_allclose(
        dense(routing.dispatcher),
        [[0.5, 0.3, 0], [0.6, 0, 0.3], [0.4, 0.35, 0], [0, 0.7, 0.2]],
        rtol=1e-6,
    )
    assert (routing.offered, routing.dropped) == (8.0, 0.0)
    np.testing.assert_array_equal(routing.dispatcher.load(jnp.ones(4)), [3, 3, 2])
    np.testing.assert_array_equal(routing.dispatcher.experts_per_token(4), [2] * 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: TokensChoose(renormalize=True, **kw),
        lambda **kw: SigmoidTopK(weight_scale=2.0, **kw),
    ],
)
def test_dropless_equals_slots_for_all(make):
    logits = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)
    real = np.arange(16) % 5 != 3
    free, slots = (
        route(make(dropless=flag), group(logits, real=real), capacity=16) for flag in (True, False)
    )
    np.testing.assert_allclose(dense(free.dispatcher, 16), dense(slots.dispatcher, 16), rtol=1e-6)
    np.testing.assert_allclose(
        dense(free.dispatcher.in_form("gather", 16), 16), dense(slots.dispatcher, 16), rtol=1e-6
    )
    np.testing.assert_allclose(
        free.dispatcher.weight_per_token(16), slots.dispatcher.weight_per_token(16), rtol=1e-6
    )
    np.testing.assert_array_equal(
        free.dispatcher.load(jnp.ones(16)), slots.dispatcher.load(jnp.ones(16))
    )
    assert free.auxiliary_loss == slots.auxiliary_loss and free.dropped == 0


def test_soft_slots_by_hand():
    # Two tokens, one expert of two slots; logits (0, log 3) and (0, 0). Over tokens: slot 0 is half
    # and half, slot 1 is 3/4 and 1/4. Over slots: token 0 takes 1/4 and 3/4, token 1 half and half.
    routing = route(
        SoftMoe(slots_per_expert=2),
        group([[0.0, np.log(3)], [0.0, 0.0]], num_experts=1),
        capacity=2,
    )
    np.testing.assert_allclose(
        routing.dispatcher.dispatch_weight[:, 0], [[0.5, 0.75], [0.5, 0.25]], rtol=1e-6
    )
    np.testing.assert_allclose(
        routing.dispatcher.combine_weight[:, 0], [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6
    )

    class Doubling:
        def on_slots(self, inputs):
            # Slots of tokens (4, 0): 2 and 3.
            np.testing.assert_allclose(inputs[0, 0, :, 0], [2.0, 3.0], rtol=1e-6)
            return 2 * inputs

    dispatcher = jax.tree.map(lambda leaf: leaf[None], routing.dispatcher)
    out = dispatcher.apply(Doubling(), jnp.array([[[4.0], [0.0]]]))
    # Token 0: 4 / 4 + 3 * 6 / 4 = 5.5; token 1: (4 + 6) / 2 = 5.
    np.testing.assert_allclose(out[0, :, 0], [5.5, 5.0], rtol=1e-6)
    assert routing.dropped == 0 and routing.dispatcher.experts_per_token(2).tolist() == [1, 1]


def test_padding_has_no_part_in_soft_slots():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    real = np.array([True, True, False, True, False, False])
    padded = route(SoftMoe(2), group(logits, num_experts=2, real=real), capacity=2).dispatcher
    alone = route(SoftMoe(2), group(logits[real], num_experts=2), capacity=2).dispatcher
    np.testing.assert_allclose(padded.dispatch_weight[real], alone.dispatch_weight, rtol=1e-6)
    np.testing.assert_allclose(padded.combine_weight[real], alone.combine_weight, rtol=1e-6)
    assert not padded.dispatch_weight[~real].any() and not padded.combine_weight[~real].any()
    np.testing.assert_allclose(padded.load(jnp.asarray(real, jnp.float32)), [2, 2], rtol=1e-6)
    nothing = route(
        SoftMoe(2), group(logits, num_experts=2, real=[False] * 6), capacity=2
    ).dispatcher
    assert not nothing.dispatch_weight.any() and not nothing.combine_weight.any()


def drawn(layer, x):
    """Parameters from NumPy, which compiles nothing."""
    rng = np.random.default_rng(1)
    specs = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))["params"]
    draw = lambda leaf: rng.normal(0, leaf.shape[-2] ** -0.5, leaf.shape).astype(leaf.dtype)
    return jax.tree.map(draw, specs)


def test_jitter_acts_in_training_alone():
    layer = MoeLayer(MoeSettings(num_experts=4), SwitchTop1(jitter_noise=0.9), hidden=8)
    x = jax.random.normal(jax.random.key(0), (1, 16, 8))
    params = {"params": drawn(layer, x)}

    @functools.partial(jax.jit, static_argnames="train")
    def probabilities(rngs, *, train):
        _, stats = layer.apply(params, x, train=train, rngs=rngs, mutable=[LAYER_STATS])
        return stats[LAYER_STATS]["stats"].probability

    def preferred(*, train, key=None):
        return probabilities({} if key is None else {"jitter": jax.random.key(key)}, train=train)

    still = preferred(train=False)
    np.testing.assert_array_equal(preferred(train=False, key=2), still)
    np.testing.assert_array_equal(preferred(train=True), still)
    np.testing.assert_array_equal(preferred(train=True, key=2), preferred(train=True, key=2))
    assert np.abs(preferred(train=True, key=2) - still).max() > 1e-2
    assert np.abs(preferred(train=True, key=2) - preferred(train=True, key=3)).max() > 1e-2


def test_noise_is_normal_over_the_number_of_experts_and_in_training_alone():
    """Logits of 0 have the entropy log 8. Noise of deviation 1 / 8 lowers it by half the variance
    of the logits within a token, (1 / 8)^2 * 7 / 8.
    """
    layer = MoeLayer(MoeSettings(num_experts=8), ExpertsChoose(noise_std=1.0), hidden=8)
    x = jnp.zeros((2, 512, 8))
    params = drawn(layer, x)

    @functools.partial(jax.jit, static_argnames="train")
    def entropy(key, *, train):
        rngs = {"jitter": jax.random.key(key)}
        _, stats = layer.apply({"params": params}, x, train=train, rngs=rngs, mutable=[LAYER_STATS])
        return stats[LAYER_STATS]["stats"].entropy / 1024

    assert entropy(2, train=False) == pytest.approx(np.log(8), abs=1e-6)
    lowered = np.log(8) - entropy(2, train=True)
    assert lowered == pytest.approx(7 / 8 / 64 / 2, rel=0.1)
    assert entropy(2, train=True) == entropy(2, train=True) != entropy(3, train=True)


def test_the_losses_of_v_moe_enter_the_report():
    """Losses of the layer are the means of its two groups'; the noise is what the layer drew."""
    settings = MoeSettings(
        num_experts=4, group_size=16, importance_loss_factor=0.005, load_loss_factor=0.005
    )
    layer = MoeLayer(settings, TokensChoose(noise_std=1.0), hidden=8)
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))
    params = {"params": drawn(layer, x)}
    kernel = params["params"]["router"]["router_weights"]["w"]["kernel"]

    @functools.partial(jax.jit, static_argnames="train")
    def report(*, train):
        rngs = {"jitter": jax.random.key(2)}
        _, stats = layer.apply(params, x, train=train, rngs=rngs, mutable=[LAYER_STATS])
        return stats[LAYER_STATS]["stats"]

    clean = x @ kernel
    expected = np.mean([losses.importance_loss(one, counted=jnp.ones(16)) for one in clean])
    for train in (True, False):
        assert float(report(train=train).importance_loss) == pytest.approx(expected, rel=1e-4)
    assert report(train=True).load_loss > 0
    assert report(train=False).load_loss == 0


def test_fresh_experts_are_different_or_equal():
    x = jnp.zeros((1, 4, 8))
    for fresh, equal in (("different", False), ("equal", True)):
        layer = MoeLayer(MoeSettings(num_experts=4, fresh_experts=fresh), TokensChoose(), hidden=8)
        params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x)["params"]["expert"])
        for name in ("wi_0", "wo"):
            kernel = np.asarray(params[name]["kernel"])
            assert (np.ptp(kernel, axis=0) == 0).all() == equal
            assert np.std(kernel) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SigmoidTopK(num_selected_experts=0),
            "num_selected_experts must be at least 1, got 0",
        ),
        (lambda: SigmoidTopK(weight_scale=0.0), "weight_scale must be above 0, got 0"),
        (lambda: LossFreeTopK(scores="tanh"), "scores must be 'sigmoid' or 'softmax', got 'tanh'"),
        (lambda: LossFreeTopK(update_rate=-1.0), "update_rate must be at least 0, got -1"),
        (lambda: SoftMoe(0), "slots_per_expert must be at least 1, got 0"),
        (lambda: HashTop1(jitter_noise=0.1), "jitter_noise=0.1 has nothing to act on"),
        (lambda: HashTop1(noise_std=1.0), r"noise_std=1\.0 has nothing to act on"),
        (lambda: ExpertsChoose(noise_std=-1.0), r"noise_std must be at least 0, got -1"),
        (lambda: DroplessTopK(dropless=False), "use TokensChoose"),
        (
            lambda: TokensChoose(batch_prioritized=True, dropless=True),
            "batch_prioritized orders tokens for a capacity",
        ),
        (
            lambda: TokensChoose(jitter_noise=1.5),
            r"jitter_noise .JITTER_NOISE. must be in \[0, 1\), got 1.5",
        ),
        (
            lambda: ExpertsChoose(jitter_noise=-0.1),
            r"jitter_noise .JITTER_NOISE. must be in \[0, 1\), got -0.1",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
