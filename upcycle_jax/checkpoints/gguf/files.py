"""The tensors of one GGUF file, dequantised part by part.

The package `gguf` says how blocks of quantised weights are stored and turns them into numbers. Its
own reader is not used: it believes the counts that a file claims.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.checkpoints.gguf.header import TensorInfo, read_header
from upcycle_jax.checkpoints.reader import Index, index_shape
from upcycle_jax.printing import printable

SUFFIX = ".gguf"
"""How the names of such files end."""

_PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16"}
_PIECE_BYTES = 4 << 20  # of float32, dequantised at a time


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor whose elements can be read.

    Attributes:
      shape: dimensions, `[out, in]` for a matrix.
      type: ggml's name of how they are stored, e.g. 'Q4_1'.
      dtype: of what is read: that of the file, float32 for quantised ones.
      start: first byte in the file.
      block: elements of a row that are stored together.
      block_bytes: bytes of a block.
    """

    shape: tuple[int, ...]
    type: str
    dtype: np.dtype
    start: int
    block: int
    block_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.start + self.rows * self.row_bytes


class GgufFile:
    """A GGUF file, mapped into memory. Opening it reads its header alone.

    Args:
      path: a local file.

    Attributes:
      path: the file.
      metadata: see `header.Header`.
      tensors: what is stored, by name, in the order of the file.

    Raises:
      ValueError: it is no GGUF file, damaged or truncated, a tensor is stored in a way that is not
        known, or the package `gguf` is not installed.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            import gguf
        except ModuleNotFoundError:
            raise ValueError(
                f"{printable(path)} is a GGUF file, and the package that reads its weights is not"
                " installed: pip install 'upcycle_jax[gguf]' (or gguf)"
            ) from None
        self._gguf = gguf
        if path.stat().st_size == 0:
            raise untrusted.damaged(path, "empty")
        self._data: np.ndarray = np.asarray(np.memmap(path, np.uint8, mode="r"))
        header = read_header(self._data, path)
        self.metadata: Mapping[str, Any] = header.metadata
        self._dequantised: set[Any] = set()
        self.tensors = {name: self._stored(name, info) for name, info in header.tensors.items()}

    def _stored(self, name: str, info: TensorInfo) -> Stored:
        try:
            kind = self._gguf.GGMLQuantizationType(info.type)
            block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._unknown_type(name, f"number {info.type}") from None
        if kind.name in _PLAIN:
            dtype = np.dtype(_PLAIN[kind.name])
        elif kind.name == "BF16":
            dtype = np.dtype(ml_dtypes.bfloat16)
        else:
            dtype = np.dtype(np.float32)
            self._check_dequantised(name, kind, block_bytes)
        shape = info.shape
        if not shape or shape[-1] % block:
            raise untrusted.damaged(
                self.path, f"{name!r} of shape {list(shape)} cannot be stored as {kind.name}"
            )
        stored = Stored(shape, kind.name, dtype, info.start, block, block_bytes)
        if stored.end > self._data.size:
            raise ValueError(
                f"{printable(self.path)} is truncated: {printable(name)} ends at byte {stored.end},"
                f" the file has {self._data.size}. Copy it again"
            )
        return stored

    def _check_dequantised(self, name: str, kind: Any, block_bytes: int) -> None:
        """Whether the package can turn a block of this type into numbers."""
        if kind in self._dequantised:
            return
        try:
            self._gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            raise self._unknown_type(name, kind.name) from None
        self._dequantised.add(kind)

    def _unknown_type(self, name: str, kind: str) -> ValueError:
        return ValueError(
            f"{printable(self.path)}: {printable(name)} is stored as type {kind}, which cannot be"
            " dequantised: convert the model to F32, F16, BF16, Q8_0 or another type that the"
            " installed package gguf knows"
        )

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a vector or matrix.

        Args:
          name: of a tensor of one or two dimensions.
          index: one slice with explicit bounds per dimension.
        """
        stored = self.tensors[name]
        *rows, columns = index
        first_row, last_row = (rows[0].start, rows[0].stop) if rows else (0, 1)
        out = np.empty((last_row - first_row, columns.stop - columns.start), stored.dtype)
        if out.size:
            # Whole blocks are dequantised; the margins are cut off.
            first, last = columns.start // stored.block, -(-columns.stop // stored.block)
            start = columns.start - first * stored.block
            inner = slice(start, start + out.shape[1])
            blocks = self._data[stored.start : stored.end].reshape(stored.rows, stored.row_bytes)
            blocks = blocks[:, first * stored.block_bytes : last * stored.block_bytes]
            count = max(1, _PIECE_BYTES // (4 * (last - first) * stored.block))
            for row in range(first_row, last_row, count):
                raw = np.ascontiguousarray(blocks[row : min(row + count, last_row)])
                piece = slice(row - first_row, row - first_row + len(raw))
                out[piece] = self._decoded(raw, stored)[:, inner]
        return out.reshape(index_shape(index))

    def _decoded(self, blocks: np.ndarray, stored: Stored) -> np.ndarray:
        """`[rows, elements]` out of uint8 `[rows, bytes]`."""
        if stored.block == 1:
            return blocks.view(stored.dtype)
        return self._gguf.dequantize(blocks, self._gguf.GGMLQuantizationType[stored.type])
