"""What routers hand over: plans that move tokens to experts and back. No array of size S x E x C
exists unless the router is a soft one.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token. A plan is made for ONE group; the layer maps routers over G, so that its leaves
have a leading G when `process` is called.
"""

import abc
import dataclasses
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.layers.projection import sums


class Experts(Protocol):
    """The experts of a layer, as plans use them."""

    def on_slots(self, inputs: jax.Array) -> jax.Array:
        """Outputs `[G, E, C, d]` of inputs `[G, E, C, d]`: expert e on row e."""

    def on_assigned(self, tokens: jax.Array, assignment: "Assignment") -> jax.Array:
        """Float32 `[G, S, d]`: for each token the weighted sum of the outputs of the experts that
        have a slot for it.
        """

    def on_choices(self, tokens: jax.Array, choices: "Choices") -> jax.Array:
        """Float32 `[G, S, d]`: for each token the weighted sum of the outputs of the experts that
        it chose.
        """


@dataclasses.dataclass(frozen=True)
class Shortened:
    """The beginning of a plan whose slots are mostly empty.

    Attributes:
      plan: with fewer slots per expert.
      holds_all: bool scalar, whether nothing sits beyond them.
    """

    plan: "Plan"
    holds_all: jax.Array


class Plan(abc.ABC):
    """Which tokens meet which experts, and with which weight. Callers use its methods and never ask
    which kind it is.
    """

    @abc.abstractmethod
    def experts_per_token(self, group_size: int) -> jax.Array:
        """Int32 `[S]`: how many experts process each token of one group."""

    @abc.abstractmethod
    def weight_per_token(self, group_size: int) -> jax.Array:
        """Float32 `[S]`: each token's combine weights, summed over the experts that process it; of
        one group.
        """

    @abc.abstractmethod
    def load(self, counted: jax.Array) -> jax.Array:
        """Float32 `[E]`: tokens that each expert processes, weighted by `counted` `[S]`; of one
        group.
        """

    @abc.abstractmethod
    def process(self, tokens: jax.Array, experts: Experts) -> jax.Array:
        """Sends `[G, S, d]` through the experts and adds up what comes back: float32 `[G, S,
        d]`.
        """

    @abc.abstractmethod
    def part(self, first: jax.Array | int, count: int) -> "Plan":
        """What `count` experts, from `first` on, do in this plan: a plan for them alone; of one
        group. The results of parts add up.
        """

    @abc.abstractmethod
    def merged(self, members: jax.Array, group_size: int) -> "Plan":
        """What the experts of bool `[E]` do in this plan, if all of them are copies of one: a plan
        for that one; of one group.
        """

    def in_slots(self, group_size: int) -> "Plan":
        """The same plan with a slot of every expert for every token, where it has no slots of its
        own; of one group.
        """
        return self

    def shortened(self, slots: int, *, group_size: int) -> Shortened | None:
        """The first `slots` slots of every expert of all groups; None where there are no more than
        that.
        """
        return None


@flax.struct.dataclass
class Assignment(Plan):
    """Which token sits in which slot of which expert, for one group.

    Attributes:
      token_index: int32 `[E, C]`, in `[0, S]`; S marks an empty slot. A token appears at most once
        per expert.
      combine_weight: float32 `[E, C]`, the factor on that expert's output for that token; 0 in
        empty slots.
    """

    token_index: jax.Array
    combine_weight: jax.Array

    def filled(self, group_size: int) -> jax.Array:
        """Bool `[E, C]`: slots that hold a token."""
        return self.token_index < group_size

    def weight_per_token(self, group_size: int) -> jax.Array:
        return (
            jnp.zeros(group_size, jnp.float32)
            .at[self.token_index]
            .add(self.combine_weight, mode="drop")
        )

    def experts_per_token(self, group_size: int) -> jax.Array:
        return jnp.zeros(group_size, jnp.int32).at[self.token_index].add(1, mode="drop")

    def load(self, counted: jax.Array) -> jax.Array:
        return jnp.sum(counted.at[self.token_index].get(mode="fill", fill_value=0.0), axis=-1)

    def part(self, first: jax.Array | int, count: int) -> Plan:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), self)

    def merged(self, members: jax.Array, group_size: int) -> Plan:
        theirs = Assignment(self.token_index, self.combine_weight * members[:, None])
        return Assignment(
            token_index=jnp.arange(group_size, dtype=jnp.int32)[None],
            combine_weight=theirs.weight_per_token(group_size)[None],
        )

    def process(self, tokens: jax.Array, experts: Experts) -> jax.Array:
        return experts.on_assigned(tokens, self)

    def shortened(self, slots: int, *, group_size: int) -> Shortened | None:
        if slots >= self.token_index.shape[-1]:
            return None
        fullest = jnp.max(jnp.sum(self.filled(group_size), axis=-1))
        return Shortened(jax.tree.map(lambda leaf: leaf[..., :slots], self), fullest <= slots)


