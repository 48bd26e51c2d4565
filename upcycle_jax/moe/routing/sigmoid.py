"""Tokens choose by sigmoid gates, and balance without a loss."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.moe.routing.base import Group
from upcycle_jax.moe.routing.token_choice import TokenChoice, TopK


@dataclasses.dataclass(frozen=True)
class SigmoidTopK(TokenChoice):
    """Each token takes the K experts of highest affinity sigmoid(logit).

    Source: DeepSeek-V3, arXiv 2412.19437, equations 12 to 15, without its bias (`LossFreeTopK` has
    it). Guarantees: as top-K, see `TokenChoice`; affinities do not compete, so one expert's logit
    changes no other's weight but through renormalisation. Load balance is not guaranteed, hence the
    auxiliary loss, over affinities scaled to sum 1. Allowed everywhere.

    Attributes:
      num_selected_experts: K.
      renormalize: scale the affinities of the experts that process a token to sum 1, after drops
        (DeepSeek-V3: on).
      weight_scale: factor on the weights after that (DeepSeek-V3: 2.5, beside a shared expert).
    """

    num_selected_experts: checks.Size = 2
    renormalize: bool = True
    weight_scale: checks.Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight_scale > 0:
            raise ValueError(f"weight_scale must be above 0, got {self.weight_scale}")

    @property
    def selected(self) -> int:
        return self.num_selected_experts

    @property
    def normalizes_granted(self) -> bool:
        return self.renormalize

    @property
    def granted_total(self) -> float:
        return self.weight_scale

    @property
    def follows_copies(self) -> bool:
        return self.renormalize

    def renormalized(self) -> "SigmoidTopK":
        return dataclasses.replace(self, renormalize=True, weight_scale=1.0)

    @property
    def unit_weights(self) -> bool:
        return self.renormalize and self.weight_scale == 1.0

    def choose(self, group: Group) -> TopK:
        affinity = jax.nn.sigmoid(group.logits)
        gate, expert = jax.lax.top_k(affinity, self.selected)
        return TopK(
            expert=expert, gate=gate * self.weight_scale, probabilities=_scaled_to_one(group.logits)
        )


@dataclasses.dataclass(frozen=True)
class LossFreeTopK(TokenChoice):
    """Top-K whose load a bias balances: it is added to the scores for choosing experts, and to
    nothing else.

    Source: Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv
    2412.19437. After every step the bias of each expert moves by `update_rate`: up where it was
    chosen less often than the mean of that step's whole batch (all microbatches, all devices), down
    where more often. It is a parameter `router/bias` that no gradient reaches; checkpoints hold it,
    and an upcycled checkpoint starts with zeros. Guarantees: as top-K, see `TokenChoice`; the
    auxiliary loss is 0; balance over many steps, not within one. Allowed everywhere: the bias is
    fixed while a batch is routed, so no token feels a later one of its own batch.

    Attributes:
      num_selected_experts: K.
      scores: 'sigmoid' (DeepSeek-V3) or 'softmax' of the logits over all experts.
      renormalize: scale the scores of the experts that process a token to sum 1, after drops.
      update_rate: how far a bias moves in a step (the paper: 0.001 for sigmoid gates); 0 freezes
        it.
    """

    num_selected_experts: checks.Size = 2
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalize: bool = True
    update_rate: checks.NotNegative = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores not in ("sigmoid", "softmax"):
            raise ValueError(f"scores must be 'sigmoid' or 'softmax', got {self.scores!r}")
        if not self.update_rate >= 0:
            raise ValueError(f"update_rate must be at least 0, got {self.update_rate}")

    @property
    def selected(self) -> int:
        return self.num_selected_experts

    @property
    def balance_rate(self) -> float | None:
        return self.update_rate

    @property
    def normalizes_granted(self) -> bool:
        return self.renormalize

    @property
    def follows_copies(self) -> bool:
        # Divided softmax scores would weigh differently against the bias.
        return self.renormalize and self.scores == "sigmoid"

    def choose(self, group: Group) -> TopK:
        softmax = self.scores == "softmax"
        score = jax.nn.softmax(group.logits, axis=-1) if softmax else jax.nn.sigmoid(group.logits)
        bias = jnp.zeros(group.num_experts, jnp.float32) if group.bias is None else group.bias
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(score + bias), self.selected)
        gate = jnp.take_along_axis(score, expert, axis=-1)
        return TopK(
            expert=expert,
            gate=gate,
            probabilities=score if softmax else _scaled_to_one(group.logits),
        )

    @property
    def has_balance_loss(self) -> bool:
        return False

    def balance_loss(self, group: Group, top: TopK) -> jax.Array:
        return jnp.zeros((), jnp.float32)


def _scaled_to_one(logits: jax.Array) -> jax.Array:
    """sigmoid(logits) over its sum, by logarithms: far below 0 every affinity underflows."""
    return jax.nn.softmax(jax.nn.log_sigmoid(logits), axis=-1)
