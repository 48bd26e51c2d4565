"""Metrics of sparse vision transformers."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.vit.kinds import model, random_params
from upcycle_jax import trees
from upcycle_jax.models import metrics
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import TokensChoose


def test_the_effective_capacity_factor_is_that_of_the_slots():
    # 2 * 9 / 4 = 4.5 slots, rounded up 5: 5 * 4 / 9 vectors for each token.
    plain = model("renormalised")
    moe = dataclasses.replace(plain.config.moe, capacity_rounding="ceil")
    one = VitModel(dataclasses.replace(plain.config, moe=moe))
    params = trees.unflatten(random_params(one))
    batch = one.features.random(None, batch_size=2)
    found = metrics.compute(jax.jit(one.eval_fn)(params, batch))
    assert found["experts/effective_capacity_factor"] == pytest.approx(20 / 9)
    assert found["experts/encoder/layers_2/load"].sum() == pytest.approx(1)
    assert np.isfinite(found["loss"])


@pytest.mark.slow
def test_the_losses_of_v_moe_are_part_of_the_loss():
    plain = model("renormalised")
    moe = dataclasses.replace(
        plain.config.moe,
        router=TokensChoose(batch_prioritized=True, noise_std=1.0),
        aux_loss_factor=0.0,
        importance_loss_factor=0.005,
        load_loss_factor=0.005,
    )
    one = VitModel(dataclasses.replace(plain.config, moe=moe))
    params = trees.unflatten(random_params(one))
    batch = one.features.random(None, batch_size=2)

    @jax.jit
    def run(params):
        denominator = one.loss_denominator(batch)
        return one.loss_fn(params, batch, jax.random.key(0), denominator=denominator)

    loss, found = run(params)
    found = metrics.compute(found)
    parts = ("cross_ent_loss", "experts/importance_loss", "experts/load_loss")
    assert all(found[name] > 0 for name in parts)
    total = sum(float(found[name]) for name in parts)
    assert float(loss) == pytest.approx(total, rel=1e-6)
