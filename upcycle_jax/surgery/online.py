"""Performs a plan online: into sharded device arrays, while a run restores."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from upcycle_jax.surgery.leaf_values import RowValues
from upcycle_jax.surgery.operations import Copy, Movement, Shape
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.plan import Plan, Row
from upcycle_jax.trees import LeafSpec


def apply_online(
    plan: Plan, reader: Reader, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """Makes every target leaf on the devices.

    A dense leaf is read once, each process reading only its shards (split over the axes that the
    target splits beside the expert axis); the program that tiles it has the target's sharding, so
    each device makes only its own experts. What is drawn or averaged is made on the host, one
    expert's slab at a time and only the experts that this process holds, by the same code as
    offline.

    Args:
      plan: what to do.
      reader: the source.
      shardings: sharding of every target leaf, by full path.

    Returns:
      Full path -> array with the sharding given.

    Raises:
      ValueError: a leaf of the plan has no sharding.
    """
    lacking = sorted(row.target for row in plan.rows if row.target not in shardings)
    if lacking:
        raise ValueError(
            f"{len(lacking)} leaves of the plan have no sharding, e.g. {lacking[0]}: give one per"
            " target leaf"
        )
    return {
        row.target: _online_leaf(row, reader, plan.recipe.seed, shardings[row.target])
        for row in plan.rows
    }


def _online_leaf(row: Row, reader: Reader, seed: int, sharding: Sharding) -> jax.Array:
    """Makes one leaf: read as it is, moved on the devices, or made on the host."""
    if isinstance(row.operation, Copy) and not row.casts:
        return reader.read_sharded(row.sources[0], sharding)
    if isinstance(row.operation, Movement) and row.moves_values:
        sources = [
            reader.read_sharded(name, source_sharding(row, spec, sharding))
            for name, spec in zip(row.sources, row.source_specs, strict=True)
        ]
        return movement(row.operation, row.spec.shape, row.spec.dtype, sharding)(sources)
    return _from_host(row, RowValues(row, reader, seed), sharding)


@functools.lru_cache(maxsize=256)
def movement(
    operation: Movement, shape: Shape, dtype: np.dtype, sharding: Sharding
) -> Callable[..., jax.Array]:
    """The compiled program that moves source values to where the target's sharding wants them."""
    return jax.jit(
        lambda sources: operation.move(sources, shape).astype(dtype), out_shardings=sharding
    )


def _from_host(row: Row, values: RowValues, sharding: Sharding) -> jax.Array:
    """Makes a leaf slab by slab on the host and puts every slab on the devices that hold it, so
    that the host never holds two.
    """
    shape = row.spec.shape
    places: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        places.setdefault(bounds, []).append(device)
    if not row.operation.stacked:
        made = {bounds: values.region(tuple(slice(*b) for b in bounds)) for bounds in places}
        shards = [
            jax.device_put(made[bounds], device)
            for bounds, devices in places.items()
            for device in devices
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)
    slabs: dict[jax.Device, list[jax.Array]] = {}
    wanted = [
        ((slice(e, e + 1), *(slice(*b) for b in bounds[1:])), devices)
        for bounds, devices in places.items()
        for e in range(*bounds[0])
    ]
    if (
        values.whole_slabs
    ):  # One slab serves all of its parts; otherwise one part of the source serves all experts.
        wanted.sort(key=lambda item: item[0][0].start)
    for region, devices in wanted:
        slab = values.region(region)
        for device in devices:
            slabs.setdefault(device, []).append(jax.device_put(slab, device))
    shards = []
    for device in list(slabs):
        parts = slabs.pop(device)
        shards.append(jax.numpy.concatenate(parts) if len(parts) > 1 else parts[0])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def source_sharding(row: Row, source: LeafSpec, sharding: Sharding) -> Sharding:
    """How a source leaf is split while its target is made: as the target is along the axes they
    share, whole along the others.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = tuple(sharding.spec) + (None,) * (len(row.spec.shape) - len(sharding.spec))
    if row.operation.stacked:
        entries = entries[1:]
    entries = (None,) * (len(source.shape) - len(entries)) + entries
    fitting = []
    for length, entry in zip(source.shape, entries, strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts = int(np.prod([sharding.mesh.shape[name] for name in names], dtype=np.int64))
        fitting.append(entry if length % parts == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*fitting))
