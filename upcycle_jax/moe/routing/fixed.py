"""Routing by token id, which nothing learns."""

import dataclasses

import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.moe.routing.base import Group, Router
from upcycle_jax.moe.routing.token_choice import TokenChoice, TopK


@dataclasses.dataclass(frozen=True)
class HashTop1(TokenChoice):
    """Each token takes the expert that a fixed hash of its id names, with weight 1.

    Source: Hash Layers, arXiv 2106.04426 (random hash). There is no router kernel and no router
    loss. Guarantees: the same word goes to the same expert in every layer of that seed;
    causal in a decoder, whose id is that of the input token, at every capacity. Load follows word
    frequencies: a frequent word fills its expert, and what exceeds the capacity is dropped, so give
    it room or set dropless. Not for models without token ids (images): MoE layers then refuse it.
    Not for merging experts by router weights: there are none.

    Attributes:
      seed: of the hash. Experts are chosen per vocabulary, so continue a model with the vocabulary
        and the seed that it was trained with.
    """

    seed: checks.Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("jitter_noise", "noise_std"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} has nothing to act on: a hash has no router"
                    " inputs. Leave it at 0"
                )

    @property
    def selected(self) -> int:
        return 1

    @property
    def needs_token_ids(self) -> bool:
        return True

    @property
    def unit_weights(self) -> bool:
        return True

    def renormalized(self) -> Router:
        return self

    def logit_columns(self, num_experts: int) -> int:
        return 0

    def choose(self, group: Group) -> TopK:
        assert group.token_ids is not None  # the layer refuses to route without them
        expert = hashed(group.token_ids, seed=self.seed, buckets=group.num_experts)
        return TopK(
            expert=expert[:, None],
            gate=jnp.ones((expert.size, 1), jnp.float32),
            probabilities=jax.nn.one_hot(expert, group.num_experts, dtype=jnp.float32),
        )

    @property
    def has_balance_loss(self) -> bool:
        return False

    def balance_loss(self, group: Group, top: TopK) -> jax.Array:
        return jnp.zeros((), jnp.float32)


def hashed(ids: jax.Array, *, seed: int, buckets: int) -> jax.Array:
    """Int32 in [0, buckets) for every int32 id: two rounds of xor-shift and multiply modulo 2^32,
    which mix every bit into every other.
    """
    x = ids.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x9E3779B9) % 2**32)
    for _ in range(2):
        x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
    return ((x ^ (x >> 16)) % jnp.uint32(buckets)).astype(jnp.int32)
