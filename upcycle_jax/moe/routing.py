"""Routers: from the float32 logits of ONE group to an assignment of tokens to expert slots.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K experts per token.

Ties are broken in favour of the lowest index everywhere, so that exact copies of router columns route deterministically.
"""

import abc
import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.moe import dispatch, losses


@flax.struct.dataclass
class Routing:
    """What a router decides about one group.

    Attributes:
      assignment: who sits where, and with which combine weight.
      auxiliary_loss: float32 scalar, the load-balancing loss of the group (0 for routers that balance by construction).
      offered: float32 scalar, how many placements were asked for (the router says what counts as one).
      dropped: float32 scalar, how many of those were not granted.
    """

    assignment: dispatch.Assignment
    auxiliary_loss: jax.Array
    offered: jax.Array
    dropped: jax.Array


@dataclasses.dataclass(frozen=True)
class Router(abc.ABC):
    """A routing algorithm. Callers use its methods and never ask which one it is."""

    @property
    def not_causal_because(self) -> str | None:
        """Why this router may not be used in an autoregressive decoder, or None if it may."""
        return None

    @property
    def input_jitter(self) -> float:
        """During training the router's inputs are multiplied by uniform noise in [1 - jitter, 1 + jitter]; 0 for none."""
        return 0.0

    @property
    def fills_capacity(self) -> bool:
        """Whether every slot of every expert holds a token by construction."""
        return False

    @property
    def per_token(self) -> bool:
        """Whether a token's experts follow from that token alone, so that with room for every token nothing depends on its group.

        Such a router fills each expert's slots from the first on: what an expert leaves empty is at the end.
        """
        return False

    def check(self, num_experts: int) -> None:
        """Raises ValueError if the router cannot serve `num_experts` experts."""
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")

    @abc.abstractmethod
    def slots(self, capacity: int, *, group_size: int) -> int:
        """C as this router uses it: slots that could never hold a token are not allocated."""

    @abc.abstractmethod
    def active_experts(self, capacity_factor: float) -> float:
        """Experts that process a token, on average and before drops: for counting active parameters."""

    @abc.abstractmethod
    def route(
        self,
        logits: jax.Array,
        *,
        capacity: int,
        routable: jax.Array,
        counted: jax.Array,
        count: jax.Array,
        limit: jax.Array | None = None,
    ) -> Routing:
        """Assigns the tokens of one group.

        Args:
          logits: float32 `[S, E]`.
          capacity: C.
          routable: bool `[S]`, tokens that may take a slot.
          counted: float32 `[S]`, 1 for tokens that losses and metrics count.
          count: float32 scalar, the number of tokens that means of losses run over.
          limit: int32 scalar, the capacity where it is known only when running: slots from there on stay empty. None: all may be filled.
        """


@dataclasses.dataclass(frozen=True)
class ExpertsChoose(Router):
    """Each expert takes its C tokens of highest router probability (Expert Choice, arXiv 2202.09368).

    Guarantees: every expert is full, so no auxiliary loss is needed and it is 0. A token may get several experts or none.
    May not be used in a decoder. Raising the capacity factor raises the average number of experts per token, which equals it.

    Attributes:
      renormalize: scale each token's combine weights to sum 1. Off, a weight is the plain softmax probability over all experts.
        The paper: on for vision, off for language.
      jitter_noise: see `Router.input_jitter`.
    """

    renormalize: bool = False
    jitter_noise: float = 0.0

    @property
    def not_causal_because(self) -> str | None:
        return (
            "experts choose among all tokens of a group, so whether a token is processed depends on later tokens: the decoder would "
            "train on information that it does not have when it generates. Use TokensChoose()"
        )

    @property
    def input_jitter(self) -> float:
        return self.jitter_noise

    @property
    def fills_capacity(self) -> bool:
        return True

    def slots(self, capacity: int, *, group_size: int) -> int:
        return min(capacity, group_size)

    def active_experts(self, capacity_factor: float) -> float:
        return capacity_factor

    def route(
        self,
        logits: jax.Array,
        *,
        capacity: int,
        routable: jax.Array,
        counted: jax.Array,
        count: jax.Array,
        limit: jax.Array | None = None,
    ) -> Routing:
        group_size = logits.shape[0]
        probabilities = jax.nn.softmax(logits, axis=-1)
        # Unroutable tokens rank behind every probability; an expert reaches them only when nothing else is left.
        scores = jnp.where(routable[:, None], probabilities, -1.0).T
        score, token_index = jax.lax.top_k(scores, capacity)
        taken = (score >= 0.0) & _below(limit, capacity)
        assignment = dispatch.Assignment(token_index=jnp.where(taken, token_index, group_size), combine_weight=jnp.where(taken, score, 0.0))
        if self.renormalize:
            assignment = dispatch.renormalized(assignment, group_size=group_size)
        left_behind = assignment.experts_per_token(group_size) == 0
        return Routing(
            assignment=assignment,
            auxiliary_loss=jnp.zeros((), jnp.float32),
            offered=jnp.sum(counted),
            dropped=jnp.sum(counted * left_behind),
        )


