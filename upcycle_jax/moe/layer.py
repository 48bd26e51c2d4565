"""The MoE layer: group, route, send tokens to experts by the router's plan, ungroup; and the expert
that all tokens share, if there is one.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token.
"""

import dataclasses
import functools
import logging
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import axes
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.projection import Projection
from upcycle_jax.moe import capacity as capacity_lib
from upcycle_jax.moe import dispatch, dropless, losses
from upcycle_jax.moe import report as report_lib
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.dispatch import Assignment, Choices, Plan
from upcycle_jax.moe.report import REPORTS, MoeReport
from upcycle_jax.moe.routing import Group, Router, Routing
from upcycle_jax.moe.sizes import layer_sizes, sequence_capacity
from upcycle_jax.moe.slots import apply_experts, init_experts, loops, one_by_one
from upcycle_jax.partitioning import active_batch_shards, constrain, on_batch_shards

__all__ = ["REPORTS", "MoeLayer", "MoeReport", "RouterLogits"]

ROOM_FOR_SKEW = 4.0
"""Without drops, slots of an expert that are computed at first, in multiples of its even share."""
MIN_ROOM = 8

_log = logging.getLogger(__name__)


class RouterLogits(nn.Module):
    """The router's kernel `router_weights/w/kernel [d, columns]`, N(0, 0.02), no bias in the
    logits; and, apart, the selection bias.

    Attributes:
      columns: E for most routers, see `Router.logit_columns`; without columns there is no kernel.
      biased_experts: E of routers that have a `Router.balance_rate`: there is a parameter `bias`
        `[E]`; 0 for the others.
    """

    columns: int
    biased_experts: int = 0

    def setup(self) -> None:
        if self.columns:
            self.router_weights = _RouterWeights(self.columns)
        if self.biased_experts:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (axes.UNMODELED,))
            bias: Any = self.param("bias", init, (self.biased_experts,), jnp.float32)
            self.bias = bias

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Float32 logits `[..., columns]` of `[..., d]`.

        Inputs are cast to float32 before the product: rounding router logits to bfloat16 makes
        training unstable (Switch Transformer, section 2.4, "selective precision").
        """
        if not self.columns:
            return jnp.zeros((*tokens.shape[:-1], 0), jnp.float32)
        return self.router_weights(tokens.astype(jnp.float32))

    def selection_bias(self) -> jax.Array | None:
        """Float32 `[E]`, or None; no gradient reaches it."""
        return jax.lax.stop_gradient(self.bias) if self.biased_experts else None


class _RouterWeights(nn.Module):
    columns: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return Projection(
            self.columns, (axes.EMBED, axes.UNMODELED), init, dtype=jnp.float32, name="w"
        )(tokens)


class MoeLayer(nn.Module):
    """Routes tokens to experts, each of which is the dense MLP of the same name with its own
    weights.

    Attributes:
      config: the model's MoE settings.
      router: decides which tokens meet which experts.
      hidden: size of an expert's hidden axis.
      activations: of the experts, as in `MlpBlock`.
      dropout_rate: dropout inside experts.
      dtype: dtype of the experts' computation; routing and combining are float32.
    """

    config: MoeSettings
    router: Router
    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps `[batch, length, d]` to the same shape, and leaves a `MoeReport` in the collection
        `moe_reports`.

        Args:
          x: tokens; zero vectors at padded positions.
          valid: bool `[batch, length]`, real tokens; None if all are.
          token_ids: int32 `[batch, length]`, for routers that need them.
          train: training capacity, dropout and router jitter.

        Raises:
          ValueError: the token count does not divide into groups, or the router needs token ids and
            there are none.
        """
        config = self.config
        router = self.router
        if router.needs_token_ids and token_ids is None:
            raise ValueError(
                f"{type(router).__name__} routes by token ids, and this model has none for its MoE"
                " layers: use TokensChoose() or another router that looks at features"
            )
        batch_size, length, _ = x.shape
        batch_shards = active_batch_shards()
        sizes = layer_sizes(
            config, router, batch_size, length, train=train, batch_shards=batch_shards
        )
        grouping = sizes.grouping
        # Groups that do not divide over devices get company, groups of padding, which are taken
        # away below. Left uneven (XLA would do the same on every device), the exchange of slots is
        # no all-to-all: slots of all groups go to all devices.
        spare = -grouping.num_groups % batch_shards
        if spare and train:
            _warn_of_spare_groups(grouping.num_groups, grouping.group_size, batch_shards)
        if valid is None:
            valid = jnp.ones((batch_size, length), bool)
        tokens = constrain(
            _group(x, grouping, spare), (axes.EXPERT_GROUP, None, axes.ACTIVATION_EMBED)
        )
        real = constrain(_group(valid, grouping, spare), (axes.EXPERT_GROUP, None))
        ids = (
            _group(token_ids, grouping, spare)
            if router.needs_token_ids and token_ids is not None
            else None
        )

        biased = 0 if router.balance_rate is None else config.num_experts
        router_module = RouterLogits(
            router.logit_columns(config.num_experts), biased, name="router"
        )
        logits = self._logits(router_module, tokens, router, train=train)
        limits = None
        if config.independent and not router.per_token:
            # A sequence's capacity follows from its real tokens, whatever padding it came with.
            by_length = np.array(
                [sequence_capacity(config, n, train=train) for n in range(length + 1)], np.int32
            )
            limits = jnp.asarray(by_length)[jnp.sum(real, axis=-1)]

        def route(groups: Any, bias: jax.Array | None) -> Any:
            return jax.vmap(
                functools.partial(self._route, router=router, capacity=sizes.capacity, bias=bias)
            )(*groups)

        routing, report = on_batch_shards(
            route, (logits, real, limits, ids), router_module.selection_bias()
        )
        report = report_lib.over_groups(_without(report, spare), every_group=config.t5x_mode)
        self.sow(REPORTS, "report", report, reduce_fn=lambda _, new: new, init_fn=lambda: None)

        y = self.process(tokens, routing.plan, train=train)
        y = constrain(y.astype(self.dtype), (axes.EXPERT_GROUP, None, axes.ACTIVATION_EMBED))
        y = _without(y, spare).reshape(
            batch_size + grouping.batch_padding, length + grouping.length_padding, -1
        )[:batch_size, :length]
        if config.shared_expert_mlp_dim is not None:
            y = y + self._shared_expert(x, config.shared_expert_mlp_dim, train=train)
        return constrain(y, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))

    def _shared_expert(self, x: jax.Array, hidden: int, *, train: bool) -> jax.Array:
        """The MLP that processes every token `[batch, length, d]`: no routing, no capacity, weight
        1.
        """
        shared = MlpBlock(
            hidden=hidden,
            activations=self.activations,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            name="shared_expert",
        )
        return shared(x.astype(self.dtype), not train)

    def _logits(
        self, module: RouterLogits, tokens: jax.Array, router: Router, *, train: bool
    ) -> jax.Array:
        """Float32 logits `[G, S, columns]` of `[G, S, d]`."""
        tokens = tokens.astype(jnp.float32)
        if train and router.input_jitter > 0 and self.has_rng("jitter"):
            low, high = 1.0 - router.input_jitter, 1.0 + router.input_jitter
            tokens = tokens * jax.random.uniform(
                self.make_rng("jitter"), tokens.shape, minval=low, maxval=high
            )
        return constrain(module(tokens), (axes.EXPERT_GROUP, None, None))

    def _route(
        self,
        logits: jax.Array,
        real: jax.Array,
        limit: jax.Array | None,
        token_ids: jax.Array | None,
        *,
        router: Router,
        capacity: int,
        bias: jax.Array | None,
    ) -> tuple[Routing, MoeReport]:
        """Routes one group; the arguments are those of `Group`."""
        config = self.config
        skips_padding = config.ignore_padding_tokens or config.independent or router.skips_padding
        routable = real if skips_padding else jnp.ones_like(real)
        # What counts in losses. T5X divides by all positions even where padding is ignored.
        counted = (routable if config.t5x_mode else real).astype(jnp.float32)
        count = jnp.float32(real.size) if config.t5x_mode else jnp.sum(counted)
        group = Group(
            logits,
            config.num_experts,
            routable,
            counted,
            count,
            limit=limit,
            bias=bias,
            token_ids=token_ids,
        )
        slots = router.slots(capacity, group_size=real.size)
        routing = router.route(group, capacity=slots)
        if config.t5x_mode:
            # Flaxformer zeroes the logits of ignored tokens and still averages over them.
            z_loss = losses.router_z_loss(
                logits * counted[:, None], counted=jnp.ones_like(counted), count=count
            )
        elif logits.size:
            z_loss = losses.router_z_loss(logits, counted=counted, count=count)
        else:
            z_loss = jnp.zeros((), jnp.float32)
        computed = capacity if config.t5x_mode else slots
        rows = router.expert_rows(config.num_experts, computed, group_size=max(real.size, computed))
        return routing, report_lib.of_group(routing, group, z_loss, rows=rows)

    def process(self, tokens: jax.Array, plan: Plan, *, train: bool = False) -> jax.Array:
        """Sends `[G, S, d]` through the experts and adds up what comes back: float32 `[G, S, d]`.

        Where every expert has a slot for every token, almost all slots are empty. As many as a
        skewed load needs are computed; all of them only in a batch whose fullest expert is beyond
        that. Tokens are never dropped.

        Applied alone, a layer needs the parameters of the experts that the plan names, which may
        be a part of its experts (`Plan.part`, `Plan.merged`).
        """
        router, group_size = self.router, tokens.shape[1]
        if self.config.dispatch == "gather" or self.is_initializing():
            plan = jax.vmap(lambda one: one.in_slots(group_size))(plan)

        def process(layer: "MoeLayer", tokens: jax.Array, plan: Plan) -> jax.Array:
            return plan.process(tokens.astype(layer.dtype), _Experts(layer, train))

        short = None
        if router.per_token and (self.config.independent or router.has_room_for_all):
            even_share = router.active_experts(1.0) * group_size / self.config.num_experts
            short = plan.shortened(
                max(math.ceil(ROOM_FOR_SKEW * even_share), MIN_ROOM), group_size=group_size
            )
        if short is None:
            return process(self, tokens, plan)
        return nn.cond(
            short.holds_all,
            lambda layer, tokens, all_slots, first_slots: process(layer, tokens, first_slots),
            lambda layer, tokens, all_slots, first_slots: process(layer, tokens, all_slots),
            self,
            tokens,
            plan,
            short.plan,
        )


