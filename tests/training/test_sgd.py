"""Gradient descent with momentum, by hand and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from upcycle_jax.training.sgd import Sgd
from upcycle_jax.trees import LeafSpec

SPECS = {"w": LeafSpec((2,), np.dtype(np.float32))}


def run(optimizer, grads, rate):
    params, state = {"w": jnp.array([1.0, -2.0])}, optimizer.init(SPECS)
    update = jax.jit(lambda p, g, s: _pair(optimizer, p, g, s, rate))
    for grad in grads:
        params, state = update(params, {"w": grad}, state)
    return params["w"], state["w"]


def _pair(optimizer, params, grads, state, rate):
    done = optimizer.apply(
        params, grads, state, param_specs=SPECS, step=jnp.int32(0), learning_rate=rate
    )
    return done.params, done.param_states


def test_two_updates_by_hand():
    # m: (1, 2), then 0.9 (1, 2) + (1, -1) = (1.9, 0.8). Rate 0.1, decay 0.5:
    # w: (1, -2) - 0.1 ((1, 2) + (0.5, -1)) = (0.85, -2.1),
    # then (0.85, -2.1) - 0.1 ((1.9, 0.8) + (0.425, -1.05)) = (0.6175, -2.075).
    grads = [jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])]
    w, slots = run(Sgd(weight_decay=0.5), grads, 0.1)
    np.testing.assert_allclose(w, [0.6175, -2.075], rtol=1e-6)
    np.testing.assert_allclose(slots["m"], [1.9, 0.8], rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_are_optax_s(nesterov, momentum):
    grads = [jnp.array([0.3, -1.0]), jnp.array([2.0, 0.1]), jnp.array([-0.5, 0.5])]
    got, _ = run(Sgd(momentum=momentum, nesterov=nesterov), grads, 0.05)
    sgd = optax.sgd(0.05, momentum=momentum, nesterov=nesterov)
    want = jnp.array([1.0, -2.0])
    state = sgd.init(want)
    for grad in grads:
        change, state = sgd.update(grad, state)
        want = optax.apply_updates(want, change)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_momentum_below_one():
    with pytest.raises(ValueError, match="momentum"):
        Sgd(momentum=1.0)
