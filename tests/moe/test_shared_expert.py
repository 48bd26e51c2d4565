"""The expert that every token passes: its place in the sum, by hand; and what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.moe.routing import TokensChoose

DENSE = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=32,
    dropout_rate=0.0,
)


def test_a_token_without_room_still_passes_the_shared_expert():
    # A router of zeros: both tokens choose expert 0 with weight 1/2, and one slot (1.0 * 2 / 2) is
    # there: the second token is dropped. Experts are relu(x) times the identity; the shared expert
    # has one hidden unit x_0 + x_1 and gives 10 and -1 times it.
    config = MoeSettings(
        num_experts=2,
        train_expert_capacity_factor=1.0,
        min_expert_capacity=1,
        shared_expert_mlp_dim=1,
    )
    params = {
        "router": {"router_weights": {"w": {"kernel": jnp.zeros((2, 2))}}},
        "expert": {
            "wi": {"kernel": jnp.stack([jnp.eye(2)] * 2)},
            "wo": {"kernel": jnp.stack([jnp.eye(2)] * 2)},
        },
        "shared_expert": {
            "wi": {"kernel": jnp.ones((2, 1))},
            "wo": {"kernel": jnp.array([[10.0, -1.0]])},
        },
    }
    layer = MoeLayer(
        config=config, router=TokensChoose(num_selected_experts=1), hidden=2, activations=("relu",)
    )
    x = jnp.array([[[1.0, 2.0], [3.0, -1.0]]])
    y = jax.jit(functools.partial(layer.apply, train=True))({"params": params}, x)
    # First: (1, 2) / 2 + 3 * (10, -1). Second: 2 * (10, -1), nothing else.
    np.testing.assert_allclose(y, [[[30.5, -2.0], [20.0, -2.0]]], rtol=1e-6)


def test_its_gate_is_a_sigmoid_of_the_token():
    # One expert that gives nothing; a shared expert of one hidden unit x_0 + x_1 and wo = (10, -1).
    # Gate logits x . (0, ln 3): 0 for (2, 0), so sigmoid 1/2; ln 3 for (1, 1), so sigmoid 3/4.
    config = MoeSettings(
        num_experts=1, shared_expert_mlp_dim=1, shared_expert_gate=True, min_expert_capacity=1
    )
    params = {
        "router": {"router_weights": {"w": {"kernel": jnp.zeros((2, 1))}}},
        "expert": {
            "wi": {"kernel": jnp.ones((1, 2, 2))},
            "wo": {"kernel": jnp.zeros((1, 2, 2))},
        },
        "shared_expert": {
            "wi": {"kernel": jnp.ones((2, 1))},
            "wo": {"kernel": jnp.array([[10.0, -1.0]])},
        },
        "shared_expert_gate": {"kernel": jnp.array([[0.0], [np.log(3.0)]])},
    }
    layer = MoeLayer(
        config=config, router=TokensChoose(num_selected_experts=1), hidden=2, activations=("relu",)
    )
    y = jax.jit(layer.apply)({"params": params}, jnp.array([[[2.0, 0.0], [1.0, 1.0]]]))
    # 1/2 * 2 * (10, -1) and 3/4 * 2 * (10, -1).
    np.testing.assert_allclose(y, [[[10.0, -1.0], [15.0, -1.5]]], rtol=1e-6)


def test_a_gate_without_a_shared_expert_is_refused():
    with pytest.raises(ValueError, match=r"without a shared expert: set shared_expert_mlp_dim"):
        MoeConfig(shared_expert_gate=True)


def test_parameters_are_named_beside_the_experts_and_sharded_as_a_dense_mlp():
    specs = EncoderDecoderModel(
        dataclasses.replace(
            DENSE,
            moe=MoeConfig(num_experts=4, shared_expert_mlp_dim=8, shared_expert_gate=True),
        )
    ).param_specs()
    shared = {path: leaf for path, leaf in specs.items() if "shared_expert/" in path}
    assert len(shared) == 6  # Three matrices, one sparse layer in each stack.
    wi, wo = (specs[f"encoder/layers_1/mlp/shared_expert/{name}/kernel"] for name in ("wi_0", "wo"))
    assert (wi.shape, wi.axes, wo.shape, wo.axes) == (
        (16, 8),
        ("embed", "mlp"),
        (8, 16),
        ("mlp", "embed"),
    )
    gate = specs["encoder/layers_1/mlp/shared_expert_gate/kernel"]
    assert (gate.shape, gate.axes) == ((16, 1), ("embed", "unmodeled"))


def test_a_width_below_one_is_refused():
    with pytest.raises(
        ValueError,
        match="shared_expert_mlp_dim must be at least 1, got 0",
    ):
        MoeConfig(shared_expert_mlp_dim=0)
