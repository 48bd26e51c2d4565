"""Parses flax's msgpack files without loading the arrays in them.

The maps of the file are walked by hand, because the msgpack package can only decode an entry
together with its bytes; everything that is neither a map nor an array goes through the package. An
array (extension type 1, or 3 for a NumPy scalar) holds the msgpack triple (shape, dtype name,
bytes): only where those bytes begin is noted.
"""

import dataclasses
import itertools
import math
import mmap
import struct
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import msgpack
import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.reader import Index

_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _NUMPY_SCALAR = 1, 3
# First byte -> number of bytes that hold the length.
_MAP_LENGTH, _EXT_LENGTH = {0xDE: 2, 0xDF: 4}, {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_BIN_LENGTH = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_FORMATS = {1: ">B", 2: ">H", 4: ">I"}


@dataclasses.dataclass(frozen=True)
class InlineArray:
    """An array whose bytes lie in the msgpack file.

    Attributes:
      shape: dimensions.
      dtype: NumPy dtype.
      buffer: the whole file, memory-mapped where it is local.
      offset: where the array's bytes (C order) begin.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    buffer: Any = dataclasses.field(repr=False, compare=False)
    offset: int

    def view(self) -> np.ndarray:
        """The array without a copy: pages are read when they are touched."""
        count = math.prod(self.shape)
        return np.frombuffer(self.buffer, self.dtype, count, self.offset).reshape(self.shape)

    def read(self, index: Index) -> np.ndarray:
        return np.array(self.view()[index])


@dataclasses.dataclass(frozen=True)
class ChunkedArray:
    """An array above 1 GiB, which flax cuts into flat pieces in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[InlineArray, ...]

    def read(self, index: Index) -> np.ndarray:
        if not self.shape:
            return self.pieces[0].read(()).reshape(())
        row = math.prod(self.shape[1:])
        first, last = index[0].start * row, index[0].stop * row
        parts, begin = [], 0
        for piece in self.pieces:
            end = begin + math.prod(piece.shape)
            low, high = max(first, begin), min(last, end)
            if low < high:
                parts.append(piece.view().reshape(-1)[low - begin : high - begin])
            begin = end
        flat = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        return np.array(flat.reshape(-1, *self.shape[1:])[(slice(None), *index[1:])])


class _Walker:
    def __init__(self, buffer: Any, path: epath.Path):
        self.buffer, self.path, self.at = buffer, path, 0

    def damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} is no complete msgpack checkpoint: {what} at byte {self.at} of"
            f" {len(self.buffer)}. Copy it again"
        )

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.buffer):
            raise self.damaged(f"the file ends inside an entry of {count} bytes that begins")
        self.at += count
        return self.buffer[self.at - count : self.at]

    def number(self, width: int) -> int:
        return struct.unpack(_FORMATS[width], self.take(width))[0]

    def value(self) -> Any:
        """The entry at the current position: a dict, an InlineArray, a ChunkedArray, or what
        msgpack makes of it.
        """
        first = self.take(1)[0]
        if first & 0xF0 == 0x80 or first in _MAP_LENGTH:
            return self.mapping(
                first & 0x0F if first & 0xF0 == 0x80 else self.number(_MAP_LENGTH[first])
            )
        if first in _EXT_LENGTH or first in _FIXED_EXT:
            length = self.number(_EXT_LENGTH[first]) if first in _EXT_LENGTH else _FIXED_EXT[first]
            return self.extension(self.take(1)[0], length)
        self.at -= 1
        return self.plain()

    def mapping(self, count: int) -> Any:
        members = {}
        for _ in range(count):
            key = self.plain()
            members[key.decode() if isinstance(key, bytes) else str(key)] = self.value()
        return self.joined(members) if _CHUNKED in members else members

    def joined(self, members: dict[str, Any]) -> ChunkedArray:
        shape = _items(members["shape"])
        pieces = tuple(_items(members["chunks"]))
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
            raise self.damaged(f"the pieces of an array of shape {shape} do not add up")
        return ChunkedArray(tuple(int(n) for n in shape), pieces[0].dtype, pieces)

    def extension(self, code: int, length: int) -> InlineArray:
        end = self.at + length
        if end > len(self.buffer):
            raise self.damaged(f"the file ends inside an array of {length} bytes that begins")
        if code not in (_NDARRAY, _NUMPY_SCALAR):
            raise self.damaged(f"an entry of the unknown extension type {code}")
        try:
            if self.take(1) != b"\x93":
                raise self.damaged("an array that is not a (shape, dtype, bytes) triple")
            shape, name = self.plain(), self.plain()
            self.number(_BIN_LENGTH[self.take(1)[0]])
            dtype = np.dtype(name.decode() if isinstance(name, bytes) else name)
        except (KeyError, TypeError):
            raise self.damaged("an array with an unreadable header") from None
        array = InlineArray(tuple(shape), dtype, self.buffer, self.at)
        if self.at + math.prod(array.shape) * dtype.itemsize != end:
            raise self.damaged(f"an array of shape {array.shape} whose bytes do not match")
        self.at = end
        return array

    def plain(self) -> Any:
        """Decodes one entry with the msgpack package; the window grows until the entry fits."""
        for window in itertools.accumulate(
            itertools.repeat(8), lambda size, factor: size * factor, initial=256
        ):
            piece = bytes(self.buffer[self.at : self.at + window])
            unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=0)
            unpacker.feed(piece)
            try:
                value = unpacker.unpack()
            except msgpack.OutOfData:
                if self.at + window >= len(self.buffer):
                    raise self.damaged("the file ends inside an entry that begins") from None
                continue
            except (ValueError, msgpack.UnpackException) as error:
                raise self.damaged(f"an unreadable entry ({error})") from None
            self.at += unpacker.tell()
            return value


def _items(sequence: Any) -> list[Any]:
    """A list that flax may have stored as a dict '0', '1', ..."""
    return (
        [sequence[str(i)] for i in range(len(sequence))]
        if isinstance(sequence, dict)
        else list(sequence)
    )


def load_index(path: epath.Path) -> dict[str, Any]:
    """The tree of a msgpack file with its arrays left in the file.

    Returns:
      Nested dicts whose leaves are `InlineArray`, `ChunkedArray`, or plain numbers, strings, lists
      and None.

    Raises:
      ValueError: the file is truncated, or is no flax msgpack file.
    """
    if path.stat().length == 0:
        raise ValueError(f"{path} is empty: copy the checkpoint again")
    with path.open("rb") as stream:
        local = storage.is_local(path)
        buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if local else stream.read()
    if buffer[0] & 0xF0 != 0x80 and buffer[0] not in _MAP_LENGTH:
        raise ValueError(
            f"{path} is no T5X checkpoint: a msgpack file begins with a map, this one with byte"
            f" {buffer[0]:#04x}"
        )
    walker = _Walker(buffer, path)
    tree = walker.value()
    if walker.at != len(buffer):
        raise walker.damaged("more bytes follow the map that ends")
    return tree
