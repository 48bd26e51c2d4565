"""One train step in every form that settings give it: looped over layers, with any router; divided
over meshes and microbatches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import metrics
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    HashTop1,
    LossFreeTopK,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.optimizers import Adafactor, OptimizerUpdate
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import jitted_train_step
from upcycle_jax.training.trainer import Trainer

RATE = 0.125  # sums of it are exact
ROUTERS = {
    "loss_free": LossFreeTopK(update_rate=RATE),
    "dropless": DroplessTopK(),
    "soft": SoftMoe(2),
    "experts_choose": ExpertsChoose(),
    "sigmoid": SigmoidTopK(),
    "hash": HashTop1(),
    "switch": SwitchTop1(jitter_noise=0.0),  # a loop draws other noise
    "batch_priority": TokensChoose(batch_prioritized=True),
    "dropless_loss_free": LossFreeTopK(update_rate=RATE, dropless=True),
    "dropless_hash": HashTop1(dropless=True),
}
ONE_DEVICE = Partitioner(devices=(jax.devices()[0],))
MOE = {
    "num_experts": 8,
    "group_size": 32,
    "train_expert_capacity_factor": 1.0,
    "min_expert_capacity": 2,
    "router_z_loss_factor": 0.1,
}


def named(*default):
    """All routers by name; those beside `default` in slow runs."""
    return [
        pytest.param(name, marks=[] if name in default else [pytest.mark.slow]) for name in ROUTERS
    ]


@dataclasses.dataclass(frozen=True)
class Recording(Adafactor):
    """Adafactor's first update (or none: what is left of it compiles sooner), with the gradients in
    place of its state.
    """

    min_dim_size_to_factor: int = 8
    updates: bool = True

    def state_specs(self, param_specs, groups=()):
        return {f"{path}/gradient": spec for path, spec in param_specs.items()}

    def apply(self, params, grads, param_states, *, param_specs, **kwargs):
        if self.updates:
            fresh = {
                path: jnp.zeros(spec.shape, spec.dtype)
                for path, spec in super().state_specs(param_specs).items()
            }
            params = (
                super()
                .apply(params, grads, trees.unflatten(fresh), param_specs=param_specs, **kwargs)
                .params
            )
        gradients = {f"{path}/gradient": leaf for path, leaf in trees.flatten(grads).items()}
        return OptimizerUpdate(params=params, param_states=trees.unflatten(gradients))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one train step: what it reports, gradients by path, and what it adds to the parameters."""

    loss: float
    metrics: dict
    gradients: dict
    updates: dict


def one_step(config, params, batch, *, partitioner=ONE_DEVICE, microbatches=None, updates=False):
    model = EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    setup = Trainer(
        optimizer=Recording(updates=updates),
        learning_rate_fn=lambda step: jnp.float32(1.0),
        num_microbatches=microbatches,
    )
    specs = state_specs(model, setup.optimizer)
    shardings = partitioner.shardings(specs)
    state = {path: np.zeros(spec.shape, spec.dtype) for path, spec in specs.items()}
    state |= {f"target/{path}": leaf for path, leaf in params.items()}
    with partitioner.activate():
        step = jitted_train_step(model, setup, partitioner=partitioner, shardings=shardings, seed=0)
        placed = jax.device_put(from_state_dict(state), from_state_dict(shardings))
        after, output = step(placed, jax.device_put(batch, partitioner.batch_sharding))
    after = jax.device_get(trees.flatten(after.state_dict()))
    slots = {path.removeprefix("state/param_states/"): leaf for path, leaf in after.items()}
    return Outcome(
        loss=float(output.loss),
        metrics=metrics.compute(output.metrics),
        gradients={path: slots[f"{path}/gradient"] for path in params},
        updates={path: after[f"target/{path}"] - leaf for path, leaf in params.items()},
    )


RATIOS = ("experts/fraction_tokens_left_behind", "experts/router_confidence")
"""As in T5X means over microbatches of ratios, which are those of the batch only where every
microbatch has as many real tokens.
"""


