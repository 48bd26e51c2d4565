"""Copied experts compute what the dense model computes: the reason why upcycling works."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose


def test_upcycled_logits_equal_dense_logits(
    tiny, ample, make_batch, make_params, copy_into_experts
):
    dense, sparse = EncoderDecoderModel(tiny()), EncoderDecoderModel(tiny(**ample))
    dense_params = make_params(dense)
    params = copy_into_experts(dense_params, make_params(sparse, seed=1))
    batch = make_batch(lengths=[8, 5, 3, 7])
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    logits = jax.jit(sparse.logits)
    want = np.asarray(jax.jit(dense.logits)(dense_params, batch))[real]
    np.testing.assert_allclose(np.asarray(logits(params, batch))[real], want, atol=1e-5)

    # The negative case: one matrix of one expert of one decoder layer, changed.
    flat = trees.flatten(params)
    flat["decoder/layers_1/mlp/expert/wo/kernel"] = (
        flat["decoder/layers_1/mlp/expert/wo/kernel"].at[2].multiply(1.5)
    )
    changed = np.asarray(logits(trees.unflatten(flat), batch))[real]
    assert np.abs(changed - want).max() > 1e-2


def test_layer_outputs_name_the_layers_in_order(tiny, make_batch, make_params, copy_into_experts):
    # Room for every token, but no renormalisation: under experts choose all experts take every
    # token, and softmax weights sum to 1; under top-2 they do not. The first sparse layer of the
    # decoder is the first to differ from the dense model.
    dense = EncoderDecoderModel(tiny())
    sparse = EncoderDecoderModel(tiny(num_experts=4, eval_expert_capacity_factor=4.0))
    dense_params = make_params(dense)
    params = copy_into_experts(dense_params, make_params(sparse, seed=1))
    batch = make_batch()
    want, got = (
        jax.jit(dense.layer_outputs)(dense_params, batch),
        jax.jit(sparse.layer_outputs)(params, batch),
    )
    names = [f"{stack}/layers_{i}" for stack in ("encoder", "decoder") for i in range(2)]
    assert set(want) == set(got) == set(names)
    difference = {name: np.abs(got[name] - want[name]).max() for name in names}
    assert max(difference[name] for name in names[:3]) < 1e-5
    assert difference["decoder/layers_1"] > 1e-2


@pytest.mark.parametrize("router", [ExpertsChoose(), TokensChoose()], ids=["experts", "tokens"])
@pytest.mark.parametrize("capacity_factor", [0.5, 4.0])
def test_without_renormalisation_a_layer_scales_by_the_summed_weights(router, capacity_factor):
    config = MoeSettings(
        num_experts=4,
        train_expert_capacity_factor=1.0,
        eval_expert_capacity_factor=capacity_factor,
        min_expert_capacity=1,
        group_size=16,
    )
    layer = MoeLayer(config=config, router=router, hidden=32)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
    x, kernel = 4 * draw(4 * 8, 16).reshape(4, 8, 16), draw(16, 4)
    dense = {"wi_0": draw(16, 32), "wi_1": draw(16, 32), "wo": draw(32, 16)}
    dense = {name: {"kernel": leaf} for name, leaf in dense.items()}
    params = {
        "router": {"router_weights": {"w": {"kernel": kernel}}},
        "expert": jax.tree.map(lambda leaf: np.stack([leaf] * 4), dense),
    }
    shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)

    # The summed weights, from the words: two groups of two rows, 16 tokens each.
    p = np.exp(x.reshape(2, 16, 16) @ kernel)
    p /= p.sum(axis=-1, keepdims=True)
    capacity = max(round(capacity_factor * 16 / 4), 1)
    summed = np.zeros((2, 16), np.float32)
    for group, probabilities in enumerate(p):
        for expert in range(4):
            if router == ExpertsChoose():
                took = np.argsort(-probabilities[:, expert], kind="stable")[:capacity]
            else:
                choices = np.argsort(-probabilities, axis=1, kind="stable")[:, :2]
                took = [
                    token for k in range(2) for token in range(16) if choices[token, k] == expert
                ][:capacity]
            summed[group, took] += probabilities[took, expert]

    want = jax.jit(MlpBlock(hidden=32).apply)({"params": dense}, x) * summed.reshape(4, 8, 1)
    got = jax.jit(lambda params, x: layer.apply({"params": params}, x))(params, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
