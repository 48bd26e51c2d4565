"""Routing policies: how tokens are grouped, which of them take part and count, and how much room
experts have. A router then decides who goes where.

Four policies cover what settings ask for, see `routing_policy`. The layer, `costs` and the
proofs of conversions all take a layer's sizes from here (`layer_sizes`).

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group).
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.moe import losses
from upcycle_jax.moe.config import CapacityRounding, MoeSettings
from upcycle_jax.moe.grouping import Grouping, ample_grouping, even_grouping, t5x_grouping
from upcycle_jax.moe.layer_stats import LayerStats, LogitLosses
from upcycle_jax.moe.routing import Group, Router

ROOM_FOR_SKEW = 4.0
"""Slots of an expert that are computed at first where every token has one, in multiples of the
expert's even share of the tokens.
"""
MIN_ROOM = 8
"""Slots that are computed at first, at least."""


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of one MoE layer.

    Attributes:
      grouping: how tokens are divided for routing.
      capacity: C as the settings ask for it; routers may need fewer slots (`slots`).
      slots: slots of one expert in one group.
      rows: vectors that the experts compute, over all groups.
    """

    grouping: Grouping
    capacity: int
    slots: int
    rows: int

    @property
    def effective_factor(self) -> float:
        """The capacity factor that these sizes come to: vectors that experts compute per token."""
        return self.rows / (self.grouping.num_groups * self.grouping.group_size)


