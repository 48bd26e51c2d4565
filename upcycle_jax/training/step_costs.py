"""What a step of a run costs: the model's loss and gradient, and the optimizer's update."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from upcycle_jax import trees
from upcycle_jax.costs import step
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.costs.step import StepCosts
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.parameter_groups import trained
from upcycle_jax.training.train_step import global_norm
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import PyTree


def step_costs(
    model: Model,
    trainer: Trainer,
    partitioner: Partitioner,
    *,
    batch_size: int,
    lengths: Mapping[str, int],
    packed: bool = False,
    tile: tuple[int, int] | None = None,
) -> StepCosts:
    """Counts a step; `StepCosts.device_flops` includes the update.

    Raises:
      ValueError: the tokens do not divide into routing groups.
    """
    shape = StepShape(
        batch_size=batch_size,
        lengths=lengths,
        packed=packed,
        num_microbatches=trainer.num_microbatches or 1,
    )
    found = step.of_step(model, shape, partitioner, tile=tile)
    update = _update_flops(model, trainer, partitioner)
    return dataclasses.replace(found, device_flops=found.device_flops + update)


def _update_flops(model: Model, trainer: Trainer, partitioner: Partitioner) -> float:
    """FLOPs of the update of the parameters and of the norm of their gradient on one device; what
    is never trained is not updated.

    Parameters of one kind, of which a deep model has many, cost the same: one of each is traced.
    """
    specs, optimizer = model.param_specs(), trainer.optimizer
    alike = collections.defaultdict(list)
    for path, spec in trained(specs, trainer.parameter_groups).items():
        alike[spec.shape, spec.dtype, spec.axes, spec.role].append(path)

    def update_flops(param_specs: Mapping[str, LeafSpec]) -> float:
        def update(params: PyTree, grads: PyTree, slots: PyTree) -> Any:
            params, grads, slots = (trees.unflatten(flat) for flat in (params, grads, slots))
            new = optimizer.apply(
                params,
                grads,
                slots,
                param_specs=param_specs,
                step=jnp.zeros((), jnp.int32),
                learning_rate=jnp.zeros((), jnp.float32),
            )
            return jax.tree.leaves((new.params, new.param_states))

        slots = optimizer.state_specs(param_specs)
        return step.device_flops(update, partitioner, param_specs, param_specs, slots)

    updates = sum(
        len(paths) * update_flops({paths[0]: specs[paths[0]]}) for paths in alike.values()
    )
    return updates + step.device_flops(global_norm, partitioner, specs)
