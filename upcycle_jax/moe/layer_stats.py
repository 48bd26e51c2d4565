"""Statistics of an MoE layer for a batch, for losses and metrics."""

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.moe.routing import Group, Routing

LAYER_STATS = "layer_stats"
"""The variable collection in which every MoE layer leaves its `LayerStats` (one per call, under the
name `stats`).
"""

_LOSSES = ("auxiliary_loss", "router_z_loss", "importance_loss", "load_loss")
"""Fields of `LayerStats` that are means over groups."""


@flax.struct.dataclass
class LayerStats:
    """What one MoE layer did with one batch. Float32 scalars unless stated; sums, so that they can
    be added up.

    Only real tokens count, except in T5X mode, where padding counts too.

    Attributes:
      auxiliary_loss: load-balancing loss, the mean over the groups that hold a counted token.
      router_z_loss: likewise.
      importance_loss: likewise; None where nobody asks for it.
      load_loss: likewise.
      tokens: counted tokens.
      left_behind: counted tokens that no expert processed.
      capacity: slots of all experts and groups.
      load: `[E]`, counted tokens that each expert processed.
      chosen: `[E]`, counted tokens that asked for each expert, before any drop.
      weight: combine weights of the counted tokens, summed.
      entropy: entropy of the router probabilities (nats), summed over counted tokens.
      probability: `[E]`, router probabilities summed over counted tokens: what the router prefers,
        where `load` is what capacity let it have.
      offered: placements asked for (`Routing`).
      dropped: placements not granted (`Routing`).
      non_finite: router logits that are NaN or infinite, of all tokens.
    """

    auxiliary_loss: jax.Array
    router_z_loss: jax.Array
    importance_loss: jax.Array | None
    load_loss: jax.Array | None
    tokens: jax.Array
    left_behind: jax.Array
    capacity: jax.Array
    load: jax.Array
    chosen: jax.Array
    weight: jax.Array
    entropy: jax.Array
    probability: jax.Array
    offered: jax.Array
    dropped: jax.Array
    non_finite: jax.Array


@flax.struct.dataclass
class LogitLosses:
    """Losses of one group that follow from the router's logits alone, float32 scalars; see
    `LayerStats`.
    """

    router_z_loss: jax.Array
    importance_loss: jax.Array | None
    load_loss: jax.Array | None


def of_group(routing: Routing, group: Group, losses: LogitLosses, *, rows: int) -> LayerStats:
    """The statistics of one group, whose experts compute `rows` vectors."""
    group_size, counted = group.counted.size, group.counted
    experts_per_token = routing.dispatcher.experts_per_token(group_size)
    entropy = jnp.sum(jax.scipy.special.entr(routing.probabilities), axis=-1)
    return LayerStats(
        auxiliary_loss=routing.auxiliary_loss,
        router_z_loss=losses.router_z_loss,
        importance_loss=losses.importance_loss,
        load_loss=losses.load_loss,
        tokens=jnp.sum(counted),
        left_behind=jnp.sum(counted * (experts_per_token == 0)),
        capacity=jnp.float32(rows),
        load=routing.dispatcher.load(counted),
        chosen=routing.chosen,
        weight=jnp.sum(routing.dispatcher.weight_per_token(group_size) * counted),
        entropy=jnp.sum(entropy * counted),
        probability=jnp.sum(routing.probabilities * counted[:, None], axis=0),
        offered=routing.offered,
        dropped=routing.dropped,
        non_finite=jnp.sum(~jnp.isfinite(group.logits), dtype=jnp.float32),
    )


def over_groups(stats: LayerStats, *, every_group: bool) -> LayerStats:
    """The layer's statistics from those of its groups `[G, ...]`: losses are averaged, the rest is
    summed.

    A group of nothing but padding has no loss to average, unless padding counts (`every_group`).
    """
    weight = jnp.ones_like(stats.tokens) if every_group else (stats.tokens > 0).astype(jnp.float32)
    num_groups = jnp.maximum(jnp.sum(weight), 1.0)
    summed = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stats)
    return summed.replace(
        **{
            name: jnp.sum(loss * weight) / num_groups
            for name in _LOSSES
            if (loss := getattr(stats, name)) is not None
        }
    )
