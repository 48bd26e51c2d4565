"""The mesh, the rule table, and the shardings that follow."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from upcycle_jax import axes, trees
from upcycle_jax.partitioning import STANDARD_RULES, Partitioner, constrain


def test_every_logical_axis_has_one_rule():
    names = {value for name, value in vars(axes).items() if name.isupper()}
    assert {name for name, _ in STANDARD_RULES} == names
    assert len(STANDARD_RULES) == len(names)


@pytest.mark.parametrize(
    ("experts", "model", "shape"),
    [(1, 1, (8, 1, 1)), (8, 1, (1, 8, 1)), (4, 1, (2, 4, 1)), (2, 2, (2, 2, 2)), (1, 8, (1, 1, 8))],
)
def test_mesh(experts, model, shape):
    partitioner = Partitioner(num_expert_partitions=experts, num_model_partitions=model)
    assert tuple(partitioner.mesh.shape.values()) == shape
    assert partitioner.num_data_shards == shape[0] * shape[1]


def test_one_device():
    partitioner = Partitioner(devices=(jax.devices()[0],))
    assert partitioner.mesh.size == 1


@pytest.mark.parametrize(("experts", "model"), [(3, 1), (4, 4)])
def test_a_mesh_that_does_not_fit(experts, model):
    with pytest.raises(
        ValueError,
        match=(
            f"8 devices cannot form a mesh of {experts} expert x {model}"
            " model.*NUM_EXPERT_PARTITIONS"
        ),
    ):
        Partitioner(num_expert_partitions=experts, num_model_partitions=model).mesh


def test_no_partition_is_refused_at_once():
    with pytest.raises(ValueError, match="num_expert_partitions must be at least 1, got 0"):
        Partitioner(num_expert_partitions=0)


def test_specs_of_parameters():
    partitioner = Partitioner(num_expert_partitions=2, num_model_partitions=2)
    assert partitioner.spec(("expert", "embed", "expert_mlp")) == PartitionSpec(
        "expert", None, "model"
    )
    assert partitioner.spec(("embed", "unmodeled")) == PartitionSpec(None, None)
    assert partitioner.spec((None, "mlp")) == PartitionSpec(None, "model")
    assert dataclasses.replace(partitioner, fsdp=True).spec(
        ("expert", "embed", "expert_mlp")
    ) == PartitionSpec("expert", "data", "model")


def test_unknown_axis_and_collision():
    partitioner = Partitioner()
    with pytest.raises(ValueError, match="'hidden' has no sharding rule; known axes: .*'embed'"):
        partitioner.spec(("hidden",))
    with pytest.raises(
        ValueError, match="'mlp' and 'vocab' of one array both map to mesh axis 'model'"
    ):
        partitioner.spec(("mlp", "vocab"))
    with pytest.raises(ValueError, match="'embed' has two rules"):
        Partitioner(rules=((axes.EMBED, None), (axes.EMBED, "model"))).spec(("embed",))


def test_a_dimension_that_does_not_divide_is_named_with_what_fits():
    partitioner = Partitioner(num_expert_partitions=4)
    specs = {
        "encoder/mlp/expert/wo/kernel": trees.LeafSpec(
            (6, 8, 4), "float32", ("expert", "expert_mlp", "embed")
        )
    }
    with pytest.raises(
        ValueError,
        match=r"encoder/mlp/expert/wo/kernel: axis 'expert' of size 6 .*4 partitions.*fits is 3",
    ):
        partitioner.shardings(specs)


def test_constraints_act_inside_activate_only():
    partitioner = Partitioner(num_expert_partitions=4)

    @jax.jit
    def inside(x):
        return constrain(x * 2, (axes.EXPERT_GROUP, None))

    with partitioner.activate():
        y = inside(jnp.ones((8, 2)))
    assert y.sharding.spec == PartitionSpec(("data", "expert"))

    @jax.jit
    def outside(x):
        return constrain(x * 2, (axes.EXPERT_GROUP, None))

    assert outside(jnp.ones((8, 2))).sharding.is_fully_replicated


def test_batches_are_split_over_data_and_expert_axes():
    partitioner = Partitioner(num_expert_partitions=2, num_model_partitions=2)
    batch = jax.device_put(jnp.zeros((8, 3)), partitioner.batch_sharding)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    assert jax.device_put(jnp.zeros(3), partitioner.replicated).sharding.is_fully_replicated


def test_a_torus_whose_sides_do_not_fit_is_split(monkeypatch):
    """Making a mesh of 2 x 32 on a 4 x 4 x 4 slice fails unless a side may serve two mesh axes."""

    def refuse(*args, **kwargs):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 32")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = Partitioner(num_expert_partitions=4).mesh
    assert dict(mesh.shape) == {"data": 2, "expert": 4, "model": 1}
    assert sorted(device.id for device in mesh.devices.flat) == sorted(
        device.id for device in jax.devices()
    )
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
