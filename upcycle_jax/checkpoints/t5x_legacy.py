"""Reads T5X's checkpoints from before Orbax: a folder with a msgpack index beside zarr arrays, or
one msgpack file.

The index has `version` (3 is the last; absent is 0) and `optimizer` (or `_optimizer`) with `target`
and `state`. A leaf is an array in the index itself, the TensorStore spec of an array in its own
folder, or `PLACEHOLDER://<folder>`.

Early versions of Orbax wrote such folders, too, of any tree: what has `params` in folders and
no optimizer is read under its own names.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from upcycle_jax.checkpoints import storage, untrusted
from upcycle_jax.checkpoints.msgpack_index import ChunkedArray, InlineArray, load_index
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.moe import roles
from upcycle_jax.printing import printable
from upcycle_jax.trees import LeafSpec

_PLACEHOLDER = "PLACEHOLDER://"
_BFLOAT16 = np.dtype("bfloat16")
_BFLOAT16_NATIVE_VERSION = 3  # Earlier versions stored bfloat16 arrays bit by bit as uint16.


class StoredArray:
    """A zarr array in a folder of its own beside the index.

    Args:
      folder: the array's folder, rebased onto the checkpoint's.
      spec: its TensorStore spec from the index; empty for a placeholder.
      version: the index's format version.
    """

    def __init__(
        self, folder: epath.Path, spec: Mapping[str, Any], version: int, context: ts.Context
    ):
        self.folder, self._context = folder, context
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is missing: the index names it, so the checkpoint was copied"
                " incompletely. Copy it again"
            )
        described = (folder / ".zarray").exists()
        if described:
            place = folder / ".zarray"
            layout = storage.ZarrLayout.from_json(untrusted.read_bytes(place), place)
        elif "metadata" in spec:
            layout = _layout_of(spec, folder)
        else:
            raise ValueError(
                f"{folder} has no .zarray, and the index does not give its shape and dtype either:"
                " the array cannot be read"
            )
        _check_chunks(folder, layout)
        self._layout, self._assumed = layout, not described
        stored, named = layout.numpy_dtype, spec.get("dtype")
        self._bfloat16 = stored == np.uint16 and (
            version < _BFLOAT16_NATIVE_VERSION or named == _BFLOAT16.name
        )
        self.shape = layout.shape
        self.dtype = _BFLOAT16 if self._bfloat16 else stored

    def read(self, index: Index) -> np.ndarray:
        spec: storage.Json = {
            "driver": "zarr",
            "kvstore": storage.file_spec(self.folder),
            "fill_missing_data_reads": False,  # T5X stores zeros too: what is absent was lost.
        }
        if self._assumed:
            spec["metadata"] = self._layout.to_json()
        try:
            array = ts.open(
                spec, open=True, assume_metadata=self._assumed, context=self._context
            ).result()
            value = np.asarray(array[index].read().result())
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder} is damaged, or is stored in a way that cannot be read:"
                f" {storage.reason(error)}"
            ) from None
        return value.view(_BFLOAT16) if self._bfloat16 else value


def _layout_of(spec: Mapping[str, Any], folder: epath.Path) -> storage.ZarrLayout:
    """The layout that a spec of the index describes, for a folder without `.zarray`."""
    place = f"{folder}: its entry in the index"
    members = dict(untrusted.member(spec, "metadata", dict, place))
    dtype = untrusted.dtype(members.pop("dtype", None) or spec.get("dtype"), place)
    shape = untrusted.dimensions(members.get("shape"), place)
    default = storage.new_layout(shape, shape, dtype)
    codec = {
        **default.codec,
        "compressor": None,
        **{name: members[name] for name in default.codec if name in members},
    }
    stored = {"shape": shape, "chunks": members.get("chunks"), "dtype": default.dtype}
    return storage.ZarrLayout.from_members({**codec, **stored}, place)


def _check_chunks(folder: epath.Path, layout: storage.ZarrLayout) -> None:
    """Checks the claimed shape against the chunks that are there: all of them must be, and none so
    small that it could not hold what is claimed. Folders in a bucket are not listed.
    """
    if not storage.is_local(folder):
        untrusted.check_chunk(layout.chunk_bytes, None, folder)
        return
    for position in storage.positions(layout.grid):  # the first absent one ends it
        path = folder / layout.key(position)
        try:
            size = os.stat(path).st_size
        except OSError:
            raise ValueError(
                f"{folder}, an array of shape {list(layout.shape)}, lacks its chunk"
                f" {layout.key(position)}: the checkpoint is damaged. Copy it again"
            ) from None
        untrusted.check_chunk(layout.chunk_bytes, size, path)


def _version(value: Any, index: epath.Path) -> int:
    if isinstance(value, InlineArray) and value.shape == () and value.dtype.kind in "iu":
        value = int(value.read(()))
    if not isinstance(value, int):
        raise untrusted.damaged(index, f"its version is a {type(value).__name__}")
    return value


def _names_folders(node: Any) -> bool:
    """Whether the arrays of a tree lie in folders of their own."""
    if isinstance(node, dict):
        return any(map(_names_folders, node.values()))
    return isinstance(node, str) and node.startswith(_PLACEHOLDER)


class T5XLegacyReader(ReaderBase):
    """A legacy T5X folder ('t5x_legacy') or single msgpack file ('t5x_msgpack'); arrays are read
    when asked for.

    Args:
      path: the folder, or the file itself.
      index: the msgpack file.

    Raises:
      ValueError: the file is truncated, or holds something other than a T5X checkpoint.
    """

    def __init__(self, path: epath.Path, index: epath.Path):
        self.path = path
        self.format = "t5x_legacy" if path != index else "t5x_msgpack"
        self._index, self._folder = index, index.parent
        self._context = storage.new_context()
        if path != index and storage.is_local(path):
            untrusted.stored_bytes(path)  # First of all, so that no link out of it is followed.
        tree = load_index(index)
        root = next((tree[name] for name in ("optimizer", "_optimizer") if name in tree), None)
        parts: tuple[str, ...] = ("target", "state")
        if root is None and _names_folders(tree.get("params")):
            root, parts = tree, tuple(tree.keys() - {"version"})  # An early Orbax tree.
        if not isinstance(root, dict) or not set(parts) & root.keys():
            raise ValueError(
                f"{index} is msgpack but no T5X checkpoint: it has"
                f" {printable(', '.join(sorted(tree)) or 'nothing')}, and not optimizer/target and"
                " optimizer/state"
            )
        self.version = _version(tree.get("version", 0), index)
        self._nodes: dict[str, Any] = {}
        for part in sorted(parts):
            self._collect(root.get(part), part)
        self._nodes = dict(sorted(self._nodes.items()))
        self._leaves: dict[str, InlineArray | ChunkedArray | StoredArray] = {}

    def _collect(self, node: Any, name: str) -> None:
        if node is None or node == {}:
            return
        if isinstance(node, dict) and not {"driver", "kvstore"} <= node.keys():
            for key, child in node.items():
                self._collect(child, f"{name}/{key}")
            return
        untrusted.check_parts(name.split("/"), self._index)
        if name in self._nodes:
            raise untrusted.damaged(self._index, f"leaf {printable(name)} is there twice")
        self._nodes[name] = node

    def _leaf(self, name: str) -> InlineArray | ChunkedArray | StoredArray:
        if name not in self._leaves:
            self._leaves[name] = self._resolve(name, self._nodes[name])
        return self._leaves[name]

    def _resolve(self, name: str, node: Any) -> InlineArray | ChunkedArray | StoredArray:
        if isinstance(node, InlineArray | ChunkedArray):
            return node
        if isinstance(node, dict):
            # Recorded paths belong to the machine that wrote them: only the array's own folder name
            # still means something.
            kvstore = untrusted.member(
                node, "kvstore", dict, f"{self._index}: leaf {printable(name)}"
            )
            recorded = node.get("path") or kvstore.get("path")
            folder = str(recorded).rstrip("/").rpartition("/")[2]
            return self._stored(name, folder if isinstance(recorded, str) else recorded, node)
        if isinstance(node, str) and node.startswith(_PLACEHOLDER):
            return self._stored(name, node.removeprefix(_PLACEHOLDER), {})
        if isinstance(node, bool | int | float):
            try:
                with np.errstate(over="raise"):
                    value = np.asarray(node, np.int32 if isinstance(node, int) else np.float32)
            except (OverflowError, FloatingPointError):
                raise untrusted.damaged(self._index, f"leaf {printable(name)} is {node}") from None
            return InlineArray((), value.dtype, value.tobytes(), 0)
        raise ValueError(
            f"{self.path}: leaf {printable(name)} is a {type(node).__name__} and no array"
        )

    def _stored(self, name: str, folder: Any, spec: Mapping[str, Any]) -> StoredArray:
        untrusted.check_folder_name(folder, f"{self._index}: leaf {printable(name)}")
        if self.path == self._index:
            raise ValueError(
                f"{self._index} is one file, but its leaf {printable(name)} lies in a folder"
                f" {folder} beside it: open that folder, with the file in it as 'checkpoint'"
            )
        try:
            return StoredArray(self._folder / folder, spec, self.version, self._context)
        except ValueError as error:
            raise ValueError(f"leaf {printable(name)}: {error}") from None

    def names(self) -> Iterable[str]:
        return self._nodes

    def specs(self) -> dict[str, LeafSpec]:
        leaves = {name: self._leaf(name) for name in self._nodes}
        return roles.inferred(
            {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        )

    def spec(self, name: str) -> LeafSpec:
        if name not in self._nodes:
            return super().spec(name)  # Raises with the nearest names.
        leaf = self._leaf(name)
        return LeafSpec(leaf.shape, leaf.dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        shape = self.spec(name).shape
        return self._leaf(name).read(checked_index(name, shape, index))
