"""Experts choose their tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.moe import dispatch
from upcycle_jax.moe.routing.base import Group, Router, Routing, check_jitter


@dataclasses.dataclass(frozen=True, repr=False)
class ExpertsChoose(Router):
    """Each expert takes its C tokens of highest router probability.

    Source: Expert Choice, arXiv 2202.09368; the encoder of Sparse Upcycling, arXiv 2212.05055.
    Guarantees: every expert is full, so no auxiliary loss is needed and it is 0. A token may get
    several experts or none. Not in a decoder: whether a token is processed depends on later ones.
    Raising the capacity factor raises the average number of experts per token, which equals it.

    Attributes:
      renormalize: scale each token's combine weights to sum 1. Off, a weight is the plain softmax
        probability over all experts. The paper: on for vision, off for language.
      jitter_noise: see `Router.input_jitter`.
      noise_std: see `Router.logit_noise`; 1.0 in V-MoE's `NoisyTopItemsPerExpertRouter`.
    """

    renormalize: bool = False
    jitter_noise: float = 0.0
    noise_std: checks.NotNegative = dataclasses.field(default=0.0, metadata=checks.ADDED)

    def __post_init__(self) -> None:
        checks.check_fields(self)
        check_jitter(self.jitter_noise)

    @property
    def not_causal_because(self) -> str | None:
        return (
            "experts choose among all tokens of a group, so whether a token is processed depends on"
            " later tokens: the decoder would train on information that it does not have when it"
            " generates. Use TokensChoose()"
        )

    @property
    def in_flaxformer(self) -> bool:
        return not self.noise_std

    @property
    def input_jitter(self) -> float:
        return self.jitter_noise

    @property
    def logit_noise(self) -> float:
        return self.noise_std

    @property
    def fills_capacity(self) -> bool:
        return True

    @property
    def unit_weights(self) -> bool:
        return self.renormalize

    def slots(self, capacity: int, *, group_size: int) -> int:
        return min(capacity, group_size)

    def active_experts(self, capacity_factor: float) -> float:
        return capacity_factor

    def route(self, group: Group, *, capacity: int) -> Routing:
        group_size = group.logits.shape[0]
        probabilities = jax.nn.softmax(group.logits, axis=-1)
        # Unroutable tokens rank behind every probability; an expert reaches them only when nothing
        # else is left.
        scores = jnp.where(group.routable[:, None], probabilities, -1.0).T
        score, token_index = jax.lax.top_k(scores, capacity)
        taken = (score >= 0.0) & dispatch.below(group.limit, capacity)
        assignment = dispatch.Assignment(
            token_index=jnp.where(taken, token_index, group_size),
            combine_weight=jnp.where(taken, score, 0.0),
        )
        if self.renormalize:
            assignment = dispatch.renormalized(assignment, group_size=group_size)
        left_behind = assignment.experts_per_token(group_size) == 0
        return Routing(
            dispatcher=assignment,
            probabilities=probabilities,
            chosen=assignment.load(group.counted),
            auxiliary_loss=jnp.zeros((), jnp.float32),
            offered=jnp.sum(group.counted),
            dropped=jnp.sum(group.counted * left_behind),
        )