@flax.struct.dataclass
class Choices(Plan):
    """The experts that each token of one group chose, all of which it gets: nothing is dropped and
    there are no slots.

    Attributes:
      expert: int32 `[S, K]`, in `[0, E]`; E marks a choice that is not made. No expert twice in a
        row.
      weight: float32 `[S, K]`, the factor on that expert's output; 0 where no choice is made.
      num_experts: E.
    """

    expert: jax.Array
    weight: jax.Array
    num_experts: int = flax.struct.field(pytree_node=False)

    def weight_per_token(self, group_size: int) -> jax.Array:
        return jnp.sum(self.weight, axis=-1)

    def experts_per_token(self, group_size: int) -> jax.Array:
        return jnp.sum(self.expert < self.num_experts, axis=-1, dtype=jnp.int32)

    def load(self, counted: jax.Array) -> jax.Array:
        return (
            jnp.zeros(self.num_experts, jnp.float32)
            .at[self.expert]
            .add(counted[:, None], mode="drop")
        )

    def part(self, first: jax.Array | int, count: int) -> Plan:
        local = self.expert - first
        here = (local >= 0) & (local < count)
        return Choices(
            jnp.where(here, local, count), jnp.where(here, self.weight, 0.0), num_experts=count
        )

    def merged(self, members: jax.Array, group_size: int) -> Plan:
        here = members.at[self.expert].get(mode="fill", fill_value=False)
        return Choices(
            expert=jnp.where(here.any(axis=-1, keepdims=True), 0, 1),
            weight=jnp.sum(jnp.where(here, self.weight, 0.0), axis=-1, keepdims=True),
            num_experts=1,
        )

    def process(self, tokens: jax.Array, experts: Experts) -> jax.Array:
        return experts.on_choices(tokens, self)

    def in_slots(self, group_size: int) -> Plan:
        return place(self, order=jnp.arange(group_size), capacity=group_size)


@flax.struct.dataclass
class Mixture(Plan):
    """Slots that hold weighted means of all tokens of one group, and tokens that are weighted means
    of all slots (soft MoE).

    Attributes:
      dispatch_weight: float32 `[S, E, C]`; over the tokens that take part it sums to 1 in every
        slot.
      combine_weight: float32 `[S, E, C]`; over all slots it sums to 1 for every token that takes
        part, and is 0 for the others.
    """

    dispatch_weight: jax.Array
    combine_weight: jax.Array

    def weight_per_token(self, group_size: int) -> jax.Array:
        return jnp.sum(self.combine_weight, axis=(-2, -1))

    def experts_per_token(self, group_size: int) -> jax.Array:
        takes_part = self.weight_per_token(group_size) > 0
        return jnp.where(takes_part, self.combine_weight.shape[-2], 0).astype(jnp.int32)

    def load(self, counted: jax.Array) -> jax.Array:
        return jnp.einsum("sec,s->e", self.dispatch_weight, counted)

    def part(self, first: jax.Array | int, count: int) -> Plan:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, axis=1), self
        )

    def merged(self, members: jax.Array, group_size: int) -> Plan:
        def of_one(leaf: jax.Array) -> jax.Array:
            return (leaf * members[:, None]).reshape(leaf.shape[0], 1, -1)

        return jax.tree.map(of_one, self)

    def process(self, tokens: jax.Array, experts: Experts) -> jax.Array:
        mixed = jnp.einsum(
            "gsec,gsd->gecd", self.dispatch_weight, tokens, preferred_element_type=jnp.float32
        )
        outputs = experts.on_slots(mixed.astype(tokens.dtype))
        return jnp.einsum(
            "gsec,gecd->gsd", self.combine_weight, outputs, preferred_element_type=jnp.float32
        )


