"""Proves the leaves of a result one by one: by what is stored only once, by value, or by recorded
checksums where the source is gone.
"""

import math
import threading
from collections.abc import Mapping

import numpy as np

from upcycle_jax.checkpoints.checksums import Accumulator, nonfinite_count
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.checkpoints.stored_sums import BLOCK_BYTES as STORED_BLOCK_BYTES
from upcycle_jax.checkpoints.stored_sums import stored_sums
from upcycle_jax.progress import Meter
from upcycle_jax.surgery.leaf_check import LeafVerdict, Moments, check_region, twin_of
from upcycle_jax.surgery.leaf_sums import LeafSum, accumulator, blocks, rows_of_chunk
from upcycle_jax.surgery.leaf_values import RowValues, regions_of
from upcycle_jax.surgery.operations import Copy, Region, Tile
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.plan import Plan, Row
from upcycle_jax.surgery.recorded import Recorded
from upcycle_jax.surgery.source_chunks import SourceChunks

REGION_BYTES = 64 << 20
"""Read and compared at a time, of all threads together."""
MAX_PROBLEMS = 4
"""More of one leaf are not looked for."""


def is_plain(row: Row) -> bool:
    """Whether a leaf is its source array, or one such array per expert: the source's checksum then
    is that of each.
    """
    return isinstance(row.operation, Copy | Tile) and row.moves_bits


