"""The load-balancing loss of a language model in its two forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.decoder.kinds import config, random_params
from upcycle_jax import trees
from upcycle_jax.models.decoder.config import DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import DroplessTopK, LossFreeTopK

E, K, FACTOR = 4, 2, 0.5


def metrics_of(form):
    moe = DecoderMoeConfig(
        num_experts=E,
        router=DroplessTopK(num_selected_experts=K, renormalize=True),
        aux_loss_factor=FACTOR,
        aux_loss=form,
    )
    model = DecoderModel(dataclasses.replace(config("llama"), num_layers=2, moe=moe))
    params = random_params(model)
    path = "decoder/layers_1/mlp/router/router_weights/w/kernel"
    batch = model.features.random(model.vocab_size, length=16)

    def loss(kernel):
        nested = trees.unflatten(params | {path: kernel})
        return model.loss_fn(nested, batch, None, denominator=jnp.float32(1.0))

    (_, metrics), of_kernel = jax.jit(jax.value_and_grad(loss, has_aux=True))(params[path])
    values = {name: np.asarray(m.total) / np.asarray(m.weight) for name, m in metrics.items()}
    return values, np.asarray(of_kernel)


def test_joint_takes_all_layers_together():
    """Loads and probabilities are averaged over layers before they are multiplied, or after."""
    (joint, of_joint), (per_layer, of_per_layer) = metrics_of("joint"), metrics_of("per_layer")
    layers = [f"experts/decoder/layers_{i}" for i in range(2)]
    # Nothing is dropped: the share of the load is that of the choices, K of each token.
    chosen = K * np.stack([joint[f"{layer}/load"] for layer in layers])  # [2, E]
    preferred = np.stack([joint[f"{layer}/router_probability"] for layer in layers])
    np.testing.assert_allclose(
        joint["experts/auxiliary_loss"],
        FACTOR * E * np.sum(chosen.mean(axis=0) * preferred.mean(axis=0)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        per_layer["experts/auxiliary_loss"],
        FACTOR * E * np.mean(np.sum(chosen * preferred, axis=1)),
        rtol=1e-5,
    )
    assert np.abs(of_joint - of_per_layer).max() > 1e-6


def test_joint_needs_a_router_that_the_loss_balances():
    with pytest.raises(ValueError, match=r"aux_loss='joint'.*LossFreeTopK balances without one"):
        DecoderMoeConfig(router=LossFreeTopK(dropless=True), aux_loss="joint")
