"""Performs a plan: online into sharded device arrays, offline into a checkpoint on disk. Both give the same bits."""

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

import upcycle_jax
from upcycle_jax.checkpoints import create_checkpoint
from upcycle_jax.surgery.operations import Copy, Operation, Shape, Zeros
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.surgery.sources import Reader
from upcycle_jax.surgery.table import STEP, Plan, Row, size
from upcycle_jax.surgery.values import RowValues
from upcycle_jax.trees import LeafSpec

DEFAULT_MAX_MEMORY = 2 << 30

Progress = Callable[[str], None]


def apply_online(plan: Plan, reader: Reader, shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Makes every target leaf on the devices.

    A dense leaf is read once, each process reading only its shards (split over the axes that the target splits beside the expert axis);
    the program that tiles it has the target's sharding, so each device makes only its own experts. What is drawn or averaged is made on the
    host, one expert's slab at a time and only the experts that this process holds, by the same code as offline.

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
        raise ValueError(f"{len(lacking)} leaves of the plan have no sharding, e.g. {lacking[0]}: give one per target leaf")
    return {row.target: _online_leaf(row, reader, plan.recipe.seed, shardings[row.target]) for row in plan.rows}


def _online_leaf(row: Row, reader: Reader, seed: int, sharding: Sharding) -> jax.Array:
    if isinstance(row.operation, Copy) and not row.casts:
        return reader.read_sharded(row.sources[0], sharding)
    if row.moves_values:
        sources = [
            reader.read_sharded(name, source_sharding(row, spec, sharding))
            for name, spec in zip(row.sources, row.source_specs, strict=True)
        ]
        return _movement(row.operation, row.spec.shape, row.spec.dtype, sharding)(sources)
    return _from_host(row, RowValues(row, reader, seed), sharding)


@functools.lru_cache(maxsize=256)
def _movement(operation: Operation, shape: Shape, dtype: np.dtype, sharding: Sharding):
    """The compiled program that moves source values to where the target's sharding wants them."""
    return jax.jit(lambda sources: operation.move(sources, {}, shape).astype(dtype), out_shardings=sharding)


def _from_host(row: Row, values: RowValues, sharding: Sharding) -> jax.Array:
    """Makes a leaf slab by slab on the host and puts every slab on the devices that hold it, so that the host never holds two."""
    shape = row.spec.shape
    places: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        places.setdefault(bounds, []).append(device)
    if not row.operation.stacked:
        made = {bounds: values.region(tuple(slice(*b) for b in bounds)) for bounds in places}
        shards = [jax.device_put(made[bounds], device) for bounds, devices in places.items() for device in devices]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)
    slabs: dict[jax.Device, list[jax.Array]] = {}
    wanted = [
        ((slice(e, e + 1), *(slice(*b) for b in bounds[1:])), devices) for bounds, devices in places.items() for e in range(*bounds[0])
    ]
    if values.whole_slabs:  # One slab serves all of its parts; otherwise one part of the source serves all experts.
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
    """How a source leaf is split while its target is made: as the target is along the axes they share, whole along the others."""
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


def result_step(plan: Plan, reader: Reader) -> int:
    """The training step of the result."""
    for row in plan.rows:
        if row.target == STEP:
            return int(RowValues(row, reader, plan.recipe.seed).region(()))
    return 0 if plan.recipe.step == "reset" else plan.recipe.step if isinstance(plan.recipe.step, int) else reader.step


def record(plan: Plan, reader: Reader) -> dict[str, Any]:
    """What a converted checkpoint says about its making: recipe, seed, source and versions. The same call gives the same record."""
    return {
        "surgery": {
            "recipe": to_json(plan.recipe),
            "seed": plan.recipe.seed,
            "source": str(getattr(reader, "path", "")),
            "source_format": str(getattr(reader, "format", "")),
            "source_step": int(reader.step),
            "source_fingerprint": reader.fingerprint(),
            "versions": {
                "upcycle_jax": upcycle_jax.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
    }


def apply_offline(
    plan: Plan,
    reader: Reader,
    output_path: os.PathLike | str,
    *,
    max_memory: int = DEFAULT_MAX_MEMORY,
    compress: bool = True,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """Writes the plan's result as a checkpoint, leaf by leaf, chunk by chunk.

    Nothing stands at `output_path` before everything is written; a call that was killed is finished by the same call, and what it had
    written already is not written again.

    Args:
      plan: what to do.
      reader: the source; it is only read.
      output_path: folder of the new checkpoint, e.g. `MODEL_DIR/checkpoint_1000`.
      max_memory: bytes of arrays to hold at a time. The floor is a few times the largest matrix where random numbers are drawn, and a few
        stored chunks elsewhere.
      compress: store chunks with zstd (as Orbax does) or raw.
      metadata: further entries for the checkpoint's record.
      progress: called with a line of text about every second.

    Returns:
      The path of the checkpoint.

    Raises:
      FileExistsError: there is something at `output_path`.
      ValueError: a partial checkpoint of another plan lies there; `max_memory` is too small to work with.
      OSError: the disk is full or cannot be written. What was written is kept for the next call.
    """
    if max_memory < 16 << 20:
        raise ValueError(f"max_memory {max_memory} is less than 16 MiB: chunks could not be held; raise it")
    chunk_bytes = min(64 << 20, max_memory // 16)
    writer = create_checkpoint(
        output_path,
        plan.specs(),
        step=result_step(plan, reader),
        metadata={**record(plan, reader), **(metadata or {})},
        chunk_bytes=chunk_bytes,
        pending_bytes=max_memory // 8,
        compress=compress,
    )
    try:
        meter = _Meter(plan.bytes_written, progress)
        for row in plan.rows:
            if row.target != STEP:  # The writer stores the step itself.
                _offline_leaf(row, reader, plan.recipe.seed, writer, meter)
        meter.finish()
        return str(writer.finalize())
    finally:
        writer.close()


def _offline_leaf(row: Row, reader: Reader, seed: int, writer, meter: "_Meter") -> None:
    values = RowValues(row, reader, seed)
    for region in values.order(list(writer.pieces(row.target))):
        nbytes = int(np.prod([s.stop - s.start for s in region], dtype=np.int64)) * row.spec.dtype.itemsize
        if not writer.is_written(row.target, region):
            if isinstance(row.operation, Zeros):
                writer.write(row.target, region, np.zeros([s.stop - s.start for s in region], row.spec.dtype))
            else:
                writer.write(row.target, region, values.region(region))
        meter.add(nbytes, row.target)


class _Meter:
    """Says about every second how far the conversion is."""

    def __init__(self, total: int, progress: Progress | None):
        self.total, self.progress, self.done = max(total, 1), progress, 0
        self.begun = self.said = time.monotonic()

    def add(self, count: int, name: str) -> None:
        self.done += count
        now = time.monotonic()
        if self.progress is not None and now - self.said >= 1:
            self.said = now
            rate = self.done / max(now - self.begun, 1e-9)
            left = (self.total - self.done) / max(rate, 1)
            self.progress(
                f"{100 * self.done / self.total:5.1f}%  {size(self.done)} of {size(self.total)}, {size(rate)}/s, {left:.0f} s left: {name}"
            )

    def finish(self) -> None:
        if self.progress is not None:
            self.progress(f"written {size(self.done)} in {time.monotonic() - self.begun:.1f} s; finishing")
