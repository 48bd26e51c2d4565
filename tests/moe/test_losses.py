"""Router losses, by hand."""

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
