"""Which files of an OCDBT database its current version needs."""

from pathlib import Path

import tensorstore as ts

from upcycle_jax.checkpoints import storage

MANIFEST = "manifest.ocdbt"
DATA_FOLDERS = ("d", "ocdbt_data", "ocdbt_meta")


def data_files(folder: Path, context: ts.Context) -> set[str]:
    """Every data file that the current version of the database in `folder` refers to, relative to
    it.
    """
    base = ts.KvStore.open(storage.file_spec(folder), context=context).result()
    manifest = ts.ocdbt.dump(base, context=context).result()
    files = {_file_of(node["location"]) for node in manifest.get("version_tree_nodes", [])}
    todo = [manifest["versions"][-1]["root"]["location"]]
    while todo:
        location = todo.pop()
        files.add(_file_of(location))
        for entry in (
            ts.ocdbt.dump(base, node=location, context=context).result().get("entries", [])
        ):
            if "location" in entry:
                todo.append(entry["location"])
            elif "indirect_value" in entry:
                files.add(_file_of(entry["indirect_value"]))
    return files


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
