"""The interface of all routers: from what is known about ONE group of tokens to a dispatcher, which
sends tokens to experts.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token.

Ties are broken in favour of the lowest index everywhere, so that exact copies of router columns
route deterministically.
"""

import abc
import dataclasses

import flax.struct
import jax

from upcycle_jax import checks
from upcycle_jax.moe.dispatch import Dispatcher


@flax.struct.dataclass
class Group:
    """One group of tokens, as routers see it.

    Attributes:
      logits: float32 `[S, columns]`, see `Router.logit_columns`.
      num_experts: E.
      routable: bool `[S]`, tokens that may take a place.
      counted: float32 `[S]`, 1 for tokens that losses and metrics count.
      count: float32 scalar, the number of tokens that means of losses run over.
      limit: int32 scalar, a capacity that is known only at run time: slots from there on stay
        empty. None: all may be filled.
      bias: float32 `[E]`, added to the scores that select experts, for routers with a
        `Router.balance_rate`; None for zeros.
      token_ids: int32 `[S]`, for routers with `Router.needs_token_ids`.
      clean_logits: float32 `[S, columns]`, `logits` before noise was added; None where none was.
    """

    logits: jax.Array
    num_experts: int = flax.struct.field(pytree_node=False)
    routable: jax.Array
    counted: jax.Array
    count: jax.Array
    limit: jax.Array | None = None
    bias: jax.Array | None = None
    token_ids: jax.Array | None = None
    clean_logits: jax.Array | None = None


@flax.struct.dataclass
class Routing:
    """What a router decides about one group.

    Attributes:
      dispatcher: which tokens go to which experts, and with which weights.
      probabilities: float32 `[S, E]`, what the router prefers; every row sums to 1.
      chosen: float32 `[E]`, counted tokens that asked for each expert, before any drop.
      auxiliary_loss: float32 scalar, the load-balancing loss of the group (0 for routers that
        balance by other means).
      offered: float32 scalar, the number of placements that were asked for; a placement is a pair
        of token and expert under tokens choose, else a token.
      dropped: float32 scalar, the number of those that were not granted.
    """

    dispatcher: Dispatcher
    probabilities: jax.Array
    chosen: jax.Array
    auxiliary_loss: jax.Array
    offered: jax.Array
    dropped: jax.Array


@dataclasses.dataclass(frozen=True)
class Router(abc.ABC):
    """A routing algorithm. Callers use its methods and never ask which one it is.

    The properties say what a router needs and promises; a subclass overrides those in which it
    differs from a plain one. Texts of routers are compared with those of earlier runs: one with
    `checks.ADDED` fields is a dataclass with `repr=False`.
    """

    __repr__ = checks.shown_repr

    @property
    def not_causal_because(self) -> str | None:
        """Why this router may not be used in an autoregressive decoder, or None if it may."""
        return None

    @property
    def not_packable_because(self) -> str | None:
        """Why rows that hold several examples may not pass this router, or None if they may."""
        return None

    @property
    def in_flaxformer(self) -> bool:
        """Whether Flaxformer has this router, so that T5X mode has a meaning."""
        return False

    @property
    def input_jitter(self) -> float:
        """During training the router's inputs are multiplied by uniform noise in [1 - jitter, 1 +
        jitter]; 0 for none.
        """
        return 0.0

    @property
    def logit_noise(self) -> float:
        """During training N(0, (logit_noise / E)^2) is added to the logits; 0 for none."""
        return 0.0

    @property
    def balance_rate(self) -> float | None:
        """How far the selection bias of each expert moves after a step (see `moe.balance`); None
        for routers without one.
        """
        return None

    @property
    def needs_token_ids(self) -> bool:
        """Whether `Group.token_ids` must be given."""
        return False

    @property
    def skips_padding(self) -> bool:
        """Whether padding never takes a place, also with `MoeConfig.ignore_padding_tokens` off."""
        return False

    @property
    def group_is_sequence(self) -> bool:
        """Whether every sequence is a group of its own, regardless of GROUP_SIZE."""
        return False

    @property
    def fills_capacity(self) -> bool:
        """Whether every slot of every expert holds a token by construction."""
        return False

    @property
    def per_token(self) -> bool:
        """Whether a token's experts follow from that token alone. With room for every token, a
        result then does not depend on the group.

        Such a router fills each expert's slots from the first on: empty slots are at the end.
        """
        return False

    @property
    def has_room_for_all(self) -> bool:
        """Whether every token goes to every expert that it chose, at any load, because there is no
        capacity.
        """
        return False

    @property
    def unit_weights(self) -> bool:
        """Whether the combine weights of a token sum to 1 where nothing is dropped: copies of one
        expert then equal that expert.
        """
        return False

    @property
    def selected_per_token(self) -> int | None:
        """K, experts that each token asks for; None where tokens do not choose."""
        return None

    @property
    def has_balance_loss(self) -> bool:
        """Whether a load-balancing loss of choices and probabilities balances experts."""
        return False

    @property
    def chooses_by_softmax(self) -> bool:
        """Whether tokens choose the experts of their largest logits, whose weights are a softmax's:
        what V-MoE's importance and load losses are about.
        """
        return False

    @property
    def follows_copies(self) -> bool:
        """Whether c * K choices among c copies of every expert, with equal logits, weigh like K
        choices among the experts themselves: each copy a c-th of the expert's weight.
        """
        return False

    def renormalized(self) -> "Router | None":
        """The same router with unit weights, or None where experts process mixtures of tokens."""
        return dataclasses.replace(self, renormalize=True)  # type: ignore[call-arg]

    def check(self, num_experts: int) -> None:
        """Raises ValueError if the router cannot serve `num_experts` experts."""
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")

    def logit_columns(self, num_experts: int) -> int:
        """Columns of the router's kernel `[d, columns]`; 0 for routers that learn nothing and have
        none.
        """
        return num_experts

    def flops_per_token(self, emb_dim: int, num_experts: int) -> int:
        """FLOPs of the router's own matrix products for one token, forward."""
        return 2 * emb_dim * self.logit_columns(num_experts)

    def expert_rows(self, num_experts: int, capacity: int, *, group_size: int) -> int:
        """Vectors that the experts compute in one group; their cost is proportional to it."""
        return num_experts * self.slots(capacity, group_size=group_size)

    @abc.abstractmethod
    def slots(self, capacity: int, *, group_size: int) -> int:
        """C as this router uses it: slots that could never hold a token are not allocated."""

    @abc.abstractmethod
    def active_experts(self, capacity_factor: float) -> float:
        """Experts that process a token, on average and before drops: for counting active
        parameters.
        """

    @abc.abstractmethod
    def route(self, group: Group, *, capacity: int) -> Routing:
        """Routes one group with `capacity` slots per expert (as from `slots`).

        Routers map with `jax.vmap` over groups, so shapes may not depend on values.
        """


def check_jitter(noise: float) -> None:
    """Raises ValueError unless `noise` can be a `Router.input_jitter`: from 1 on it could change
    the sign of inputs.
    """
    if not 0 <= noise < 1:
        raise ValueError(
            f"jitter_noise (JITTER_NOISE) must be in [0, 1), got {noise}: Switch Transformer's is"
            " 0.01, 0 is none"
        )