@dataclasses.dataclass(frozen=True)
class TokensChoose(Router):
    """Each token takes its K experts of highest router probability, as long as they have room (top-K; K=1 is Switch).

    Positions inside an expert are given out k-major: every token's first choice before any second choice, tokens in order. What
    exceeds the capacity is dropped: such a token is processed by fewer experts, or by none. Raising the capacity factor drops
    less and changes nothing else. Load balance is not guaranteed, hence the auxiliary loss.

    In token order this is causal as far as nothing is dropped, or K = 1. With K > 1 a later token's first choice goes before an earlier
    token's second choice, as in T5X: where capacity is short, that is the one thing an earlier token can feel of a later one.

    Attributes:
      num_selected_experts: K.
      batch_prioritized: give out positions by highest first-choice probability instead of in token order (Batch Prioritized Routing,
        V-MoE, arXiv 2106.05974). Not causal: a later token can push out an earlier one.
      renormalize: scale each token's combine weights to sum 1 over the experts that do process it, after drops. With K=1 the router then
        learns from the auxiliary loss alone.
      softmax_order: 'before_top_k' takes the softmax over all experts, then the top K (T5X, Switch, V-MoE); 'after_top_k' takes the
        top K logits, then the softmax over those K (Mixtral), so that weights sum to 1 before drops.
      jitter_noise: see `Router.input_jitter`.

    Raises:
      ValueError: K < 1, or an unknown softmax order.
    """

    num_selected_experts: int = 2
    batch_prioritized: bool = False
    renormalize: bool = False
    softmax_order: Literal["before_top_k", "after_top_k"] = "before_top_k"
    jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.num_selected_experts < 1:
            raise ValueError(f"num_selected_experts must be at least 1, got {self.num_selected_experts}")
        if self.softmax_order not in ("before_top_k", "after_top_k"):
            raise ValueError(f"softmax_order must be 'before_top_k' or 'after_top_k', got {self.softmax_order!r}")

    @property
    def not_causal_because(self) -> str | None:
        if not self.batch_prioritized:
            return None
        return (
            "batch-prioritised order gives slots to the most confident tokens of a group, so a later token can push out an earlier one: "
            "the decoder would train on information that it does not have when it generates. Set batch_prioritized=False"
        )

    @property
    def input_jitter(self) -> float:
        return self.jitter_noise

    @property
    def per_token(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if self.num_selected_experts > num_experts:
            raise ValueError(
                f"num_selected_experts={self.num_selected_experts} is more than num_experts={num_experts}: lower NUM_SELECTED_EXPERTS to "
                f"at most {num_experts} or raise NUM_EXPERTS"
            )

    def slots(self, capacity: int, *, group_size: int) -> int:
        return min(capacity, group_size)

    def active_experts(self, capacity_factor: float) -> float:
        return float(self.num_selected_experts)

    def route(
        self,
        logits: jax.Array,
        *,
        capacity: int,
        routable: jax.Array,
        counted: jax.Array,
        count: jax.Array,
        limit: jax.Array | None = None,
    ) -> Routing:
        group_size, num_experts = logits.shape
        probabilities = jax.nn.softmax(logits, axis=-1)
        # The softmax is monotonic, but near-equal logits can become equal probabilities: choose on what is compared in T5X.
        gates, choices = jax.lax.top_k(probabilities, self.num_selected_experts)
        if self.softmax_order == "after_top_k":
            top_logits, choices = jax.lax.top_k(logits, self.num_selected_experts)
            gates = jax.nn.softmax(top_logits, axis=-1)
        order = jnp.arange(group_size)
        if self.batch_prioritized:
            order = jnp.argsort(jnp.where(routable, -gates[:, 0], jnp.inf), stable=True)
        assignment = _place(
            jnp.where(routable[:, None], choices, num_experts), gates, order=order, num_experts=num_experts, capacity=capacity, limit=limit
        )
        granted = jnp.sum(assignment.experts_per_token(group_size) * counted)
        if self.renormalize:
            assignment = dispatch.renormalized(assignment, group_size=group_size)
        offered = jnp.sum(counted) * self.num_selected_experts
        return Routing(
            assignment=assignment,
            auxiliary_loss=losses.load_balancing_loss(probabilities, choices, counted=counted, count=count),
            offered=offered,
            dropped=offered - granted,
        )


def _below(limit: jax.Array | None, capacity: int) -> jax.Array:
    """Bool `[C]`: slots below the limit."""
    return jnp.arange(capacity) < (capacity if limit is None else limit)


def _place(
    choices: jax.Array, gates: jax.Array, *, order: jax.Array, num_experts: int, capacity: int, limit: jax.Array | None = None
) -> dispatch.Assignment:
    """Gives out expert slots k-major until each expert is full.

    A stable sort by expert of the K * S choices, laid out k-major, puts every expert's choices next to each other in the order of
    their priority; slot c of expert e is then the c-th of its run.

    Args:
      choices: int32 `[S, K]`; E marks a choice that takes no slot.
      gates: float32 `[S, K]`.
      order: int32 `[S]`, token indices by descending priority.
      num_experts: E.
      capacity: C.
      limit: see `Router.route`.
    """
    group_size = choices.shape[0]
    by_priority = choices[order].T.reshape(-1)
    sorted_experts, rank = jax.lax.sort_key_val(by_priority, jnp.arange(by_priority.size), is_stable=True)
    starts = jnp.searchsorted(sorted_experts, jnp.arange(num_experts + 1))
    slots = jnp.arange(capacity)
    filled = (slots < (starts[1:] - starts[:-1])[:, None]) & _below(limit, capacity)
    position = rank[jnp.minimum(starts[:-1, None] + slots, rank.size - 1)]
    token_index = order[position % group_size]
    weight = gates[token_index, position // group_size]
    return dispatch.Assignment(
        token_index=jnp.where(filled, token_index, group_size).astype(jnp.int32), combine_weight=jnp.where(filled, weight, 0.0)
    )
