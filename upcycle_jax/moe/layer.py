"""The MoE layer: group, route, dispatch, the lifted dense MLP, combine, ungroup; and the expert that all tokens share, if there is one.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K experts per token.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import axes
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.projection import Projection
from upcycle_jax.moe import capacity as capacity_lib
from upcycle_jax.moe import dispatch, losses
from upcycle_jax.moe.config import MoeConfig, Stack
from upcycle_jax.moe.routing import Router, Routing
from upcycle_jax.partitioning import active_batch_shards, constrain

ROOM_FOR_SKEW = 4.0
"""Without drops, slots of an expert that are computed at first, in multiples of its even share."""
MIN_ROOM = 8

REPORTS = "moe_reports"
"""The variable collection in which every MoE layer leaves its `MoeReport` (one per call, under the name `report`)."""


@flax.struct.dataclass
class MoeReport:
    """What one MoE layer did with one batch. Float32 scalars unless stated; sums, so that reports can be added up.

    Only real tokens count, except in T5X mode, where padding counts too.

    Attributes:
      auxiliary_loss: load-balancing loss, the mean over the groups that hold a counted token.
      router_z_loss: likewise.
      tokens: counted tokens.
      left_behind: counted tokens that no expert processed.
      capacity: slots of all experts and groups.
      load: `[E]`, counted tokens that each expert processed.
      weight: combine weights of the counted tokens, summed.
      entropy: entropy of the router probabilities (nats), summed over counted tokens.
      probability: `[E]`, router probabilities summed over counted tokens: what the router prefers, where `load` is what capacity let it
        have.
      offered: placements asked for (`Routing`).
      dropped: placements not granted (`Routing`).
    """

    auxiliary_loss: jax.Array
    router_z_loss: jax.Array
    tokens: jax.Array
    left_behind: jax.Array
    capacity: jax.Array
    load: jax.Array
    weight: jax.Array
    entropy: jax.Array
    probability: jax.Array
    offered: jax.Array
    dropped: jax.Array


class RouterLogits(nn.Module):
    """The router's kernel `router_weights/w/kernel [d, E]`, N(0, 0.02), no bias.

    Attributes:
      num_experts: E.
    """

    num_experts: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Float32 logits `[..., E]` of `[..., d]`.

        Inputs are cast to float32 before the product: rounding router logits to bfloat16 makes training unstable (Switch
        Transformer, section 2.4, "selective precision").
        """
        return _RouterWeights(self.num_experts, name="router_weights")(tokens.astype(jnp.float32))


class _RouterWeights(nn.Module):
    num_experts: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return Projection(self.num_experts, (axes.EMBED, axes.UNMODELED), init, dtype=jnp.float32, name="w")(tokens)


