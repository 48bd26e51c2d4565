"""One update as a pure function: state and batch in, state and metrics out."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import axes, partitioning, trees
from upcycle_jax.models import expert_metrics, layer_names
from upcycle_jax.models.base import Model, balance_rates
from upcycle_jax.models.metrics import Mean, Metrics, merge
from upcycle_jax.models.shared import NON_FINITE_LOGITS
from upcycle_jax.moe import balance
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.parameter_groups import settings_of, with_stopped_gradients
from upcycle_jax.training.train_state import TrainState, from_state_dict
from upcycle_jax.training.trainer import NonFinite, Trainer
from upcycle_jax.trees import LeafSpec, Role
from upcycle_jax.types import Array, Batch, PyTree


@flax.struct.dataclass
class StepOutput:
    """What a step reports besides the new state.

    Attributes:
      metrics: sums to be merged over steps.
      loss: the optimised loss, float32 scalar.
      grad_norm: global norm of the gradients, float32 scalar.
      bad_logits: by MoE layer, in order, how many router logits are NaN or infinite, float32
        scalars.
    """

    metrics: Metrics
    loss: jax.Array
    grad_norm: jax.Array
    bad_logits: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


TrainStep = Callable[..., tuple[TrainState, StepOutput]]
"""State, batch, and (float32 scalar, may be left out) the loss above which the update is
skipped.
"""


def make_train_step(model: Model, trainer: Trainer, *, seed: int) -> TrainStep:
    """The train step of a model; trace it inside `Partitioner.activate`.

    Dropout draws from `fold_in(fold_in(key(seed), step), microbatch)`: a run that resumes at a step
    draws what the uninterrupted run drew.

    Args:
      model: the model.
      trainer: optimizer, schedule, microbatches.
      seed: the run's random seed.
    """
    param_specs = model.param_specs()

    def train_step(
        state: TrainState, batch: Batch, loss_limit: jax.Array | None = None
    ) -> tuple[TrainState, StepOutput]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads, metrics = _loss_and_grads(
            model, trainer, state.params, batch, key, param_specs
        )
        learning_rate = trainer.learning_rate_fn(state.step)
        grad_norm = global_norm(grads)
        update = trainer.optimizer.apply(
            state.params,
            _clipped(trainer, param_specs, grads, grad_norm, state.step),
            state.param_states,
            param_specs=param_specs,
            step=state.step,
            learning_rate=learning_rate,
            groups=trainer.parameter_groups,
        )
        params = _balanced(model, trainer, param_specs, update.params, state, metrics)
        new_state = TrainState(step=state.step + 1, params=params, param_states=update.param_states)
        bad_logits = {
            name.removeprefix(NON_FINITE_LOGITS): metrics.pop(name).total
            for name in list(metrics)
            if name.startswith(NON_FINITE_LOGITS)
        }
        metrics = metrics | expert_metrics.dead_experts(metrics)
        one = jnp.ones((), jnp.float32)
        metrics = metrics | {"grad_norm": Mean(grad_norm, one)}
        applies = None
        if trainer.non_finite == NonFinite.SKIP:
            applies = (
                jnp.isfinite(loss)
                & jnp.isfinite(grad_norm)
                & (sum(bad_logits.values(), jnp.float32(0)) == 0)
            )
        if loss_limit is not None:
            within = ~(loss > loss_limit)  # a loss that is no number is the other policy's
            applies = within if applies is None else applies & within
        if applies is not None:
            new_state = _where(
                applies, new_state, TrainState(state.step + 1, state.params, state.param_states)
            )
            metrics = _where(applies, metrics, jax.tree.map(jnp.zeros_like, metrics))
        metrics = metrics | {"learning_rate": Mean(learning_rate, one)}
        return new_state, StepOutput(
            metrics=metrics, loss=loss, grad_norm=grad_norm, bad_logits=bad_logits
        )

    return train_step


def _clipped(
    trainer: Trainer,
    param_specs: Mapping[str, LeafSpec],
    grads: PyTree,
    grad_norm: jax.Array,
    step: jax.Array,
) -> PyTree:
    """The gradients, scaled down where their norm is above `Trainer.max_gradient_norm`. Those of
    parameters that are frozen at this step do not count.
    """
    limit = trainer.max_gradient_norm
    if limit is None:
        return grads
    if any(group.frozen for group in trainer.parameter_groups):
        flat = trees.flatten(grads)
        for path, grad in flat.items():
            settings = settings_of(path, param_specs[path], trainer.parameter_groups)
            flat[path] = settings.held(jnp.zeros_like(grad), grad, step)
        grad_norm = global_norm(flat)
    scale = limit / jnp.maximum(grad_norm, limit)
    return jax.tree.map(lambda grad: grad * scale, grads)


def _balanced(
    model: Model,
    trainer: Trainer,
    param_specs: Mapping[str, LeafSpec],
    params: PyTree,
    before: TrainState,
    metrics: Metrics,
) -> PyTree:
    """The parameters after the optimizer, with the biases that balance routers moved by the load of
    the whole batch, but those that are frozen.
    """
    rates = balance_rates(model.stacks)
    if not rates:
        return params
    chosen = expert_metrics.chosen_counts(metrics)
    biases = {
        place.layer: path
        for path, spec in param_specs.items()
        if spec.role is Role.ROUTER_BIAS and (place := layer_names.split(path)) is not None
    }
    old = trees.flatten(before.params)
    moved = balance.with_moved_biases(trees.flatten(params), old, chosen, rates, biases)
    for path in biases.values():
        settings = settings_of(path, param_specs[path], trainer.parameter_groups)
        moved[path] = settings.held(old[path], moved[path], before.step)
    return trees.unflatten(moved)


def jitted_train_step(
    model: Model,
    trainer: Trainer,
    *,
    partitioner: Partitioner,
    shardings: Mapping[str, jax.sharding.NamedSharding],
    seed: int,
) -> Any:
    """The train step as it runs: jitted, the state donated and laid out as `shardings` (by full
    path), what it reports replicated.

    Call or lower it inside `Partitioner.activate`.
    """
    step = make_train_step(model, trainer, seed=seed)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(from_state_dict(shardings), partitioner.replicated)
    )


def global_norm(tree: PyTree) -> jax.Array:
    """The 2-norm of all leaves together, float32 scalar."""
    leaves = jax.tree.leaves(tree)
    if partitioning.active_platform() == "cpu":
        # XLA for CPUs would share the squares with the optimizer's, and write them to memory for
        # that.
        leaves = [jax.lax.optimization_barrier(leaf) for leaf in leaves]
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def split_batch(batch: Batch, num_microbatches: int) -> dict[str, jax.Array]:
    """Features `[batch, ...]` -> `[num_microbatches, batch / num_microbatches, ...]`, every
    microbatch split over all data shards.

    Microbatches are consecutive rows: token groups that fit into a microbatch hold the same tokens
    as without microbatches. Moving rows between devices for that costs a few integers per token.
    """

    def split(feature: Array) -> jax.Array:
        parts = jnp.reshape(
            feature, (num_microbatches, feature.shape[0] // num_microbatches, *feature.shape[1:])
        )
        return partitioning.constrain(parts, (None, axes.BATCH) + (None,) * (parts.ndim - 2))

    return {name: split(feature) for name, feature in batch.items()}


def _loss_and_grads(
    model: Model,
    trainer: Trainer,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    param_specs: Mapping[str, LeafSpec],
) -> tuple[jax.Array, PyTree, Metrics]:
    """Loss, float32 gradients and metrics of the whole batch.

    The denominator of the loss is taken over the whole batch and auxiliary losses, which are means,
    are weighted by the share of each microbatch: the sums over microbatches are then the values
    without them.
    """
    num_microbatches = trainer.num_microbatches or 1
    denominator = model.loss_denominator(batch)

    def loss_fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[jax.Array, Metrics]:
        trained = with_stopped_gradients(params, param_specs, trainer.parameter_groups)
        return model.loss_fn(trained, *args, **kwargs)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def one_part(part: Batch, index: jax.Array | int) -> tuple[jax.Array, PyTree, Metrics]:
        dropout_rng = jax.random.fold_in(key, index)
        (loss, metrics), grads = grad_fn(
            params, part, dropout_rng, denominator=denominator, aux_scale=1.0 / num_microbatches
        )
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

    if num_microbatches == 1:
        return one_part(batch, 0)

    def constrained(grads: PyTree) -> PyTree:
        flat = {
            path: partitioning.constrain(grad, param_specs[path].axes)
            for path, grad in trees.flatten(grads).items()
        }
        return trees.unflatten(flat)

    def add_part(
        total: tuple[jax.Array, PyTree, Metrics], x: tuple[Batch, jax.Array]
    ) -> tuple[Any, None]:
        loss, grads, metrics = one_part(*x)
        return (
            total[0] + loss,
            constrained(jax.tree.map(jnp.add, total[1], grads)),
            merge(total[2], metrics),
        ), None

    parts = split_batch(batch, num_microbatches)
    shapes = jax.eval_shape(one_part, {name: part[0] for name, part in parts.items()}, 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add_part, zeros, (parts, jnp.arange(num_microbatches)))
    return total


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
