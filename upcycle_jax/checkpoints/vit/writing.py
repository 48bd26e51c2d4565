"""Writes vision transformers as the projects that train them with Flax read them: NumPy archives,
and V-MoE's own files. What is written appears when it is complete.
"""

import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from etils import epath

from upcycle_jax import leases
from upcycle_jax.checkpoints.formats import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.output import check_unfinished, checked_output
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.checkpoints.vit.naming import Dialect, Named, named_arrays
from upcycle_jax.checkpoints.vit.vmoe import (
    CHUNKS,
    INDEX,
    INDEX_ENTRY,
    SLICES,
    VERSION,
    shard_path,
)
from upcycle_jax.models.base import ModelConfig

_ARRAY = 1
"""Flax's extension type of an array."""
_MAX_PART = 1 << 30
"""Bytes of an array that flax puts into one entry."""

Progress = Callable[[str], None]


def write_npz(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    dialect: Dialect = Dialect.BIG_VISION,
    dtype: np.dtype | None = None,
    model: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the parameters of a checkpoint as a NumPy archive.

    Args:
      reader: a vision transformer.
      output: a file that does not exist, whose name ends in `.npz`.
      dialect: whose names the arrays have.
      dtype: of the arrays, float32 or bfloat16 (stored as two raw bytes, as big_vision does); None:
        as they are stored.
      model: the model, where the checkpoint does not state it.
      progress: called with the name of each array.

    Raises:
      ValueError: the model is not one of these projects', a leaf is damaged or holds NaN, or the
        dtype cannot hold a value. Nothing is left at `output`.
      FileExistsError: there is something at `output`.
    """
    final = checked_output(output, [reader.path])
    if final.suffix != ".npz":
        raise ValueError(f"{final}: the name of a NumPy archive ends in .npz")
    _refuse_existing(final)
    arrays = named_arrays(reader, dialect, dtype=dtype, model=model)
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    with _holding(final):
        check_unfinished(partial, r"archive\.npz")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with zipfile.ZipFile(partial / "archive.npz", "w") as members:
                for array in arrays:
                    if progress:
                        progress(array.name)
                    info = zipfile.ZipInfo(f"{array.name}.npy")
                    with members.open(info, "w", force_zip64=True) as member:
                        _write_npy(member, array)
            os.rename(partial / "archive.npz", final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_npy(stream: Any, array: Named) -> None:
    """Writes an array as NumPy does."""
    raw = array.dtype.name == "bfloat16"
    descr = "|V2" if raw else np.lib.format.dtype_to_descr(array.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for block in array.blocks():
        stream.write(_raw(block))


def _raw(block: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return memoryview(block.tobytes())


def write_vmoe(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    dtype: np.dtype | None = None,
    model: ModelConfig | None = None,
    shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Path:
    """Writes the parameters of a checkpoint, dense or with experts, as V-MoE's `PREFIX.index` and
    `PREFIX.data-00000-of-000NN`, which its `initialize_from_vmoe` reads.

    Args:
      reader: a vision transformer.
      output: PREFIX, with which no file's name begins yet.
      dtype: of the arrays; None: as they are stored.
      model: the model, where the checkpoint does not state it.
      shard_bytes: at most so many bytes of arrays in a file, or one array if that is larger.
      progress: called with the name of each file.

    Returns:
      PREFIX.

    Raises:
      ValueError: see `write_npz`.
      FileExistsError: there is such a checkpoint already.
    """
    final = checked_output(output, [reader.path])
    index = final.with_name(final.name + INDEX)
    for path in (final, index):
        _refuse_existing(path)
    arrays = named_arrays(reader, Dialect.VMOE, dtype=dtype, model=model)
    shards = list(_shards(list(enumerate(arrays)), shard_bytes))
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    with _holding(final):
        own = "|".join((r"\.index", r"\.data-\d{5,}-of-\d{5,}"))
        check_unfinished(partial, rf"[^/]+(?:{own})")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            files = _write_vmoe(partial / final.name, shards, progress)
            for file in files:  # The index is the last: without it there is no checkpoint.
                os.replace(file, final.with_name(file.name))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_vmoe(
    prefix: Path, shards: Sequence[Sequence[tuple[int, Named]]], progress: Progress | None
) -> list[Path]:
    """Writes all files; returns them, the index last."""
    files: list[Path] = []
    tree: dict[str, Any] = {}
    for shard, numbered in enumerate(shards):
        files.append(Path(shard_path(epath.Path(prefix), shard, len(shards))))
        with open(files[-1], "wb") as stream:
            stream.write(_map_header(len(numbered) + 1) + _packed(CHUNKS) + _packed(True))
            for number, array in numbered:
                stream.write(_packed(str(number)))
                _write_piece(stream, array)
                *parents, last = array.name.split("/")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = _entry(array, shard)
        if progress:
            progress(files[-1].name)
    files.append(prefix.with_name(prefix.name + INDEX))
    content = {"version": VERSION, "shard_count": len(shards), "index": tree}
    files[-1].write_bytes(_packed(content))
    if progress:
        progress(files[-1].name)
    return files


def _write_piece(stream: BinaryIO, array: Named) -> None:
    """Writes an array as a list of one piece: its values, flat, in parts, and its slices."""
    count, size = array.nbytes // array.dtype.itemsize, array.dtype.itemsize
    limit = _MAX_PART // size
    sizes = [min(limit, count - start) for start in range(0, count, limit)] or [0]
    stream.write(_list_header(1) + _list_header(2) + _list_header(len(sizes)))
    parts, left = iter(sizes), 0
    for block in array.blocks():
        data = _raw(block)
        while data:
            if not left:
                left = next(parts) * size
                stream.write(_array_header(left // size, array.dtype, left))
            stream.write(data[:left])
            data, left = data[left:], max(0, left - len(data))
    if not count:
        stream.write(_array_header(0, array.dtype, 0))
    slices = [_packed([0, length, None]) for length in array.shape]
    stream.write(_packed(msgpack.ExtType(SLICES, _packed(slices))))


def _entry(array: Named, shard: int) -> msgpack.ExtType:
    """The entry of an array in the index."""
    shape = _packed([list(array.shape), array.dtype.name, False, {}])
    slices = _packed([_packed([0, length, None]) for length in array.shape])
    return msgpack.ExtType(INDEX_ENTRY, _packed([shape, [slices], [shard]]))


def _array_header(count: int, dtype: np.dtype, nbytes: int) -> bytes:
    """What stands before the bytes of a flat array: (shape, dtype, bytes) as an extension."""
    head = b"\x93" + _packed([count]) + _packed(dtype.name) + b"\xc6" + struct.pack(">I", nbytes)
    return b"\xc9" + struct.pack(">IB", len(head) + nbytes, _ARRAY) + head


def _map_header(count: int) -> bytes:
    return b"\xdf" + struct.pack(">I", count)


def _list_header(count: int) -> bytes:
    return b"\xdd" + struct.pack(">I", count)


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _shards(
    arrays: Sequence[tuple[int, Named]], shard_bytes: int
) -> Iterator[list[tuple[int, Named]]]:
    shard: list[tuple[int, Named]] = []
    held = 0
    for number, array in arrays:
        if shard and held + array.nbytes > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append((number, array))
        held += array.nbytes
    yield shard


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(
            f"{path} exists already: nothing was changed. Choose another output path or remove it"
            " first"
        )


def _holding(final: Path) -> Any:
    """The lease of an output."""
    return leases.hold(
        final.with_name(f".{final.name}.lease.json"),
        what=str(final),
        remedy="choose another output path",
    )