def assert_same(want, have, *, divided=False):
    np.testing.assert_allclose(have.loss, want.loss, rtol=1e-5)
    assert have.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        if divided and name in RATIOS:
            continue
        np.testing.assert_allclose(have.metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for path, leaf in want.gradients.items():
        if path.endswith("router/bias"):
            assert not leaf.any() and not have.gradients[path].any()
            np.testing.assert_array_equal(have.updates[path], want.updates[path], err_msg=path)
            continue
        np.testing.assert_allclose(
            have.gradients[path], leaf, atol=1e-4 * max(np.abs(leaf).max(), 1e-3), err_msg=path
        )
        # The first update divides a gradient by its size, so where that is rounding, signs are
        # free; elsewhere parts in a thousand.
        clear = np.abs(leaf) > 1e-3 * np.abs(leaf).max()
        np.testing.assert_allclose(
            have.updates[path][clear], want.updates[path][clear], rtol=1e-2, atol=1e-5, err_msg=path
        )


def make_config(tiny, router, **model):
    """Two MoE layers with the router in a stack that may have it, one dense layer in the other."""
    stack, other = ("encoder", "decoder") if router.not_causal_because else ("decoder", "encoder")
    shape = {f"num_{stack}_layers": 2, f"num_{other}_layers": 1}
    moe = {
        f"{stack}_router": router,
        f"{stack}_sparse_layout": (0, 1),
        f"num_{other}_sparse_layers": 0,
    }
    return tiny(model=shape | model, **MOE | moe)


def scanned(config, remat="none"):
    return dataclasses.replace(config, scan_layers=True, remat_policy=remat)


def host_params(make_params, config):
    """Parameters by path, with selection biases that decide something."""
    draw, out = np.random.default_rng(5), {}
    for path, leaf in trees.flatten(make_params(EncoderDecoderModel(config))).items():
        out[path] = (
            np.float32(RATE * draw.integers(-3, 4, leaf.shape))
            if path.endswith("router/bias")
            else np.asarray(leaf)
        )
    return out


# In every run test_stacking.py has a loop with a biased router, whose choices are among the metrics
# there: what its bias follows. Dropless experts in a loop are in `test_inference_in_a_loop`.
@pytest.mark.parametrize("name", named())
def test_a_loop_over_layers_changes_nothing(name, tiny, make_batch, make_params):
    config = make_config(tiny, ROUTERS[name])
    params = host_params(make_params, config)
    batch = make_batch(batch_size=4, inputs=16, targets=16, lengths=[16, 3, 9, 12])
    want = one_step(config, params, batch)
    assert_same(want, one_step(scanned(config), params, batch))
    biases = [path for path in want.updates if path.endswith("router/bias")]
    assert len(biases) == (2 if ROUTERS[name].balance_rate else 0)
    for path in biases:
        assert set(np.abs(want.updates[path])) <= {0, RATE} and want.updates[path].any()


@pytest.mark.parametrize("name", named())
def test_a_loop_on_a_mesh_with_microbatches_and_recomputation(name, tiny, make_batch, make_params):
    config = make_config(tiny, ROUTERS[name])
    params = host_params(make_params, config)
    batch = make_batch(
        batch_size=16, inputs=8, targets=8, lengths=[8, 3, 5, 8, 1, 7, 2, 8, 4, 6, 8, 8, 1, 2, 3, 4]
    )
    want = one_step(config, params, batch)
    mesh = Partitioner(num_expert_partitions=4)
    assert_same(
        want,
        one_step(scanned(config, "minimal"), params, batch, partitioner=mesh, microbatches=2),
        divided=True,
    )


@pytest.mark.parametrize("name", named("dropless"))
def test_inference_in_a_loop(name, tiny, make_batch, make_params):
    """Independent routing, in which a branch of the program has room for any load, inside of a
    loop.
    """
    config = make_config(tiny, ROUTERS[name])
    params = trees.unflatten(host_params(make_params, config))
    batch = make_batch(batch_size=4, inputs=16, targets=16, lengths=[16, 3, 9, 12])
    want, have = (
        jax.jit(EncoderDecoderModel(form.for_inference).logits)(params, batch)
        for form in (config, scanned(config))
    )
    np.testing.assert_allclose(have, want, atol=1e-4)


DIVISIONS = [(experts, microbatches) for experts in (0, 1, 8, 2, 4) for microbatches in (1, 2, 4)]
"""Expert partitions of eight devices (0 stands for a single device): 1x1, 8x1, 1x8, 4x2 and 2x4,
each with 1, 2 and 4 microbatches.
"""
QUICK = {(4, 2)}


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.mark.parametrize(
    ("experts", "microbatches"),
    [
        pytest.param(*d, marks=[] if d in QUICK else [pytest.mark.slow])
        for d in DIVISIONS
        if d != (0, 1)
    ],
)
def test_any_mesh_and_any_number_of_microbatches(
    experts, microbatches, single, make_batch, make_params, reference
):
    """Values, gradients, auxiliary losses, optimizer updates, balancing bias: a bias in the
    encoder, a balancing loss in the decoder.
    """
    config = single(**MOE | {"encoder_router": LossFreeTopK(update_rate=RATE)})
    params = host_params(make_params, config)
    lengths = np.random.default_rng(2).integers(1, 9, 32)
    batch = make_batch(batch_size=32, inputs=8, targets=8, lengths=lengths)
    if not reference:
        reference["one"] = one_step(config, params, batch, updates=True)
        assert (
            reference["one"].metrics["experts/auxiliary_loss"] > 0
            and reference["one"].metrics["experts/router_z_loss"] > 0
        )
        assert reference["one"].updates["encoder/layers_0/mlp/router/bias"].any()
    partitioner = Partitioner(num_expert_partitions=experts) if experts else ONE_DEVICE
    have = one_step(
        config, params, batch, partitioner=partitioner, microbatches=microbatches, updates=True
    )
    assert_same(reference["one"], have, divided=microbatches > 1)