def place(
    choices: Choices, *, order: jax.Array, capacity: int, limit: jax.Array | None = None
) -> Assignment:
    """Gives out expert slots k-major until each expert is full; later choices are dropped.

    A stable sort by expert of the K * S choices, laid out k-major, puts every expert's choices next
    to each other in the order of their priority; slot c of expert e is then the c-th of its run.

    Args:
      choices: of one group.
      order: int32 `[S]`, token indices by descending priority.
      capacity: C.
      limit: int32 scalar, see `below`.
    """
    group_size = choices.expert.shape[0]
    by_priority = choices.expert[order].T.reshape(-1)
    sorted_experts, rank = jax.lax.sort_key_val(
        by_priority, jnp.arange(by_priority.size), is_stable=True
    )
    starts = jnp.searchsorted(sorted_experts, jnp.arange(choices.num_experts + 1))
    slots = jnp.arange(capacity)
    filled = (slots < (starts[1:] - starts[:-1])[:, None]) & below(limit, capacity)
    position = rank[jnp.minimum(starts[:-1, None] + slots, rank.size - 1)]
    token_index = order[position % group_size]
    weight = choices.weight[token_index, position // group_size]
    return Assignment(
        token_index=jnp.where(filled, token_index, group_size).astype(jnp.int32),
        combine_weight=jnp.where(filled, weight, 0.0),
    )


def below(limit: jax.Array | None, capacity: int) -> jax.Array:
    """Bool `[C]`: slots below the limit, which is a capacity that is known only when running; all
    of them without one.
    """
    return jnp.arange(capacity) < (capacity if limit is None else limit)


def renormalized(assignment: Assignment, *, group_size: int, total: float = 1.0) -> Assignment:
    """Scales combine weights so that each token's sum to `total` over the experts that do process
    it.

    A token that no expert took keeps 0. Source: Sparse Upcycling, section 3.1 (on for its vision
    models, off for language).
    """
    scale = total * _inverse(assignment.weight_per_token(group_size))
    per_slot = scale.at[assignment.token_index].get(mode="fill", fill_value=0.0)
    return Assignment(
        token_index=assignment.token_index, combine_weight=assignment.combine_weight * per_slot
    )


def renormalized_choices(choices: Choices, *, total: float = 1.0) -> Choices:
    """The same for choices, all of which are granted."""
    scale = total * _inverse(jnp.sum(choices.weight, axis=-1))
    return Choices(
        expert=choices.expert,
        weight=choices.weight * scale[..., None],
        num_experts=choices.num_experts,
    )


def _inverse(total: jax.Array) -> jax.Array:
    """1 / total; a token whose every weight underflowed to 0 must give 0, not NaN."""
    return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)


def dispatch(tokens: jax.Array, assignment: Assignment) -> jax.Array:
    """Gathers `[S, d]` into `[E, C, d]`; empty slots are zero."""
    return tokens.at[assignment.token_index].get(mode="fill", fill_value=0)


def combine(expert_outputs: jax.Array, assignment: Assignment, *, group_size: int) -> jax.Array:
    """Adds `[E, C, d]`, scaled by the combine weights, back to float32 `[S, d]`; tokens without an
    expert get zero.
    """
    weighted = _weighted(expert_outputs.astype(jnp.float32), assignment.combine_weight)
    return (
        jnp.zeros((group_size, expert_outputs.shape[-1]), jnp.float32)
        .at[assignment.token_index]
        .add(weighted, mode="drop")
    )


@jax.custom_vjp
def _weighted(vectors: jax.Array, weight: jax.Array) -> jax.Array:
    """Vectors `[..., d]` times `weight` `[...]`."""
    return vectors * weight[..., None]


def _weighted_backward(
    saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    vectors, weight = saved
    return _weighted(grad, weight), sums(vectors * grad)


_weighted.defvjp(
    lambda vectors, weight: (_weighted(vectors, weight), (vectors, weight)), _weighted_backward
)
