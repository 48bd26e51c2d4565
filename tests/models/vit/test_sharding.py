"""Eight devices compute what one computes: loss, gradients, and where they lie."""

import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import ExpertsChoose
from upcycle_jax.partitioning import Partitioner

# The head is narrow on purpose: no mesh divides 7 classes.
CONFIG = VitConfig(
    num_classes=7,
    image_size=8,
    patch_size=2,
    emb_dim=16,
    num_layers=1,
    num_heads=4,
    mlp_dim=32,
    pool="map",
    # Noise is the same on every mesh.
    moe=VitMoeConfig(
        num_experts=8,
        num_sparse_layers=1,
        group_size=32,
        router=ExpertsChoose(renormalize=True, noise_std=1.0),
    ),
)


def run(model, params, batch, partitioner):
    shardings = trees.unflatten(partitioner.shardings(model.param_specs()))
    params = jax.device_put(params, shardings)
    batch = jax.device_put(batch, partitioner.batch_sharding)

    def value(params, batch):
        denominator = model.loss_denominator(batch)
        key = jax.random.key(0)
        return model.loss_fn(params, batch, key, denominator=denominator)[0]

    step = jax.jit(jax.value_and_grad(value), out_shardings=(None, shardings))
    with partitioner.activate():
        loss, gradient = step(params, batch)
    return loss, trees.flatten(gradient)


@pytest.mark.parametrize(
    ("experts", "model_parts"),
    [
        (2, 2),
        pytest.param(8, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(experts, model_parts):
    model = VitModel(CONFIG)
    batch = model.features.random(None, batch_size=8)
    batch["labels"] = np.arange(8, dtype=np.int32) % 7
    batch["weights"][-1] = 0
    random = np.random.default_rng(0)
    params = trees.unflatten(
        {
            path: random.normal(0, 0.2, spec.shape).astype(np.float32)
            for path, spec in model.param_specs().items()
        }
    )
    want_loss, want = run(model, params, batch, Partitioner(devices=(jax.devices()[0],)))
    partitioner = Partitioner(num_expert_partitions=experts, num_model_partitions=model_parts)
    loss, gradient = run(model, params, batch, partitioner)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for path, leaf in want.items():
        scale = max(np.abs(leaf).max(), 1e-3)
        np.testing.assert_allclose(gradient[path], leaf, atol=1e-5 * scale, err_msg=path)
    kernel = gradient["encoder/layers_0/mlp/expert/wi/kernel"].addressable_shards[0].data.shape
    assert kernel == (8 // experts, 16, 32 // model_parts)
