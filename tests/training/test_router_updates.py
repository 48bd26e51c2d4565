"""How far the fresh router of a real vision transformer moves when the network was upcycled with an
optimizer state of many steps.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.surgery.conftest import MemoryReader
from upcycle_jax import surgery, trees
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.state_tree import PARAM_STATES, STEP
from upcycle_jax.surgery import Recipe
from upcycle_jax.training.big_vision_adafactor import BigVisionAdafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train_state import from_state_dict, initial_state, state_specs
from upcycle_jax.training.train_step import make_train_step
from upcycle_jax.training.trainer import Trainer

LATE = 100_000
"""Updates that the loaded state claims to have seen: beta is 0.999 from step 5,600 on."""
STEPS = 20
RATE = 1e-4
ROUTER = "encoder/layers_1/mlp/router/router_weights/w/kernel"
BODY = "encoder/layers_0/mlp/wi/kernel"


def model(moe=None):
    return VitModel(
        VitConfig(
            num_classes=4,
            image_size=8,
            patch_size=4,
            channels=1,
            emb_dim=16,
            num_layers=2,
            num_heads=2,
            mlp_dim=32,
            moe=moe,
        )
    )


SPARSE = VitMoeConfig(num_experts=4, num_sparse_layers=1, group_size=16)


def batch(number):
    """16 images of four classes: each class has a pattern, with noise over it."""
    rng = np.random.default_rng(number)
    labels = rng.integers(0, 4, 16)
    patterns = np.random.default_rng(1000).standard_normal((4, 8, 8, 1))
    images = patterns[labels] + 0.5 * rng.standard_normal((16, 8, 8, 1))
    return {
        "images": images.astype(np.float32),
        "labels": labels.astype(np.int32),
        "weights": np.ones(16, np.float32),
    }


def trained(one, optimizer, state, numbers):
    """The state after steps on these batches, and the parameters before each of them."""
    rate = create_learning_rate_scheduler("constant", base_learning_rate=RATE)
    trainer = Trainer(optimizer=optimizer, learning_rate_fn=rate)
    with Partitioner(devices=(jax.devices()[0],)).activate():
        step = jax.jit(make_train_step(one, trainer, seed=0))
        seen = []
        for number in numbers:
            seen.append(trees.flatten(state.params))
            state, _ = step(state, batch(number))
    return state, [*seen, trees.flatten(state.params)]


@functools.cache
def loaded():
    """A dense state after 60 steps that says it is of a late one, by full path."""
    optimizer = BigVisionAdafactor()
    partitioner = Partitioner(devices=(jax.devices()[0],))
    with partitioner.activate():
        start = initial_state(
            model(),
            optimizer,
            seed=0,
            shardings=partitioner.shardings(state_specs(model(), optimizer)),
        )
    state, _ = trained(model(), optimizer, start, range(60))
    flat = {path: np.asarray(v) for path, v in trees.flatten(state.state_dict()).items()}
    return {
        path: np.full_like(v, LATE) if path == STEP or path.endswith("/count") else v
        for path, v in flat.items()
    }


@functools.cache
def moves(optimizer):
    """RMS of the updates of the router and of a matrix of the body, in learning rates, float
    `[STEPS, 2]`, after upcycling with the state.
    """
    dense = loaded()
    target = state_specs(model(SPARSE), optimizer)
    plan = surgery.make_plan(
        state_specs(model(), optimizer), target, Recipe(optimizer_state="tiled")
    )
    partitioner = Partitioner(devices=(jax.devices()[0],))
    flat = surgery.apply_online(plan, MemoryReader(dense), partitioner.shardings(target))
    assert int(flat[STEP]) == LATE
    assert not np.any(flat[f"{PARAM_STATES}{ROUTER}/v"])
    state = from_state_dict(flat)
    _, seen = trained(model(SPARSE), optimizer, state, range(100, 100 + STEPS))
    sizes = [
        [float(jnp.sqrt(jnp.mean((after[path] - before[path]) ** 2))) for path in (ROUTER, BODY)]
        for before, after in itertools.pairwise(seen)
    ]
    return np.array(sizes) / RATE


def test_under_a_loaded_step_count_the_router_moves_too_far():
    """Second moments of a thousandth of g^2: the first update is 0.1 * 1000^0.5 = 3.2 learning
    rates, and those after it are several times those of the body.
    """
    sizes = moves(BigVisionAdafactor(count_by="step"))
    np.testing.assert_allclose(sizes[0, 0], 0.1 * 1000**0.5, rtol=1e-2)
    assert sizes[5:, 0].min() > 3 * sizes[5:, 1].max()


@pytest.mark.parametrize(
    "optimizer",
    [BigVisionAdafactor(), BigVisionAdafactor(count_by="step", clipping_threshold=1.0)],
    ids=["its own count", "clipped"],
)
def test_both_remedies_keep_it_with_the_others(optimizer):
    sizes = moves(optimizer)
    assert sizes[:, 0].max() < 1.0
    assert sizes[5:, 0].max() < 3 * sizes[5:, 1].min()
