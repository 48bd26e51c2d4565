"""Tensors out of leaves: the way back of `views`."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from upcycle_jax.checkpoints.casting import cast
from upcycle_jax.checkpoints.huggingface.base import Export, Leaf, Source, row_axis
from upcycle_jax.checkpoints.huggingface.transposing import transposed, transposed_parts


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a tensor, or all of it.

    Attributes:
      path: of the leaf, for messages.
      leaf: that it comes from.
      expert: along the leaf's first axis, where tensors are stacked there; None: all of the leaf.
      source: how the leaf is made of the tensor.
    """

    path: str
    leaf: Leaf
    expert: int | None
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part of the tensor."""
        shape = list(self.leaf.spec.shape if self.expert is None else self.leaf.spec.shape[1:])
        if self.source.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)

    def read(self, dtype: np.dtype) -> np.ndarray:
        """The part of the tensor; see `Tensor.read`."""
        value = self.values(dtype)
        return transposed(value) if self.source.transposed else value

    def values(self, dtype: np.dtype) -> np.ndarray:
        """The part of the leaf that is behind it, as the leaf has it; see `Tensor.read`."""
        whole = [slice(0, size) for size in self.leaf.spec.shape]
        if self.expert is not None:
            whole[0] = slice(self.expert, self.expert + 1)
        value = cast(self.path, self.leaf.read(tuple(whole)), dtype, tuple(whole))
        return value if self.expert is None else value[0]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is to be written.

    Attributes:
      name: in the file.
      pieces: what it is made of.
      dtype: to write.
    """

    name: str
    pieces: tuple[Piece, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        shape = list(self.pieces[0].shape)
        if self.pieces[0].source.rows is not None:
            axis = row_axis(len(shape))
            shape[axis] = sum(piece.shape[axis] for piece in self.pieces)
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """About what is held while it is read: leaves as they are stored and decoded, and what is
        made of them.
        """
        leaves = sum(math.prod(part.shape) * part.leaf.spec.dtype.itemsize for part in self.pieces)
        return 2 * leaves + self.nbytes

    def parts(self) -> Iterator[np.ndarray]:
        """What `read` gives, in contiguous parts in C order, each of which is overwritten by the
        next; holds less memory.

        Raises:
          ValueError: as `read`.
        """
        first = self.pieces[0]
        if first.source.rows is None and first.source.transposed:
            yield from transposed_parts(first.values(self.dtype))
        else:
            yield self.read()

    def read(self) -> np.ndarray:
        """Its values, contiguous.

        Raises:
          ValueError: a leaf is damaged, or the dtype cannot hold a value of it.
        """
        if self.pieces[0].source.rows is None:
            return np.asarray(self.pieces[0].read(self.dtype), order="C")  # Scalars stay so.
        out = np.empty(self.shape, self.dtype)
        rows = np.moveaxis(out, row_axis(out.ndim), 0)
        for piece in self.pieces:
            assert piece.source.rows is not None
            value = piece.read(self.dtype)
            rows[piece.source.rows.indices()] = np.moveaxis(value, row_axis(value.ndim), 0)
        return out


def tensors_of(folder: Export, dtype: np.dtype | None) -> list[Tensor]:
    """Every tensor of a folder, in order.

    Args:
      folder: what is written.
      dtype: of all tensors; None: each has that of its leaves.
    """
    pieces: dict[str, list[Piece]] = {}
    for path, sources in folder.tensors.items():
        leaf = folder.leaves[path]
        if isinstance(sources, Source):
            pieces.setdefault(sources.tensor, []).append(Piece(path, leaf, None, sources))
            continue
        for expert, source in enumerate(sources):
            pieces.setdefault(source.tensor, []).append(Piece(path, leaf, expert, source))
    return [_tensor(name, parts, dtype) for name, parts in pieces.items()]


def _tensor(name: str, parts: Sequence[Piece], dtype: np.dtype | None) -> Tensor:
    own = functools.reduce(np.promote_types, (part.leaf.spec.dtype for part in parts))
    out = Tensor(name, tuple(parts), np.dtype(own if dtype is None else dtype))
    if parts[0].source.rows is None:
        assert len(parts) == 1, f"{name} is made of {[part.path for part in parts]}"
        return out
    taken = np.concatenate([part.source.rows.indices() for part in parts if part.source.rows])
    size = out.shape[row_axis(len(out.shape))]
    assert np.array_equal(np.sort(taken), np.arange(size)), f"{name} is not filled"
    return out
