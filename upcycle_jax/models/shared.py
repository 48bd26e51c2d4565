"""What a family of models whose layers are stacks needs not write itself: specs of its parameters,
weights of its targets, its loss and its metrics.

Metrics, and what each is a mean over (`M` below stands for the weight `aux_scale`, so that
microbatches add up to the batch):

  loss: the optimised objective (M); in evaluation its value per target token.
  cross_ent_loss, z_loss, accuracy: per target token (weighted by the loss weights).
  target_tokens: the count of target tokens (M).
  experts/auxiliary_loss, experts/router_z_loss: with their factors, as they enter the loss (M).
  experts/importance_loss, experts/load_loss: likewise, where their factors are not 0.

`expert_metrics` adds those of single MoE layers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import trees
from upcycle_jax.models import expert_metrics
from upcycle_jax.models.base import Stack
from upcycle_jax.models.expert_metrics import layer_mean, scaled_mean
from upcycle_jax.models.losses import TokenLosses
from upcycle_jax.models.metrics import Mean, Metrics
from upcycle_jax.moe import losses, roles
from upcycle_jax.moe.layer_stats import LAYER_STATS, LayerStats
from upcycle_jax.types import Array, PyTree

NON_FINITE_LOGITS = "non_finite_router_logits/"
"""Before a layer ('encoder/layers_1'): the metric of `loss_fn` that counts router logits that are
NaN or infinite, for train steps.
"""

LossNormalizer = float | Literal["NUM_REAL_TARGET_TOKENS"] | None
"""What summed token losses are divided by: a number, the weights of the target tokens in the whole
batch, or None for the plain sum.
"""


def check_normalizer(value: LossNormalizer) -> None:
    """Raises a ValueError where a string is no `LossNormalizer`."""
    if isinstance(value, str) and value != "NUM_REAL_TARGET_TOKENS":
        raise ValueError(
            "loss_normalizing_factor must be None, a number or 'NUM_REAL_TARGET_TOKENS', got"
            f" {value!r}"
        )


def loss_denominator(normalizer: LossNormalizer, weights: jax.Array) -> jax.Array:
    """The float32 scalar that a `LossNormalizer` stands for, for a batch whose target tokens weigh
    float32 `weights`.
    """
    if normalizer is None:
        return jnp.float32(1.0)
    if normalizer == "NUM_REAL_TARGET_TOKENS":
        return jnp.maximum(jnp.sum(weights), 1.0)
    return jnp.float32(normalizer)


def loss_weights(targets: Array, weights: Array | None) -> jax.Array:
    """Float32 weights of int32 target tokens: where none are given, every real one counts 1."""
    return jnp.asarray(targets > 0 if weights is None else weights, jnp.float32)


def param_specs(boxed: PyTree, stacks: Mapping[str, Stack]) -> dict[str, trees.LeafSpec]:
    """Specs of parameters by path.

    Args:
      boxed: abstract parameters, nested, in boxes that name their logical axes.
      stacks: of the model; MoE layers are the `mlp` of their layer.
    """
    specs = {}
    for path, leaf in trees.flatten(boxed).items():
        value, names = (
            (leaf.value, leaf.names) if isinstance(leaf, nn.LogicallyPartitioned) else (leaf, ())
        )
        specs[path] = trees.LeafSpec(value.shape, value.dtype, names)
    layers = (layer for stack in stacks.values() for layer in stack.moe_layers)
    return roles.marked(specs, (f"{layer}/mlp" for layer in layers))


def moe_reports(variables: Any, stacks: Mapping[str, Stack]) -> dict[str, LayerStats]:
    """The report of every MoE layer by layer ('encoder/layers_1'), in order, out of the variables
    that an application of the model with `mutable=[LAYER_STATS]` returned.
    """
    return {
        stack.layer(i): variables[LAYER_STATS][stack.name][stack.layer_name(i)]["mlp"]["stats"]
        for stack in stacks.values()
        for i in stack.sparse_layers
    }


def training_loss(
    stacks: Mapping[str, Stack],
    tokens: TokenLosses,
    weights: jax.Array,
    reports: Mapping[str, LayerStats],
    *,
    denominator: jax.Array,
    aux_scale: jax.Array | float,
) -> tuple[jax.Array, Metrics]:
    """(cross entropy + z-loss) / denominator + aux_scale * auxiliary losses, and metrics.

    The auxiliary losses are aux_loss_factor * the load-balancing loss and router_z_loss_factor *
    the router z-loss, each averaged over all MoE layers of all stacks; experts-choose layers report
    a load-balancing loss of 0 and are part of that mean, as in T5X. `MoeSettings.aux_loss` may take
    all layers together instead. Those of V-MoE are added where their factors are not 0.

    Args:
      stacks: of the model.
      tokens: losses of the target tokens.
      weights: float32, of the same shape.
      reports: of the MoE layers.
      denominator: see `base.Model.loss_fn`.
      aux_scale: likewise.
    """
    token_loss = jnp.sum((tokens.cross_entropy + tokens.z_loss) * weights) / denominator
    auxiliary = _auxiliary_losses(stacks, reports)
    loss = token_loss + aux_scale * sum(auxiliary.values())
    metrics = _token_metrics(tokens, weights, aux_scale)
    metrics["loss"] = scaled_mean(loss / aux_scale, aux_scale)
    metrics |= {name: scaled_mean(value, aux_scale) for name, value in auxiliary.items()}
    metrics |= {
        f"{NON_FINITE_LOGITS}{layer}": Mean(report.non_finite, jnp.float32(aux_scale))
        for layer, report in reports.items()
    }
    return loss, metrics | expert_metrics.of_reports(stacks, reports, aux_scale)


def evaluation_metrics(
    stacks: Mapping[str, Stack],
    tokens: TokenLosses,
    weights: jax.Array,
    reports: Mapping[str, LayerStats],
) -> Metrics:
    """Metrics of an evaluation batch; `loss` is per target token, auxiliary losses included.
    Arguments as in `training_loss`.
    """
    num_tokens = jnp.sum(weights)
    auxiliary = _auxiliary_losses(stacks, reports)
    metrics = _token_metrics(tokens, weights, 1.0)
    summed = jnp.sum((tokens.cross_entropy + tokens.z_loss) * weights)
    metrics["loss"] = Mean(total=summed + sum(auxiliary.values()) * num_tokens, weight=num_tokens)
    metrics |= {name: scaled_mean(value, 1.0) for name, value in auxiliary.items()}
    metrics |= expert_metrics.of_reports(stacks, reports, 1.0)
    return metrics | expert_metrics.dead_experts(metrics)


def _auxiliary_losses(
    stacks: Mapping[str, Stack], reports: Mapping[str, LayerStats]
) -> dict[str, jax.Array]:
    moe = next((stack.moe for stack in stacks.values() if stack.moe is not None), None)
    if moe is None:
        return {}
    if moe.aux_loss == "joint":
        balance = losses.joint_load_balancing_loss(
            sum((r.chosen for r in reports.values()), start=jnp.zeros(())),
            sum((r.probability for r in reports.values()), start=jnp.zeros(())),
            sum((r.tokens for r in reports.values()), start=jnp.zeros(())),
        )
    else:
        balance = layer_mean(r.auxiliary_loss for r in reports.values())
    found = {
        "experts/auxiliary_loss": moe.aux_loss_factor * balance,
        "experts/router_z_loss": (
            moe.router_z_loss_factor * layer_mean(r.router_z_loss for r in reports.values())
        ),
    }
    if moe.importance_loss_factor > 0:
        importance = layer_mean(_given(r.importance_loss) for r in reports.values())
        found["experts/importance_loss"] = moe.importance_loss_factor * importance
    if moe.load_loss_factor > 0:
        load = layer_mean(_given(r.load_loss) for r in reports.values())
        found["experts/load_loss"] = moe.load_loss_factor * load
    return found


def _given(loss: jax.Array | None) -> jax.Array:
    """A loss that the settings ask for, which layers therefore report."""
    assert loss is not None
    return loss


def _token_metrics(
    tokens: TokenLosses, weights: jax.Array, aux_scale: jax.Array | float
) -> Metrics:
    num_tokens = jnp.sum(weights)
    return {
        "cross_ent_loss": Mean(total=jnp.sum(tokens.cross_entropy * weights), weight=num_tokens),
        "z_loss": Mean(total=jnp.sum(tokens.z_loss * weights), weight=num_tokens),
        "accuracy": Mean(total=jnp.sum(tokens.correct * weights), weight=num_tokens),
        "target_tokens": Mean(total=num_tokens, weight=jnp.float32(aux_scale)),
    }
