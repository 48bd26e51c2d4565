"""Moving tokens to experts and back, by index: no array of size S x E x C ever exists.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K experts per token.
Everything here works on ONE group; the layer maps it over G.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Assignment:
    """Which token sits in which slot of which expert, for one group.

    Attributes:
      token_index: int32 `[E, C]`, in `[0, S]`; S marks an empty slot. A token appears at most once per expert.
      combine_weight: float32 `[E, C]`, the factor on that expert's output for that token; 0 in empty slots.
    """

    token_index: jax.Array
    combine_weight: jax.Array

    def filled(self, group_size: int) -> jax.Array:
        """Bool `[E, C]`: slots that hold a token."""
        return self.token_index < group_size

    def weight_per_token(self, group_size: int) -> jax.Array:
        """Float32 `[S]`: each token's combine weights, summed over the experts that process it."""
        return jnp.zeros(group_size, jnp.float32).at[self.token_index].add(self.combine_weight, mode="drop")

    def experts_per_token(self, group_size: int) -> jax.Array:
        """Int32 `[S]`: how many experts process each token."""
        return jnp.zeros(group_size, jnp.int32).at[self.token_index].add(1, mode="drop")


def renormalized(assignment: Assignment, *, group_size: int) -> Assignment:
    """Scales combine weights so that each token's sum to 1 over the experts that do process it.

    A token that no expert took keeps 0. Source: Sparse Upcycling, section 3.1 (on for its vision models, off for language).
    """
    total = assignment.weight_per_token(group_size)
    # A token whose every weight underflowed to 0 must give 0, not NaN.
    scale = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    per_slot = scale.at[assignment.token_index].get(mode="fill", fill_value=0.0)
    return Assignment(token_index=assignment.token_index, combine_weight=assignment.combine_weight * per_slot)


def dispatch(tokens: jax.Array, assignment: Assignment) -> jax.Array:
    """Gathers `[S, d]` into `[E, C, d]`; empty slots are zero."""
    return tokens.at[assignment.token_index].get(mode="fill", fill_value=0)


def combine(expert_outputs: jax.Array, assignment: Assignment, *, group_size: int) -> jax.Array:
    """Adds `[E, C, d]`, scaled by the combine weights, back to float32 `[S, d]`; tokens without an expert get zero."""
    weighted = expert_outputs.astype(jnp.float32) * assignment.combine_weight[..., None]
    return jnp.zeros((group_size, expert_outputs.shape[-1]), jnp.float32).at[assignment.token_index].add(weighted, mode="drop")
