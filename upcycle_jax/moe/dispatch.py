"""Dispatchers: which tokens go to which experts, how they get there, and how outputs come back.

A router makes one for a group of tokens. The forms differ in what they hold and in how much memory
they need; all give the same sums:

  * `Assignment`: the token in each slot of each expert. Gathers and scatters, for routers with a
    capacity.
  * `OneHot`: the same decisions as a mask [S, E, C] and two products, as in T5X. The baseline of
    benchmarks and the oracle of tests.
  * `TokenChoices`: the experts of each token, without slots, for routers that drop nothing.
  * `SoftDispatch`: weights [S, E, C] that mix all tokens into slots and all slots into tokens.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token, d width of a token. A dispatcher is made for ONE group; the layer maps routers
over G, so that arrays have a leading G in `apply` and `shortened`.
"""

import abc
import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.layers.projection import sums
from upcycle_jax.moe.experts import ExpertBank
from upcycle_jax.moe.grouped_experts import Dispatch


@dataclasses.dataclass(frozen=True)
class Shortened:
    """The beginning of a dispatcher whose slots are mostly empty.

    Attributes:
      dispatcher: with fewer slots per expert.
      holds_all: bool scalar, whether all slots beyond them are empty.
    """

    dispatcher: "Dispatcher"
    holds_all: jax.Array


class Dispatcher(abc.ABC):
    """Which tokens go to which experts, and with which weights. Callers use its methods and never
    ask which form it has.
    """

    @abc.abstractmethod
    def apply(self, experts: ExpertBank, tokens: jax.Array) -> jax.Array:
        """Sends tokens to experts and adds up the weighted outputs.

        Args:
          experts: the experts.
          tokens: `[G, S, d]` in the dtype of the experts' computation.

        Returns:
          Float32 `[G, S, d]`; zero for tokens without an expert.
        """

    @abc.abstractmethod
    def experts_per_token(self, group_size: int) -> jax.Array:
        """Int32 `[S]`: how many experts process each token of one group."""

    @abc.abstractmethod
    def weight_per_token(self, group_size: int) -> jax.Array:
        """Float32 `[S]`: the sum of each token's combine weights, of one group."""

    @abc.abstractmethod
    def load(self, counted: jax.Array) -> jax.Array:
        """Float32 `[E]`: tokens that each expert processes, weighted by `counted` `[S]`; of one
        group.
        """

    @abc.abstractmethod
    def part(self, first: jax.Array | int, count: int) -> "Dispatcher":
        """The dispatcher of `count` experts, from `first` on, alone; of one group. The outputs of
        all parts add up to that of the whole.
        """

    @abc.abstractmethod
    def merged(self, members: jax.Array, group_size: int) -> "Dispatcher":
        """The dispatcher of one expert that stands for those of bool `[E]`, all copies of it; of
        one group.
        """

    @property
    def mixes_groups(self) -> bool:
        """Whether experts take the tokens of all groups at once. If not, each group has its own
        slots.
        """
        return False

    def in_form(self, form: Dispatch, group_size: int) -> "Dispatcher":
        """The same decisions in the form that `MoeConfig.dispatch` asks for, of one group.

        'gather' gives token choices slots: one of every expert for every token. 'one_hot' moves
        tokens to slots by masks, and does both for token choices. The other values of the setting
        change nothing, nor does any for a dispatcher that has no such form.
        """
        return self

    def shortened(self, slots: int, *, group_size: int) -> Shortened | None:
        """The first `slots` slots of every expert of all groups; None if there are no more."""
        return None


@flax.struct.dataclass
class Assignment(Dispatcher):
    """Which token sits in which slot of which expert, for one group.

    Attributes:
      token_index: int32 `[E, C]`, in `[0, S]`; S marks an empty slot. A token appears at most once
        per expert.
      combine_weight: float32 `[E, C]`, the factor on that expert's output for that token; 0 in
        empty slots.
    """

    token_index: jax.Array
    combine_weight: jax.Array

    def apply(self, experts: ExpertBank, tokens: jax.Array) -> jax.Array:
        if experts.looped_over:
            return experts.looped(tokens, self.token_index, self.combine_weight)
        slots = jax.vmap(gather)(tokens, self.token_index)  # [G, E, C, d]
        outputs = experts.on_slots(slots)  # [G, E, C, d]
        scatter_groups = jax.vmap(lambda one, where: scatter(one, where, tokens.shape[1]))
        return scatter_groups(outputs, self)  # [G, S, d]

    def filled(self, group_size: int) -> jax.Array:
        """Bool `[E, C]`: slots that hold a token."""
        return self.token_index < group_size

    def weight_per_token(self, group_size: int) -> jax.Array:
        zeros = jnp.zeros(group_size, jnp.float32)
        return zeros.at[self.token_index].add(self.combine_weight, mode="drop")

    def experts_per_token(self, group_size: int) -> jax.Array:
        return jnp.zeros(group_size, jnp.int32).at[self.token_index].add(1, mode="drop")

    def load(self, counted: jax.Array) -> jax.Array:
        return jnp.sum(counted.at[self.token_index].get(mode="fill", fill_value=0.0), axis=-1)

    def part(self, first: jax.Array | int, count: int) -> Self:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), self)

    def merged(self, members: jax.Array, group_size: int) -> Self:
        theirs = dataclasses.replace(self, combine_weight=self.combine_weight * members[:, None])
        return dataclasses.replace(
            self,
            token_index=jnp.arange(group_size, dtype=jnp.int32)[None],
            combine_weight=theirs.weight_per_token(group_size)[None],
        )

    def in_form(self, form: Dispatch, group_size: int) -> Dispatcher:
        if form == "one_hot":
            return OneHot(self.token_index, self.combine_weight)
        return self

    def shortened(self, slots: int, *, group_size: int) -> Shortened | None:
        if slots >= self.token_index.shape[-1]:
            return None
        fullest = jnp.max(jnp.sum(self.filled(group_size), axis=-1))
        return Shortened(jax.tree.map(lambda leaf: leaf[..., :slots], self), fullest <= slots)