class MoeLayer(nn.Module):
    """Routes tokens to experts, each of which is the dense MLP of the same name with its own weights.

    Attributes:
      config: the model's MoE settings.
      stack: 'encoder' or 'decoder', which decides the router.
      hidden: size of an expert's hidden axis.
      activations: of the experts, as in `MlpBlock`.
      dropout_rate: dropout inside experts.
      dtype: dtype of the experts' computation; routing and combining are float32.
    """

    config: MoeConfig
    stack: Stack
    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Maps `[batch, length, d]` to the same shape, and leaves a `MoeReport` in the collection `moe_reports`.

        Args:
          x: tokens; zero vectors at padded positions.
          valid: bool `[batch, length]`, real tokens; None if all are.
          train: training capacity, dropout and router jitter.

        Raises:
          ValueError: the token count does not divide into groups.
        """
        config = self.config
        router = config.router(self.stack)
        batch_size, length, _ = x.shape
        grouping, capacity = self._sizes(router, batch_size, length, train=train)
        if valid is None:
            valid = jnp.ones((batch_size, length), bool)
        tokens = constrain(_group(x, grouping), (axes.EXPERT_GROUP, None, axes.ACTIVATION_EMBED))
        real = constrain(_group(valid, grouping), (axes.EXPERT_GROUP, None))

        logits = self._logits(tokens, router, train=train)
        limits = None
        if config.independent and not router.per_token:
            # A sequence's capacity follows from its real tokens, whatever padding it came with.
            by_length = np.array([self._sequence_capacity(n, train=train) for n in range(length + 1)], np.int32)
            limits = jnp.asarray(by_length)[jnp.sum(real, axis=-1)]
        routing, report = jax.vmap(functools.partial(self._route, router=router, capacity=capacity))(logits, real, limits)
        report = _over_groups(report, every_group=config.t5x_mode)
        self.sow(REPORTS, "report", report, reduce_fn=lambda _, new: new, init_fn=lambda: None)

        y = self._process(tokens, routing.assignment, train=train)
        y = constrain(y.astype(self.dtype), (axes.EXPERT_GROUP, None, axes.ACTIVATION_EMBED))
        y = y.reshape(batch_size + grouping.batch_padding, length + grouping.length_padding, -1)[:batch_size, :length]
        if config.shared_expert_mlp_dim is not None:
            y = y + self._shared_expert(x, config.shared_expert_mlp_dim, train=train)
        return constrain(y, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))

    def _shared_expert(self, x: jax.Array, hidden: int, *, train: bool) -> jax.Array:
        """The MLP that processes every token `[batch, length, d]`: no routing, no capacity, weight 1."""
        shared = MlpBlock(
            hidden=hidden,
            activations=self.activations,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            name="shared_expert",
        )
        return shared(x.astype(self.dtype), not train)

    def _sizes(self, router: Router, batch_size: int, length: int, *, train: bool) -> tuple[capacity_lib.Grouping, int]:
        """Groups, and the capacity of an expert in each."""
        config = self.config
        if config.independent and router.per_token:
            # With room for every token results do not depend on the groups, so these may follow the mesh.
            shards = active_batch_shards()
            grouping = capacity_lib.ample_grouping(batch_size * length, max_group_size=config.group_size, multiple_of=shards)
            return grouping, grouping.group_size
        if config.independent:
            grouping = capacity_lib.Grouping(num_groups=batch_size, group_size=length)
            return grouping, self._sequence_capacity(length, train=train)
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
        return grouping, capacity

    def _sequence_capacity(self, length: int, *, train: bool) -> int:
        """Capacity of an expert where one sequence of so many real tokens is a group."""
        return capacity_lib.expert_capacity(
            length,
            num_experts=self.config.num_experts,
            capacity_factor=self.config.capacity_factor(train=train),
            min_expert_capacity=self.config.min_inference_capacity,
        )

    def _logits(self, tokens: jax.Array, router: Router, *, train: bool) -> jax.Array:
        """Float32 logits `[G, S, E]` of `[G, S, d]`."""
        tokens = tokens.astype(jnp.float32)
        if train and router.input_jitter > 0 and self.has_rng("jitter"):
            low, high = 1.0 - router.input_jitter, 1.0 + router.input_jitter
            tokens = tokens * jax.random.uniform(self.make_rng("jitter"), tokens.shape, minval=low, maxval=high)
        logits = RouterLogits(self.config.num_experts, name="router")(tokens)
        return constrain(logits, (axes.EXPERT_GROUP, None, None))

    def _route(
        self, logits: jax.Array, real: jax.Array, limit: jax.Array | None, *, router: Router, capacity: int
    ) -> tuple[Routing, MoeReport]:
        """Routes one group: logits `[S, E]`, real tokens bool `[S]`, and the limit of `Router.route`."""
        config = self.config
        group_size = logits.shape[0]
        routable = real if config.ignore_padding_tokens or config.independent else jnp.ones_like(real)
        # What counts in losses. T5X divides by all positions even where padding is ignored.
        counted = (routable if config.t5x_mode else real).astype(jnp.float32)
        count = jnp.float32(group_size) if config.t5x_mode else jnp.sum(counted)
        slots = router.slots(capacity, group_size=group_size)
        routing = router.route(logits, capacity=slots, routable=routable, counted=counted, count=count, limit=limit)
        if config.t5x_mode:
            # Flaxformer zeroes the logits of ignored tokens and still averages over them.
            logits = logits * counted[:, None]
            z_loss = losses.router_z_loss(logits, counted=jnp.ones_like(counted), count=count)
        else:
            z_loss = losses.router_z_loss(logits, counted=counted, count=count)
        return routing, _report(routing, logits, z_loss, counted=counted, capacity=capacity if config.t5x_mode else slots)

    def _process(self, tokens: jax.Array, assignment: dispatch.Assignment, *, train: bool) -> jax.Array:
        """Sends `[G, S, d]` through the experts and adds up what comes back: float32 `[G, S, d]`.

        Where every expert has room for every token, almost all slots are empty. As many as a skewed load needs are computed; all of them
        only in a batch whose fullest expert is beyond that. Tokens are never dropped.
        """
        group_size, slots = tokens.shape[1], assignment.token_index.shape[-1]

        def process(layer: "MoeLayer", tokens: jax.Array, assignment: dispatch.Assignment) -> jax.Array:
            outputs = layer._experts(tokens, assignment, train=train)
            return jax.vmap(lambda out, where: dispatch.combine(out, where, group_size=group_size))(outputs, assignment)

        few = slots
        router = self.config.router(self.stack)
        if self.config.independent and router.per_token:
            even_share = router.active_experts(1.0) * group_size / self.config.num_experts
            few = max(math.ceil(ROOM_FOR_SKEW * even_share), MIN_ROOM)
        if few >= slots:
            return process(self, tokens, assignment)
        fullest = jnp.max(jnp.sum(assignment.filled(group_size), axis=-1))
        first_slots = jax.tree.map(lambda leaf: leaf[..., :few], assignment)
        return nn.cond(
            fullest <= few,
            lambda layer, tokens, all_slots, first_slots: process(layer, tokens, first_slots),
            lambda layer, tokens, all_slots, first_slots: process(layer, tokens, all_slots),
            self,
            tokens,
            assignment,
            first_slots,
        )

    def _experts(self, tokens: jax.Array, assignment: dispatch.Assignment, *, train: bool) -> jax.Array:
        """Sends `[G, S, d]` to the experts; returns their outputs `[G, E, C, d]`.

        Before, groups are split over all data and expert shards; in between, groups over data shards only and experts over expert shards.
        The change from one to the other and back is what becomes the two all-to-alls, and nothing else crosses devices.
        """
        here = (axes.EXPERT_GROUP, None, None, axes.ACTIVATION_EMBED)
        there = (axes.EXPERT_REPLICA_GROUP, axes.ACTIVATION_EXPERT, None, axes.ACTIVATION_EMBED)
        inputs = constrain(jax.vmap(dispatch.dispatch)(tokens.astype(self.dtype), assignment), here)
        inputs = constrain(inputs, there)
        expert = nn.vmap(
            MlpBlock,
            in_axes=(1, None),
            out_axes=1,
            axis_size=self.config.num_experts,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: axes.EXPERT},
        )(
            hidden=self.hidden,
            activations=self.activations,
            hidden_axis=axes.EXPERT_MLP,
            activation_axes=(axes.EXPERT_REPLICA_GROUP, None, axes.ACTIVATION_EXPERT_MLP),
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            name="expert",
        )
        return constrain(constrain(expert(inputs, not train), there), here)


def _group(x: jax.Array, grouping: capacity_lib.Grouping) -> jax.Array:
    """`[batch, length, ...]` to `[G, S, ...]`, with T5X mode's padding of zeros."""
    padding = [(0, grouping.batch_padding), (0, grouping.length_padding)] + [(0, 0)] * (x.ndim - 2)
    if grouping.batch_padding or grouping.length_padding:
        x = jnp.pad(x, padding)
    return x.reshape(grouping.num_groups, grouping.group_size, *x.shape[2:])


