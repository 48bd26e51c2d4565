"""Repeats positions along the first axis of leaves at the speed of a file copy.

Experts that begin as copies of one MLP have the same stored bytes. One of them is written through
the database. The others get copies of the files that hold it, made by the kernel on all cores, and
the database refers to those: nothing is encoded, buffered or hashed again, and every expert has
bytes of its own.
"""

import concurrent.futures
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tensorstore as ts

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.ocdbt import MANIFEST, index_files, stored_values
from upcycle_jax.checkpoints.output import REFERENCED
from upcycle_jax.checkpoints.workers import threads
from upcycle_jax.checkpoints.writer import CheckpointWriter
from upcycle_jax.progress import Meter, Progress

# Chunk keys are digits with dots; '.zarray' sorts before them and is not copied.
_CHUNK_KEYS = ts.KvStore.KeyRange(b"0", b":")


def repeat_rows(
    writer: CheckpointWriter, rows: Mapping[str, Sequence[int]], progress: Progress | None = None
) -> None:
    """Gives positions along the first axis of leaves the stored bytes of another one. What an
    interrupted call did already is not done again.

    Args:
      writer: for the leaves named here, `has_rows` is true.
      rows: by leaf, positions along that axis: the first has been written, the others get what it
        has.
      progress: called with a line of text about every second.

    Raises:
      ValueError: a leaf is stored otherwise, or its first position has not been written.
      OSError: the disk is full or cannot be written.
    """
    writer.flush()
    lacking: dict[int, list[str]] = {}
    for name, (first, *others) in rows.items():
        if not has_rows(writer, name):
            raise ValueError(
                f"{name}: of chunks of {writer.layout(name).chunks} none holds one position of its"
                " first axis and its rest, which could be repeated"
            )
        if not writer.is_written(name, (slice(first, first + 1),)):
            raise ValueError(f"{name}: position {first} is not there yet, so it has no copies")
        for row in others:
            if not writer.is_written(name, (slice(row, row + 1),)):
                lacking.setdefault(row, []).append(name)
    if not lacking:
        return
    with writer.explained():
        folders = {row: writer.state / f"{REFERENCED}.row_{row}" for row in sorted(lacking)}
        _copy_database(writer, rows, list(folders.values()), progress)
    refer(
        writer,
        (
            (folders[row], _prefix(writer, name, rows[name][0]), _prefix(writer, name, row))
            for row, names in lacking.items()
            for name in names
        ),
    )


def has_rows(writer: CheckpointWriter, name: str) -> bool:
    """Whether every position along a leaf's first axis is an array with chunks of its own."""
    chunks = writer.layout(name).chunks
    return len(chunks) > 1 and chunks[0] == 1


def _prefix(writer: CheckpointWriter, name: str, row: int) -> str:
    """What the keys of a position's chunks begin with."""
    return f"{writer.key(name)}/{row}{writer.layout(name).separator}"


def _copy_database(
    writer: CheckpointWriter,
    rows: Mapping[str, Sequence[int]],
    folders: Sequence[Path],
    progress: Progress | None,
) -> None:
    """Copies the database of `writer` into folders: its index, and of its values the files that
    hold the first position of each leaf.
    """
    origin = writer.state
    wanted = tuple(_prefix(writer, name, first) for name, (first, *_) in rows.items())
    values = stored_values(origin, writer.context)
    files = index_files(origin, writer.context) | {
        value.file for key, value in values.items() if value.file and key.startswith(wanted)
    }
    nbytes = {file: (origin / file).stat().st_size for file in files}
    meter = Meter(sum(nbytes.values()) * len(folders), progress, verb="copied")

    def copy(job: tuple[Path, str]) -> None:
        folder, file = job
        bring_copy(origin / file, folder / file)
        meter.add(nbytes[file], f"the first expert, to {folder.name}")

    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        try:
            # The same file to every folder, so that it is read from memory.
            for future in [
                pool.submit(copy, (to, file)) for file in sorted(files) for to in folders
            ]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for folder in folders:
        (folder / MANIFEST).unlink(missing_ok=True)  # of an interrupted call: it may say less
        bring_copy(origin / MANIFEST, folder / MANIFEST)


def bring_copy(file: Path, place: Path) -> None:
    """Copies a file whole, onto the disk. One of the same size that is there already stays: data
    files never change once written.
    """
    if place.exists() and place.stat().st_size == file.stat().st_size:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(place.name + ".tmp")
    shutil.copyfile(file, scratch)
    with open(scratch, "rb") as stream:
        os.fsync(stream.fileno())
    scratch.rename(place)


def refer(writer: CheckpointWriter, links: Iterable[tuple[Path, str, str]]) -> None:
    """Makes keys of the output refer to values of databases below its folder, in one commit.

    Args:
      writer: of the output.
      links: a database's folder, what keys in it begin with, and what the output has in place of
        that.
    """
    databases: dict[Path, ts.KvStore] = {}
    transaction = ts.Transaction(atomic=True)
    target = writer.store.with_transaction(transaction)
    with writer.explained():
        futures = []
        for folder, origin, place in links:
            if folder not in databases:
                databases[folder] = ts.KvStore.open(
                    storage.ocdbt_spec(folder), context=writer.context
                ).result()
            futures.append(copy_keys(databases[folder] / origin, target / place))
        for future in futures:
            future.result()
        transaction.commit_async().result()
    writer.refresh()


def copy_keys(source: ts.KvStore, target: ts.KvStore) -> ts.Future:
    """Copies the chunks below a prefix by reference, as Orbax merges its processes' databases."""
    return source.experimental_copy_range_to(target, source_range=_CHUNK_KEYS)
