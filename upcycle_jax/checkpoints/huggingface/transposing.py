"""Matrices transposed in memory, faster than NumPy does it: a linear layer is `[out, in]` in a
folder and `[in, out]` here, so nearly every byte passes through.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from upcycle_jax.distributed import host_device

_BLOCK = 64
"""Rows that NumPy writes together: a cache line of the result is filled while it is near."""

_SAME_SIZE: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
}
"""What values are while jax moves them: of a type that it has, and whose bits it leaves alone."""

_PART_BYTES = 1 << 20
"""About what is turned at a time where a transpose is not wanted whole: it stays in the cache."""


def transposed(value: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A contiguous copy with the last two axes exchanged.

    >>> transposed(np.arange(6).reshape(2, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]

    Args:
      value: of two axes or more.
      out: where to write it; None: a new array.
    """
    rows, columns = value.shape[-2:]
    if out is None:
        out = np.empty((*value.shape[:-2], columns, rows), value.dtype)
    for stack in np.ndindex(value.shape[:-2]):
        source, target = value[stack], out[stack]
        if (turned := _turned(source)) is not None:
            target[...] = turned
            continue
        for start in range(0, rows, _BLOCK):
            target[:, start : start + _BLOCK] = source[start : start + _BLOCK].T
    return out


def _turned(matrix: np.ndarray) -> np.ndarray | None:
    """The transpose as jax's runtime brings it to the CPU, which turns tiles in registers: twice
    as fast as blocks by NumPy. None where it cannot: jax may have no CPU (JAX_PLATFORMS), and no
    type of 8 bytes. The result can only be read.
    """
    kind, cpu = _SAME_SIZE.get(matrix.dtype.itemsize), host_device()
    if kind is None or cpu is None:
        return None
    return np.asarray(jax.device_put(matrix.view(kind).T, cpu)).view(matrix.dtype)


def transposed_parts(value: np.ndarray) -> Iterator[np.ndarray]:
    """What `transposed` gives, some rows at a time, in C order.

    >>> [part.tolist() for part in transposed_parts(np.arange(6).reshape(2, 3))]
    [[[0, 3], [1, 4], [2, 5]]]

    Args:
      value: of two axes or more.

    Yields:
      `[rows, columns]`, contiguous. Do not write to it, nor keep it: the next may take its place.
    """
    columns, rows = value.shape[-2:]  # of the transpose: rows before columns
    step = max(_BLOCK, _PART_BYTES // max(columns * value.itemsize, 1) // _BLOCK * _BLOCK)
    room = np.empty((min(step, rows), columns), value.dtype)
    for stack in np.ndindex(value.shape[:-2]):
        for start in range(0, rows, step):
            source = value[stack][:, start : start + step]
            turned = _turned(source)
            yield transposed(source, room[: source.shape[1]]) if turned is None else turned