def _report(routing: Routing, logits: jax.Array, z_loss: jax.Array, *, counted: jax.Array, capacity: int) -> MoeReport:
    """The report of one group."""
    group_size, num_experts = logits.shape
    assignment = routing.assignment
    counts = counted.at[assignment.token_index].get(mode="fill", fill_value=0.0)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(log_probabilities)
    entropy = -jnp.sum(probabilities * log_probabilities, axis=-1)
    return MoeReport(
        auxiliary_loss=routing.auxiliary_loss,
        router_z_loss=z_loss,
        tokens=jnp.sum(counted),
        left_behind=jnp.sum(counted * (assignment.experts_per_token(group_size) == 0)),
        capacity=jnp.float32(num_experts * capacity),
        load=jnp.sum(counts, axis=-1),
        weight=jnp.sum(assignment.combine_weight * counts),
        entropy=jnp.sum(entropy * counted),
        probability=jnp.sum(probabilities * counted[:, None], axis=0),
        offered=routing.offered,
        dropped=routing.dropped,
    )


def _over_groups(report: MoeReport, *, every_group: bool) -> MoeReport:
    """The layer's report from those of its groups `[G, ...]`: losses are averaged, the rest is summed.

    A group of nothing but padding has no loss to average, unless padding counts (`every_group`).
    """
    weight = jnp.ones_like(report.tokens) if every_group else (report.tokens > 0).astype(jnp.float32)
    num_groups = jnp.maximum(jnp.sum(weight), 1.0)
    summed = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), report)
    return summed.replace(
        auxiliary_loss=jnp.sum(report.auxiliary_loss * weight) / num_groups,
        router_z_loss=jnp.sum(report.router_z_loss * weight) / num_groups,
    )
