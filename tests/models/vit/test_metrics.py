"""Metrics of sparse vision transformers."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.vit.kinds import model, random_params
from upcycle_jax import trees
from upcycle_jax.models import metrics
from upcycle_jax.models.vit.model import VitModel


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
