"""The layer of the paper's vision transformers against a NumPy specification that agrees with
V-MoE's own modules.
"""

import jax
import numpy as np
import pytest

from tests import oracles
from upcycle_jax import trees
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import ExpertsChoose

D, F, E = 16, 24, 4


@pytest.fixture(scope="module")
def oracle():
    return oracles.load("vit_reference")


# 9 tokens of an image, 2 * 9 / 4 = 4.5 slots; two images are 18 tokens, 9 slots.
@pytest.mark.parametrize(
    ("group", "rounding", "multiple", "slots"),
    [
        (9, "ceil", 4, 8),
        (18, "ceil", 1, 9),
        pytest.param(9, "round", 1, 4, marks=pytest.mark.slow),
        pytest.param(9, "ceil", 1, 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_layer_is_the_specifications(group, rounding, multiple, slots, renormalize, oracle):
    settings = MoeSettings(
        num_experts=E,
        group_size=group,
        min_expert_capacity=1,
        capacity_rounding=rounding,
        capacity_multiple=multiple,
    )
    layer = MoeLayer(
        settings, ExpertsChoose(renormalize=renormalize), F, activations=("gelu",), use_bias=True
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, D)).astype(np.float32)
    shapes = {
        "router/router_weights/w/kernel": (D, E),
        "expert/wi/kernel": (E, D, F),
        "expert/wi/bias": (E, F),
        "expert/wo/kernel": (E, F, D),
        "expert/wo/bias": (E, D),
    }
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    theirs = {
        "m/Router/dense/kernel": params["router/router_weights/w/kernel"],
        **{
            f"m/Mlp/Dense_{i}/{leaf}": params[f"expert/{name}/{leaf}"]
            for i, name in enumerate(("wi", "wo"))
            for leaf in ("kernel", "bias")
        },
    }
    y, sown = jax.jit(lambda p, x: layer.apply({"params": p}, x, mutable=[LAYER_STATS]))(
        trees.unflatten(params), x
    )
    expected = oracle.expert_choice(
        x.reshape(-1, group, D).astype(np.float64),
        {name: value.astype(np.float64) for name, value in theirs.items()},
        "m",
        2,
        oracle.gelu_tanh,
        renormalise=renormalize,
        capacity=slots,
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-5 * scale, rtol=0)
    assert sown[LAYER_STATS]["stats"].capacity == 18 // group * E * slots
