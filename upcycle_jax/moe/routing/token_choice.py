"""Tokens choose their experts: what such routers share, and the ones that choose by a softmax."""

import abc
import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.moe import dispatch, losses
from upcycle_jax.moe.routing.base import Group, Router, Routing, check_jitter


@flax.struct.dataclass
class TopK:
    """The K experts that each token of one group asks for.

    Attributes:
      expert: int32 `[S, K]`, best first; all different in a row.
      gate: float32 `[S, K]`, the weight of each.
      probabilities: float32 `[S, E]`, see `Routing`.
    """

    expert: jax.Array
    gate: jax.Array
    probabilities: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TokenChoice(Router):
    """Each token takes K experts, as long as they have room; subclasses say which, and with which
    weights.

    Positions inside an expert are given out k-major: every token's first choice before any second
    choice, tokens in order. What exceeds the capacity is dropped: such a token is processed by
    fewer experts, or by none. Raising the capacity factor drops less and changes nothing else.

    In token order this is causal as far as nothing is dropped, or K = 1. With K > 1 a later token's
    first choice goes before an earlier token's second choice, as in T5X: where capacity is short,
    that is the one thing an earlier token can feel of a later one.

    Attributes:
      jitter_noise: see `Router.input_jitter`.
      dropless: there is no capacity: every token goes to all of its K experts, at any load
        (MegaBlocks, arXiv 2211.15841). Capacity factors then do nothing, and `MoeConfig.dispatch`
        says how tokens are moved. Padding is not routed. Causal for every K.
      noise_std: see `Router.logit_noise`; 1.0 in V-MoE's `NoisyTopExpertsPerItemRouter`.
    """

    jitter_noise: float = 0.0
    dropless: bool = False
    noise_std: checks.NotNegative = dataclasses.field(default=0.0, metadata=checks.ADDED)

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.selected < 1:
            raise ValueError(f"num_selected_experts must be at least 1, got {self.selected}")
        check_jitter(self.jitter_noise)

    @property
    @abc.abstractmethod
    def selected(self) -> int:
        """K."""

    @abc.abstractmethod
    def choose(self, group: Group) -> TopK:
        """The choices of all tokens of a group, unroutable ones included."""

    def priority(self, group: Group, top: TopK) -> jax.Array:
        """Int32 `[S]`, the order in which tokens are served."""
        return jnp.arange(top.expert.shape[0])

    @property
    def normalizes_granted(self) -> bool:
        """Whether combine weights are scaled to sum `granted_total` over the experts that do
        process a token, after drops.
        """
        return False

    @property
    def granted_total(self) -> float:
        """What they are scaled to."""
        return 1.0

    @property
    def has_balance_loss(self) -> bool:
        return True

    def balance_loss(self, group: Group, top: TopK) -> jax.Array:
        """Float32 scalar, the load-balancing loss of the group."""
        return losses.load_balancing_loss(
            top.probabilities, top.expert, counted=group.counted, count=group.count
        )

    @property
    def input_jitter(self) -> float:
        return self.jitter_noise

    @property
    def logit_noise(self) -> float:
        return self.noise_std

    @property
    def selected_per_token(self) -> int | None:
        return self.selected

    @property
    def per_token(self) -> bool:
        return True

    @property
    def has_room_for_all(self) -> bool:
        return self.dropless

    @property
    def skips_padding(self) -> bool:
        return self.dropless

    @property
    def unit_weights(self) -> bool:
        return self.normalizes_granted

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if self.selected > num_experts:
            raise ValueError(
                f"num_selected_experts={self.selected} is more than num_experts={num_experts}:"
                f" lower NUM_SELECTED_EXPERTS to at most {num_experts} or raise NUM_EXPERTS"
            )

    def slots(self, capacity: int, *, group_size: int) -> int:
        return group_size if self.dropless else min(capacity, group_size)

    def expert_rows(self, num_experts: int, capacity: int, *, group_size: int) -> int:
        return (
            self.selected * group_size
            if self.dropless
            else super().expert_rows(num_experts, capacity, group_size=group_size)
        )

    def active_experts(self, capacity_factor: float) -> float:
        return float(self.selected)

    def route(self, group: Group, *, capacity: int) -> Routing:
        group_size, num_experts = group.logits.shape[0], group.num_experts
        top = self.choose(group)
        choices = dispatch.TokenChoices(
            expert=jnp.where(group.routable[:, None], top.expert, num_experts).astype(jnp.int32),
            weight=jnp.where(group.routable[:, None], top.gate, 0.0),
            num_experts=num_experts,
        )
        dispatcher = self._granted(group, top, choices, capacity)
        granted = jnp.sum(dispatcher.experts_per_token(group_size) * group.counted)
        offered = jnp.sum(group.counted) * self.selected
        return Routing(
            dispatcher=dispatcher,
            probabilities=top.probabilities,
            chosen=jnp.zeros(num_experts, jnp.float32).at[top.expert].add(group.counted[:, None]),
            auxiliary_loss=self.balance_loss(group, top),
            offered=offered,
            dropped=offered - granted,
        )

    def _granted(
        self, group: Group, top: TopK, choices: dispatch.TokenChoices, capacity: int
    ) -> dispatch.Dispatcher:
        """The choices that there is room for, with their final weights."""
        if self.dropless:
            if not self.normalizes_granted:
                return choices
            return dispatch.renormalized_choices(choices, total=self.granted_total)
        assignment = dispatch.assign_slots(
            choices, order=self.priority(group, top), capacity=capacity, limit=group.limit
        )
        if not self.normalizes_granted:
            return assignment
        return dispatch.renormalized(
            assignment, group_size=group.logits.shape[0], total=self.granted_total
        )