@flax.struct.dataclass
class OneHot(Assignment):
    """An assignment that moves tokens by products with arrays `[S, E, C]`, as T5X's Flaxformer and
    Mesh TensorFlow do: `MoeConfig.dispatch = 'one_hot'`.

    It needs S * E * C numbers per group, twice, and as many multiplications for each of the d
    numbers of a token. Use it to measure the other forms against, and to check them.
    """

    def apply(self, experts: ExpertBank, tokens: jax.Array) -> jax.Array:
        # Empty slots hold S, which no token has: their row of the mask is False.
        positions = jnp.arange(tokens.shape[1])[:, None, None]
        mask = self.token_index[:, None] == positions  # [G, S, E, C]
        slots = jnp.einsum("gsec,gsd->gecd", mask.astype(tokens.dtype), tokens)
        outputs = experts.on_slots(slots)  # [G, E, C, d]
        weights = jnp.where(mask, self.combine_weight[:, None], 0.0)  # [G, S, E, C]
        return jnp.einsum("gsec,gecd->gsd", weights, outputs.astype(jnp.float32))


@flax.struct.dataclass
class TokenChoices(Dispatcher):
    """The experts that each token of one group goes to. Nothing is dropped and there are no slots.

    Attributes:
      expert: int32 `[S, K]`, in `[0, E]`; E marks a choice that is not made. No expert twice in a
        row.
      weight: float32 `[S, K]`, the factor on that expert's output; 0 where no choice is made.
      num_experts: E.
    """

    expert: jax.Array
    weight: jax.Array
    num_experts: int = flax.struct.field(pytree_node=False)

    def apply(self, experts: ExpertBank, tokens: jax.Array) -> jax.Array:
        # Groups do not matter without a capacity: [G, S, ...] is one list of tokens [G * S, ...].
        flat, expert, weight = (
            a.reshape(-1, a.shape[-1]) for a in (tokens, self.expert, self.weight)
        )
        return experts.grouped(flat, expert, weight).reshape(tokens.shape)

    @property
    def mixes_groups(self) -> bool:
        return True

    def weight_per_token(self, group_size: int) -> jax.Array:
        return jnp.sum(self.weight, axis=-1)

    def experts_per_token(self, group_size: int) -> jax.Array:
        return jnp.sum(self.expert < self.num_experts, axis=-1, dtype=jnp.int32)

    def load(self, counted: jax.Array) -> jax.Array:
        zeros = jnp.zeros(self.num_experts, jnp.float32)
        return zeros.at[self.expert].add(counted[:, None], mode="drop")

    def part(self, first: jax.Array | int, count: int) -> "TokenChoices":
        local = self.expert - first
        here = (local >= 0) & (local < count)
        return TokenChoices(
            jnp.where(here, local, count), jnp.where(here, self.weight, 0.0), num_experts=count
        )

    def merged(self, members: jax.Array, group_size: int) -> "TokenChoices":
        here = members.at[self.expert].get(mode="fill", fill_value=False)
        return TokenChoices(
            expert=jnp.where(here.any(axis=-1, keepdims=True), 0, 1),
            weight=jnp.sum(jnp.where(here, self.weight, 0.0), axis=-1, keepdims=True),
            num_experts=1,
        )

    def in_form(self, form: Dispatch, group_size: int) -> Dispatcher:
        if form not in ("gather", "one_hot"):
            return self
        slots = assign_slots(self, order=jnp.arange(group_size), capacity=group_size)
        return slots.in_form(form, group_size)


