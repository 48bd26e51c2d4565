"""Soft MoE: experts process mixtures of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.moe import dispatch
from upcycle_jax.moe.routing.base import Group, Router, Routing

_MASKED = -1e30
"""Stands for a logit of minus infinity, whose softmax over nothing else would be NaN."""


@dataclasses.dataclass(frozen=True)
class SoftMoe(Router):
    """Every slot is a weighted mean of all tokens of a sequence, every token gets a weighted mean
    of all slots.

    Source: From Sparse to Soft Mixtures of Experts, arXiv 2308.00951, equations 1 and 2 (without
    the l2-normalisation of its section 2.3, which its large vision models need). The router's
    kernel has one column per slot: `[d, E * slots_per_expert]`. Guarantees: nothing is dropped,
    every expert has the same load, everything is differentiable, so the auxiliary loss is 0. Cost
    follows from the number of slots alone, not from a capacity factor: a sequence of S tokens costs
    E * slots_per_expert / S experts per token. Every sequence is a group and padding has no part in
    it, so a result depends neither on the batch nor on padding. Not in a decoder, and not with
    packed rows: every output depends on every token of the row. Upcycling does not keep the
    function: the MLP of a mean is not the mean of MLPs.

    Attributes:
      slots_per_expert: p, in every sequence.
    """

    slots_per_expert: checks.Size = 1

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.slots_per_expert < 1:
            raise ValueError(f"slots_per_expert must be at least 1, got {self.slots_per_expert}")

    @property
    def not_causal_because(self) -> str | None:
        return (
            "every slot is a mixture of all tokens of the sequence, so each output depends on all"
            " later tokens: the decoder would train on information that it does not have when it"
            " generates. Use TokensChoose()"
        )

    @property
    def not_packable_because(self) -> str | None:
        return (
            "every slot mixes all tokens of a row, so the examples that are packed into one row"
            " would see each other. Set PACK to False"
        )

    @property
    def skips_padding(self) -> bool:
        return True

    @property
    def group_is_sequence(self) -> bool:
        return True

    @property
    def fills_capacity(self) -> bool:
        return True

    def renormalized(self) -> Router | None:
        return None

    def logit_columns(self, num_experts: int) -> int:
        return num_experts * self.slots_per_expert

    def flops_per_token(self, emb_dim: int, num_experts: int) -> int:
        # The logits, the mixing of tokens into slots, and that of slots into tokens.
        return 3 * 2 * emb_dim * self.logit_columns(num_experts)

    def slots(self, capacity: int, *, group_size: int) -> int:
        return self.slots_per_expert

    def active_experts(self, capacity_factor: float) -> float:
        return math.inf  # all of them

    def route(self, group: Group, *, capacity: int) -> Routing:
        group_size = group.logits.shape[0]
        logits = group.logits.reshape(group_size, -1, self.slots_per_expert)
        takes_part = group.routable[:, None, None]
        over_tokens = jax.nn.softmax(jnp.where(takes_part, logits, _MASKED), axis=0)
        over_slots = jax.nn.softmax(group.logits, axis=-1).reshape(logits.shape)
        dispatcher = dispatch.SoftDispatch(
            dispatch_weight=jnp.where(takes_part, over_tokens, 0.0),
            combine_weight=jnp.where(takes_part, over_slots, 0.0),
        )
        return Routing(
            dispatcher=dispatcher,
            probabilities=jnp.sum(over_slots, axis=-1),
            chosen=dispatcher.load(group.counted),
            auxiliary_loss=jnp.zeros((), jnp.float32),
            offered=jnp.sum(group.counted),
            dropped=jnp.zeros((), jnp.float32),
        )
