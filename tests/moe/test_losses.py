"""Router losses, by hand."""

import math

import jax.numpy as jnp
import numpy as np

from upcycle_jax.moe import losses


def test_z_loss_by_hand():
    # logsumexp of (0, 0) is log 2, of (log 3, 0) is log 4.
    logits = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0]])
    expected = (np.log(2) ** 2 + np.log(4) ** 2) / 2
    np.testing.assert_allclose(
        losses.router_z_loss(logits, counted=jnp.ones(2), count=jnp.float32(2)), expected, rtol=1e-6
    )


def test_z_loss_of_counted_tokens_alone():
    logits = jnp.array([[0.0, 0.0], [100.0, 0.0]])
    np.testing.assert_allclose(
        losses.router_z_loss(logits, counted=jnp.array([1.0, 0.0]), count=jnp.float32(1)),
        np.log(2) ** 2,
        rtol=1e-6,
    )


def test_load_balancing_loss_of_a_collapsed_router():
    # All tokens choose expert 0 with certainty: f = p = (1, 0, 0), so E^2 * (1 / E) = E.
    p = jnp.array([[1.0, 0.0, 0.0]] * 5)
    loss = losses.load_balancing_loss(
        p, jnp.zeros((5, 1), jnp.int32), counted=jnp.ones(5), count=jnp.float32(5)
    )
    np.testing.assert_allclose(loss, 3.0, rtol=1e-6)


def test_nothing_counted_is_zero():
    p = jnp.full((4, 2), 0.5)
    choices = jnp.zeros((4, 1), jnp.int32)
    assert losses.load_balancing_loss(p, choices, counted=jnp.zeros(4), count=jnp.float32(0)) == 0.0
    assert losses.router_z_loss(p, counted=jnp.zeros(4), count=jnp.float32(0)) == 0.0


def numpy_load_loss(clean, noisy, k, std):
    """V-MoE's load loss in float64: Phi by `math.erf`."""
    threshold = np.sort(noisy, axis=-1)[:, [-k]]
    chosen = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(
        (clean - threshold) / std
    )
    load = chosen.mean(0)
    return (load.std() / load.mean()) ** 2


def test_importance_by_hand():
    # Probabilities (1/2, 1/2) and (3/4, 1/4) sum to (5/4, 3/4): mean 1, standard deviation 1/4.
    # The third token, (1/101, 100/101), does not count.
    logits = jnp.log(jnp.array([[1.0, 1.0], [3.0, 1.0], [1.0, 100.0]]))
    loss = losses.importance_loss(logits, counted=jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss, 1 / 16, rtol=1e-6)


def test_load_by_hand():
    # K = 1 of two experts, noise 1/2. Without noise in this draw the threshold is the larger logit:
    # its expert is chosen with probability Phi(0) = 1/2, the other, one below, with Phi(-2).
    logits = jnp.array([[1.0, 0.0]])
    other = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))
    mean, deviation = (0.5 + other) / 2, (0.5 - other) / 2
    loss = losses.load_loss(logits, logits, selected=1, noise_std=0.5, counted=jnp.ones(1))
    np.testing.assert_allclose(loss, (deviation / mean) ** 2, rtol=1e-5)


def test_losses_of_v_moe_against_numpy():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(24, 8)).astype(np.float32)
    noisy = clean + rng.normal(size=clean.shape).astype(np.float32) / 8
    probabilities = np.exp(clean) / np.exp(clean).sum(-1, keepdims=True)
    importance = probabilities.sum(0)
    counted = jnp.ones(24)
    np.testing.assert_allclose(
        losses.importance_loss(clean, counted=counted),
        (importance.std() / importance.mean()) ** 2,
        rtol=1e-5,
    )
    found = losses.load_loss(clean, noisy, selected=2, noise_std=1 / 8, counted=counted)
    np.testing.assert_allclose(found, numpy_load_loss(clean, noisy, 2, 1 / 8), rtol=1e-5)
    # Tokens that do not count might as well be absent.
    some = (jnp.arange(24) < 10).astype(jnp.float32)
    found = losses.load_loss(clean, noisy, selected=2, noise_std=1 / 8, counted=some)
    expected = numpy_load_loss(clean[:10], noisy[:10], 2, 1 / 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_group_without_tokens_has_no_losses_of_v_moe():
    logits, nobody = jnp.ones((4, 2)), jnp.zeros(4)
    assert losses.importance_loss(logits, counted=nobody) == 0.0
    loss = losses.load_loss(logits, logits, selected=1, noise_std=0.5, counted=nobody)
    assert loss == 0.0
