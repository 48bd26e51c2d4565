"""Reads T5X's checkpoints from before Orbax: a folder with a msgpack index beside zarr arrays, or
one msgpack file.

The index has `version` (3 is the last; absent is 0) and `optimizer` (or `_optimizer`) with `target`
and `state`. A leaf is an array in the index itself, the TensorStore spec of an array in its own
folder, or `PLACEHOLDER://<folder>`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.msgpack_index import ChunkedArray, InlineArray, load_index
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
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
            layout = storage.ZarrLayout.from_json((folder / ".zarray").read_text())
        elif "metadata" in spec:
            layout = _layout_of(spec)
        else:
            raise ValueError(
                f"{folder} has no .zarray, and the index does not give its shape and dtype either:"
                " the array cannot be read"
            )
        self._layout, self._assumed = layout, not described
        stored, named = layout.numpy_dtype, spec.get("dtype")
        self._bfloat16 = stored == np.uint16 and (
            version < _BFLOAT16_NATIVE_VERSION or named == _BFLOAT16.name
        )
        self.shape = layout.shape
        self.dtype = _BFLOAT16 if self._bfloat16 else stored

    def read(self, index: Index) -> np.ndarray:
        spec: storage.Json = {"driver": "zarr", "kvstore": storage.file_spec(self.folder)}
        if self._assumed:
            spec["metadata"] = self._layout.to_json()
        try:
            array = ts.open(
                spec, open=True, assume_metadata=self._assumed, context=self._context
            ).result()
            value = np.asarray(array[index].read().result())
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder} is damaged, or is stored in a way that cannot be read: {error}"
            ) from None
        return value.view(_BFLOAT16) if self._bfloat16 else value


def _layout_of(spec: Mapping[str, Any]) -> storage.ZarrLayout:
    """The layout that a spec of the index describes, for a folder without `.zarray`."""
    members = dict(spec["metadata"])
    dtype = np.dtype(members.pop("dtype", None) or spec["dtype"])
    default = storage.new_layout(members["shape"], members["chunks"], dtype)
    codec = {
        **default.codec,
        "compressor": None,
        **{name: members[name] for name in default.codec if name in members},
    }
    return dataclasses.replace(default, codec=codec)


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
        self._folder = index.parent
        self._context = storage.new_context()
        tree = load_index(index)
        root = next((tree[name] for name in ("optimizer", "_optimizer") if name in tree), None)
        if not isinstance(root, dict) or not {"target", "state"} & root.keys():
            raise ValueError(
                f"{index} is msgpack but no T5X checkpoint: it has"
                f" {', '.join(sorted(tree)) or 'nothing'}, and not optimizer/target and"
                " optimizer/state"
            )
        self.version = int(tree.get("version", 0))
        self._nodes: dict[str, Any] = {}
        for part in ("target", "state"):
            self._collect(root.get(part), part)
        self._nodes = dict(sorted(self._nodes.items()))
        self._leaves: dict[str, InlineArray | ChunkedArray | StoredArray] = {}

    def _collect(self, node: Any, name: str) -> None:
        if node is None or node == {}:
            return
        if isinstance(node, dict) and not {"driver", "kvstore"} <= node.keys():
            for key, child in node.items():
                self._collect(child, f"{name}/{key}")
        else:
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
            recorded = node.get("path") or node["kvstore"].get("path", "")
            return self._stored(name, recorded.rstrip("/").rpartition("/")[2], node)
        if isinstance(node, str) and node.startswith(_PLACEHOLDER):
            return self._stored(name, node.removeprefix(_PLACEHOLDER), {})
        if isinstance(node, bool | int | float):
            value = np.asarray(node, np.int32 if isinstance(node, int) else np.float32)
            return InlineArray((), value.dtype, value.tobytes(), 0)
        raise ValueError(f"{self.path}: leaf {name} is a {type(node).__name__} and no array")

    def _stored(self, name: str, folder: str, spec: Mapping[str, Any]) -> StoredArray:
        try:
            return StoredArray(self._folder / folder, spec, self.version, self._context)
        except ValueError as error:
            raise ValueError(f"leaf {name}: {error}") from None

    def specs(self) -> dict[str, LeafSpec]:
        return {
            name: LeafSpec(leaf.shape, leaf.dtype)
            for name, leaf in ((name, self._leaf(name)) for name in self._nodes)
        }

    def spec(self, name: str) -> LeafSpec:
        if name not in self._nodes:
            return super().spec(name)  # Raises with the nearest names.
        leaf = self._leaf(name)
        return LeafSpec(leaf.shape, leaf.dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        shape = self.spec(name).shape
        return self._leaf(name).read(checked_index(name, shape, index))