class LeafProver:
    """Proves rows of a plan; several threads may call it at a time."""

    def __init__(
        self,
        plan: Plan,
        source: Reader | None,
        target: Reader,
        recorded: Recorded,
        sums: Mapping[str, LeafSum],
        meter: Meter,
        region_bytes: int,
        origins: SourceChunks,
    ):
        self.plan, self.source, self.target, self.recorded = plan, source, target, recorded
        self.sums, self.meter = sums, meter
        self.specs = target.specs()
        self.stored = StoredChunks(target)
        self.origins = origins
        self._summing = threading.Lock()  # All cores are busy with one leaf.
        self.region_bytes = max(1 << 20, region_bytes)

    def changed(self, name: str) -> bool:
        """Whether a source leaf is not what it was at the conversion."""
        now, then = self.sums.get(name), self.recorded.checksums.get(name)
        return now is not None and (bool(now.problem) or bool(then and now.checksum != then))

    def prove(self, row: Row) -> LeafVerdict:
        """What is found about one leaf, which must be among the result's."""
        verdict, found = LeafVerdict(row.target, row.what, row.spec.size), self.specs[row.target]
        if (found.shape, found.dtype) != (row.spec.shape, row.spec.dtype):
            verdict.problems.append(f"is {found}, planned {row.spec}")
            verdict.readable = False
        for name in row.sources:
            if name in self.sums and self.sums[name].problem:
                verdict.problems.append(
                    f"source leaf {name} cannot be read: {self.sums[name].problem}"
                )
                verdict.readable, verdict.blame = False, "source"
        if verdict.problems:
            return verdict
        try:
            if is_plain(row):
                self._copies(row, verdict)
            elif self.source is None and row.sources:
                self._checksum_alone(row, verdict)
            else:
                self._values(row, verdict)
        except _CannotBeRead as error:
            verdict.problems.append(f"cannot be read: {error}")
            verdict.readable, verdict.blame = False, "result"
        return verdict

    # Copies: each distinct stored array is looked at once.

    def _copies(self, row: Row, verdict: LeafVerdict) -> None:
        """Proves a copy, or copies of one source leaf for all experts.

        Experts whose stored bytes are the same are looked at once; those that share the source's
        own bytes are not read at all.
        """
        name, experts = row.sources[0], range(row.spec.shape[0]) if row.operation.stacked else (0,)
        size, nbytes = row.spec.size // len(experts), row.spec.nbytes // len(experts)
        if not len(experts) or not size:
            return
        same: dict[object, list[int]] = {}
        for expert in experts:
            slab = self.stored.slab(row.target, expert if row.operation.stacked else None)
            same.setdefault(("alone", expert) if slab is None else slab, []).append(expert)
        chunks, leaf = self.origins.origin(name)
        shared = same.pop(chunks.slab(leaf), []) if self.source is not None else []
        if shared:
            self._shared_with_source(row, shared, size, verdict)
            self.meter.add(nbytes * len(shared), row.target)
        if not same:
            return
        twins = {members[0]: len(members) for members in same.values()}
        before = len(verdict.problems)
        if self.source is None:
            right = self._slabs_by_checksum(row, list(twins), verdict)
        else:
            right = self._slabs_by_value(row, list(twins), verdict)
        for expert, count in twins.items():
            if expert in right:
                verdict.shared += size * (count - 1)
                if self.source is None:
                    verdict.by_checksum += size * count
                else:
                    verdict.identical += size * count
            self.meter.add(nbytes * (count - 1), row.target)
        if len(verdict.problems) > before and self.source is not None:
            self._blame_copies(row, [e for e in twins if e not in right], verdict)

    def _shared_with_source(
        self, row: Row, experts: list[int], size: int, verdict: LeafVerdict
    ) -> None:
        """Proves experts that share the stored bytes of their source leaf."""
        name = row.sources[0]
        found = self.sums[name]
        if found.nonfinite:
            verdict.problems.append(f"{found.nonfinite} values are not finite")
        if self.changed(name):
            verdict.problems.append(
                f"shares its stored chunks with source leaf {name}, whose values are no longer"
                " those of the conversion"
            )
            verdict.blame = "both"
        if not verdict.problems:
            verdict.identical += size * len(experts)
            verdict.shared += size * len(experts)

    def _slabs_by_value(self, row: Row, experts: list[int], verdict: LeafVerdict) -> set[int]:
        """Compares experts with the source; returns those that are right."""
        assert self.source is not None
        values, right = RowValues(row, self.source, self.plan.recipe.seed), set(experts)
        for region in self._regions(row, experts):
            expert = region[0].start if row.operation.stacked else 0
            if expert not in right:
                continue
            actual = self._read(row, region)
            problem = check_region(row, values, region, actual, None, Moments())
            if problem:
                right.discard(expert)
                if len(verdict.problems) < MAX_PROBLEMS:
                    twin = twin_of(actual, row, region, self.source)
                    verdict.problems.append(
                        _where(row, region)
                        + problem
                        + (f"; these are the bits of source leaf {twin}" if twin else "")
                    )
                else:
                    verdict.problems[MAX_PROBLEMS:] = ["further experts differ, too"]
        return right

    def _slabs_by_checksum(self, row: Row, experts: list[int], verdict: LeafVerdict) -> set[int]:
        """Compares experts with the recorded checksum of the source; returns those that are
        right.
        """
        then = self.recorded.checksums.get(row.sources[0])
        if then is None:
            verdict.problems.append(
                "the source is gone and no checksum of it is recorded: it cannot be proved"
            )
            return set()
        right = self._stored_as_recorded(row, experts)
        for expert in experts:
            if expert in right:
                continue
            now, bad = self._slab_sum(row, expert)
            if now == then and not bad:
                right.add(expert)
            elif len(verdict.problems) < MAX_PROBLEMS:
                where = f"expert {expert}: " if row.operation.stacked else ""
                what = f"{bad} values are not finite" if now == then else "is not what was recorded"
                verdict.problems.append(f"{where}{what} (checksum {now}, recorded {then})")
                verdict.blame = "result"
        return right

    def _stored_as_recorded(self, row: Row, experts: list[int]) -> set[int]:
        """The experts (0 for a leaf without experts) that are stored as the bytes that the record
        has of their source leaf: these are read, and not decoded.
        """
        then = self.recorded.stored.get(row.sources[0])
        if then is None:
            return set()
        slabs = {(row.target, e if row.operation.stacked else None): e for e in experts}
        with self._summing:
            found = stored_sums(
                self.stored, slabs, block_bytes=min(STORED_BLOCK_BYTES, self.region_bytes)
            )
        right = {slabs[slab] for slab, text in found.items() if text == then}
        parts = row.spec.shape[0] if row.operation.stacked else 1
        self.meter.add(row.spec.nbytes // parts * len(right), row.target)
        return right

    def _slab_sum(self, row: Row, expert: int) -> tuple[str, int]:
        """The checksum of one expert (or of a leaf without experts) of the result, and how many of
        its values are not finite.
        """
        stacked = row.operation.stacked
        shape = row.spec.shape[1:] if stacked else row.spec.shape
        total, bad = Accumulator(shape, row.spec.dtype), 0
        for region in self._regions(row, [expert]):
            actual = self._read(row, region)
            total.add(region[1:] if stacked else region, actual[0] if stacked else actual)
            bad += nonfinite_count(actual)
        return total.text(), bad

    def _blame_copies(self, row: Row, wrong: list[int], verdict: LeafVerdict) -> None:
        """Tells from the recorded checksum which side of a copy that differs is not as it was."""
        name = row.sources[0]
        then = self.recorded.checksums.get(name)
        if then is None or verdict.blame:
            return
        right_result = wrong and all(self._slab_sum(row, e)[0] == then for e in wrong)
        verdict.blame = (
            ("source" if right_result else "both")
            if self.changed(name)
            else ("" if right_result else "result")
        )

    # Everything else.

    def _values(self, row: Row, verdict: LeafVerdict) -> None:
        """Compares a leaf with what the recipe makes of the source."""
        values = RowValues(row, self.source or _Nothing(), self.plan.recipe.seed)
        moments, total = Moments(), accumulator(row.spec)
        for region in regions_of(row, self.region_bytes):
            actual = self._read(row, region)
            if total is not None:
                total.add(region, actual)
            if len(verdict.problems) > MAX_PROBLEMS:
                continue  # Only the checksum is still wanted.
            problem = check_region(row, values, region, actual, verdict, moments)
            if problem:
                twin = twin_of(actual, row, region, self.source) if self.source else ""
                verdict.problems.append(
                    _where(row, region)
                    + problem
                    + (f"; these are the bits of source leaf {twin}" if twin else "")
                )
                if len(verdict.problems) == MAX_PROBLEMS:
                    verdict.problems.append("further regions were not looked at")
        if moments.count:
            verdict.mean, verdict.std = moments.mean, moments.std
        self._compare_sum(row, total.text() if total is not None else None, verdict)

    def _checksum_alone(self, row: Row, verdict: LeafVerdict) -> None:
        """Compares a leaf that cannot be made again with the checksum of when it was proved."""
        total, bad = accumulator(row.spec), 0
        for region in blocks(row.spec, rows_of_chunk(self.target, row.target), self.region_bytes):
            actual = self._read(row, region)
            bad += nonfinite_count(actual)
            if total is not None:
                total.add(region, actual)
        if bad:
            verdict.problems.append(f"{bad} values are not finite")
        self._compare_sum(row, total.text() if total is not None else None, verdict)
        if row.target not in self.recorded.results:
            verdict.problems.append(
                "the source is gone and no checksum of this leaf is recorded: it cannot be proved"
            )
        elif not verdict.problems:
            verdict.by_checksum = row.spec.size

    def _compare_sum(self, row: Row, now: str | None, verdict: LeafVerdict) -> None:
        """Compares a leaf's checksum with the recorded one, and finds the side that changed."""
        verdict.checksum, then = now, self.recorded.results.get(row.target)
        changed = any(self.changed(name) for name in row.sources)
        if then is None or now is None:
            verdict.blame = "source" if verdict.problems and changed else ""
            return
        if now != then:
            verdict.problems.append(
                f"is not what was proved at the conversion (checksum {now}, recorded {then})"
            )
            verdict.blame = "both" if changed else "result"
        elif verdict.problems and changed:
            verdict.blame = "source"

    def _regions(self, row: Row, experts: list[int]) -> list[Region]:
        """The regions of a leaf that belong to some of its experts."""
        regions = regions_of(row, self.region_bytes)
        if not row.operation.stacked:
            return regions
        wanted = set(experts)
        return [region for region in regions if region[0].start in wanted]

    def _read(self, row: Row, region: Region) -> np.ndarray:
        """A region of the result.

        Raises:
          _CannotBeRead: its data is missing or damaged.
        """
        try:
            actual = self.target.read(row.target, region or None)
        except (ValueError, KeyError, OSError) as error:
            raise _CannotBeRead(error.args[0] if error.args else error) from None
        self.meter.add(math.prod(actual.shape) * actual.dtype.itemsize, row.target)
        return actual


class _CannotBeRead(Exception):
    """A part of the result cannot be read."""


class _Nothing:
    """A source without leaves: for rows that are made of none."""

    step, path, format = 0, None, ""

    def specs(self) -> dict:
        return {}

    def read(self, name: str, index: Region | None = None) -> np.ndarray:
        raise KeyError(name)

    def read_sharded(self, name, sharding):
        raise KeyError(name)

    def fingerprint(self) -> str:
        return ""

    def metadata(self) -> dict:
        return {}


def _where(row: Row, region: Region) -> str:
    """'expert 3: ' for a region of stacked experts, else nothing."""
    return f"expert {region[0].start}: " if row.operation.stacked else ""
