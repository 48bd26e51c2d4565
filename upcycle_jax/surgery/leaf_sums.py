"""Checksums of the leaves of a source: every distinct leaf is read once, on all cores."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from upcycle_jax.checkpoints.checksums import Accumulator, nonfinite_count
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader
from upcycle_jax.checkpoints.workers import threads
from upcycle_jax.progress import Meter, Progress
from upcycle_jax.surgery.operations import Region
from upcycle_jax.surgery.parents import JoinedReader, Reader
from upcycle_jax.trees import LeafSpec

BLOCK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class LeafSum:
    """What reading a leaf once tells.

    Attributes:
      checksum: see `checkpoints.checksums`; '' where it could not be read, or its dtype has none.
      nonfinite: values that are NaN or infinite.
      problem: why it could not be read; '' otherwise.
    """

    checksum: str
    nonfinite: int = 0
    problem: str = ""


def leaf_sums(
    reader: Reader,
    names: Iterable[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> dict[str, LeafSum]:
    """Reads leaves and adds up their checksums, block by block.

    Args:
      reader: a checkpoint.
      names: its leaves, full paths.
      block_bytes: bytes of one block; each of `progress.threads` threads holds one. Stored chunks
        that are larger are read whole.
      progress: called with a line of text about every second.
    """
    specs = reader.specs()
    wanted = sorted(set(names), key=lambda name: -specs[name].nbytes)
    meter = Meter(sum(specs[name].nbytes for name in wanted), progress, verb="read")
    made = {name: _Sum(specs[name]) for name in wanted}

    def add(name: str, region: Region) -> None:
        """Reads one block and adds it to the checksum of its leaf."""
        found = made[name]
        if found.problem:
            return
        try:
            block = reader.read(name, region or None)
        except (ValueError, KeyError, OSError) as error:
            found.problem = str(error.args[0] if error.args else error)
            return
        found.add(region, block)
        meter.add(block.nbytes, name)

    tasks = [
        (name, region)
        for name in wanted
        for region in blocks(specs[name], rows_of_chunk(reader, name), block_bytes)
    ]
    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        try:
            for future in [pool.submit(add, *task) for task in tasks]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: made[name].result() for name in sorted(made)}


class _Sum:
    """The checksum of one leaf, to which several threads add."""

    def __init__(self, spec: LeafSpec):
        self.spec, self.nonfinite, self.problem = spec, 0, ""
        self._lock = threading.Lock()
        self._total = accumulator(spec)

    def add(self, region: Region, block: np.ndarray) -> None:
        part, bad = accumulator(self.spec), nonfinite_count(block)
        if part is not None:
            part.add(region, block)
        with self._lock:
            self.nonfinite += bad
            if self._total is not None and part is not None:
                self._total.merge(part)

    def result(self) -> LeafSum:
        if self.problem or self._total is None:
            return LeafSum("", self.nonfinite, self.problem)
        return LeafSum(self._total.text(), self.nonfinite)


def accumulator(spec: LeafSpec) -> Accumulator | None:
    """An accumulator for a leaf; None for a dtype that has no checksum."""
    try:
        return Accumulator(spec.shape, spec.dtype)
    except ValueError:
        return None


def blocks(spec: LeafSpec, rows: int, max_bytes: int) -> Iterator[Region]:
    """Cuts a leaf along its first axis into blocks of about `max_bytes`, each a multiple of `rows`
    (those of a stored chunk) high, so that no chunk is decoded twice.
    """
    if not spec.shape:
        yield ()
        return
    height = spec.shape[0]
    per_row = max(1, spec.nbytes // max(height, 1))
    step = max(1, max_bytes // (per_row * rows)) * rows
    rest = tuple(slice(0, n) for n in spec.shape[1:])
    for first in range(0, height, step):
        yield (slice(first, min(first + step, height)), *rest)
    if not height:
        yield (slice(0, 0), *rest)


def rows_of_chunk(reader: Reader, name: str) -> int:
    """Rows of a stored chunk, where that is known."""
    if isinstance(reader, JoinedReader):
        return rows_of_chunk(*reader.origin(name))
    if isinstance(reader, OrbaxReader) and not reader.uses_zarr3:
        return max((1, *reader.zarr_layout(name).chunks[:1]))
    return 1
