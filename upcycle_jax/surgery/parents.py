"""Several dense checkpoints read as one source: leaves of parent n are named `parent_<n>/<full
path>`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from upcycle_jax.checkpoints import model_settings
from upcycle_jax.trees import LeafSpec


class Reader(Protocol):
    """What the surgeon needs of a checkpoint; `checkpoints.CheckpointReader` has it."""

    @property
    def step(self) -> int:
        """Training step."""

    def specs(self) -> dict[str, LeafSpec]:
        """Every leaf's spec, by full path."""

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One leaf or a part of it."""

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """One leaf as a global array."""

    def fingerprint(self) -> str:
        """A digest of the checkpoint's files."""

    def metadata(self) -> dict[str, Any]:
        """This library's record of the checkpoint; empty where there is none."""


class JoinedReader:
    """Several readers as one."""

    def __init__(self, readers: Sequence[Reader]):
        self.readers = tuple(readers)
        self.path = " + ".join(str(getattr(reader, "path", "?")) for reader in self.readers)
        self.format = "several"

    @property
    def step(self) -> int:
        """The first parent's step."""
        return self.readers[0].step

    def specs(self) -> dict[str, LeafSpec]:
        """All leaves of all parents."""
        return {
            f"parent_{n}/{name}": spec
            for n, reader in enumerate(self.readers)
            for name, spec in reader.specs().items()
        }

    def origin(self, name: str) -> tuple[Reader, str]:
        """The parent that has a leaf, and the leaf's name there."""
        parent, _, rest = name.partition("/")
        return self.readers[int(parent.removeprefix("parent_"))], rest

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One leaf of one parent, or a part of it."""
        reader, rest = self.origin(name)
        return reader.read(rest, index)

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """One leaf of one parent as a global array."""
        reader, rest = self.origin(name)
        return reader.read_sharded(rest, sharding)

    def fingerprint(self) -> str:
        """All fingerprints, in order."""
        return " ".join(reader.fingerprint() for reader in self.readers)

    def metadata(self) -> dict[str, Any]:
        """Empty: several sources have no one record."""
        return {}

    def model_settings(self) -> Mapping[str, Any]:
        """What the parents state together.

        Raises:
          ValueError: two of them contradict each other.
        """
        return model_settings.common(self.readers)


def join(readers: Sequence[Reader]) -> Reader:
    """One reader as it is, several as a `JoinedReader`."""
    return readers[0] if len(readers) == 1 else JoinedReader(readers)


def source_paths(reader: Reader) -> list[str]:
    """The paths of the checkpoints behind a reader; empty where they lie nowhere on disk."""
    readers = reader.readers if isinstance(reader, JoinedReader) else (reader,)
    paths = [getattr(each, "path", None) for each in readers]
    return [str(path) for path in paths if path is not None]
