"""V-MoE's own files: `PREFIX.index`, which says what arrays there are and how they are cut, and
`PREFIX.data-00000-of-000NN`, which hold the pieces. All are msgpack, with extension types for
slices and for an array's entry in the index.

Source: vmoe/checkpoints/{serialization,types,partitioned}.py, Apache-2.0; version '20220622'.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
from etils import epath

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.checkpoints.msgpack_index import InlineArray, Walker, opened
from upcycle_jax.checkpoints.reader import Index, fingerprint_files, index_shape
from upcycle_jax.checkpoints.vit.arrays import Stored
from upcycle_jax.checkpoints.vit.names import prefix_of
from upcycle_jax.printing import printable

INDEX = ".index"
VERSION = "20220622"
CHUNKS = "__msgpack_array_chunk_a87ca2__"
"""The key that marks a map of arrays' pieces."""
SLICES, INDEX_ENTRY = 6, 8
"""Extension types: one slice for each axis; an array's entry in the index."""
_MAX_SHARDS, _MAX_PIECES = 1 << 16, 1 << 20

Bounds = tuple[tuple[int, int], ...]
"""Where a piece begins and ends, along each axis."""


def shard_path(prefix: epath.Path, shard: int, count: int) -> epath.Path:
    """The file of a shard."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{count:05d}")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An array in the index.

    Attributes:
      stored: its shape and dtype.
      pieces: where they are in it, each with the number of its shard.
    """

    stored: Stored
    pieces: tuple[tuple[Bounds, int], ...]


class _IndexWalker(Walker):
    """Walks the index."""

    def extension(self, code: int, length: int) -> Any:
        if code != INDEX_ENTRY:
            return super().extension(code, length)
        try:
            content = bytes(self.take(length))
            shape, slices, shards = _unpacked(content, 3)
            size, dtype, *_ = _unpacked(shape)
            dimensions = untrusted.dimensions(size, self.path)
            bounds = [_bounds(one, dimensions) for one in slices]
            if len(bounds) != len(shards) or not all(
                isinstance(n, int) and 0 <= n < _MAX_SHARDS for n in shards
            ):
                raise ValueError("pieces and shards do not belong together")
            name = dtype.decode() if isinstance(dtype, bytes) else dtype
            stored = Stored(dimensions, untrusted.dtype(name, self.path))
            return _Entry(stored, tuple(zip(bounds, shards, strict=True)))
        except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException) as error:
            raise self.damaged(f"an unreadable entry of an array ({error})") from None


def _unpacked(content: Any, count: int | None = None) -> list[Any]:
    """The list that a few bytes hold; msgpack takes no more memory than they have."""
    if not isinstance(content, bytes):
        raise ValueError("a list is missing")
    value = msgpack.unpackb(
        content, raw=True, max_array_len=len(content), max_map_len=16, strict_map_key=False
    )
    if not isinstance(value, list) or count not in (None, len(value)):
        raise ValueError("a list of another length")
    return value


def _bounds(content: Any, shape: tuple[int, ...]) -> Bounds:
    """What a list of slices selects of an array.

    Raises:
      ValueError: it is none, or leaves the array.
    """
    slices = [_unpacked(one, 3) for one in _unpacked(content)]
    if len(slices) != len(shape):
        raise ValueError(f"{len(slices)} slices of an array of {len(shape)} axes")
    out = []
    for (start, stop, step), size in zip(slices, shape, strict=True):
        begin, end = 0 if start is None else start, size if stop is None else stop
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (begin, end))
        if not whole or not 0 <= begin <= end <= size or step not in (None, 1):
            raise ValueError(f"a slice of {size} entries from {begin} to {end}")
        out.append((begin, end))
    return tuple(out)


