"""The MLP in NumPy is the model's."""

import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.layers import mlp_reference
from upcycle_jax.layers.mlp import MlpBlock, input_kernel_names


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "activations", [("gelu", "linear"), ("silu", "linear"), ("relu",), ("gelu_exact",)]
)
def test_it_is_the_models_mlp(activations, biased):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    shapes = dict.fromkeys(input_kernel_names(activations), (8, 12)) | {"wo": (12, 8)}
    kernels = {
        f"{name}/kernel": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    if biased:
        kernels |= {
            f"{name}/bias": rng.normal(size=shape[1]).astype(np.float32)
            for name, shape in shapes.items()
        }
    for units in (12, 5):
        cut = {
            path: (
                leaf
                if path == "wo/bias"
                else leaf[:units]
                if path == "wo/kernel"
                else leaf[..., :units]
            )
            for path, leaf in kernels.items()
        }
        params = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in cut.items()})
        block = MlpBlock(hidden=units, activations=activations, use_bias=biased)
        want = block.apply({"params": params}, x)
        found = mlp_reference.mlp(x, kernels, activations, units=units)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
