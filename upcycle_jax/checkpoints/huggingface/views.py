"""Leaves out of tensors, in parts: transposed, as rows of a larger tensor, or stacked."""

from collections.abc import Callable

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import Source, Sources, row_axis
from upcycle_jax.checkpoints.reader import Index, index_shape

ReadTensor = Callable[[str, Index], np.ndarray]
"""Reads a part of a tensor, given its name and one slice with explicit bounds per dimension."""

_GAP = 4
"""Rows that nobody asked for are read along where no more than so many lie between two others."""


def read_leaf(sources: Sources, read: ReadTensor, index: Index, dtype: np.dtype) -> np.ndarray:
    """A part of a leaf. Few more bytes than it has are held beside it.

    Args:
      sources: what is behind the leaf.
      read: reads tensors.
      index: one slice with explicit bounds per dimension of the leaf.
      dtype: of the leaf.
    """
    if isinstance(sources, tuple):
        out = np.empty(index_shape(index), dtype)
        for position, source in enumerate(sources[index[0]]):
            out[position] = _view(source, read, index[1:], dtype)
        return out
    value = _view(sources, read, index, dtype)
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)


def _view(source: Source, read: ReadTensor, index: Index, dtype: np.dtype) -> np.ndarray:
    if source.transposed:
        index = (*index[:-2], index[-1], index[-2])
    value = _rows(source, read, index)
    value = value.swapaxes(-1, -2) if source.transposed else value
    if source.factor == 1.0:
        return value.astype(dtype, copy=False)
    return value.astype(dtype) * np.asarray(source.factor, dtype)


def _rows(source: Source, read: ReadTensor, index: Index) -> np.ndarray:
    """The rows of a tensor that a source means, in its order; `index` counts these."""
    if source.rows is None:
        return read(source.tensor, index)
    axis = row_axis(len(index))
    before, after = index[:axis], index[axis + 1 :]

    def span(start: int, stop: int) -> np.ndarray:
        return read(source.tensor, (*before, slice(start, stop), *after))

    wanted = source.rows.indices(index[axis].start, index[axis].stop)
    if not wanted.size:
        return span(0, 0)
    if np.array_equal(wanted, np.arange(wanted[0], wanted[0] + wanted.size)):
        return span(int(wanted[0]), int(wanted[0]) + wanted.size)
    # Runs of the tensor in its own order, each read once and put where the leaf has it.
    order = np.argsort(wanted)
    runs = np.split(order, np.flatnonzero(np.diff(wanted[order]) > _GAP) + 1)
    out = None
    for run in runs:
        first, last = int(wanted[run[0]]), int(wanted[run[-1]])
        part = np.moveaxis(span(first, last + 1), axis, 0)
        if out is None:
            out = np.empty((wanted.size, *part.shape[1:]), part.dtype)
        out[run] = part[wanted[run] - first]
    assert out is not None
    return np.moveaxis(out, 0, axis)