class _DataWalker(Walker):
    """Walks a shard: maps and lists whose arrays stay in the file."""

    def value(self) -> Any:
        first = self.buffer[self.at] if self.at < len(self.buffer) else None
        if first is None or not (first & 0xF0 == 0x90 or first in (0xDC, 0xDD)):
            return super().value()
        self.take(1)
        count = first & 0x0F if first & 0xF0 == 0x90 else self.number(2 if first == 0xDC else 4)
        self.depth += 1
        if self.depth > untrusted.MAX_DEPTH or count > _MAX_PIECES:
            raise self.damaged("a list that is nested too deeply, or endless")
        items = [self.value() for _ in range(count)]
        self.depth -= 1
        return items

    def extension(self, code: int, length: int) -> Any:
        if code != SLICES:
            return super().extension(code, length)
        content = bytes(self.take(length))
        try:
            bounds = []
            for one in _unpacked(content):
                start, stop, _ = _unpacked(one, 3)
                if not isinstance(start, int) or not isinstance(stop, int):
                    raise ValueError("a slice without an end")
                bounds.append((start, stop))
            return tuple(bounds)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise self.damaged(f"unreadable slices ({error})") from None


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A piece of an array in a shard, flat and in C order, in parts of at most 1 GiB.

    Attributes:
      bounds: where it is in the array.
      parts: one after the other.
    """

    bounds: Bounds
    parts: tuple[InlineArray, ...]

    def read(self, index: Index) -> np.ndarray:
        """The part that `index`, which counts inside the piece, selects."""
        shape = tuple(stop - start for start, stop in self.bounds)
        if len(self.parts) == 1:
            return self.parts[0].view().reshape(shape)[index]
        row = math.prod(shape[1:])
        first, last = index[0].start * row, index[0].stop * row
        found, begin = [], 0
        for part in self.parts:
            end = begin + math.prod(part.shape)
            low, high = max(first, begin), min(last, end)
            if low < high:
                found.append(part.view().reshape(-1)[low - begin : high - begin])
            begin = end
        flat = np.concatenate(found) if found else np.empty(0, self.parts[0].dtype)
        return flat.reshape(-1, *shape[1:])[(slice(None), *index[1:])]


class VMoeFiles:
    """See `arrays.Arrays`. Data files are memory-mapped, and read where a leaf is asked for.

    Args:
      prefix: PREFIX, or PREFIX.index.

    Raises:
      FileNotFoundError: a shard is missing.
      ValueError: a file is damaged, or of an unknown version.
    """

    format = "vmoe"

    def __init__(self, prefix: epath.Path):
        self.path = prefix.with_name(prefix.name.removesuffix(INDEX))
        self._index = self.path.with_name(self.path.name + INDEX)
        version, self._count, tree = self._load()
        self._names: list[str] = []
        self._entries: dict[str, _Entry] = {}
        for name, entry in _leaves(tree, self._index):
            self._names.append(name)
            self._entries[name] = entry
        self.arrays = {name: entry.stored for name, entry in self._entries.items()}
        if version is None and prefix_of(self.arrays) not in ("", "params/"):
            # Arrays were numbered in the order of the training state's fields, which nothing tells.
            raise ValueError(
                f"{self._index} is of a version before {VERSION} and holds a training state, whose"
                " arrays cannot be told apart: save it again with a newer V-MoE"
            )
        self._check_shards()
        self._shards: dict[int, dict[str, tuple[_Piece, ...]]] = {}

    def _load(self) -> tuple[str | None, int, dict[str, Any]]:
        walker = _IndexWalker(opened(self._index), self._index)
        content = walker.value()
        if not isinstance(content, dict) or walker.at != len(walker.buffer):
            raise untrusted.damaged(self._index, "it is no map, or more follows it")
        version, count = content.get("version"), content.get("shard_count")
        if version not in (None, VERSION):
            raise ValueError(
                f"{self._index} is of the version {printable(repr(version)[:40])}; {VERSION} is"
                " read"
            )
        if not isinstance(count, int) or not 1 <= count < _MAX_SHARDS:
            raise untrusted.damaged(self._index, "shard_count is no number of files")
        tree = content.get("index")
        if not isinstance(tree, dict):
            raise untrusted.damaged(self._index, "it has no index")
        return version, count, tree

    def _check_shards(self) -> None:
        """Checks that every array is covered by its pieces, and that their files are there and
        long enough.
        """
        claimed: dict[int, int] = {}
        for name, entry in self._entries.items():
            if not _is_grid([bounds for bounds, _ in entry.pieces], entry.stored.shape):
                raise untrusted.damaged(
                    self._index,
                    f"the pieces of {name} do not make up its shape {list(entry.stored.shape)}",
                )
            for bounds, shard in entry.pieces:
                nbytes = math.prod(b - a for a, b in bounds) * entry.stored.dtype.itemsize
                claimed[shard] = claimed.get(shard, 0) + nbytes
        for shard, nbytes in sorted(claimed.items()):
            if shard >= self._count:
                raise untrusted.damaged(
                    self._index, f"a piece lies in shard {shard} of {self._count}"
                )
            path = shard_path(self.path, shard, self._count)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: {self._index.name} names {self._count} such files. Copy it"
                    " again"
                )
            if path.stat().length < nbytes:
                raise untrusted.damaged(
                    path, f"{path.stat().length} bytes, {nbytes} bytes of arrays belong into it"
                )

    def _shard(self, number: int) -> dict[str, tuple[_Piece, ...]]:
        """The pieces in a shard, by array."""
        if number not in self._shards:
            path = shard_path(self.path, number, self._count)
            walker = _DataWalker(opened(path), path)
            content = walker.value()
            if not isinstance(content, dict) or not content.pop(CHUNKS, None):
                raise untrusted.damaged(path, "it holds no pieces of arrays")
            found = {}
            for key, pieces in content.items():
                position = int(key) if key.isascii() and key.isdigit() else len(self._names)
                if position >= len(self._names) or not isinstance(pieces, list):
                    raise untrusted.damaged(path, f"an array {key} that the index does not have")
                name = self._names[position]
                found[name] = tuple(self._piece(path, name, piece) for piece in pieces)
            self._shards[number] = found
        return self._shards[number]

    def _piece(self, path: epath.Path, name: str, piece: Any) -> _Piece:
        stored = self.arrays[name]
        match piece:
            case [[*parts], tuple(bounds)] if all(isinstance(p, InlineArray) for p in parts):
                size = math.prod(b - a for a, b in bounds)
                fits = sum(math.prod(p.shape) for p in parts) == size
                if fits and parts and {p.dtype for p in parts} == {stored.dtype}:
                    return _Piece(bounds, tuple(parts))
        raise untrusted.damaged(path, f"a piece of {name} is not what the index says")

    def read(self, name: str, index: Index) -> np.ndarray:
        entry = self._entries[name]
        out = np.empty(index_shape(index), entry.stored.dtype)
        for bounds, shard in entry.pieces:
            common = [
                (max(part.start, start), min(part.stop, stop))
                for part, (start, stop) in zip(index, bounds, strict=True)
            ]
            if any(first >= last for first, last in common):
                continue
            found = self._shard(shard).get(name, ())
            piece = next((one for one in found if one.bounds == bounds), None)
            if piece is None:
                path = shard_path(self.path, shard, self._count)
                raise untrusted.damaged(path, f"it lacks the piece {list(bounds)} of {name}")
            inside = tuple(
                slice(first - start, last - start)
                for (first, last), (start, _) in zip(common, bounds, strict=True)
            )
            target = tuple(
                slice(first - part.start, last - part.start)
                for (first, last), part in zip(common, index, strict=True)
            )
            out[target] = piece.read(inside)
        return out

    def fingerprint(self) -> str:
        shards = {shard for entry in self._entries.values() for _, shard in entry.pieces}
        files = [shard_path(self.path, shard, self._count) for shard in sorted(shards)]
        return fingerprint_files(self.path.parent, [self._index, *files])


def _is_grid(pieces: list[Bounds], shape: tuple[int, ...]) -> bool:
    """Whether pieces lie side by side and fill an array, as the cells of a grid do."""
    count = 1
    for axis, size in enumerate(shape):
        ranges = sorted({bounds[axis] for bounds in pieces})
        ends = [0, *(stop for _, stop in ranges)]
        if [start for start, _ in ranges] != ends[:-1] or ends[-1] != size:
            return False
        count *= len(ranges)
    return len(set(pieces)) == len(pieces) == count


def _leaves(tree: dict[str, Any], place: epath.Path) -> Iterator[tuple[str, _Entry]]:
    """The arrays of an index by name, in the order in which JAX numbers them: sorted by the parts
    of their names.
    """
    for key in sorted(tree):
        child = tree[key]
        untrusted.check_parts([key], place)
        if isinstance(child, _Entry):
            yield key, child
        elif isinstance(child, dict):
            yield from ((f"{key}/{name}", entry) for name, entry in _leaves(child, place))
        elif child is not None:
            raise untrusted.damaged(place, f"{key} is a {type(child).__name__} and no array")
