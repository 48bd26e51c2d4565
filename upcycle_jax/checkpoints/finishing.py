"""The small files that make a folder of arrays a checkpoint for Orbax, and what its writer asks of
the file system.
"""

import errno
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.orbax_reader import STATE_ITEM
from upcycle_jax.checkpoints.reader import METADATA_KEY
from upcycle_jax.trees import LeafSpec

_PYTREE_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_DICT_KEY = 2  # Orbax's number for "this path element is a dictionary key".
_STORAGE_ERRORS = {
    "No space left": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Permission denied": errno.EACCES,
    "Read-only": errno.EROFS,
    "Input/output error": errno.EIO,
}


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


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file and waits until it is on the disk."""
    with open(path, "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until renames in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_errno(text: str) -> int | None:
    """The errno behind a TensorStore error message, or None where it is no storage error."""
    return next((code for words, code in _STORAGE_ERRORS.items() if re.search(words, text)), None)
