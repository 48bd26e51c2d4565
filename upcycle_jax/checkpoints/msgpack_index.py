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

import msgpack
import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage, untrusted
from upcycle_jax.checkpoints.reader import Index
from upcycle_jax.printing import printable

_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _NUMPY_SCALAR = 1, 3
# First byte -> number of bytes that hold the length.
_MAP_LENGTH, _EXT_LENGTH = {0xDE: 2, 0xDF: 4}, {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_BIN_LENGTH = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_FORMATS = {1: ">B", 2: ">H", 4: ">I"}
# Entries that are neither maps nor arrays are texts, numbers and short lists. The msgpack package
# takes memory for as many items as a list claims, and for all bytes of a text.
_MAX_PLAIN_BYTES, _MAX_PLAIN_ITEMS = 1 << 24, 4096


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


class Walker:
    """Walks the entries of a msgpack file.

    Args:
      buffer: the whole file.
      path: for messages.
    """

    def __init__(self, buffer: Any, path: epath.Path):
        self.buffer, self.path, self.at, self.depth = buffer, path, 0, 0

    def damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{printable(self.path)} is no complete msgpack checkpoint: {printable(what)} at byte"
            f" {self.at} of {len(self.buffer)}. Copy it again"
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
        self.depth += 1
        if self.depth > untrusted.MAX_DEPTH:
            raise self.damaged(f"maps nested deeper than {untrusted.MAX_DEPTH}")
        members: dict[str, Any] = {}
        for _ in range(count):
            key = self.plain()
            if not isinstance(key, str | bytes | int):
                raise self.damaged(f"a {type(key).__name__} as the key of an entry")
            try:
                name = key.decode() if isinstance(key, bytes) else str(key)
            except UnicodeDecodeError:
                raise self.damaged("a key that is no UTF-8") from None
            if name in members:
                raise self.damaged(f"a second entry {name!r}")
            members[name] = self.value()
        self.depth -= 1
        return self.joined(members) if _CHUNKED in members else members

    def joined(self, members: dict[str, Any]) -> ChunkedArray:
        shape = untrusted.dimensions(self.items(members.get("shape")), self.path)
        pieces = self.items(members.get("chunks"))
        if not pieces or not all(isinstance(piece, InlineArray) for piece in pieces):
            raise self.damaged("an array in pieces that are no arrays")
        if len({piece.dtype for piece in pieces}) > 1:
            raise self.damaged("an array in pieces of several dtypes")
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
            raise self.damaged(f"the pieces of an array of shape {shape} do not add up")
        return ChunkedArray(shape, pieces[0].dtype, tuple(pieces))

    def items(self, sequence: Any) -> list[Any]:
        """A list that flax may have stored as a dict '0', '1', ..."""
        if isinstance(sequence, dict):
            sequence = [sequence.get(str(i)) for i in range(len(sequence))]
        if not isinstance(sequence, list | tuple):
            raise self.damaged("an array in pieces that are not listed")
        return list(sequence)

    def extension(self, code: int, length: int) -> InlineArray:
        end = self.at + length
        if end > len(self.buffer):
            raise self.damaged(f"the file ends inside an array of {length} bytes that begins")
        if code not in (_NDARRAY, _NUMPY_SCALAR):
            raise self.damaged(f"an entry of the unknown extension type {code}")
        if self.take(1) != b"\x93":
            raise self.damaged("an array that is not a (shape, dtype, bytes) triple")
        shape, name, width = self.plain(), self.plain(), _BIN_LENGTH.get(self.take(1)[0])
        if width is None:
            raise self.damaged("an array with an unreadable header")
        self.number(width)
        place = f"{self.path}: the array at byte {self.at} of {len(self.buffer)}"
        shape = untrusted.dimensions(shape, place)
        try:
            dtype = untrusted.dtype(name.decode() if isinstance(name, bytes) else name, place)
        except UnicodeDecodeError:
            raise self.damaged("an array with an unreadable header") from None
        array = InlineArray(shape, dtype, self.buffer, self.at)
        if self.at + math.prod(shape) * dtype.itemsize != end:
            raise self.damaged(f"an array of shape {shape} whose bytes do not match")
        self.at = end
        return array

    def plain(self) -> Any:
        """Decodes one entry with the msgpack package; the window grows until the entry fits."""
        for window in itertools.accumulate(
            itertools.repeat(8), lambda size, factor: size * factor, initial=256
        ):
            piece = bytes(self.buffer[self.at : self.at + window])
            unpacker = msgpack.Unpacker(
                raw=False,
                strict_map_key=False,
                max_buffer_size=0,
                max_array_len=_MAX_PLAIN_ITEMS,
                max_map_len=_MAX_PLAIN_ITEMS,
            )
            unpacker.feed(piece)
            try:
                value = unpacker.unpack()
            except msgpack.OutOfData:
                if self.at + window >= len(self.buffer):
                    raise self.damaged("the file ends inside an entry that begins") from None
                if window >= _MAX_PLAIN_BYTES:
                    raise self.damaged(f"a text above {_MAX_PLAIN_BYTES} bytes") from None
                continue
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                raise self.damaged(f"an unreadable entry ({error})") from None
            self.at += unpacker.tell()
            return value


def opened(path: epath.Path) -> Any:
    """The bytes of a file, memory-mapped where it is local.

    Raises:
      ValueError: it is empty or cannot be read.
    """
    try:
        if path.stat().length == 0:
            raise ValueError(f"{path} is empty: copy the checkpoint again")
        with path.open("rb") as stream:
            if storage.is_local(path):
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return stream.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def load_index(path: epath.Path) -> dict[str, Any]:
    """The tree of a msgpack file with its arrays left in the file.

    Returns:
      Nested dicts whose leaves are `InlineArray`, `ChunkedArray`, or plain numbers, strings, lists
      and None.

    Raises:
      ValueError: the file is truncated, or is no flax msgpack file.
    """
    buffer = opened(path)
    if buffer[0] & 0xF0 != 0x80 and buffer[0] not in _MAP_LENGTH:
        raise ValueError(
            f"{path} is no T5X checkpoint: a msgpack file begins with a map, this one with byte"
            f" {buffer[0]:#04x}"
        )
    walker = Walker(buffer, path)
    tree = walker.value()
    if not isinstance(tree, dict):
        raise walker.damaged("one array and no tree")
    if walker.at != len(buffer):
        raise walker.damaged("more bytes follow the map that ends")
    return tree
