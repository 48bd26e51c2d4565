"""The small files of an Orbax checkpoint: `_METADATA` of a tree and `_CHECKPOINT_METADATA` of a
step, parsed and made, and `zarr.json` of an array, parsed. (`.zarray` is `storage.ZarrLayout`.)
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.checkpoints.reader import METADATA_KEY
from upcycle_jax.printing import printable
from upcycle_jax.trees import LeafSpec

STATE_ITEM = "state"
"""The folder of the array tree."""
TREE_METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
_NO_ARRAY = ("None", "Dict", "List", "Tuple", "string")
"""Types of values that have no array behind them."""
_PYTREE_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_DICT_KEY = 2  # Orbax's number for "this path element is a dictionary key".


@dataclasses.dataclass(frozen=True)
class TreeMetadata:
    """What `_METADATA` says.

    Attributes:
      keys: leaf by '/'-joined path -> '.'-joined key of its array.
      ocdbt: whether the arrays are in one database; None where it is not said.
      zarr3: whether they are stored as zarr 3.
      stores_zeros: whether chunks of zeros are stored too.
    """

    keys: dict[str, str]
    ocdbt: bool | None
    zarr3: bool
    stores_zeros: bool


def read_tree_metadata(path: epath.Path) -> TreeMetadata:
    """Reads `_METADATA`.

    Raises:
      ValueError: it is damaged, of an unknown version, or names something outside the checkpoint.
    """
    content = untrusted.read_json(path)
    keys: dict[str, str] = {}
    for text, entry in untrusted.member(content, "tree_metadata", dict, path).items():
        place = f"{path}: entry {text}"
        if not isinstance(entry, dict):
            raise untrusted.damaged(place, f"a {type(entry).__name__} where an object is expected")
        value = untrusted.member(entry, "value_metadata", dict, place)
        if value.get("skip_deserialize") or value.get("value_type") in _NO_ARRAY:
            continue
        untrusted.member(value, "value_type", str, place)
        parts = _parts(text, entry, place)
        untrusted.check_parts(parts, path)
        name = "/".join(parts)
        if name in keys:
            raise untrusted.damaged(path, f"leaf {printable(name)} is there twice")
        keys[name] = ".".join(parts)
    if len(set(keys.values())) < len(keys):
        raise untrusted.damaged(path, "two leaves share one stored array")
    return TreeMetadata(
        keys,
        untrusted.member(content, "use_ocdbt", bool, path) if "use_ocdbt" in content else None,
        _flag(content, "use_zarr3", path),
        _flag(content, "store_array_data_equal_to_fill_value", path),
    )


def _flag(content: dict[str, Any], name: str, path: epath.Path) -> bool:
    return bool(untrusted.member(content, name, bool, path)) if content.get(name) else False


def _parts(text: str, entry: dict[str, Any], place: str) -> list[str]:
    if "key_metadata" not in entry:
        parts = untrusted.literal(text, place)
        if not isinstance(parts, tuple | list):
            raise untrusted.damaged(place, "the key is no path")
        return list(parts)
    parts = []
    for part in untrusted.member(entry, "key_metadata", list, place):
        key = part.get("key") if isinstance(part, dict) else None
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise untrusted.damaged(place, "key_metadata is no list of keys")
        parts.append(str(key))
    return parts


def read_record(path: epath.Path) -> dict[str, Any]:
    """This library's record in `_CHECKPOINT_METADATA`; empty where there is none.

    Raises:
      ValueError: the file is damaged.
    """
    custom = untrusted.read_json(path).get("custom_metadata") or {}
    record = custom.get(METADATA_KEY, {}) if isinstance(custom, dict) else None
    if not isinstance(record, dict):
        raise untrusted.damaged(path, "custom_metadata is no record")
    return dict(record)


def tree_metadata(specs: Mapping[str, LeafSpec]) -> dict[str, Any]:
    """The content of `_METADATA`: every leaf as an array of a nested dictionary, in OCDBT and zarr
    2.
    """
    tree = {}
    for name, spec in specs.items():
        parts = name.split("/")
        tree[str(tuple(parts))] = {
            "key_metadata": [{"key": part, "key_type": _DICT_KEY} for part in parts],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(spec.shape),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def step_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `_CHECKPOINT_METADATA`, with this library's record in it."""
    now = time.time_ns()
    return {
        "item_handlers": {STATE_ITEM: _PYTREE_HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {METADATA_KEY: dict(record)},
    }


@dataclasses.dataclass(frozen=True)
class Zarr3Layout:
    """What is used of a `zarr.json`.

    Attributes:
      shape: dimensions of the array.
      chunks: dimensions of one stored chunk (a shard, where those are packed).
      dtype: of the elements.
      separator: between the positions of a chunk's key.
      default_keys: whether keys begin with 'c'.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    separator: str
    default_keys: bool

    @classmethod
    def from_json(cls, text: bytes | str, place: object) -> "Zarr3Layout":
        """Raises ValueError where the text is no `zarr.json` of an array; `place` names it."""
        content = untrusted.parse_json(text, place)
        shape = untrusted.dimensions(content.get("shape"), place)
        grid = untrusted.member(content, "chunk_grid", dict, place)
        if grid.get("name") != "regular":
            raise untrusted.damaged(place, "its chunk_grid is not regular")
        grid = untrusted.member(grid, "configuration", dict, place)
        chunks = untrusted.dimensions(grid.get("chunk_shape"), place, what="chunk_shape")
        if len(chunks) != len(shape) or any(
            not 1 <= chunk <= max(1, size) for chunk, size in zip(chunks, shape, strict=True)
        ):
            raise untrusted.damaged(
                place, f"chunks {list(chunks)} do not cut an array of shape {list(shape)}"
            )
        encoding = untrusted.member(content, "chunk_key_encoding", dict, place)
        default = encoding.get("name") == "default"
        options = encoding.get("configuration") or {}
        separator = options.get("separator") if isinstance(options, dict) else None
        separator = separator or ("/" if default else ".")
        if encoding.get("name") not in ("default", "v2") or separator not in (".", "/"):
            raise untrusted.damaged(place, "its chunk_key_encoding is unknown")
        dtype = untrusted.dtype(content.get("data_type"), place)
        return cls(shape, chunks, dtype, separator, default)

    @property
    def numpy_dtype(self) -> np.dtype:
        return self.dtype

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def key(self, position: tuple[int, ...]) -> str:
        """The key of a chunk below the array's own."""
        if self.default_keys:
            return self.separator.join(["c", *map(str, position)])
        return self.separator.join(map(str, position)) if position else "0"
