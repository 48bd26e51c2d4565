"""What the forms of storage have in common: arrays with names, which are read in parts."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from etils import epath

from upcycle_jax.checkpoints.reader import Index, ReaderBase


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a checkpoint.

    Attributes:
      shape: of it.
      dtype: of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


class Arrays(Protocol):
    """The arrays of a checkpoint.

    Attributes:
      path: its folder or file.
      format: see `CheckpointReader.format`.
      arrays: by name, whose parts are joined by '/'.
    """

    path: epath.Path
    format: str

    @property
    def arrays(self) -> Mapping[str, Stored]: ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part of an array that `index` selects, one slice with explicit bounds for each of its
        dimensions.

        Raises:
          ValueError: it is damaged.
        """
        ...

    def fingerprint(self) -> str:
        """See `CheckpointReader.fingerprint`."""
        ...


class TreeArrays:
    """The arrays of a tree that another reader reads, of which no name is one of this library's.

    Args:
      reader: of the tree, e.g. of an Orbax checkpoint.
    """

    def __init__(self, reader: ReaderBase):
        self._reader = reader
        self.path, self.format = reader.path, reader.format
        self.arrays = {
            name: Stored(spec.shape, spec.dtype) for name, spec in reader.specs().items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._reader.read(name, index)

    def fingerprint(self) -> str:
        return self._reader.fingerprint()
