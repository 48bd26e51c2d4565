"""The values of a plan's rows, region by region on the host: what is written offline, put on
devices online, and compared with by the proof.
"""

import functools
from collections.abc import Sequence

import numpy as np

from upcycle_jax.surgery.operations import Expectation, Reach, Region
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.plan import Row


class RowValues:
    """The values of one row. Holds at most one dense leaf (or a region of it) and one slab."""

    def __init__(self, row: Row, reader: Reader, seed: int):
        self.row, self.reader, self.keys, self.seed = row, reader, row.keys(seed), seed
        self._sources: tuple[list[Region | None], list[np.ndarray]] | None = None
        self._slab: tuple[int, np.ndarray] | None = None

    @property
    def whole_slabs(self) -> bool:
        """Whether a value can only be had with its whole slab."""
        return self.row.operation.reach is Reach.WHOLE

    def order(self, regions: Sequence[Region]) -> list[Region]:
        """The regions in the order that reads every source byte once: where regions are
        independent, experts innermost.
        """
        if not self.row.operation.stacked or self.whole_slabs:
            return list(regions)
        return sorted(
            regions, key=lambda region: [(s.start, s.stop) for s in (*region[1:], region[0])]
        )

    @functools.cached_property
    def aux(self) -> dict[str, np.ndarray]:
        """See `Operation.prepare`."""
        operation = self.row.operation
        return operation.prepare(
            self.sources(None) if operation.reads_statistics else (), self.keys, self.row.spec.shape
        )

    def sources(self, region: Region | None, expert: int = 0) -> list[np.ndarray]:
        """The source arrays, or (reach ELEMENT) the part of each that a region of an expert (of the
        leaf, where not stacked) is made of.
        """
        operation, number = self.row.operation, len(self.row.sources)
        indices: list[Region | None] = [None] * number
        if region is not None:
            indices = [operation.source_region(region, n, expert) for n in range(number)]
        if self._sources is None or self._sources[0] != indices:
            self._sources = None  # Free the old ones before the new ones are read.
            read = [
                self.reader.read(name, index or None)
                for name, index in zip(self.row.sources, indices, strict=True)
            ]
            self._sources = (indices, read)
        return self._sources[1]

    def region(self, region: Region) -> np.ndarray:
        """The values of a region of the target leaf (explicit bounds for every axis), in the leaf's
        dtype.

        Where stacked, the region may hold several experts; the result then is a new array, else
        possibly a view of a source.
        """
        if not self.row.operation.stacked:
            return self._slab_region(0, region)
        slabs = [
            self._slab_region(expert, region[1:])
            for expert in range(region[0].start, region[0].stop)
        ]
        return slabs[0][None] if len(slabs) == 1 else np.stack(slabs)

    def prepare(self) -> None:
        """Reads what whole slabs are made of. Threads may call `slab` at a time after it."""
        self.sources(None), self.aux

    def slab(self, expert: int) -> np.ndarray:
        """One expert's slab, or the leaf where not stacked, in the leaf's dtype; it is not kept."""
        operation, shape = self.row.operation, self.row.spec.shape
        made = operation.make(
            self.sources(None),
            self.aux,
            self.keys,
            expert,
            shape[1:] if operation.stacked else shape,
        )
        return np.asarray(made).astype(self.row.spec.dtype, copy=False)

    def _slab_region(self, expert: int, inner: Region) -> np.ndarray:
        """A region of one expert's slab, or of the leaf where not stacked, in the leaf's dtype."""
        operation = self.row.operation
        if self.whole_slabs:
            if self._slab is None or self._slab[0] != expert:
                self._slab = None
                self._slab = (expert, self.slab(expert))
            return self._slab[1][inner]
        shape = tuple(s.stop - s.start for s in inner)
        made = operation.make(self.sources(inner, expert), self.aux, self.keys, expert, shape)
        return np.asarray(made).astype(self.row.spec.dtype, copy=False).reshape(shape)

    def expectation(self, region: Region) -> Expectation | None:
        """What a region of one expert must look like without the generator; a whole slab where
        `whole_slabs`.
        """
        operation = self.row.operation
        inner = region[1:] if operation.stacked else region
        expert = region[0].start if operation.stacked else 0
        sources = self.sources(None if self.whole_slabs else inner, expert)
        shape = tuple(s.stop - s.start for s in inner)
        return operation.expectation(sources, self.aux, expert, shape)


def regions_of(row: Row, max_bytes: int) -> list[Region]:
    """Cuts a leaf into regions of at most `max_bytes` where the operation allows it: one expert
    each where stacked, then along the first axis.
    """
    shape = row.spec.shape
    if not shape:
        return [()]
    stacked = row.operation.stacked
    inner = shape[1:] if stacked else shape
    whole = tuple(slice(0, n) for n in inner)
    rows = inner[0] if inner else 1
    per_row = max(1, (row.spec.nbytes // (shape[0] if stacked else 1)) // max(rows, 1))
    # A merge reads every expert of the region.
    fan_in = 1
    if not row.operation.picks_experts:
        read = sum(s.size for s in row.source_specs) * (shape[0] if stacked else 1)
        fan_in = max(1, read // max(row.spec.size, 1))
    step = max(1, max_bytes // (per_row * fan_in))
    if row.operation.reach is Reach.WHOLE or not inner:
        parts = [whole]
    else:
        parts = [(slice(a, min(a + step, rows)), *whole[1:]) for a in range(0, rows, step)] or [
            whole
        ]
    if not stacked:
        return parts
    return [(slice(e, e + 1), *part) for part in parts for e in range(shape[0])]
