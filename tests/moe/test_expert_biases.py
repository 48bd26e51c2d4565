"""Experts with biases: every form is the MLP in NumPy, and all forms have the same gradients."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.layers import mlp_reference
from upcycle_jax.moe import looped_experts
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import DroplessTopK, TokensChoose
from upcycle_jax.partitioning import Partitioner

D, F, E, K = 8, 16, 4, 2
SETTINGS = MoeSettings(num_experts=E, group_size=16, shared_expert_mlp_dim=4)
DROPLESS = DroplessTopK(num_selected_experts=K, renormalize=True)
ROOMY = TokensChoose(num_selected_experts=K, renormalize=True)
"""With a capacity factor of E, which every test here sets, it drops nothing either."""
X = np.random.default_rng(0).normal(size=(4, 16, D)).astype(np.float32)


def layer(router=DROPLESS, dispatch="auto", activations=("silu", "linear"), **others):
    settings = dataclasses.replace(
        SETTINGS, dispatch=dispatch, train_expert_capacity_factor=float(E)
    )
    return MoeLayer(settings, router, F, activations, use_bias=True, **others)


@functools.cache
def parameters(activations=("silu", "linear")):
    """Random ones: biases would start at zero."""
    shapes = jax.eval_shape(layer(activations=activations).init, jax.random.key(0), X)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / D**0.5, jnp.float32),
        nn.meta.unbox(shapes)["params"],
    )


def in_numpy(params, activations):
    """The definition: softmax over the K largest logits, K experts, and the shared one."""
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    below = lambda start: {p.removeprefix(start): a for p, a in flat.items() if p.startswith(start)}
    logits = X @ flat["router/router_weights/w/kernel"]
    out = mlp_reference.mlp(X, below("shared_expert/"), activations)
    for row, column in np.ndindex(X.shape[:2]):
        chosen = np.argsort(-logits[row, column])[:K]
        odds = np.exp(logits[row, column, chosen].astype(np.float64))
        for expert, weight in zip(chosen, odds / odds.sum(), strict=True):
            of_one = {path: leaf[expert] for path, leaf in below("expert/").items()}
            out[row, column] += weight * mlp_reference.mlp(X[row, column], of_one, activations)
    return out


def outputs_and_gradients(module, params):
    def loss(params, x):
        y, _ = module.apply({"params": params}, x, train=True, mutable=[LAYER_STATS])
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), gradients = run(params, X)
    return y, gradients


@functools.cache
def expected():
    """Slots of all experts at once, whose gradients are automatic."""
    return outputs_and_gradients(layer(ROOMY), parameters())


@pytest.mark.parametrize("activations", [("silu", "linear"), ("gelu_exact",)])
def test_experts_and_shared_expert_are_the_mlp_in_numpy(activations):
    params = parameters(activations)
    y = jax.jit(layer(activations=activations).apply)({"params": params}, X)
    np.testing.assert_allclose(y, in_numpy(params, activations), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "dispatch", "mesh", "looped"),
    [
        (DROPLESS, "sorted", None, False),
        (ROOMY, "auto", None, True),
        (DROPLESS, "sorted", (2, 2), False),
        (ROOMY, "auto", (4, 2), False),
        # Slots of tokens, whatever gathers them, meet the same experts; see test_dispatch.py.
        pytest.param(DROPLESS, "gather", None, False, marks=pytest.mark.slow),
        pytest.param(ROOMY, "one_hot", None, False, marks=pytest.mark.slow),
        pytest.param(DROPLESS, "sorted", (1, 4), False, marks=pytest.mark.slow),
    ],
)
def test_all_forms_agree_on_values_and_gradients(monkeypatch, router, dispatch, mesh, looped):
    if looped:
        monkeypatch.setattr(looped_experts, "LARGE", 0)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            expert, model = mesh
            partitioner = Partitioner(num_expert_partitions=expert, num_model_partitions=model)
            stack.enter_context(partitioner.activate())
        got = outputs_and_gradients(layer(router, dispatch), parameters())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, expected()
    )


def test_a_bias_of_each_expert_lies_beside_its_kernel():
    shapes = jax.eval_shape(layer().init, jax.random.key(0), X)["params"]["expert"]
    found = {
        path: (leaf.value.shape, leaf.names)
        for path, leaf in trees.flatten(shapes).items()
        if path.endswith("bias")
    }
    assert found == {
        "wi_0/bias": ((E, F), ("expert", "expert_mlp")),
        "wi_1/bias": ((E, F), ("expert", "expert_mlp")),
        "wo/bias": ((E, D), ("expert", "embed")),
    }
    without = jax.eval_shape(MoeLayer(SETTINGS, DROPLESS, F).init, jax.random.key(0), X)
    assert not [path for path in trees.flatten(without["params"]) if path.endswith("bias")]
