"""Numbers of parameters and their bytes, by hand."""

import jax

from upcycle_jax.costs import parameters
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import Role

EXPERT = 3 * 16 * 32


def test_memory_per_device(tiny):
    specs = tiny(num_experts=4).param_specs()
    one = parameters.nbytes(specs, Partitioner(devices=jax.devices()[:1]))
    assert one.total == one.per_device == sum(leaf.nbytes for leaf in specs.values())
    split = parameters.nbytes(specs, Partitioner(num_expert_partitions=4))
    experts = sum(leaf.nbytes for leaf in specs.values() if leaf.role == Role.EXPERT)
    assert split.per_device == one.total - experts + experts // 4


def test_active_parameters_follow_the_router(tiny):
    model = tiny(num_experts=4, train_expert_capacity_factor=1.0, eval_expert_capacity_factor=3.0)
    specs = model.param_specs()
    dense_part = sum(leaf.size for leaf in specs.values() if leaf.role != Role.EXPERT)
    # Encoder, experts choose: the capacity factor; decoder: K = 2.
    assert parameters.count(model).active == dense_part + (1 + 2) * EXPERT
    assert parameters.count(model, train=False).active == dense_part + (3 + 2) * EXPERT


def test_a_shared_expert_is_active_and_no_experts(tiny):
    one, other = (
        parameters.count(tiny(num_experts=4, shared_expert_mlp_dim=width)) for width in (None, 8)
    )
    # Two sparse layers with three matrices of 16 x 8; all of them active, none of them an expert's.
    assert other.total - one.total == other.active - one.active == 2 * 3 * 16 * 8
    assert (other.experts, other.routers) == (one.experts, one.routers)


def test_all_parameters_of_a_dense_model_are_active(tiny):
    counts = parameters.count(tiny())
    assert counts.total == counts.active and counts.experts == counts.routers == 0
