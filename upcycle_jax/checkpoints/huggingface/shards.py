"""Tensors written as safetensors: one file, or shards with their index. The files are those of the
library `safetensors`, byte for byte, which would hold all of a file in memory to write it.
"""

import concurrent.futures
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from upcycle_jax.checkpoints.huggingface.assembly import Tensor
from upcycle_jax.checkpoints.huggingface.files import DTYPES, WEIGHTS, WEIGHTS_INDEX
from upcycle_jax.checkpoints.workers import in_order

DEFAULT_SHARD_BYTES = 1 << 30

_SYNCED_BYTES = 128 << 20
"""The disk is set to work whenever so much was written, while more is being read."""

_CODES = {name: code for code, name in DTYPES.items()}
_ORDER = ("float64", "float32", "bfloat16", "float16")
"""Dtypes in the library's order: wide ones first, so that every tensor is aligned."""


def write_tensors(
    tensors: Sequence[Tensor],
    place: Path,
    shard_bytes: int,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Writes tensors into a folder, several at a time, and waits until they are on the disk.

    Args:
      tensors: in order.
      place: the folder.
      shard_bytes: at most so many bytes are held in memory and written to one file, or one tensor
        if that is larger.
      progress: called with the name of each file.

    Raises:
      ValueError: a leaf is damaged, or the dtype cannot hold a value of it.
      OSError: the disk is full or cannot be written.
    """
    shards = list(_shards(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        _write_file(shard, place / file, shard_bytes)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), file)
        if progress:
            progress(file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(place / WEIGHTS_INDEX, index)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON object for people."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(tensor)
        held += tensor.nbytes
    yield shard


def _write_file(tensors: Sequence[Tensor], path: Path, max_bytes: int) -> None:
    """Writes one file; about `max_bytes` are held at a time."""
    ordered = sorted(tensors, key=lambda tensor: (_ORDER.index(tensor.dtype.name), tensor.name))
    header, starts = _header(ordered)
    with open(path, "wb") as stream, concurrent.futures.ThreadPoolExecutor(1) as syncing:
        stream.write(header)
        stream.flush()
        descriptor = stream.fileno()

        def put(item: tuple[Tensor, int]) -> int:
            tensor, start = item
            for part in tensor.parts():
                start += _write_at(descriptor, part, start)
            return tensor.nbytes

        synced, unsynced = [], 0
        tasks = zip(ordered, starts, strict=True)
        for nbytes in in_order(put, tasks, lambda item: item[0].held_bytes, max_bytes):
            unsynced += nbytes
            if unsynced >= _SYNCED_BYTES:
                synced.append(syncing.submit(os.fdatasync, descriptor))
                unsynced = 0
        for future in synced:
            future.result()
        os.fsync(descriptor)


def _header(tensors: Sequence[Tensor]) -> tuple[bytes, list[int]]:
    """What a file begins with: length and text of a JSON object; and where each tensor starts."""
    # transformers 4 refuses other formats than 'pt'.
    members: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.nbytes)
        members[tensor.name] = {
            "dtype": _CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": ends[-2:],
        }
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends[:-1]]


def _write_at(descriptor: int, value: np.ndarray, start: int) -> int:
    """Writes a contiguous array at a position of a file; returns how many bytes those are."""
    left = value.reshape(-1).view(np.uint8).data
    while left:
        count = os.pwrite(descriptor, left, start)
        left, start = left[count:], start + count
    return value.nbytes
