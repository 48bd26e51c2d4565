"""Reads Orbax checkpoints (T5X's layout, this library's, and plain Orbax trees) straight through
TensorStore.
"""

import ast
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.reader import METADATA_KEY, STEP, Index, ReaderBase, checked_index
from upcycle_jax.trees import LeafSpec

TREE_METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
STATE_ITEM = "state"


def find_item(path: epath.Path) -> epath.Path | None:
    """The folder below (or at) `path` that holds an Orbax array tree: `state` before any other;
    None where there is none.
    """
    if (path / TREE_METADATA).exists():
        return path
    if (path / STATE_ITEM / TREE_METADATA).exists():
        return path / STATE_ITEM
    items = sorted(
        child for child in path.iterdir() if child.is_dir() and (child / TREE_METADATA).exists()
    )
    if len(items) > 1:
        raise ValueError(
            f"{path} holds several Orbax trees ({', '.join(item.name for item in items)}): open the"
            " one you mean by its path"
        )
    return items[0] if items else None


class OrbaxReader(ReaderBase):
    """An Orbax array tree: OCDBT or one folder per array, zarr 2 or zarr 3.

    Attributes:
      item: the folder of the tree itself, e.g. `checkpoint_100/state`.
    """

    format = "orbax"

    def __init__(self, path: epath.Path, item: epath.Path):
        self.path = path
        self.item = item
        self.context = storage.new_context()
        self._arrays: dict[str, ts.TensorStore] = {}
        try:
            self._tree = json.loads((item / TREE_METADATA).read_text())
            entries = self._tree["tree_metadata"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{item / TREE_METADATA} is damaged or of an unknown Orbax version ({error}): copy"
                " the checkpoint again"
            ) from None
        self._keys = {}
        for text, entry in entries.items():
            value_type = entry["value_metadata"]["value_type"]
            if entry["value_metadata"].get("skip_deserialize") or value_type in (
                "None",
                "Dict",
                "List",
                "Tuple",
                "string",
            ):
                continue  # Empty nodes and strings: no array behind them.
            parts = (
                [str(part["key"]) for part in entry["key_metadata"]]
                if "key_metadata" in entry
                else list(ast.literal_eval(text))
            )
            self._keys["/".join(parts)] = ".".join(parts)
        self.uses_ocdbt = bool(self._tree.get("use_ocdbt", (item / "manifest.ocdbt").exists()))
        self.uses_zarr3 = bool(self._tree.get("use_zarr3", False))
        if self.uses_ocdbt and not (item / "manifest.ocdbt").exists():
            raise ValueError(
                f"{item} has no manifest.ocdbt: the checkpoint is half-written or half-copied. Use"
                " another step or copy it again"
            )

    @functools.cached_property
    def store(self) -> ts.KvStore:
        """The key-value store that holds the arrays; keys begin with the '.'-joined name."""
        spec = storage.ocdbt_spec(self.item) if self.uses_ocdbt else storage.file_spec(self.item)
        return ts.KvStore.open(spec, context=self.context).result()

    def key(self, name: str) -> str:
        """The '.'-joined key of a leaf.

        Raises:
          KeyError: no such leaf.
        """
        self.spec(name)
        return self._keys[name]

    @functools.cached_property
    def _documents(self) -> dict[str, bytes]:
        """The `.zarray` or `zarr.json` of every leaf."""
        member = "zarr.json" if self.uses_zarr3 else ".zarray"
        reads = {
            name: self.store.read(f"{key}/{member}") for name, key in sorted(self._keys.items())
        }
        documents = {}
        for name, future in reads.items():
            result = future.result()
            if result.state != "value":
                raise ValueError(
                    f"{self.item}: leaf {name} is in the tree but its {member} is missing: the"
                    " checkpoint is damaged"
                )
            documents[name] = result.value
        return documents

    def zarr_layout(self, name: str) -> storage.ZarrLayout:
        """Chunks and codec of one leaf.

        Raises:
          ValueError: the checkpoint is stored as zarr 3.
        """
        if self.uses_zarr3:
            raise ValueError(f"{self.item} is stored as zarr 3, whose chunks are packed in shards")
        self.spec(name)
        return storage.ZarrLayout.from_json(self._documents[name])

    @functools.cached_property
    def _specs(self) -> dict[str, LeafSpec]:
        specs = {}
        for name, text in self._documents.items():
            members = json.loads(text)
            specs[name] = LeafSpec(
                tuple(members["shape"]),
                np.dtype(members["data_type"] if self.uses_zarr3 else members["dtype"]),
            )
        return specs

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    @property
    def step(self) -> int:
        """`state/step` where it is stored, else the number that the folder's name ends with, else
        0.
        """
        if STEP in self._keys:
            return int(self.read(STEP))
        found = re.search(r"(\d+)$", self.path.name)
        return int(found.group(1)) if found else 0

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            driver = "zarr3" if self.uses_zarr3 else "zarr"
            spec: storage.Json = {
                "driver": driver,
                "kvstore": {**self.store.spec().to_json(), "path": self._path(name)},
            }
            if self._tree.get("store_array_data_equal_to_fill_value"):
                spec["fill_missing_data_reads"] = (
                    False  # Zeros are stored too, so an absent chunk is a damaged checkpoint.
                )
            self._arrays[name] = ts.open(spec, open=True, context=self.context).result()
        return self._arrays[name]

    def _path(self, name: str) -> str:
        prefix = "" if self.uses_ocdbt else self.store.path
        return f"{prefix}{self._keys[name]}/"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self.read_parts(name, [index or ()])[0]

    def read_parts(self, name: str, indices: Sequence[Index]) -> list[np.ndarray]:
        """Several parts of one leaf, in order; asked for at once, so that a chunk that several of
        them touch is decoded once.
        """
        shape = self.spec(name).shape
        checked = [checked_index(name, shape, index) for index in indices]
        try:
            array = self._array(name)
            return [
                np.asarray(future.result()) for future in [array[index].read() for index in checked]
            ]
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.item}: leaf {name} cannot be read, its data is missing or damaged: {error}"
            ) from None

    def metadata(self) -> dict[str, Any]:
        for folder in (self.path, self.item.parent):
            if (folder / STEP_METADATA).exists():
                custom = (
                    json.loads((folder / STEP_METADATA).read_text()).get("custom_metadata") or {}
                )
                return dict(custom.get(METADATA_KEY, {}))
        return {}
