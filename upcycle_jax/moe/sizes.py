"""Groups and slots of an MoE layer for a batch: what the layer, the accounting and the proofs of
conversions all start from.
"""

import dataclasses

from upcycle_jax.moe import capacity as capacity_lib
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import Router


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of one MoE layer.

    Attributes:
      grouping: how tokens are divided for routing.
      capacity: C as the settings ask for it; routers may need fewer slots (`slots`).
      slots: slots of one expert in one group.
      rows: vectors that the experts compute, over all groups.
    """

    grouping: capacity_lib.Grouping
    capacity: int
    slots: int
    rows: int


def layer_sizes(
    config: MoeSettings,
    router: Router,
    batch_size: int,
    length: int,
    *,
    train: bool,
    batch_shards: int = 1,
) -> LayerSizes:
    """Sizes of a layer.

    Args:
      config: the model's MoE settings.
      router: the layer's.
      batch_size: rows of the layer's input.
      length: its columns.
      train: training capacity, or that of evaluation.
      batch_shards: ways in which a mesh splits the batch; used only where groups do not matter.

    Raises:
      ValueError: the token count does not divide into groups.
    """
    if config.independent and router.per_token:
        # With room for every token results do not depend on the groups, so these may follow the
        # mesh.
        grouping = capacity_lib.ample_grouping(
            batch_size * length, max_group_size=config.group_size, multiple_of=batch_shards
        )
        capacity = grouping.group_size
    elif config.independent or router.group_is_sequence:
        grouping = capacity_lib.Grouping(num_groups=batch_size, group_size=length)
        capacity = sequence_capacity(config, length, train=train)
    else:
        grouping = capacity_lib.grouping(
            batch_size,
            length,
            max_group_size=config.group_size,
            num_experts=config.num_experts,
            num_expert_replicas=config.num_expert_replicas if config.t5x_mode else None,
        )
        capacity = capacity_lib.expert_capacity(
            grouping.group_size,
            num_experts=config.num_experts,
            capacity_factor=config.capacity_factor(train=train),
            min_expert_capacity=config.min_expert_capacity,
        )
    return LayerSizes(
        grouping=grouping,
        capacity=capacity,
        slots=router.slots(capacity, group_size=grouping.group_size),
        rows=grouping.num_groups
        * router.expert_rows(config.num_experts, capacity, group_size=grouping.group_size),
    )


def sequence_capacity(config: MoeSettings, length: int, *, train: bool) -> int:
    """Capacity of an expert where one sequence of so many real tokens is a group."""
    return capacity_lib.expert_capacity(
        length,
        num_experts=config.num_experts,
        capacity_factor=config.capacity_factor(train=train),
        min_expert_capacity=config.min_inference_capacity,
    )
