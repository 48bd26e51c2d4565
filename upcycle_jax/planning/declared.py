"""Which collectives a step is expected to have. Whatever else a compiled program sends was put
there by the compiler, to move arrays that are divided otherwise than they are used.

* Experts' tokens and gradients: all-to-alls among the devices of the expert axis.
* Sums of gradients, losses and metrics: reductions among devices along any axes of the mesh.
* With FSDP: gathers of parameters along the data axis; and, as the columns of the embedding are
  divided, all-to-alls and permutations of its rows.
* With a model axis: gathers and permutations along it, around the products that it divides.
"""

import itertools
import math
from collections.abc import Iterable

from upcycle_jax.partitioning import DATA, EXPERT, MODEL
from upcycle_jax.planning.collectives import Traffic
from upcycle_jax.planning.compilation import Workload

_EXCHANGES = ("all-to-all", "ragged-all-to-all")
_SUMS = ("all-reduce", "reduce-scatter")


def undeclared(workload: Workload, traffic: Iterable[Traffic]) -> list[Traffic]:
    """The collectives of a step that are none of the above."""
    return [item for item in traffic if not _is_declared(workload, item)]


def _is_declared(workload: Workload, item: Traffic) -> bool:
    partitioner = workload.partitioner
    sizes = partitioner.mesh.shape
    group = item.group_size or partitioner.mesh.size  # 0: all devices
    if item.kind in _SUMS:
        return group in {
            math.prod(sizes[axis] for axis in some)
            for count in range(1, 4)
            for some in itertools.combinations((DATA, EXPERT, MODEL), count)
        }
    divided = partitioner.fsdp or sizes[MODEL] > 1
    if item.kind in _EXCHANGES:
        has_experts = workload.model.config.moe is not None
        return (has_experts and group == sizes[EXPERT]) or partitioner.fsdp
    if item.kind == "all-gather":
        return (partitioner.fsdp and group == sizes[DATA]) or (
            sizes[MODEL] > 1 and group == sizes[MODEL]
        )
    return divided and item.kind == "collective-permute"
