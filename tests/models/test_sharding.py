"""Eight devices compute what one computes: loss, metrics, gradients, on several meshes. In every
run test_stacking.py shows it of a model with a loop over its encoder's layers, and none in its
decoder; here are models without any, in slow runs.
"""

import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import metrics
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.partitioning import Partitioner

MOE = {
    "num_experts": 8,
    "group_size": 32,
    "train_expert_capacity_factor": 1.0,
    "min_expert_capacity": 2,
    "router_z_loss_factor": 0.1,
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
def reference():
    return {}


@pytest.mark.parametrize(
    ("experts", "model_parts", "fsdp"),
    [
        pytest.param(1, 1, False, marks=pytest.mark.slow),
        pytest.param(4, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 2, True, marks=pytest.mark.slow),
        pytest.param(2, 1, False, marks=pytest.mark.slow),
        pytest.param(8, 1, False, marks=pytest.mark.slow),
        pytest.param(4, 1, True, marks=pytest.mark.slow),
        pytest.param(1, 2, False, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(
    experts, model_parts, fsdp, single, make_batch, make_params, reference
):
    # 8 rows of 16 and 8 tokens: 4 encoder groups and 2 decoder groups, fewer than devices. Dropout
    #   is on: its masks must not depend on the
    # mesh either.
    config = single(model={"dropout_rate": 0.1}, **MOE)
    model = EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    params, batch = (
        make_params(model),
        make_batch(batch_size=8, inputs=16, targets=8, lengths=[16, 3, 9, 12, 1, 8, 5, 14]),
    )
    if not reference:
        reference["one"] = run(model, params, batch, Partitioner(devices=(jax.devices()[0],)))
    want_loss, want_values, want_gradient, _ = reference["one"]
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
    shard = gradient["encoder/layers_0/mlp/expert/wi_0/kernel"].addressable_shards[0].data.shape
    assert shard == (
        8 // experts,
        16 // (8 // experts // model_parts if fsdp else 1),
        32 // model_parts,
    )
