"""The header of a GGUF file: what it states of the model, and where its tensors lie. None of it is
trusted: counts, lengths and offsets are compared with the file before anything is done with them.

Source: the format as ggml's docs/gguf.md describes it (versions 2 and 3, little-endian).
"""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.printing import printable

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 24  # of an array; as many rows as an embedding here may have
_MAX_NAME_BYTES = 1 << 16

_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("bool"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Code of a value's type -> the type of a number."""

_TEXT, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file.

    Attributes:
      shape: dimensions, slowest first; the file lists them the other way round.
      type: ggml's number of how its elements are stored.
      start: first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands before the data of the tensors.

    Attributes:
      metadata: key -> number, text, list of texts or array of numbers.
      tensors: by name, in the order of the file. That their data end inside the file is not checked
        here.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(data: np.ndarray, place: Path) -> Header:
    """The header of a file.

    Args:
      data: uint8 `[bytes]`, the whole file.
      place: the file, for messages.

    Raises:
      ValueError: it is no GGUF file of a version that is read, or its header is damaged.
    """
    cursor = _Cursor(data, place)
    if bytes(data[:4]) != _MAGIC:
        raise ValueError(f"{printable(place)} is no GGUF file: it does not begin with 'GGUF'")
    cursor.skip(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0
        raise ValueError(
            f"{printable(place)} is "
            + (
                "a big-endian GGUF file"
                if swapped
                else f"a GGUF file of version {version}; versions 2 and 3 are read"
            )
            + ": convert the model again with a current llama.cpp on a little-endian machine"
        )
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.name()
        if key in metadata:
            raise untrusted.damaged(place, f"the key {key!r} is there twice")
        metadata[key] = cursor.value()
    found: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name, info = cursor.tensor()
        if name in found:
            raise untrusted.damaged(place, f"the tensor {name!r} is there twice")
        found[name] = info
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT:
        raise untrusted.damaged(place, f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    for name, info in found.items():
        if info.start % alignment:
            raise untrusted.damaged(place, f"the tensor {name!r} is not aligned")
    return Header(
        metadata,
        {name: dataclasses.replace(info, start=start + info.start) for name, info in found.items()},
    )


class _Cursor:
    """Reads a header piece by piece; no piece reaches beyond the end of the file."""

    def __init__(self, data: np.ndarray, place: Path):
        self._data, self._place, self.position = data.data, place, 0

    def skip(self, count: int) -> int:
        """Moves on by `count` bytes and returns where they begin."""
        start = self.position
        if count > len(self._data) - start:
            raise untrusted.damaged(
                self._place, f"its header ends before byte {start + count}, truncated"
            )
        self.position = start + count
        return start

    def number(self, code: str) -> Any:
        """A little-endian number; `code` as of the struct module."""
        return struct.unpack_from(f"<{code}", self._data, self.skip(struct.calcsize(code)))[0]

    def text(self, limit: int | None = None) -> str:
        length = self.number("Q")
        if limit is not None and length > limit:
            raise untrusted.damaged(self._place, f"a name of {length} bytes")
        start = self.skip(length)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise untrusted.damaged(self._place, f"a text is no UTF-8: {error.reason}") from None

    def name(self) -> str:
        """A key, or the name of a tensor."""
        return self.text(_MAX_NAME_BYTES)

    def value(self) -> Any:
        """The value of a key with its type before it."""
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        return self._numbers(kind, 1)[0].item()

    def _array(self) -> list[str] | np.ndarray:
        kind, count = self.number("I"), self.number("Q")
        if count > _MAX_ENTRIES:
            raise untrusted.damaged(self._place, f"a list of {count} entries")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise untrusted.damaged(self._place, f"a value of the unknown type {kind}")
        dtype = _NUMBERS[kind]
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start).copy()

    def tensor(self) -> tuple[str, TensorInfo]:
        """Name and place of a tensor; `start` counts from the first byte of the data."""
        name, rank = self.name(), self.number("I")
        if rank > _MAX_DIMENSIONS:
            raise untrusted.damaged(self._place, f"the tensor {name!r} has {rank} dimensions")
        sizes = [self.number("Q") for _ in range(rank)]
        shape = untrusted.dimensions(sizes[::-1], self._place, what=f"shape of {name!r}")
        return name, TensorInfo(shape, self.number("I"), self.number("Q"))
