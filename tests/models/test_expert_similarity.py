"""Mean pairwise cosines against all pairs formed in NumPy, and computed where the experts are."""

import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import expert_similarity
from upcycle_jax.models.expert_similarity import mean_pairwise_cosine
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe import roles
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.planning import collectives, hlo


def all_pairs(kernel):
    flat = np.asarray(kernel, np.float64).reshape(kernel.shape[0], -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = unit @ unit.T
    return cosines[~np.eye(len(unit), dtype=bool)].mean()


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_against_all_pairs(shift):
    kernel = np.random.default_rng(0).normal(size=(5, 7, 11)).astype(np.float32) + shift
    np.testing.assert_allclose(mean_pairwise_cosine(kernel), all_pairs(kernel), atol=1e-5)


def test_copies_are_alike_and_opposites_are_not():
    one = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(mean_pairwise_cosine(np.tile(one, (8, 1, 1))), 1.0, atol=1e-5)
    np.testing.assert_allclose(
        mean_pairwise_cosine(np.concatenate([one, -2 * one])), -1.0, atol=1e-5
    )
    # Rows of the identity are at right angles.
    np.testing.assert_allclose(
        mean_pairwise_cosine(np.eye(4, dtype=np.float32)[:, :, None]), 0.0, atol=1e-6
    )


def test_an_expert_of_zeros_is_like_none():
    kernel = np.ones((3, 2, 2), np.float32)
    kernel[0] = 0
    # Of six ordered pairs, two are copies of each other and four have the zeros in them.
    np.testing.assert_allclose(mean_pairwise_cosine(kernel), 2 / 6, atol=1e-6)


def test_every_moe_layer_has_one(tiny, make_params):
    model = EncoderDecoderModel(tiny(num_experts=4))
    params = make_params(model)
    found = expert_similarity.metrics(params, model.param_specs())
    assert set(found) == {
        "experts/encoder/layers_1/similarity",
        "experts/decoder/layers_1/similarity",
    }
    flat = trees.flatten(params)
    kernels = [
        flat[f"encoder/layers_1/mlp/expert/{name}/kernel"] for name in ("wi_0", "wi_1", "wo")
    ]
    want = np.mean([all_pairs(kernel) for kernel in kernels])
    np.testing.assert_allclose(
        found["experts/encoder/layers_1/similarity"].compute(), want, atol=1e-5
    )
    dense = EncoderDecoderModel(tiny())
    assert expert_similarity.metrics(make_params(dense), dense.param_specs()) == {}
    alone = {"encoder/layers_1/mlp/expert/wo/kernel": np.ones((1, 2, 2))}
    specs = roles.inferred({path: trees.LeafSpec(a.shape, a.dtype) for path, a in alone.items()})
    assert expert_similarity.metrics(trees.unflatten(alone), specs) == {}


def test_experts_stay_where_they_are():
    """Eight experts on eight devices: nothing larger than one expert is sent, and nothing is
    gathered.
    """
    partitioner = Partitioner(num_expert_partitions=8)
    kernel = np.random.default_rng(0).normal(size=(8, 16, 32)).astype(np.float32)
    spec = trees.LeafSpec(kernel.shape, np.dtype(np.float32), ("expert", "embed", "expert_mlp"))
    placed = jax.device_put(kernel, partitioner.sharding(spec))
    program = (
        jax.jit(mean_pairwise_cosine, out_shardings=partitioner.replicated).lower(placed).compile()
    )
    sent = collectives.collectives(hlo.parse(program.as_text()))
    assert {item.kind for item in sent} == {"all-reduce"}
    assert sum(item.nbytes for item in sent) <= 4 * (
        16 * 32 + 8
    )  # the sum of unit kernels, and how many are not zero
    np.testing.assert_allclose(program(placed), all_pairs(kernel), atol=1e-5)