@flax.struct.dataclass
class SoftDispatch(Dispatcher):
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

    def apply(self, experts: ExpertBank, tokens: jax.Array) -> jax.Array:
        slots = jnp.einsum(
            "gsec,gsd->gecd", self.dispatch_weight, tokens, preferred_element_type=jnp.float32
        )
        outputs = experts.on_slots(slots.astype(tokens.dtype))  # [G, E, C, d]
        return jnp.einsum(
            "gsec,gecd->gsd", self.combine_weight, outputs, preferred_element_type=jnp.float32
        )

    def weight_per_token(self, group_size: int) -> jax.Array:
        return jnp.sum(self.combine_weight, axis=(-2, -1))

    def experts_per_token(self, group_size: int) -> jax.Array:
        takes_part = self.weight_per_token(group_size) > 0
        return jnp.where(takes_part, self.combine_weight.shape[-2], 0).astype(jnp.int32)

    def load(self, counted: jax.Array) -> jax.Array:
        return jnp.einsum("sec,s->e", self.dispatch_weight, counted)

    def part(self, first: jax.Array | int, count: int) -> "SoftDispatch":
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, axis=1), self
        )

    def merged(self, members: jax.Array, group_size: int) -> "SoftDispatch":
        def of_one(leaf: jax.Array) -> jax.Array:
            return (leaf * members[:, None]).reshape(leaf.shape[0], 1, -1)

        return jax.tree.map(of_one, self)


def assign_slots(
    choices: TokenChoices, *, order: jax.Array, capacity: int, limit: jax.Array | None = None
) -> Assignment:
    """Gives out expert slots k-major until each expert is full, and drops later choices.

    Args:
      choices: of one group.
      order: int32 `[S]`, token indices by descending priority.
      capacity: C.
      limit: int32 scalar, see `below`.
    """
    group_size = choices.expert.shape[0]
    # [K * S]: the first choices of all tokens, by priority, then all second choices, and so on.
    by_priority = choices.expert[order].T.reshape(-1)
    # A stable sort by expert puts the choices of every expert next to each other, a run, in the
    # order of their priority. Slot c of expert e is the c-th of its run.
    sorted_experts, rank = jax.lax.sort_key_val(
        by_priority, jnp.arange(by_priority.size), is_stable=True
    )
    starts = jnp.searchsorted(sorted_experts, jnp.arange(choices.num_experts + 1))  # [E + 1]
    slots = jnp.arange(capacity)
    run_sizes = (starts[1:] - starts[:-1])[:, None]
    filled = (slots < run_sizes) & below(limit, capacity)  # [E, C]
    # [E, C]: which of the K * S choices each slot holds; anything in slots that are not filled.
    position = rank[jnp.minimum(starts[:-1, None] + slots, rank.size - 1)]
    token_index = order[position % group_size]
    weight = choices.weight[token_index, position // group_size]
    return Assignment(
        token_index=jnp.where(filled, token_index, group_size).astype(jnp.int32),
        combine_weight=jnp.where(filled, weight, 0.0),
    )


def below(limit: jax.Array | None, capacity: int) -> jax.Array:
    """Bool `[C]`: slots below the limit, a capacity that is known only at run time; all slots if
    there is none.
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
    return dataclasses.replace(assignment, combine_weight=assignment.combine_weight * per_slot)


def renormalized_choices(choices: TokenChoices, *, total: float = 1.0) -> TokenChoices:
    """As `renormalized`, for choices, all of which are granted."""
    scale = total * _inverse(jnp.sum(choices.weight, axis=-1))
    return dataclasses.replace(choices, weight=choices.weight * scale[..., None])


def _inverse(total: jax.Array) -> jax.Array:
    """1 / total; 0, not NaN, for a token whose weights all underflowed to 0."""
    return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)


def gather(tokens: jax.Array, token_index: jax.Array) -> jax.Array:
    """`[S, d]` of one group in its slots `[E, C, d]`; empty slots are zero."""
    return tokens.at[token_index].get(mode="fill", fill_value=0)


def scatter(outputs: jax.Array, assignment: Assignment, group_size: int) -> jax.Array:
    """Adds outputs `[E, C, d]`, scaled by the combine weights, up to float32 `[S, d]`, of one
    group; tokens without an expert get zero.
    """
    weighted = _weighted(outputs.astype(jnp.float32), assignment.combine_weight)
    zeros = jnp.zeros((group_size, outputs.shape[-1]), jnp.float32)
    return zeros.at[assignment.token_index].add(weighted, mode="drop")


@jax.custom_vjp
def _weighted(vectors: jax.Array, weight: jax.Array) -> jax.Array:
    """Vectors `[..., d]` times `weight` `[...]`. Its gradient sums over d by
    `layers.projection.sums`, which automatic differentiation would not.
    """
    return vectors * weight[..., None]


def _weighted_backward(
    saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    vectors, weight = saved
    return _weighted(grad, weight), sums(vectors * grad)


_weighted.defvjp(
    lambda vectors, weight: (_weighted(vectors, weight), (vectors, weight)), _weighted_backward
)
