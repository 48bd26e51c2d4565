"""Tells which parts of leaves are one and the same stored bytes, from the index alone: what shares
its storage need not be read twice.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Hashable
from pathlib import Path

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.ocdbt import StoredValue, stored_values
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader


@dataclasses.dataclass(frozen=True)
class StoredValues:
    """Where the chunks of a leaf, or of one position along its first axis, lie.

    Attributes:
      layout: how they are encoded, and which part of the array each of them is.
      values: of every chunk, in C order of the grid.
    """

    layout: storage.ZarrLayout
    values: tuple[StoredValue, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(value.length for value in self.values)


class StoredChunks:
    """Where the chunks of one checkpoint lie on the disk.

    Checkpoints other than local OCDBT databases with zarr 2 arrays have no chunks that could be
    shared: of their leaves nothing is known.
    """

    def __init__(self, reader: object):
        self._reader = (
            reader
            if isinstance(reader, OrbaxReader)
            and reader.uses_ocdbt
            and not reader.uses_zarr3
            and storage.is_local(reader.item)
            else None
        )
        self._files: dict[str, Hashable] = {}

    def slab(self, name: str, expert: int | None = None) -> Hashable | None:
        """What identifies the stored bytes of a leaf, or of one position along its first axis.

        Two equal answers, of the same or of different checkpoints, mean the same values: the same
        codec, chunk for chunk the same bytes of the same files. None: unknown, or chunks are
        missing.

        Args:
          name: the leaf.
          expert: None for the whole leaf.
        """
        found = self.values(name, expert)
        if found is None:
            return None
        layout = found.layout
        codec = repr(sorted(layout.codec.items(), key=lambda item: item[0]))
        return (
            layout.shape,
            layout.chunks,
            layout.dtype,
            codec,
            *(self.identity(value) for value in found.values),
        )

    def values(self, name: str, expert: int | None = None) -> StoredValues | None:
        """Where the chunks lie that `slab` compares; None: unknown, or chunks are missing."""
        if self._reader is None or name not in self._values:
            return None
        layout = self._reader.zarr_layout(name)
        if expert is not None:
            if layout.chunks[:1] != (1,):
                return None
            layout = dataclasses.replace(layout, shape=layout.shape[1:], chunks=layout.chunks[1:])
        prefix = "" if expert is None else f"{expert}{layout.separator}"
        places = [
            self._values[name].get(prefix + layout.key(position))
            for position in itertools.product(*(range(n) for n in layout.grid))
        ]
        there = tuple(place for place in places if place is not None)
        return StoredValues(layout, there) if there and len(there) == len(places) else None

    def files(self, name: str) -> list[str]:
        """The files that hold a leaf's values, as paths; of a leaf that is unknown, the
        checkpoint's own.
        """
        if self._reader is None or name not in self._values:
            return []
        used = {value.file for value in self._values[name].values()}
        return sorted(str(self.folder / file) if file else str(self.folder) for file in used)

    @property
    def folder(self) -> Path:
        """Of the database: what the files of its values are relative to."""
        assert self._reader is not None
        return Path(os.fspath(self._reader.item))

    @functools.cached_property
    def _values(self) -> dict[str, dict[str, StoredValue]]:
        """By leaf and by chunk key; empty where the index or the tree cannot be read (reading the
        leaves then says why).
        """
        assert self._reader is not None
        try:
            names = {self._reader.key(name): name for name in self._reader.specs()}
            values = stored_values(self.folder, self._reader.context)
        except (ValueError, KeyError, OSError):
            return {}
        found: dict[str, dict[str, StoredValue]] = {}
        for key, value in values.items():
            leaf, _, chunk = key.partition("/")
            if leaf in names and chunk != ".zarray":
                found.setdefault(names[leaf], {})[chunk] = value
        return found

    def identity(self, value: StoredValue) -> Hashable:
        """Equal where the bytes are the same ones: hard links of one file are one file."""
        if value.inline is not None:
            return value.inline
        return (self._file_identity(value.file), value.offset, value.length)

    def _file_identity(self, file: str) -> Hashable:
        if file not in self._files:
            try:
                found = os.stat(self.folder / file)
                self._files[file] = (found.st_dev, found.st_ino)
            except OSError:
                self._files[file] = (str(self.folder), file)
        return self._files[file]
