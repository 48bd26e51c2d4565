"""The network against a NumPy forward pass that agrees with big_vision's and V-MoE's own modules,
and against itself where two ways must give one result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from tests.models.vit.kinds import KINDS, in_big_vision, model, random_params
from upcycle_jax import trees
from upcycle_jax.models.vit.config import VitMoeConfig
from upcycle_jax.models.vit.model import VitModel


@pytest.fixture(scope="module")
def oracle():
    return oracles.load("vit_reference")


def settings(kind, oracle):
    """What the oracle is told of a kind."""
    return {
        "mean": {},
        "class_token": {"pool": "tok"},
        "map": {"pool": "map"},
        "clip": {"pool": "tok", "pre_norm": True, "act": oracle.quick_gelu, "eps": 1e-5},
        "dinov2": {"pool": "tok", "act": oracle.gelu_erf},
        "renormalised": {"renormalise": True, "capacity": 4},
        "two_images": {"renormalise": False, "group": 18, "capacity": 9},
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_oracles(kind, oracle):
    one = VitModel(dataclasses.replace(model(kind).config, num_layers=2))
    params = random_params(one)
    batch = one.features.random(None, batch_size=2)
    theirs = {
        name: value.astype(np.float64)
        for name, value in in_big_vision(params, one.config.num_heads).items()
    }
    expected = oracle.forward(theirs, batch["images"].astype(np.float64), **settings(kind, oracle))
    logits = jax.jit(one.logits)(trees.unflatten(params), batch)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    assert np.abs(expected).max() > 0.5


def test_rows_that_fill_a_batch_up_take_no_expert():
    """A group of two images, of which one is real: whatever stands in the other changes nothing."""
    one = model("two_images")
    params = trees.unflatten(random_params(one))
    batch = one.features.random(None, batch_size=2)
    batch["weights"] = np.array([1, 0], np.float32)
    other = batch | {"images": batch["images"].copy()}
    other["images"][1] += 1
    apply = jax.jit(one.logits)
    np.testing.assert_array_equal(apply(params, batch)[0], apply(params, other)[0])


def test_renormalised_copies_with_room_for_all_are_the_dense_model():
    dense = model("mean")
    moe = VitMoeConfig(num_experts=4, group_size=18, eval_expert_capacity_factor=4.0)
    sparse = VitModel(dataclasses.replace(dense.config, moe=moe))
    params = random_params(dense)
    rng = np.random.default_rng(1)
    copied = {}
    for path, spec in sparse.param_specs().items():
        if spec.twin:
            copied[path] = np.broadcast_to(params[spec.twin], spec.shape)
        else:
            copied[path] = rng.normal(size=spec.shape).astype(np.float32)
    batch = dense.features.random(None, batch_size=2)
    expected = jax.jit(dense.logits)(trees.unflatten(params), batch)
    logits = jax.jit(sparse.logits)(trees.unflatten(copied), batch)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@functools.cache
def gradient(**form):
    """By path, of a model in a form."""
    one = VitModel(dataclasses.replace(model("renormalised").config, **form))
    params = jax.tree.map(jnp.asarray, trees.unflatten(random_params(one)))
    batch = one.features.random(None, batch_size=2)
    denominator = one.loss_denominator(batch)
    loss = lambda params: one.loss_fn(params, batch, None, denominator=denominator)[0]
    return trees.flatten(jax.jit(jax.grad(loss))(params))


# Each by itself is in decoder/test_network.py.
@pytest.mark.parametrize(
    "form",
    [
        {"scan_layers": True, "remat_policy": "full"},
        pytest.param({"scan_layers": True}, marks=pytest.mark.slow),
        pytest.param({"remat_policy": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scan_and_remat_change_no_gradient(form):
    expected = gradient()
    for path, leaf in gradient(**form).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, rtol=1e-5, err_msg=path)


def test_experts_have_a_dropout_of_their_own():
    """With no dropout elsewhere the loss depends on the draw where experts drop, in training."""
    config = dataclasses.replace(model("renormalised").config, num_layers=2)  # dense, sparse
    params = random_params(VitModel(config))
    batch = VitModel(config).features.random(None, batch_size=2)

    def losses(rate):
        moe = dataclasses.replace(config.moe, expert_dropout_rate=rate)
        one = VitModel(dataclasses.replace(config, moe=moe))
        run = jax.jit(
            lambda key: one.loss_fn(
                trees.unflatten(params), batch, key, denominator=jnp.float32(2)
            )[0]
        )
        plain = jax.jit(lambda: one.logits(trees.unflatten(params), batch))()
        return [float(run(jax.random.key(seed))) for seed in (0, 1)], plain

    (first, second), plain = losses(0.5)
    (third, fourth), without = losses(0.0)
    assert first != second and third == fourth
    np.testing.assert_array_equal(plain, without)
