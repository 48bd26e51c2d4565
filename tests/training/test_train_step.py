"""The update as a function: microbatches, meshes, dropout keys, and one step worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training import batches
from upcycle_jax.training.optimizers import AdamW
from upcycle_jax.training.train_state import from_state_dict, initial_state, state_specs
from upcycle_jax.training.train_step import make_train_step, split_batch


def run_steps(model, trainer, partitioner, host_batches, seed=0):
    """Losses of each step and the final flat state, as host arrays."""
    specs = state_specs(model, trainer.optimizer)
    shardings = partitioner.shardings(specs)
    with partitioner.activate():
        state = initial_state(model, trainer.optimizer, seed=seed, shardings=shardings)
        step = jax.jit(
            make_train_step(model, trainer, seed=seed),
            out_shardings=(from_state_dict(shardings), partitioner.replicated),
        )
        outputs = []
        for batch in host_batches:
            state, output = step(state, batches.to_global(batch, partitioner))
            outputs.append(jax.device_get(output))
    for path, leaf in trees.flatten(state.state_dict()).items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
    return outputs, jax.device_get(trees.flatten(state.state_dict()))


def assert_close(left, right, rtol=1e-5, atol=1e-6):
    for path in left:
        np.testing.assert_allclose(left[path], right[path], rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize(
    ("num_experts", "num_microbatches"),
    [
        (4, 4),
        pytest.param(0, 2, marks=pytest.mark.slow),
        pytest.param(0, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_microbatches_change_neither_loss_nor_update(bags, num_experts, num_microbatches):
    model, data = bags.Model(num_experts=num_experts, dropout=0.0), bags.Dataset()
    host = [data.batch(k) for k in range(3)]
    whole, whole_state = run_steps(model, bags.trainer(), bags.one_device, host)
    parts, parts_state = run_steps(
        model, bags.trainer(num_microbatches=num_microbatches), bags.one_device, host
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        for name in a.metrics:
            np.testing.assert_allclose(
                a.metrics[name].compute(), b.metrics[name].compute(), rtol=1e-5, err_msg=name
            )
    assert_close(whole_state, parts_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "mesh"),
    [
        # Each of the others divides its batch over the data axis too.
        pytest.param(0, {}, marks=pytest.mark.slow),
        (4, {"num_expert_partitions": 4}),
        (4, {"num_model_partitions": 2, "fsdp": True}),
    ],
)
def test_eight_devices_equal_one(bags, num_experts, mesh):
    model, data = (
        bags.Model(num_experts=num_experts),
        bags.Dataset(batch_size=16),
    )  # dropout on: its masks must not depend on the mesh
    host = [data.batch(k) for k in range(3)]
    trainer = bags.trainer(num_microbatches=2)
    one, one_state = run_steps(model, trainer, bags.one_device, host)
    eight, eight_state = run_steps(model, trainer, Partitioner(**mesh), host)
    np.testing.assert_allclose([o.loss for o in one], [o.loss for o in eight], rtol=1e-5)
    assert_close(one_state, eight_state, rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_seed_step_and_microbatch_only(bags):
    class Recorder(bags.Model):
        def loss_fn(self, params, batch, dropout_rng, *, denominator, aux_scale=1.0):
            loss, metrics = super().loss_fn(
                params, batch, None, denominator=denominator, aux_scale=aux_scale
            )
            words = (jax.random.key_data(dropout_rng) % 4096).astype(jnp.float32)
            return loss, metrics | {
                "key": metrics["loss"].__class__(words * aux_scale, jnp.float32(aux_scale))
            }

    data = bags.Dataset()
    host = [data.batch(0), data.batch(0)]
    outputs, _ = run_steps(Recorder(), bags.trainer(), bags.one_device, host, seed=3)
    for step, output in enumerate(outputs):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), step), 0)
        np.testing.assert_array_equal(
            output.metrics["key"].compute(), jax.random.key_data(key) % 4096
        )
    outputs, _ = run_steps(
        Recorder(), bags.trainer(num_microbatches=2), bags.one_device, host[:1], seed=3
    )
    keys = [
        jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), m)) % 4096
        for m in range(2)
    ]
    np.testing.assert_allclose(outputs[0].metrics["key"].compute(), np.mean(keys, axis=0))


def test_split_batch_keeps_rows_in_order():
    batch = {"x": jnp.arange(12).reshape(6, 2)}
    np.testing.assert_array_equal(
        split_batch(batch, 3)["x"], [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    )


def test_learning_rate_of_the_first_step_is_that_of_step_zero(bags):
    model, data = bags.Model(), bags.Dataset()
    seen, _ = run_steps(
        model,
        bags.trainer(learning_rate_fn=lambda step: 0.5 + step),
        bags.one_device,
        [data.batch(0), data.batch(1)],
    )
    assert [float(output.metrics["learning_rate"].compute()) for output in seen] == [0.5, 1.5]


def test_one_step_of_adamw_by_hand(bags):
    # The first Adam step is lr * sign(gradient) up to eps, for every parameter whose gradient is
    # not tiny.
    model, data = bags.Model(dropout=0.0), bags.Dataset()
    trainer = bags.trainer(optimizer=AdamW(), learning_rate_fn=lambda step: jnp.float32(0.01))
    specs = state_specs(model, trainer.optimizer)
    before = initial_state(
        model, trainer.optimizer, seed=0, shardings=bags.one_device.shardings(specs)
    )
    denominator = model.loss_denominator(data.batch(0))

    def loss(params):
        return model.loss_fn(params, data.batch(0), None, denominator=denominator)[0]

    grads = jax.jit(jax.grad(loss))(before.params)
    _, after = run_steps(model, trainer, bags.one_device, [data.batch(0)])
    for path, grad in trees.flatten(grads).items():
        clear = np.abs(grad) > 1e-4
        moved = (trees.flatten(before.params)[path] - after[f"target/{path}"])[clear]
        np.testing.assert_allclose(moved, 0.01 * np.sign(grad)[clear], rtol=1e-3)


def test_state_dict_round_trip_and_specs(bags):
    model, optimizer = bags.Model(num_experts=2), bags.trainer().optimizer
    specs = state_specs(model, optimizer)
    state = initial_state(model, optimizer, seed=0, shardings=bags.one_device.shardings(specs))
    flat = trees.flatten(state.state_dict())
    assert not trees.diff(specs, flat, compare_dtype=True)
    for tree in (flat, state.state_dict()):
        again = trees.flatten(from_state_dict(tree).state_dict())
        assert again.keys() == flat.keys() and all(again[path] is flat[path] for path in flat)
    assert specs["state/param_states/decoder/layers_0/mlp/expert/wi_0/kernel/v_row"].axes == (
        "expert",
        "embed",
    )


def test_fresh_parameters_do_not_depend_on_the_mesh(bags):
    model, optimizer = bags.Model(num_experts=4), bags.trainer().optimizer
    specs = state_specs(model, optimizer)
    states = [
        initial_state(model, optimizer, seed=1, shardings=partitioner.shardings(specs))
        for partitioner in (
            bags.one_device,
            Partitioner(num_expert_partitions=4, num_model_partitions=2),
        )
    ]
    one, eight = (jax.device_get(trees.flatten(state.params)) for state in states)
    for path in one:
        np.testing.assert_array_equal(one[path], eight[path], err_msg=path)


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "message"),
    [
        (6, 4, "BATCH_SIZE 6 does not split into 4"),
        (12, 1, "does not split over the 8 data shards"),
        (16, 4, "a microbatch of 4 rows"),
    ],
)
def test_batches_that_do_not_divide(batch_size, microbatches, message):
    with pytest.raises(ValueError, match=message):
        batches.check_batch_size(batch_size, microbatches, Partitioner())


def test_layout_of_one_process():
    assert batches.data_layout(Partitioner(num_model_partitions=2), 8) == batches.DataLayout(
        shard=0, num_shards=1
    )