@dataclasses.dataclass(frozen=True)
class _Experts:
    """The experts of a layer, as plans use them (`dispatch.Experts`)."""

    layer: MoeLayer
    train: bool

    def on_slots(self, inputs: jax.Array) -> jax.Array:
        """Outputs `[G, E, C, d]` of `[G, E, C, d]`.

        Before, groups are split over all data and expert shards; in between, groups over data
        shards only and experts over expert shards. The change from one to the other and back is
        what becomes the two all-to-alls, and nothing else crosses devices.
        """
        layer = self.layer
        here = (axes.EXPERT_GROUP, None, None, axes.ACTIVATION_EMBED)
        there = (axes.EXPERT_REPLICA_GROUP, axes.ACTIVATION_EXPERT, None, axes.ACTIVATION_EMBED)
        inputs = constrain(constrain(inputs, here), there)
        if layer.is_initializing():
            outputs = init_experts(
                self._expert(name="expert", parent=layer),
                inputs,
                num_experts=layer.config.num_experts,
            )
        else:
            groups, num_experts = inputs.shape[:2]
            outputs = apply_experts(
                self._expert(),
                self._params(),
                inputs,
                hidden_scale=self._dropout((groups, num_experts, 1, layer.hidden)),
            )
        return constrain(constrain(outputs, there), here)

    def on_assigned(self, tokens: jax.Array, assignment: Assignment) -> jax.Array:
        """Float32 `[G, S, d]`. Experts that are looped over take tokens from where they are and add
        to sums there: no slots are made.
        """
        layer = self.layer
        groups, num_tokens, d = tokens.shape
        if loops(d * layer.hidden) and not layer.is_initializing():
            scale = self._dropout((groups, layer.config.num_experts, 1, layer.hidden))
            return one_by_one(
                self._expert(), self._params(), tokens, assignment, hidden_scale=scale
            )
        outputs = self.on_slots(jax.vmap(dispatch.dispatch)(tokens, assignment))
        return jax.vmap(lambda out, where: dispatch.combine(out, where, group_size=num_tokens))(
            outputs, assignment
        )

    def on_choices(self, tokens: jax.Array, choices: Choices) -> jax.Array:
        """Float32 `[G, S, d]`. The parameters are those that `on_slots` makes; how they are
        multiplied differs alone.
        """
        layer = self.layer
        kernels = {name: leaf["kernel"] for name, leaf in self._params().items()}
        flat, expert, weight = (
            a.reshape(-1, a.shape[-1]) for a in (tokens, choices.expert, choices.weight)
        )
        out = dropless.process(
            flat,
            expert,
            weight,
            kernels,
            activations=layer.activations,
            dispatch=dropless.resolve(layer.config.dispatch),
            hidden_scale=self._dropout(kernels["wo"].shape[:2]),
        )
        return out.reshape(*tokens.shape)

    def _expert(self, **bound: Any) -> MlpBlock:
        """One expert, whose parameters are all experts' where `bound` names it and its parent."""
        layer = self.layer
        return MlpBlock(
            hidden=layer.hidden,
            activations=layer.activations,
            hidden_axis=axes.EXPERT_MLP,
            activation_axes=(axes.EXPERT_REPLICA_GROUP, None, axes.ACTIVATION_EXPERT_MLP),
            dtype=layer.dtype,
            **(bound or {"parent": None}),
        )

    def _params(self) -> Any:
        """Of the experts, with a leading E."""
        return nn.meta.unbox(self.layer.variables["params"]["expert"])

    def _dropout(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Float32 factors on hidden units of experts: 0 or 1 / (1 - rate), where a unit is dropped
        for all tokens of a group, or of all groups, or for none; None without dropout.
        """
        layer = self.layer
        if not self.train or layer.dropout_rate == 0:
            return None
        keep = 1.0 - layer.dropout_rate
        return (
            jax.random.bernoulli(layer.make_rng("dropout"), keep, shape).astype(jnp.float32) / keep
        )


@functools.cache
def _warn_of_spare_groups(num_groups: int, group_size: int, batch_shards: int) -> None:
    """Once for each kind of layer: a run's speed suffers silently otherwise."""
    _log.warning(
        "MoE layers have %d groups of %d tokens on %d batch shards (data x expert partitions): %d"
        " groups of padding are computed beside them, and tokens move to the device of their group"
        " and back. Choose GROUP_SIZE or BATCH_SIZE (with microbatches: of one) such that the"
        " groups are a multiple of %d",
        num_groups,
        group_size,
        batch_shards,
        -num_groups % batch_shards,
        batch_shards,
    )


def _group(x: jax.Array, grouping: capacity_lib.Grouping, spare: int) -> jax.Array:
    """`[batch, length, ...]` to `[G + spare, S, ...]`, with T5X mode's padding of zeros and so many
    groups of zeros.
    """
    padding = [(0, grouping.batch_padding), (0, grouping.length_padding)] + [(0, 0)] * (x.ndim - 2)
    if grouping.batch_padding or grouping.length_padding:
        x = jnp.pad(x, padding)
    x = x.reshape(grouping.num_groups, grouping.group_size, *x.shape[2:])
    return jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) if spare else x


def _without(groups: Any, spare: int) -> Any:
    """A tree of `[G + spare, ...]` without its last groups."""
    return jax.tree.map(lambda leaf: leaf[:-spare], groups) if spare else groups
