"""Leaves out of tensors, in parts: transposed, as rows of a larger tensor, or stacked."""

from collections.abc import Callable

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import Computed, Source, Sources, row_axis
from upcycle_jax.checkpoints.huggingface.transposing import transposed
from upcycle_jax.checkpoints.reader import Index, index_shape

ReadTensor = Callable[[str, Index], np.ndarray]
"""Reads a part of a tensor, given its name and one slice with explicit bounds per dimension."""

_BLOCK_BYTES, _BLOCK_ROWS = 1 << 20, 64
"""About what is read and transposed at a time; whole blocks of rows."""

_GAP = 4
"""Rows that nobody asked for are read along where no more than so many lie between two others."""


def read_leaf(
    sources: Sources | Computed, read: ReadTensor, index: Index, dtype: np.dtype
) -> np.ndarray:
    """A part of a leaf, contiguous. Little is held beside it, unless it is a part of a tensor's
    rows as they are, or times a factor: then as much again.

    Args:
      sources: what is behind the leaf.
      read: reads tensors.
      index: one slice with explicit bounds per dimension of the leaf.
      dtype: of the leaf.
    """
    if isinstance(sources, Computed):
        whole = [read(name, _all(shape)) for name, shape in sources.tensors.items()]
        value = sources.compute(*(tensor.astype(dtype, copy=False) for tensor in whole))
        return np.ascontiguousarray(value[index], dtype)
    parts = sources[index[0]] if isinstance(sources, tuple) else (sources,)
    inner = index[1:] if isinstance(sources, tuple) else index
    if not isinstance(sources, tuple) and not sources.transposed:
        value = _plain(sources, read, inner, dtype)
        return value if value.flags.c_contiguous else np.ascontiguousarray(value)
    out = np.empty(index_shape(index), dtype)
    for position, source in enumerate(parts):
        target = out[position] if isinstance(sources, tuple) else out
        if source.transposed:
            _write_transposed(source, read, inner, target)
        else:
            target[...] = _plain(source, read, inner, dtype)
    return out


def _all(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)


def _plain(source: Source, read: ReadTensor, index: Index, dtype: np.dtype) -> np.ndarray:
    """The rows of a tensor that a source means, times its factor."""
    value = _rows(source, read, index).astype(dtype, copy=False)
    return value if source.factor == 1.0 else value * np.asarray(source.factor, dtype)


def _write_transposed(source: Source, read: ReadTensor, index: Index, out: np.ndarray) -> None:
    """Writes a part of a leaf that is a transpose, few rows of the tensor at a time: they are near
    while they are turned, and what is held beside the leaf stays small.
    """
    *before, columns, rows = index  # The tensor has rows before columns.
    width = (columns.stop - columns.start) * out.dtype.itemsize
    count = max(_BLOCK_ROWS, _BLOCK_BYTES // max(width, 1) // _BLOCK_ROWS * _BLOCK_ROWS)
    for stack in np.ndindex(index_shape(tuple(before))):
        one = [slice(s.start + i, s.start + i + 1) for s, i in zip(before, stack, strict=True)]
        for start in range(rows.start, rows.stop, count):
            stop = min(start + count, rows.stop)
            part = _plain(source, read, (*one, slice(start, stop), columns), out.dtype)
            target = out[stack][:, start - rows.start : stop - rows.start]
            transposed(part.reshape(part.shape[-2:]), target)


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
