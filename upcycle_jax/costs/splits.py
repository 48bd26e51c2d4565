"""How the arrays of a program are divided over a mesh: from those of its inputs to those of every
operation, as XLA's partitioner does it.

A dimension is divided over mesh axes, and an array has each axis at most once. What a rule here
does not know is whole on every device, so that work is counted too high rather than too low. Hints
inside programs (`sharding_constraint`) are not needed: programs are traced without a mesh.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

Split = tuple[tuple[str, ...], ...]
"""Mesh axes of each dimension."""

MeshShape = Mapping[str, int]
"""Devices along each mesh axis."""


def whole(ndim: int) -> Split:
    """Divided nowhere."""
    return ((),) * ndim


def of_spec(spec: PartitionSpec, ndim: int) -> Split:
    """The split that a partition spec means."""
    named = [
        () if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec
    ]
    return (*named, *whole(ndim - len(named)))


def local_shape(shape: Sequence[int], split: Split, mesh: MeshShape) -> tuple[int, ...]:
    """What one device has of an array; the largest part where it does not divide."""
    return tuple(
        math.ceil(size / math.prod(mesh.get(axis, 1) for axis in axes))
        for size, axes in zip(shape, split, strict=True)
    )


def tiled_size(shape: Sequence[int], tile: tuple[int, int]) -> int:
    """Elements of an array whose last two axes in memory are padded to multiples of a tile, of the
    order of its axes that has the fewest. Axes of one element are merged into others.
    """
    sizes = [size for size in shape if size > 1]
    if len(sizes) < 2:
        return math.prod(sizes)
    rows, columns = tile

    def padded(i: int, j: int) -> int:
        others = math.prod(size for k, size in enumerate(sizes) if k not in (i, j))
        return others * _up(sizes[i], rows) * _up(sizes[j], columns)

    return min(padded(i, j) for i, j in itertools.permutations(range(len(sizes)), 2))


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def joined(splits: Iterable[Split], ndim: int) -> Split:
    """The split of a result whose dimensions are those of all operands, one by one."""
    splits = list(splits)
    found: list[tuple[str, ...]] = []
    used: set[str] = set()
    for dimension in range(ndim):
        longest: tuple[str, ...] = ()
        for split in splits:
            free = tuple(axis for axis in split[dimension] if axis not in used)
            longest = max(longest, free, key=len)
        used.update(longest)
        found.append(longest)
    return tuple(found)


def reshaped(split: Split, before: Sequence[int], after: Sequence[int]) -> Split:
    """The split of a reshaped array: a dimension keeps its axes where the elements before it, in
    row-major order, stay before it.

    `[batch, length, d]` divided over the batch and `[batch * length, d]` are the same on every
    device, and so are `[n, heads * size]` divided over the second dimension and `[n, heads, size]`.
    """
    starts: dict[int, tuple[int, tuple[str, ...]]] = {}
    major = 1
    for size, axes in zip(before, split, strict=True):
        if axes and size > 1:
            starts[major] = (size, axes)
        major *= size
    found = []
    major = 1
    for size in after:
        kept: tuple[str, ...] = ()
        if size > 1 and major in starts:
            old_size, axes = starts.pop(major)
            if size % old_size == 0 or old_size % size == 0:
                kept = axes
        found.append(kept)
        major *= size
    return tuple(found)


def of_product(
    lhs: Split, rhs: Split, numbers: Any, *, lhs_is_larger: bool
) -> tuple[Split, Split, Split]:
    """Splits of a `dot_general`: of both operands as they are multiplied, and of the result.

    Where both want an axis for different dimensions, batch dimensions come first, then contracted
    ones that both divide, then dimensions of the larger operand: a device fetches the rest.
    """
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = numbers
    used: set[str] = set()

    def take(*axes: tuple[str, ...]) -> tuple[str, ...]:
        found = max((tuple(a for a in one if a not in used) for one in axes), key=len)
        used.update(found)
        return found

    left: list[tuple[str, ...]] = [()] * len(lhs)
    right: list[tuple[str, ...]] = [()] * len(rhs)
    pairs = list(zip(lhs_contracted, rhs_contracted, strict=True))
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        left[i] = right[j] = take(lhs[i], rhs[j])
    for i, j in pairs:
        both = tuple(axis for axis in lhs[i] if axis in rhs[j])
        left[i] = right[j] = take(both)
    lhs_free = [i for i in range(len(lhs)) if i not in (*lhs_contracted, *lhs_batch)]
    rhs_free = [j for j in range(len(rhs)) if j not in (*rhs_contracted, *rhs_batch)]
    sides = [(left, lhs, lhs_free), (right, rhs, rhs_free)]
    for split, given, free in sides if lhs_is_larger else reversed(sides):
        for i in free:
            split[i] = take(given[i])
    for i, j in pairs:
        if not left[i]:
            left[i] = right[j] = take(lhs[i], rhs[j])
    result = [left[i] for i in lhs_batch] + [left[i] for i in lhs_free]
    return tuple(left), tuple(right), (*result, *(right[j] for j in rhs_free))


def of_gather(operand: Split, indices: Split, shapes: Any, params: Mapping[str, Any]) -> Split:
    """The split of a `gather`: dimensions of the indices, and of slices that are whole.

    Args:
      operand: its split.
      indices: theirs; the last dimension is the index vector.
      shapes: shape of the operand, number of dimensions of the result.
      params: of the equation.
    """
    shape, ndim = shapes
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    found: list[tuple[str, ...]] = [()] * ndim
    batch = [i for i in range(ndim) if i not in numbers.offset_dims]
    for i, axes in zip(batch, indices[:-1], strict=True):
        found[i] = axes
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for of_operand, of_indices in pairs:
        i = batch[of_indices]
        found[i] = max(found[i], operand[of_operand], key=len)
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(shape)) if i not in removed]
    for i, dimension in zip(numbers.offset_dims, kept, strict=True):
        if sizes[dimension] == shape[dimension]:
            found[i] = operand[dimension]
    return joined([tuple(found)], ndim)


def of_scatter(
    operand: Split, indices: Split, updates: Split, numbers: Any, *, replaces: bool
) -> Split:
    """The split of a `scatter`: that of the operand, its batching dimensions also as updates have
    them, and whole windows.

    Where values are put in place rather than added up, they are moved and stay divided: each device
    keeps as many as it had.
    """
    found = list(operand)
    window = list(numbers.update_window_dims)
    rows = [i for i in range(len(updates)) if i not in window]
    pairs = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    for of_operand, of_indices in pairs:
        ways = (found[of_operand], indices[of_indices], updates[rows[of_indices]])
        found[of_operand] = max(ways, key=len)
    removed = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(operand)) if i not in removed]
    for dimension, i in zip(kept, window, strict=True):
        found[dimension] = max(found[dimension], updates[i], key=len)
    moved = [i for i in rows if i not in numbers.scatter_indices_batching_dims]
    if replaces and len(moved) == len(numbers.inserted_window_dims) == 1:
        found[numbers.inserted_window_dims[0]] = updates[moved[0]]
    return joined([tuple(found)], len(operand))


def of_move(
    name: str,
    params: Mapping[str, Any],
    before: Sequence[tuple[int, ...]],
    after: tuple[int, ...],
    given: Sequence[Split],
) -> Split:
    """The split of a result of an operation on elements, a reduction, or a change of shape.

    Args:
      name: of the primitive.
      params: of the equation.
      before: shapes of the operands.
      after: shape of the result.
      given: splits of the operands.
    """
    if name == "reshape":
        return reshaped(given[0], before[0], after)
    if name == "transpose":
        return tuple(given[0][axis] for axis in params["permutation"])
    if name == "broadcast_in_dim":
        found: list[tuple[str, ...]] = [()] * len(after)
        for axis, size, axes in zip(
            params["broadcast_dimensions"], before[0], given[0], strict=True
        ):
            found[axis] = axes if size == after[axis] else ()
        return tuple(found)
    if name.startswith(("reduce_", "arg", "squeeze")) and name != "reduce_precision":
        removed = params["dimensions" if name == "squeeze" else "axes"]
        return tuple(axes for axis, axes in enumerate(given[0]) if axis not in removed)
    # Elements stay where they are, or dimensions of one size do (slices, padding, concatenation).
    same = [
        tuple(
            axes if size == result else ()
            for size, result, axes in zip(shape, after, split, strict=True)
        )
        for shape, split in zip(before, given, strict=True)
        if len(shape) == len(after)
    ]
    return joined(same, len(after))
