"""Bytes that MoE layers hand over in all-to-alls, from shapes."""

import math

from upcycle_jax import axes
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.models.base import Model, Stack, stack_lengths
from upcycle_jax.moe import all_to_all
from upcycle_jax.moe.policy import layer_sizes
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import Role


def exchange_bytes(
    model: Model, shape: StepShape, partitioner: Partitioner, *, recomputes: bool
) -> int:
    """Bytes that all-to-alls hand over on each device in a training step; 0 where experts are not
    divided. The part that stays on its own device (1 / expert partitions) is included, as it is in
    XLA's shapes.

    Args:
      model: the model.
      shape: the batch.
      partitioner: the mesh.
      recomputes: whether the backward pass computes layers again, and sends tokens again for that.

    Raises:
      ValueError: the tokens do not divide into routing groups.
    """
    if partitioner.num_expert_partitions == 1:
        return 0
    forwards = 2 if recomputes else 1
    of_layers = (
        len(stack.sparse_layers) * _of_layer(model, stack, shape, partitioner, forwards)
        for stack in model.stacks.values()
        if stack.sparse_layers
    )
    return shape.num_microbatches * sum(of_layers)


def follows_load(model: Model) -> bool:
    """Whether what MoE layers exchange depends on how tokens choose, so that `exchange_bytes` is
    that of an even load.
    """
    return any(
        stack.router is not None and bool(stack.sparse_layers) and stack.router.has_room_for_all
        for stack in model.stacks.values()
    )


def _of_layer(
    model: Model, stack: Stack, shape: StepShape, partitioner: Partitioner, forwards: int
) -> int:
    """Of one MoE layer, in one microbatch.

    Every slot goes to its expert and comes back, in the activations' dtype, and so do the
    gradients. What dropless routers send follows the load, which shapes do not tell: counted is an
    even one, tokens and gradients in the activations' dtype, sums of expert outputs and theirs in
    float32. With the dispatch 'gather' slots are added as a batch needs them, and nothing is
    counted.
    """
    moe, router = stack.moe, stack.router
    assert moe is not None and router is not None
    rows, length = shape.rows, stack_lengths(model, shape.lengths)[stack.name]
    width = _width(model, stack)
    vector = width * model.config.activation_dtype.itemsize
    if not router.has_room_for_all:
        slots = layer_sizes(moe, router, rows, length, train=True).rows
        return 2 * (forwards + 1) * slots * vector // partitioner.num_data_shards
    if moe.dispatch == "gather":
        return 0
    choices = round(router.active_experts(moe.capacity_factor(train=True)))
    sent = all_to_all.slots_at_even_load(
        math.ceil(rows * length / partitioner.num_data_shards),
        num_choices=choices,
        num_devices=partitioner.num_expert_partitions,
    )
    # Weights are float32, experts int32. What comes back is not needed twice: it is only added up.
    there, sums, gradients = vector + 8 * choices, 4 * width, vector + 4 * choices
    return sent * (forwards * there + 2 * sums + gradients)


def _width(model: Model, stack: Stack) -> int:
    """Size of a token's vector, as the stack's experts take it."""
    leaf = next(
        leaf
        for path, leaf in model.param_specs().items()
        if leaf.role == Role.EXPERT
        and path.startswith(f"{stack.name}/")
        and axes.EMBED in leaf.axes  # Biases of hidden units have none.
    )
    return leaf.shape[leaf.axes.index(axes.EMBED)]
