"""Numbers of a model's parameters, and bytes of sets of arrays on a mesh."""

import dataclasses
import math
from collections.abc import Mapping

from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec, Role


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
      total: all of them.
      experts: those of experts.
      routers: those of routers.
      active: those that process a token on average: all but the experts that do not. Under experts
        choose that is the capacity factor of experts per token, under tokens choose K.
    """

    total: int
    experts: int
    routers: int
    active: int


def count(model: Model, *, train: bool = True) -> ParameterCounts:
    """Counts the parameters of a model.

    Args:
      model: the model.
      train: active experts at the training capacity factor, or at that of evaluation.
    """
    specs = model.param_specs()
    inactive = 0.0
    for stack in model.stacks.values():
        if stack.moe is None or stack.router is None:
            continue
        factor = stack.moe.capacity_factor(train=train)
        share = min(stack.router.active_experts(factor) / stack.moe.num_experts, 1.0)
        inactive += (1.0 - share) * sum(
            leaf.size
            for path, leaf in specs.items()
            if leaf.role == Role.EXPERT and path.startswith(f"{stack.name}/")
        )
    total = sum(leaf.size for leaf in specs.values())
    return ParameterCounts(
        total=total,
        experts=sum(leaf.size for leaf in specs.values() if leaf.role == Role.EXPERT),
        routers=sum(leaf.size for leaf in specs.values() if leaf.role == Role.ROUTER),
        active=total - round(inactive),
    )


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of a set of arrays.

    Attributes:
      total: all arrays, once.
      per_device: what one device of the mesh holds.
    """

    total: int
    per_device: int


def nbytes(specs: Mapping[str, LeafSpec], partitioner: Partitioner) -> Bytes:
    """Bytes of parameters, or of optimizer state, in total and on each device of a mesh.

    Args:
      specs: arrays with their logical axes.
      partitioner: mesh and rules.

    Raises:
      ValueError: an array cannot be divided over the mesh; the message names it.
    """
    per_device = 0
    for path, sharding in partitioner.shardings(specs).items():
        shard = sharding.shard_shape(specs[path].shape)
        per_device += math.prod(shard) * specs[path].dtype.itemsize
    return Bytes(total=sum(leaf.nbytes for leaf in specs.values()), per_device=per_device)
