"""Matrices transposed in memory, faster than NumPy does it: a linear layer is `[out, in]` in a
folder and `[in, out]` here, so nearly every byte passes through.
"""

import numpy as np

_BLOCK = 64
"""Rows that are written together: a cache line of the result is filled while it is near."""


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
