"""Which files of an OCDBT database its current version needs, and where its values lie."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from upcycle_jax.checkpoints import storage

MANIFEST = "manifest.ocdbt"
DATA_FOLDERS = ("d", "ocdbt_data", "ocdbt_meta")


@dataclasses.dataclass(frozen=True)
class StoredValue:
    """Where a database keeps one value.

    Attributes:
      file: the data file, relative to the database's folder; '' where the index itself has it.
      offset: its first byte in the file.
      length: number of bytes.
      inline: the value itself, where the index has it.
    """

    file: str
    offset: int
    length: int
    inline: bytes | None = None


def data_files(folder: Path, context: ts.Context) -> set[str]:
    """Every data file that the current version of the database in `folder` refers to, relative to
    it.
    """
    return _files(folder, context, ("location", "indirect_value"))


def index_files(folder: Path, context: ts.Context) -> set[str]:
    """Of `data_files`, those that hold the index, perhaps beside values."""
    return _files(folder, context, ("location",))


def _files(folder: Path, context: ts.Context, kinds: Sequence[str]) -> set[str]:
    return {
        _file_of(entry[kind])
        for _, entry in _entries(folder, context)
        for kind in kinds
        if kind in entry
    }


def stored_values(folder: Path, context: ts.Context) -> dict[str, StoredValue]:
    """Where the current version of the database in `folder` keeps the value of every key.

    Only the index is read.

    Raises:
      ValueError: the index cannot be read, or names files outside of `folder`.
    """
    values = {}
    for key, entry in _entries(folder, context):
        if "inline_value" in entry:
            values[key] = StoredValue("", 0, len(entry["inline_value"]), entry["inline_value"])
        elif "indirect_value" in entry:
            file, (offset, length) = _file_of(entry["indirect_value"]), _span(entry)
            if os.path.isabs(file) or ".." in file.split("/"):
                raise ValueError(f"{folder}: the index names the file {file!r} outside of it")
            values[key] = StoredValue(file, offset, length)
    return values


def _entries(folder: Path, context: ts.Context) -> Iterator[tuple[str, dict[str, Any]]]:
    """All entries of the index, with their keys: nodes (which have a `location`) before what is in
    them.
    """
    base = ts.KvStore.open(storage.file_spec(folder), context=context).result()
    manifest = ts.ocdbt.dump(base, context=context).result()
    yield from (("", node) for node in manifest.get("version_tree_nodes", []))
    root = manifest["versions"][-1]["root"]
    if "location" not in root:
        return  # An empty database.
    yield "", root
    todo = [(root["location"], b"")]
    while todo:
        location, prefix = todo.pop()
        node = ts.ocdbt.dump(base, node=location, context=context).result()
        for entry in node.get("entries", []):
            yield (prefix + entry["key"]).decode(errors="replace"), entry
            if "location" in entry:
                # The keys in a node lack what they all begin with.
                todo.append((entry["location"], prefix + entry.get("subtree_common_prefix", b"")))


def drop_unused(folder: Path, context: ts.Context, *, keep_linked: bool = False) -> None:
    """Removes the data files below `folder` that the database does not need, and the folders that
    this leaves empty.

    They are what interrupted writes, superseded indices and linked databases leave behind. Nobody
    may be writing to the database.

    Args:
      folder: of the database.
      context: TensorStore's.
      keep_linked: leave other databases in folders below it as they are: they are still to be
        copied from.
    """
    used = {folder / file for file in data_files(folder, context)} | {folder / MANIFEST}
    # Deepest first, so that a folder is looked at after what it holds.
    for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        if keep_linked and path.relative_to(folder).parts[0] not in (MANIFEST, *DATA_FOLDERS):
            continue
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in used and (
            path.parent.name in DATA_FOLDERS or path.name.startswith(MANIFEST)
        ):
            path.unlink()


def _file_of(location: str) -> str:
    """The path in a location such as `btreenode:<folder>:<file>:<offset>:<length>`."""
    _, folder, file, _, _ = location.split(":")
    return f"{folder}{file}"


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """Offset and length of an entry's value."""
    *_, offset, length = entry["indirect_value"].split(":")
    return int(offset), int(length)
