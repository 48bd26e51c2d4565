"""From host batches to global device arrays."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from upcycle_jax.partitioning import Partitioner
from upcycle_jax.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """Which rows of the global batch this process loads.

    Attributes:
      shard: index of this process's part.
      num_shards: number of parts. Fewer than processes where a model replica spans several: those
        then load the same rows.
    """

    shard: int
    num_shards: int


def data_layout(partitioner: Partitioner, batch_size: int) -> DataLayout:
    """The part of a global batch that this process's devices hold.

    Raises:
      ValueError: the batch does not divide over the data shards, or the mesh deals rows to
        processes in overlapping parts.
    """
    check_batch_size(batch_size, 1, partitioner)
    rows: dict[int, set[tuple[int, int]]] = {}
    device: Any
    for device, index in partitioner.batch_sharding.devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).add(index[0].indices(batch_size)[:2])
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(stop - start for part in parts for start, stop in part) != batch_size:
        raise ValueError(
            "processes hold overlapping but unequal parts of the batch on this mesh: choose"
            " NUM_MODEL_PARTITIONS so that a model replica fills whole processes or divides one"
        )
    return DataLayout(
        shard=parts.index(tuple(sorted(rows[jax.process_index()]))), num_shards=len(parts)
    )


def check_batch_size(batch_size: int, num_microbatches: int, partitioner: Partitioner) -> None:
    """Raises a ValueError where a batch cannot be split into microbatches and over the mesh."""
    if batch_size < 1 or batch_size % num_microbatches:
        raise ValueError(
            f"BATCH_SIZE {batch_size} does not split into {num_microbatches} microbatches: change"
            " either so that it divides"
        )
    part, shards = batch_size // num_microbatches, partitioner.num_data_shards
    if part % shards:
        what = "a microbatch" if num_microbatches > 1 else "BATCH_SIZE"
        raise ValueError(
            f"{what} of {part} rows does not split over the {shards} data shards of the mesh (data"
            f" x expert axes): choose a multiple of {shards}"
        )


def to_global(batch: Batch, partitioner: Partitioner, num_shards: int = 1) -> dict[str, Array]:
    """Puts this process's rows on its devices, as part of global arrays `[batch, ...]`.

    For one device they stay NumPy arrays: a compiled program takes them there in a fraction of the
    time.
    """
    sharding = partitioner.batch_sharding
    if jax.process_count() == 1:  # All features at once: an eighth of the time.
        rows: dict[str, Array] = {k: np.asarray(feature) for k, feature in batch.items()}
        return rows if sharding.num_devices == 1 else jax.device_put(rows, sharding)

    def put(rows: Array) -> jax.Array:
        rows = np.asarray(rows)
        return jax.make_array_from_process_local_data(
            sharding, rows, (rows.shape[0] * num_shards, *rows.shape[1:])
        )

    return {name: put(feature) for name, feature in batch.items()}


def replicated_scalar(value: float, partitioner: Partitioner) -> jax.Array:
    """A float32 scalar on all devices; every process must give the same value."""
    return jax.make_array_from_callback((), partitioner.replicated, lambda _: np.float32(value))


def check_first_batch(
    batch: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct], num_shards: int
) -> None:
    """Raises a ValueError where the data does not give the features and shapes that the
    configuration promises.
    """
    got = {
        name: (np.shape(feature)[0] * num_shards, *np.shape(feature)[1:])
        for name, feature in batch.items()
    }
    want = {name: tuple(spec.shape) for name, spec in expected.items()}
    wrong = [
        f"{name}: expected {want.get(name, 'no such feature')}, got {got.get(name, 'nothing')}"
        for name in sorted(want.keys() | got.keys())
    ]
    wrong = [
        line
        for name, line in zip(sorted(want.keys() | got.keys()), wrong, strict=True)
        if want.get(name) != got.get(name)
    ]
    if wrong:
        raise ValueError(
            "the training data does not match the configuration (BATCH_SIZE, TASK_FEATURE_LENGTHS,"
            " pack):\n" + "\n".join(wrong)
        )


def fingerprint(batch: Batch) -> dict[str, str]:
    """CRC-32 of every feature of this process's rows, in hexadecimal."""
    return {
        name: f"{zlib.crc32(np.ascontiguousarray(feature).tobytes()):08x}"
        for name, feature in sorted(batch.items())
    }
