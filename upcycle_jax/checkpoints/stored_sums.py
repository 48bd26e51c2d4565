"""Checksums of leaves as they are stored: of the encoded bytes of their chunks. So it is told by
reading these bytes once, without decoding them, whether a leaf is as it was.

The text of a leaf is a digest of its layout (shape, chunks, dtype and codec) and, of every chunk in
C order of the grid, its length and the checksum of its bytes (`checksums`, of 32-bit words, the
first byte lowest, the last word filled up with zeros). Two leaves of one text that can be decoded
have the same values; the other way round that need not be.
"""

import collections
import concurrent.futures
import hashlib
import io
import json
import math
import threading
from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np

from upcycle_jax.checkpoints.checksums import Accumulator, aligned
from upcycle_jax.checkpoints.ocdbt import StoredValue
from upcycle_jax.checkpoints.stored_chunks import StoredChunks, StoredValues
from upcycle_jax.checkpoints.workers import threads
from upcycle_jax.progress import Meter, Progress

PREFIX = "stored64:"
"""What the text begins with; 32 hexadecimal digits follow."""
BLOCK_BYTES = 4 << 20
"""Read at a time by each thread."""

Leaf = tuple[str, int | None]
"""A leaf, and a position along its first axis; None for the whole leaf."""


def stored_sums(
    chunks: StoredChunks,
    leaves: Iterable[Leaf],
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> dict[Leaf, str]:
    """Reads the stored bytes of leaves, those that several of them share once, on all cores.

    Args:
      chunks: of a checkpoint.
      leaves: which ones.
      block_bytes: held by each thread, of which there is one more than `workers.threads`.
      progress: called with a line of text about every second.

    Returns:
      A text for each leaf whose chunks are known (`StoredChunks.values`) and can be read.
    """
    found = {leaf: chunks.values(*leaf) for leaf in leaves}
    wanted = {leaf: values for leaf, values in found.items() if values is not None}
    distinct = {
        chunks.identity(value): value for values in wanted.values() for value in values.values
    }
    sums = _sums(chunks, distinct, block_bytes, progress)
    texts = {}
    for leaf, values in wanted.items():
        of_chunks = [sums.get(chunks.identity(value)) for value in values.values]
        if None not in of_chunks:
            texts[leaf] = _text(values, of_chunks)
    return texts


def _text(values: StoredValues, sums: list[str | None]) -> str:
    lengths = [value.length for value in values.values]
    content = [values.layout.to_json(), lengths, sums]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{PREFIX}{digest[:32]}"


def _sums(
    chunks: StoredChunks,
    values: dict[Hashable, StoredValue],
    block_bytes: int,
    progress: Progress | None,
) -> dict[Hashable, str]:
    """Checksums of the bytes of values; those that cannot be read are left out."""
    block_bytes = max(4, block_bytes // 4 * 4)
    totals = {key: _accumulator(value) for key, value in values.items()}
    unread: set[Hashable] = set()
    meter = Meter(sum(value.length for value in values.values()), progress, verb="read")
    merging = threading.Lock()
    blocks = collections.deque(
        (key, start)
        for key, value in sorted(
            values.items(), key=lambda item: (item[1].file, item[1].offset, item[1].length)
        )
        for start in range(0, value.length, block_bytes)
    )

    def work() -> None:
        """Reads blocks while there are any, and adds them to the checksums of their values."""
        room = aligned(block_bytes)
        with _OneFile(chunks.folder) as file:
            while True:
                try:
                    key, start = blocks.popleft()
                except IndexError:
                    return
                value = values[key]
                count = min(block_bytes, value.length - start)
                words = math.ceil(count / 4)
                room[count : 4 * words] = 0
                if key in unread or not read_into(file, value, start, room[:count]):
                    unread.add(key)
                    continue
                part, first = _accumulator(value), start // 4
                part.add((slice(first, first + words),), room[: 4 * words].view("<u4"))
                with merging:
                    totals[key].merge(part)
                meter.add(count, value.file)

    # One more than there are cores, since each waits for a compiled program at times.
    workers = min(threads() + 1, len(blocks))
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        except BaseException:
            blocks.clear()
            raise
    return {key: total.text() for key, total in totals.items() if key not in unread}


class _OneFile:
    """A file of a folder, kept open until another one is wanted."""

    def __init__(self, folder: Path):
        self._folder, self._name = folder, ""
        self._stream: io.FileIO | None = None

    def open(self, name: str) -> io.FileIO:
        """The file of a name.

        Raises:
          OSError: it cannot be opened.
        """
        if self._stream is None or name != self._name:
            self.__exit__()
            self._name, self._stream = name, io.FileIO(self._folder / name)
        return self._stream

    def __enter__(self) -> "_OneFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_into(file: _OneFile, value: StoredValue, start: int, room: np.ndarray) -> bool:
    """Fills an array of bytes with those of a value from `start` on; False where they are not
    there.
    """
    if value.inline is not None:
        room[:] = np.frombuffer(value.inline[start : start + room.size], np.uint8)
        return True
    filled = 0
    try:
        stream = file.open(value.file)
        stream.seek(value.offset + start)
        while filled < room.size:
            count = stream.readinto(room[filled:].data)
            if not count:
                return False
            filled += count
    except OSError:
        return False
    return True


def _accumulator(value: StoredValue) -> Accumulator:
    """Of a value's bytes as words."""
    return Accumulator((math.ceil(value.length / 4),), np.uint32)
