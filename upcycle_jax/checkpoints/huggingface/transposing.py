"""Matrices transposed in memory, faster than NumPy does it: a linear layer is `[out, in]` in a
folder and `[in, out]` here, so nearly every byte passes through.
"""

from collections.abc import Iterator

import numpy as np

_BLOCK = 64
"""Rows that are written together: a cache line of the result is filled while it is near."""

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
        for start in range(0, rows, _BLOCK):
            target[:, start : start + _BLOCK] = source[start : start + _BLOCK].T
    return out


def transposed_parts(value: np.ndarray) -> Iterator[np.ndarray]:
    """What `transposed` gives, some rows at a time, in C order.

    >>> [part.tolist() for part in transposed_parts(np.arange(6).reshape(2, 3))]
    [[[0, 3], [1, 4], [2, 5]]]

    Args:
      value: of two axes or more.

    Yields:
      `[rows, columns]`, contiguous; each is overwritten by the next.
    """
    columns, rows = value.shape[-2:]  # of the transpose: rows before columns
    step = max(_BLOCK, _PART_BYTES // max(columns * value.itemsize, 1) // _BLOCK * _BLOCK)
    part = np.empty((min(step, rows), columns), value.dtype)
    for stack in np.ndindex(value.shape[:-2]):
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield transposed(value[stack][:, start : start + count], part[:count])