@dataclasses.dataclass(frozen=True, repr=False)
class TokensChoose(TokenChoice):
    """Each token takes its K experts of highest router probability (top-K).

    Source: Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv 2006.16668; with batch priority
    V-MoE, arXiv 2106.05974. Guarantees: at most K experts per token, for which see `TokenChoice`.
    Load balance is not guaranteed, hence the auxiliary loss. Allowed everywhere, but for batch
    priority in a decoder.

    Attributes:
      num_selected_experts: K.
      batch_prioritized: give out positions by highest first-choice probability instead of in token
        order (Batch Prioritized Routing). Not causal: a later token can push out an earlier one.
      renormalize: scale each token's combine weights to sum 1 over the experts that do process it,
        after drops. With K=1 the router then learns from the auxiliary loss alone.
      softmax_order: 'before_top_k' takes the softmax over all experts, then the top K (T5X, Switch,
        V-MoE); 'after_top_k' takes the top K logits, then the softmax over those K (Mixtral), so
        that weights sum to 1 before drops.

    Raises:
      ValueError: K < 1, an unknown softmax order, or a priority where nothing is dropped.
    """

    num_selected_experts: checks.Size = 2
    batch_prioritized: bool = False
    renormalize: bool = False
    softmax_order: Literal["before_top_k", "after_top_k"] = "before_top_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softmax_order not in ("before_top_k", "after_top_k"):
            raise ValueError(
                f"softmax_order must be 'before_top_k' or 'after_top_k', got {self.softmax_order!r}"
            )
        if self.batch_prioritized and self.dropless:
            raise ValueError(
                "batch_prioritized orders tokens for a capacity, and dropless=True has none: set"
                " one of them to False"
            )

    @property
    def selected(self) -> int:
        return self.num_selected_experts

    @property
    def not_causal_because(self) -> str | None:
        if not self.batch_prioritized:
            return None
        return (
            "batch-prioritised order gives slots to the most confident tokens of a group, so a"
            " later token can push out an earlier one: the decoder would train on information that"
            " it does not have when it generates. Set batch_prioritized=False"
        )

    @property
    def in_flaxformer(self) -> bool:
        return not (self.dropless or self.noise_std)

    @property
    def normalizes_granted(self) -> bool:
        return self.renormalize

    @property
    def unit_weights(self) -> bool:
        return self.renormalize or self.softmax_order == "after_top_k"

    @property
    def chooses_by_softmax(self) -> bool:
        return True

    @property
    def follows_copies(self) -> bool:
        return True  # Softmax over c times as many columns divides every probability by c.

    def priority(self, group: Group, top: TopK) -> jax.Array:
        if not self.batch_prioritized:
            return super().priority(group, top)
        return jnp.argsort(jnp.where(group.routable, -top.gate[:, 0], jnp.inf), stable=True)

    def choose(self, group: Group) -> TopK:
        probabilities = jax.nn.softmax(group.logits, axis=-1)
        if self.softmax_order == "after_top_k":
            top_logits, expert = jax.lax.top_k(group.logits, self.selected)
            return TopK(
                expert=expert, gate=jax.nn.softmax(top_logits, axis=-1), probabilities=probabilities
            )
        # The softmax is monotonic, but near-equal logits can become equal probabilities: choose on
        # what is compared in T5X.
        gate, expert = jax.lax.top_k(probabilities, self.selected)
        return TopK(expert=expert, gate=gate, probabilities=probabilities)


@dataclasses.dataclass(frozen=True, repr=False)
class DroplessTopK(TokensChoose):
    """Top-K without a capacity: no token is ever dropped, at any load.

    Source: MegaBlocks, arXiv 2211.15841; Mixtral, arXiv 2401.04088 (with
    softmax_order='after_top_k'). Guarantees: every token goes to its K experts, so a result depends
    on nothing but the token, and its cost on the load of the fullest device. Load balance is not
    guaranteed, hence the auxiliary loss. Allowed everywhere; with experts divided over a mesh every
    device sees the tokens of its expert group (see `moe.grouped_experts`).
    """

    dropless: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dropless:
            raise ValueError(
                "DroplessTopK is dropless: use TokensChoose for experts with a capacity"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class SwitchTop1(TokenChoice):
    """Each token takes the one expert of highest router probability, and that probability as
    weight.

    Source: Switch Transformer, arXiv 2101.03961, whose jitter of 0.01 is the default. Guarantees:
    at most one expert per token, in token order: causal at every capacity. Load balance is not
    guaranteed, hence the auxiliary loss. Allowed everywhere. Weights are never renormalised:
    through a weight of 1 the router would learn nothing.
    """

    jitter_noise: float = dataclasses.field(default=0.01, kw_only=True)

    @property
    def selected(self) -> int:
        return 1

    @property
    def in_flaxformer(self) -> bool:
        return not (self.dropless or self.noise_std)

    @property
    def chooses_by_softmax(self) -> bool:
        return True

    def renormalized(self) -> Router:
        return TokensChoose(
            num_selected_experts=1,
            renormalize=True,
            jitter_noise=self.jitter_noise,
            noise_std=self.noise_std,
            dropless=self.dropless,
        )

    def choose(self, group: Group) -> TopK:
        probabilities = jax.nn.softmax(group.logits, axis=-1)
        gate, expert = jax.lax.top_k(probabilities, 1)
        return TopK(expert=expert, gate=gate, probabilities=probabilities)
