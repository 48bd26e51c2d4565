"""What MoE layers report, as metrics; `M` stands for the weight `aux_scale`, see `shared`.

experts/fraction_tokens_left_behind, experts/expert_usage, experts/router_confidence: averaged
  over MoE layers (M), as T5X does.
experts/effective_capacity_factor: vectors that experts compute per real token, over all MoE layers:
  what the capacity factor comes to after rounding. Of stacks that are all tokens, as images are;
  elsewhere it would tell how much of a batch is padding.
experts/<layer>/load: `[E]`, share of the processed tokens that each expert took.
experts/<layer>/router_probability: `[E]`, mean router probability of each expert over tokens.
experts/<layer>/entropy: of the router probabilities, in nats, per token.
experts/<layer>/dropped: share of the placements asked for that were not granted: token choices
  beyond capacity under tokens choose, tokens without any expert under experts choose.
experts/<layer>/dead: share of the experts that received no real token of the batch. Of train
  steps and evaluation batches.
experts/<layer>/chosen: `[E]`, as load, but before any drop. Where a bias balances the router.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from upcycle_jax.models.base import Stack, balance_rates
from upcycle_jax.models.metrics import Mean, Metrics
from upcycle_jax.moe.layer_stats import LayerStats


def layer_mean(values: Iterable[jax.Array]) -> jax.Array:
    """Mean over MoE layers."""
    return jnp.mean(jnp.stack(list(values)))


def scaled_mean(value: jax.Array, weight: jax.Array | float) -> Mean:
    """A value that counts `weight` times."""
    return Mean(total=value * weight, weight=jnp.float32(weight))


def of_reports(
    stacks: Mapping[str, Stack], reports: Mapping[str, LayerStats], aux_scale: jax.Array | float
) -> Metrics:
    """Metrics of a batch or a microbatch.

    Args:
      stacks: of the model.
      reports: of its MoE layers, by layer ('encoder/layers_1').
      aux_scale: the microbatch's share of the batch.
    """
    if not reports:
        return {}
    owners = {layer: stack for stack in stacks.values() for layer in stack.moe_layers}
    balanced = balance_rates(stacks)
    usage = [owners[layer].policy.expert_usage(report) for layer, report in reports.items()]
    behind = [report.left_behind / jnp.maximum(report.tokens, 1.0) for report in reports.values()]
    confidence = [
        report.weight / jnp.maximum(jnp.sum(report.load), 1.0) for report in reports.values()
    ]
    metrics = {
        "experts/fraction_tokens_left_behind": scaled_mean(layer_mean(behind), aux_scale),
        "experts/expert_usage": scaled_mean(layer_mean(usage), aux_scale),
        "experts/router_confidence": scaled_mean(layer_mean(confidence), aux_scale),
    }
    if all(stack.positions is not None for stack in owners.values()):
        metrics["experts/effective_capacity_factor"] = Mean(
            total=jnp.sum(jnp.stack([report.capacity for report in reports.values()])),
            weight=jnp.sum(jnp.stack([report.tokens for report in reports.values()])),
        )
    for layer, report in reports.items():
        metrics[f"experts/{layer}/load"] = Mean(total=report.load, weight=jnp.sum(report.load))
        metrics[f"experts/{layer}/router_probability"] = Mean(
            total=report.probability, weight=report.tokens
        )
        metrics[f"experts/{layer}/entropy"] = Mean(total=report.entropy, weight=report.tokens)
        metrics[f"experts/{layer}/dropped"] = Mean(total=report.dropped, weight=report.offered)
        if layer in balanced:
            metrics[f"experts/{layer}/chosen"] = Mean(
                total=report.chosen, weight=jnp.sum(report.chosen)
            )
    return metrics


def dead_experts(metrics: Metrics) -> Metrics:
    """`experts/<layer>/dead` of a whole batch: the share of experts whose load in these metrics is
    0.

    Shares of microbatches would not add up to it, so it is taken when they are merged.
    """
    loads = {
        name.removesuffix("load"): mean.total
        for name, mean in metrics.items()
        if _is_of_layer(name, "load")
    }
    return {
        f"{prefix}dead": scaled_mean(jnp.mean(load == 0, dtype=jnp.float32), 1.0)
        for prefix, load in loads.items()
    }


def chosen_counts(metrics: Metrics) -> dict[str, jax.Array]:
    """By layer, how many real tokens of the batch wanted each expert, `[E]`; of layers with a
    selection bias.
    """
    return {
        _layer(name): mean.total for name, mean in metrics.items() if _is_of_layer(name, "chosen")
    }


def _is_of_layer(name: str, metric: str) -> bool:
    return name.startswith("experts/") and name.endswith(f"/{metric}")


def _layer(name: str) -> str:
    return name.removeprefix("experts/").rpartition("/")[0]
