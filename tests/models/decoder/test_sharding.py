"""Eight devices compute what one computes: loss, metrics, gradients, on several meshes."""

import dataclasses

import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import metrics
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import DroplessTopK, TokensChoose
from upcycle_jax.partitioning import Partitioner

# Grouped queries, norms of queries and keys, a window, experts and a shared one, which is an MLP as
# those of dense layers: what a mesh could divide wrongly.
CONFIG = DecoderConfig(
    vocab_size=24,
    emb_dim=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=32,
    qk_norm="head",
    layer_types=("sliding",),
    sliding_window=5,
    dropout_rate=0.1,
    moe=DecoderMoeConfig(
        num_experts=8,
        num_sparse_layers=1,
        shared_expert_mlp_dim=8,
        group_size=32,
        router_z_loss_factor=0.1,
        router=DroplessTopK(renormalize=True),
    ),
)
ROUTERS = {
    "dropless": CONFIG.moe.router,
    "capacity": TokensChoose(renormalize=True),
}


def run(model, params, batch, partitioner):
    specs = model.param_specs()
    shardings = trees.unflatten(partitioner.shardings(specs))
    params = jax.device_put(params, shardings)
    batch = jax.device_put(batch, partitioner.batch_sharding)

    def value(params, batch):
        return model.loss_fn(
            params, batch, jax.random.key(7), denominator=model.loss_denominator(batch)
        )

    step = jax.jit(jax.value_and_grad(value, has_aux=True), out_shardings=((None, None), shardings))
    with partitioner.activate():
        (loss, found), gradient = step(params, batch)
    return loss, metrics.compute(found), trees.flatten(gradient), trees.flatten(shardings)


@pytest.fixture(scope="module")
def one_device():
    return {}


@pytest.mark.parametrize(
    ("router", "experts", "model_parts", "fsdp"),
    [
        pytest.param("dropless", 4, 1, True, marks=pytest.mark.slow),
        ("dropless", 2, 2, True),
        pytest.param("dropless", 1, 1, True, marks=pytest.mark.slow),
        pytest.param("dropless", 8, 1, False, marks=pytest.mark.slow),
        pytest.param("capacity", 4, 1, True, marks=pytest.mark.slow),
        pytest.param("capacity", 1, 2, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("drawn_parameters")
def test_eight_devices_equal_one(router, experts, model_parts, fsdp, one_device):
    """Of packed rows with padding; dropout is on: its masks must not depend on the mesh either."""
    moe = dataclasses.replace(CONFIG.moe, router=ROUTERS[router], train_expert_capacity_factor=1.0)
    model = DecoderModel(dataclasses.replace(CONFIG, moe=moe))
    random = np.random.default_rng(0)
    rows = [[{"targets": random.integers(0, 24, size)} for size in (5, 3 + i)] for i in range(8)]
    batch = model.features.pack(rows, {"targets": 16})
    with jax.default_device(jax.devices()[0]):
        params = jax.jit(model.init_params)(jax.random.key(1))
    if router not in one_device:
        one_device[router] = run(model, params, batch, Partitioner(devices=(jax.devices()[0],)))
    want_loss, want_values, want_gradient, _ = one_device[router]
    partitioner = Partitioner(
        num_expert_partitions=experts, num_model_partitions=model_parts, fsdp=fsdp
    )
    loss, values, gradient, shardings = run(model, params, batch, partitioner)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for name in want_values:
        np.testing.assert_allclose(
            values[name], want_values[name], rtol=1e-4, atol=1e-6, err_msg=name
        )
    for path, leaf in want_gradient.items():
        np.testing.assert_allclose(
            gradient[path], leaf, atol=1e-5 * max(np.abs(leaf).max(), 1e-3), err_msg=path
        )
        assert gradient[path].sharding.is_equivalent_to(shardings[path], gradient[path].ndim), path
    kernel = gradient["decoder/layers_0/mlp/expert/wi_0/kernel"].addressable_shards[0].data.shape
    data = 8 // experts // model_parts
    assert kernel == (8 // experts, 16 // (data if fsdp else 1), 32 // model_parts)
    query = gradient["decoder/layers_0/self_attention/query/kernel"].addressable_shards[0].data
    assert query.shape == (16 // (data if fsdp else 1), 16 // model_parts)