@dataclasses.dataclass(frozen=True)
class RoutingPolicy(abc.ABC):
    """What surrounds a router in a layer.

    Attributes:
      settings: of the layer.
      router: the layer's.
    """

    settings: MoeSettings
    router: Router

    @abc.abstractmethod
    def grouping(self, batch_size: int, length: int, *, batch_shards: int) -> Grouping:
        """The groups of a batch.

        Args:
          batch_size: rows of the layer's input.
          length: its columns.
          batch_shards: ways in which a mesh splits the batch.

        Raises:
          ValueError: the token count does not divide into groups.
        """

    @abc.abstractmethod
    def capacity(self, group_size: int, *, train: bool) -> int:
        """C as the settings ask for it, of training or of evaluation."""

    def _capacity(self, group_size: int, at_least: int, *, train: bool) -> int:
        return expert_capacity(
            group_size,
            num_experts=self.settings.num_experts,
            capacity_factor=self.settings.capacity_factor(train=train),
            min_expert_capacity=at_least,
            rounding=self.settings.capacity_rounding,
            multiple=self.settings.capacity_multiple,
        )

    def sizes(
        self, batch_size: int, length: int, *, train: bool, batch_shards: int = 1
    ) -> LayerSizes:
        """Sizes of the layer for a batch; arguments as of `grouping` and `capacity`."""
        grouping = self.grouping(batch_size, length, batch_shards=batch_shards)
        group_size, num_experts = grouping.group_size, self.settings.num_experts
        capacity = self.capacity(group_size, train=train)
        rows = self.router.expert_rows(num_experts, capacity, group_size=group_size)
        return LayerSizes(
            grouping=grouping.divided_over(batch_shards),
            capacity=capacity,
            slots=self.router.slots(capacity, group_size=group_size),
            rows=grouping.num_groups * rows,
        )

    def limits(self, real: jax.Array, *, train: bool) -> jax.Array | None:
        """Int32 `[G]`, capacities that follow from the groups' real tokens, bool `[G, S]`; None
        where all groups have the same.
        """
        return None

    @property
    def skips_padding(self) -> bool:
        """Whether padding takes no places."""
        return self.settings.ignore_padding_tokens is not False or self.router.skips_padding

    def routable(self, real: jax.Array) -> jax.Array:
        """Bool `[S]`, the tokens of a group that may take a place; `real` is bool `[S]`."""
        return real if self.skips_padding else jnp.ones_like(real)

    def counted(self, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float32 `[S]`, 1 for tokens that losses and statistics count; and the float32 number that
        means of losses divide by.
        """
        counted = real.astype(jnp.float32)
        return counted, jnp.sum(counted)

    def router_z_loss(self, group: Group) -> jax.Array:
        """Float32 scalar, the router z-loss of a group; 0 for routers without logits."""
        if not group.logits.size:
            return jnp.zeros((), jnp.float32)
        return losses.router_z_loss(group.logits, counted=group.counted, count=group.count)

    def logit_losses(self, group: Group) -> LogitLosses:
        """The losses of a group's logits; those of V-MoE where they are asked for."""
        settings, importance, load = self.settings, None, None
        clean = group.logits if group.clean_logits is None else group.clean_logits
        if settings.importance_loss_factor > 0:
            importance = losses.importance_loss(clean, counted=group.counted)
        if settings.load_loss_factor > 0:
            load = jnp.zeros((), jnp.float32)
            selected = self.router.selected_per_token
            if group.clean_logits is not None and selected is not None:
                load = losses.load_loss(
                    clean,
                    group.logits,
                    selected=selected,
                    noise_std=self.router.logit_noise / group.num_experts,
                    counted=group.counted,
                )
        return LogitLosses(self.router_z_loss(group), importance, load)

    @property
    def empty_groups_count(self) -> bool:
        """Whether means of losses over groups include those without a counted token."""
        return False

    def reported_rows(self, sizes: LayerSizes) -> int:
        """Slots of one group that statistics call its capacity: those that are computed."""
        return sizes.rows // sizes.grouping.num_groups

    def expert_usage(self, stats: LayerStats) -> jax.Array:
        """Float32 scalar, the share of slots that hold a counted token."""
        return jnp.sum(stats.load) / stats.capacity

    @property
    def has_room_for_all(self) -> bool:
        """Whether every expert has a slot for every token, where there are slots."""
        return self.router.has_room_for_all

    def first_slots(self, group_size: int) -> int | None:
        """Slots of an expert that are computed at first, if almost all are empty because every
        token has one; None if all slots are computed at once.
        """
        if not self.has_room_for_all:
            return None
        even_share = self.router.active_experts(1.0) * group_size / self.settings.num_experts
        return max(math.ceil(ROOM_FOR_SKEW * even_share), MIN_ROOM)


class Grouped(RoutingPolicy):
    """Groups of GROUP_SIZE tokens over the whole batch."""

    def grouping(self, batch_size: int, length: int, *, batch_shards: int) -> Grouping:
        return even_grouping(batch_size * length, max_group_size=self.settings.group_size)

    def capacity(self, group_size: int, *, train: bool) -> int:
        return self._capacity(group_size, self.settings.min_expert_capacity, train=train)


class T5x(Grouped):
    """Groups, padding, losses and statistics exactly as in Flaxformer."""

    def grouping(self, batch_size: int, length: int, *, batch_shards: int) -> Grouping:
        return t5x_grouping(
            batch_size,
            length,
            max_group_size=self.settings.group_size,
            num_experts=self.settings.num_experts,
            num_expert_replicas=self.settings.num_expert_replicas,
        )

    @property
    def skips_padding(self) -> bool:
        # Flaxformer's default: padding is routed.
        return self.settings.ignore_padding_tokens is True

    def counted(self, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        # T5X divides by all positions even where it ignores padding.
        return self.routable(real).astype(jnp.float32), jnp.float32(real.size)

    def router_z_loss(self, group: Group) -> jax.Array:
        # Flaxformer zeroes the logits of ignored tokens and still averages over them.
        logits = group.logits * group.counted[:, None]
        return losses.router_z_loss(logits, counted=jnp.ones_like(group.counted), count=group.count)

    @property
    def empty_groups_count(self) -> bool:
        return True

    def reported_rows(self, sizes: LayerSizes) -> int:
        # Flaxformer has all C slots, also where a group has fewer tokens than that.
        group_size = max(sizes.grouping.group_size, sizes.capacity)
        return self.router.expert_rows(
            self.settings.num_experts, sizes.capacity, group_size=group_size
        )

    def expert_usage(self, stats: LayerStats) -> jax.Array:
        # 1 by definition for routers that fill every slot.
        return jnp.float32(1.0) if self.router.fills_capacity else super().expert_usage(stats)


class PerSequence(RoutingPolicy):
    """Every sequence is a group, padding has no part in it, and the capacity is that of the
    sequence's own length: a result depends neither on the batch nor on padding.
    """

    def grouping(self, batch_size: int, length: int, *, batch_shards: int) -> Grouping:
        return Grouping(num_groups=batch_size, group_size=length)

    def capacity(self, group_size: int, *, train: bool) -> int:
        return self._capacity(group_size, self.settings.min_inference_capacity, train=train)

    def limits(self, real: jax.Array, *, train: bool) -> jax.Array | None:
        lengths = range(real.shape[-1] + 1)
        by_length = np.array([self.capacity(n, train=train) for n in lengths], np.int32)
        return jnp.asarray(by_length)[jnp.sum(real, axis=-1)]

    @property
    def skips_padding(self) -> bool:
        return True


class PerToken(RoutingPolicy):
    """Every token has room at every expert, so that its result depends on no other token. Groups do
    not matter and may follow the mesh.
    """

    def grouping(self, batch_size: int, length: int, *, batch_shards: int) -> Grouping:
        return ample_grouping(
            batch_size * length, max_group_size=self.settings.group_size, multiple_of=batch_shards
        )

    def capacity(self, group_size: int, *, train: bool) -> int:
        return group_size

    @property
    def skips_padding(self) -> bool:
        return True

    @property
    def has_room_for_all(self) -> bool:
        return True


def routing_policy(settings: MoeSettings, router: Router) -> RoutingPolicy:
    """The policy that settings ask for (`independent`, `t5x_mode`) and that the router can have."""
    policy: type[RoutingPolicy]
    if settings.independent and router.per_token:
        policy = PerToken
    elif settings.independent or router.group_is_sequence:
        policy = PerSequence
    else:
        policy = T5x if settings.t5x_mode else Grouped
    return policy(settings, router)


def layer_sizes(
    settings: MoeSettings,
    router: Router,
    batch_size: int,
    length: int,
    *,
    train: bool,
    batch_shards: int = 1,
) -> LayerSizes:
    """Sizes of a layer for a batch, see `RoutingPolicy.sizes`.

    Raises:
      ValueError: the token count does not divide into groups.
    """
    policy = routing_policy(settings, router)
    return policy.sizes(batch_size, length, train=train, batch_shards=batch_shards)


_ROUNDINGS: Mapping[CapacityRounding, Callable[[float], int]] = {
    "round": round,  # half to even, as in Flaxformer
    "ceil": math.ceil,
    "floor": math.floor,
}


def expert_capacity(
    group_size: int,
    *,
    num_experts: int,
    capacity_factor: float,
    min_expert_capacity: int = 4,
    rounding: CapacityRounding = "round",
    multiple: int = 1,
) -> int:
    """C = max(rounded capacity_factor * S / E, min_expert_capacity), filled up to a multiple.

    Args:
      group_size: S.
      num_experts: E.
      capacity_factor: 1.0 gives every expert room for its even share of the tokens.
      min_expert_capacity: lower bound for C.
      rounding: see `MoeSettings.capacity_rounding`.
      multiple: see `MoeSettings.capacity_multiple`.
    """
    slots = _ROUNDINGS[rounding](capacity_factor * group_size / num_experts)
    return -(-max(slots, min_expert_capacity) // multiple) * multiple
