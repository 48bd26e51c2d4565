"""Bytes that MoE layers hand over in all-to-alls, and that they reserve for what may arrive, from
shapes.
"""

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


def reserved_bytes(
    model: Model, shape: StepShape, partitioner: Partitioner, *, recomputes: bool
) -> int:
    """Bytes on one device that dropless experts reserve for the case that all tokens choose experts
    of one device, beyond those of an even load; 0 where experts are not divided.

    The backward pass of a layer holds, for every row, its token and output, the hidden units before
    and after the activation, and the gradients of all; without recomputation every layer keeps
    token, output and what the activation takes.

    Args:
      model: the model.
      shape: the batch.
      partitioner: the mesh.
      recomputes: whether the backward pass computes layers again.
    """
    devices, reserved = partitioner.num_expert_partitions, 0
    for stack in model.stacks.values():
        moe, router = stack.moe, stack.router
        if not stack.sparse_layers or moe is None or router is None or devices == 1:
            continue
        if not router.has_room_for_all or moe.dispatch in ("gather", "one_hot"):
            continue
        length = stack_lengths(model, shape.lengths)[stack.name]
        tokens = math.ceil(shape.rows * length / partitioner.num_data_shards)
        choices = round(router.active_experts(moe.capacity_factor(train=True)))
        rows = tokens * (devices * min(choices, moe.num_experts // devices) - choices)
        width, hidden, inputs = _expert_sizes(model, stack)
        hidden = math.ceil(hidden / partitioner.num_model_partitions)
        at_peak = 2 * (inputs + 1) * hidden + 4 * width
        kept = 0 if recomputes else (len(stack.sparse_layers) - 1) * (inputs * hidden + 2 * width)
        per_row = (at_peak + kept) * model.config.activation_dtype.itemsize
        reserved = max(reserved, max(rows, 0) * per_row)
    return reserved


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
    return _expert_sizes(model, stack)[0]


def _expert_sizes(model: Model, stack: Stack) -> tuple[int, int, int]:
    """Sizes of a token's vector and of an expert's hidden axis, and how many matrices lead from one
    to the other, of a stack's experts.
    """
    matrices = {
        path: leaf
        for path, leaf in model.param_specs().items()
        if leaf.role == Role.EXPERT and path.startswith(f"{stack.name}/") and len(leaf.shape) == 3
    }
    first = next(iter(matrices))
    leaf, expert = matrices[first], first.rsplit("/", 2)[0]
    width, hidden = (leaf.shape[leaf.axes.index(axis)] for axis in (axes.EMBED, axes.EXPERT_MLP))
    return width, hidden, sum(path.startswith(f"{expert}/") for path in matrices) - 1
