"""A checkpoint of which some leaves are another's."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from upcycle_jax.surgery.parents import Reader
from upcycle_jax.trees import LeafSpec


class Overlaid:
    """A reader with leaves of another: a source whose positions are those of the result, so that
    both take images of one size, or whose head is.

    Attributes:
      reader: the checkpoint.
      other: the one whose leaves stand in.
      replaced: which.
    """

    def __init__(self, reader: Reader, other: Reader, replaced: Collection[str]):
        self.reader, self.other, self.replaced = reader, other, frozenset(replaced)

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self.reader.step

    def specs(self) -> dict[str, LeafSpec]:
        """Specs of its leaves."""
        others = self.other.specs()
        return {**self.reader.specs(), **{name: others[name] for name in self.replaced}}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A leaf, or a part of it."""
        return (self.other if name in self.replaced else self.reader).read(name, index)

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """A leaf as a global array."""
        return (self.other if name in self.replaced else self.reader).read_sharded(name, sharding)

    def fingerprint(self) -> str:
        """Of the checkpoint."""
        return self.reader.fingerprint()

    def metadata(self) -> dict[str, Any]:
        """Of the checkpoint."""
        return self.reader.metadata()
