"""The MoE layer. A token's way through it: its batch is divided into groups; the router decides
which experts it goes to; it is dispatched to them; they process it; their outputs are combined.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token, d width of a token.
"""

import functools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.projection import Projection
from upcycle_jax.moe import layer_stats, roles
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.dispatch import Dispatcher
from upcycle_jax.moe.experts import ExpertBank, init_experts
from upcycle_jax.moe.grouping import Grouping
from upcycle_jax.moe.layer_stats import LAYER_STATS, LayerStats
from upcycle_jax.moe.policy import LayerSizes, RoutingPolicy, routing_policy
from upcycle_jax.moe.router_logits import RouterLogits
from upcycle_jax.moe.routing import Group, Router
from upcycle_jax.partitioning import active_batch_shards, constrain, on_batch_shards

_log = logging.getLogger(__name__)

_TOKENS = (axes.EXPERT_GROUP, None, axes.ACTIVATION_EMBED)
"""Logical axes of tokens `[G, S, d]`."""


class MoeLayer(nn.Module):
    """Routes tokens to experts, each of which is the dense MLP of the same name with its own
    weights.

    Attributes:
      config: the layer's settings.
      router: decides which tokens go to which experts.
      hidden: size of an expert's hidden axis.
      activations: of the experts, as in `MlpBlock`.
      dropout_rate: dropout inside experts.
      dtype: dtype of the experts' computation; routing and combining are float32.
      use_bias: experts and shared expert have biases, as in `MlpBlock`.
    """

    config: MoeSettings
    router: Router
    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Maps `[batch, length, d]` to the same shape, and leaves `LayerStats` in the collection
        `LAYER_STATS`.

        Args:
          x: tokens; zero vectors at padded positions.
          valid: bool `[batch, length]`, real tokens; None if all are.
          token_ids: int32 `[batch, length]`, for routers that need them.
          train: training capacity, dropout, and jitter and noise of routers.

        Raises:
          ValueError: the token count does not divide into groups, or the router needs token ids and
            there are none.
        """
        token_ids = self._needed(token_ids)
        batch, length, _ = x.shape
        batch_shards = active_batch_shards()
        sizes = self.policy.sizes(batch, length, train=train, batch_shards=batch_shards)
        grouping = sizes.grouping
        if grouping.spare_groups and train:
            _warn_of_spare_groups(grouping, batch_shards)

        # Group: [batch, length, ...] to [G, S, ...], spare groups of padding included.
        tokens = constrain(grouping.split(x), _TOKENS)
        if valid is None:
            valid = jnp.ones((batch, length), bool)
        real = constrain(grouping.split(valid), (axes.EXPERT_GROUP, None))
        ids = None if token_ids is None else grouping.split(token_ids)

        dispatcher = self._route(tokens, real, ids, sizes, train=train)
        y = self.process(tokens, dispatcher, train=train)

        # Ungroup.
        y = grouping.join(constrain(y.astype(self.dtype), _TOKENS), batch, length)
        if self.config.shared_expert_mlp_dim is not None:
            y = y + self._shared_expert(x, self.config.shared_expert_mlp_dim, train=train)
        return constrain(y, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))

    @property
    def policy(self) -> RoutingPolicy:
        """How tokens are grouped, and which of them take part and count."""
        return routing_policy(self.config, self.router)

    def _route(
        self,
        tokens: jax.Array,
        real: jax.Array,
        token_ids: jax.Array | None,
        sizes: LayerSizes,
        *,
        train: bool,
    ) -> Dispatcher:
        """Decides which tokens go to which experts, and leaves statistics of it.

        Args:
          tokens: `[G, S, d]`.
          real: bool `[G, S]`, tokens that are no padding.
          token_ids: int32 `[G, S]`, for routers that need them.
          sizes: of the layer.
          train: with jitter and noise of routers; capacities of training.

        Returns:
          A dispatcher whose arrays have a leading G.
        """
        router, policy, num_experts = self.router, self.policy, self.config.num_experts
        biased_experts = 0 if router.balance_rate is None else num_experts
        module = RouterLogits(router.logit_columns(num_experts), biased_experts, name="router")
        clean = constrain(
            module(self._with_jitter(tokens, train=train)), (axes.EXPERT_GROUP, None, None)
        )
        noise = self._noise(clean, sizes.grouping, train=train)
        logits = clean if noise is None else clean + noise
        reported_rows = policy.reported_rows(sizes)

        def route_group(
            logits: jax.Array,  # [S, columns]
            real: jax.Array,  # [S]
            limit: jax.Array | None,  # []
            token_ids: jax.Array | None,  # [S]
            clean: jax.Array | None,  # [S, columns]
            *,
            bias: jax.Array | None,  # [E]
        ) -> tuple[Dispatcher, LayerStats]:
            counted, count = policy.counted(real)
            group = Group(
                logits,
                num_experts,
                policy.routable(real),
                counted,
                count,
                limit=limit,
                bias=bias,
                token_ids=token_ids,
                clean_logits=clean,
            )
            routing = router.route(group, capacity=sizes.slots)
            losses = policy.logit_losses(group)
            stats = layer_stats.of_group(routing, group, losses, rows=reported_rows)
            return routing.dispatcher, stats

        # Every device routes its own groups; logits are not gathered.
        dispatcher, stats = on_batch_shards(
            lambda groups, bias: jax.vmap(functools.partial(route_group, bias=bias))(*groups),
            (
                logits,
                real,
                policy.limits(real, train=train),
                token_ids,
                None if noise is None else clean,
            ),
            module.selection_bias(),
        )
        stats = jax.tree.map(lambda leaf: leaf[: sizes.grouping.num_groups], stats)
        stats = layer_stats.over_groups(stats, every_group=policy.empty_groups_count)
        self.sow(LAYER_STATS, "stats", stats, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return dispatcher

    def process(
        self, tokens: jax.Array, dispatcher: Dispatcher, *, train: bool = False
    ) -> jax.Array:
        """Dispatches tokens `[G, S, d]` to the experts and combines the outputs: float32 `[G, S,
        d]`; zeros while parameters are made.

        If every expert has a slot for every token, almost all slots are empty. The first slots are
        then computed alone, as many as a skewed load fills; in a batch whose fullest expert needs
        more, all of them. Tokens are never dropped.

        Applied alone, a layer needs the parameters of the experts that the dispatcher names, which
        may be a part of its experts (`Dispatcher.part`, `Dispatcher.merged`).
        """
        num_groups, group_size, emb_dim = tokens.shape
        if self.is_initializing():
            self._init_experts(emb_dim)
            return jnp.zeros(tokens.shape, jnp.float32)
        form = self.config.dispatch
        dispatcher = jax.vmap(lambda one: one.in_form(form, group_size))(dispatcher)
        experts = self._experts(1 if dispatcher.mixes_groups else num_groups, train=train)
        tokens = tokens.astype(self.dtype)
        first = self.policy.first_slots(group_size)
        short = None if first is None else dispatcher.shortened(first, group_size=group_size)
        if short is None:
            return dispatcher.apply(experts, tokens)
        return jax.lax.cond(
            short.holds_all,
            lambda: short.dispatcher.apply(experts, tokens),
            lambda: dispatcher.apply(experts, tokens),
        )

    def _init_experts(self, emb_dim: int) -> None:
        """Makes the experts' parameters, in the module `expert`."""
        expert = MlpBlock(
            hidden=self.hidden,
            activations=self.activations,
            hidden_axis=axes.EXPERT_MLP,
            activation_axes=(axes.EXPERT_REPLICA_GROUP, None, axes.ACTIVATION_EXPERT_MLP),
            dtype=self.dtype,
            use_bias=self.use_bias,
            name=roles.EXPERT,
        )
        init_experts(
            expert,
            num_experts=self.config.num_experts,
            emb_dim=emb_dim,
            equal=self.config.fresh_experts == "equal",
        )

    def _experts(self, num_groups: int, *, train: bool) -> ExpertBank:
        """The experts, with dropout masks for `num_groups` groups."""
        params = nn.meta.unbox(self.variables["params"][roles.EXPERT])
        kernels = {name: leaf["kernel"] for name, leaf in params.items()}
        biases = {name: leaf["bias"] for name, leaf in params.items()} if self.use_bias else {}
        hidden_scale = None
        if train and self.dropout_rate > 0:
            # A hidden unit of an expert is dropped for all tokens of a group, or for none.
            keep = 1.0 - self.dropout_rate
            shape = (num_groups, len(kernels["wo"]), self.hidden)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
            hidden_scale = kept.astype(jnp.float32) / keep
        return ExpertBank(
            kernels,
            hidden_scale,
            activations=self.activations,
            dtype=self.dtype,
            dispatch=self.config.dispatch,
            biases=biases,
        )

    def _shared_expert(self, x: jax.Array, hidden: int, *, train: bool) -> jax.Array:
        """The MLP that processes every token `[batch, length, d]`: no routing, no capacity; weight
        1, or that of its own gate.
        """
        shared = MlpBlock(
            hidden=hidden,
            activations=self.activations,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            use_bias=self.use_bias,
            name=roles.SHARED_EXPERT,
        )
        y = shared(x.astype(self.dtype), not train)
        if not self.config.shared_expert_gate:
            return y
        gate = Projection(
            1, (axes.EMBED, axes.UNMODELED), nn.initializers.normal(0.02), name=roles.SHARED_GATE
        )
        # float32, as the weights of routed experts are.
        weight = jax.nn.sigmoid(gate(x.astype(jnp.float32)))  # [batch, length, 1]
        return (weight * y.astype(jnp.float32)).astype(self.dtype)

    def _with_jitter(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """Float32 tokens as the router sees them, see `Router.input_jitter`."""
        tokens, jitter = tokens.astype(jnp.float32), self.router.input_jitter
        if not (train and jitter > 0 and self.has_rng("jitter")):
            return tokens
        noise = jax.random.uniform(
            self.make_rng("jitter"), tokens.shape, minval=1.0 - jitter, maxval=1.0 + jitter
        )
        return tokens * noise

    def _noise(self, logits: jax.Array, grouping: Grouping, *, train: bool) -> jax.Array | None:
        """Float32 `[G, S, columns]`, see `Router.logit_noise`; None for none."""
        std = self.router.logit_noise / self.config.num_experts
        if not (train and std > 0 and self.has_rng("jitter")):
            return None
        # Drawn for the groups of the batch, so that it does not depend on spare ones of a mesh.
        shape = (grouping.num_groups, *logits.shape[1:])
        noise = std * jax.random.normal(self.make_rng("jitter"), shape)
        noise = jnp.pad(noise, [(0, grouping.spare_groups), (0, 0), (0, 0)])
        return constrain(noise, (axes.EXPERT_GROUP, None, None))

    def _needed(self, token_ids: jax.Array | None) -> jax.Array | None:
        """The token ids if the router needs them, else None. Raises ValueError if missing."""
        if not self.router.needs_token_ids:
            return None
        if token_ids is None:
            raise ValueError(
                f"{type(self.router).__name__} routes by token ids, and this model has none for its"
                " MoE layers: use TokensChoose() or another router that looks at features"
            )
        return token_ids


@functools.cache
def _warn_of_spare_groups(grouping: Grouping, batch_shards: int) -> None:
    """Once for each kind of layer: a run's speed suffers silently otherwise."""
    _log.warning(
        "MoE layers have %d groups of %d tokens on %d batch shards (data x expert partitions): %d"
        " groups of padding are computed beside them, and tokens move to the device of their group"
        " and back. Choose GROUP_SIZE or BATCH_SIZE (with microbatches: of one) such that the"
        " groups are a multiple of %d",
        grouping.num_groups,
        grouping.group_size,
        batch_shards,
        grouping.spare_groups,
        batch_shards,
    )
