"""Folders of zarr arrays, one for each, as newer versions of big_vision write them: the names of
arrays have '~' in place of '/', and a file `<path>-LAST` beside the folders `<path>-<step>` says
which of them is the newest.
"""

import re

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage, untrusted
from upcycle_jax.checkpoints.reader import Index, files_below, fingerprint_files
from upcycle_jax.checkpoints.t5x_legacy import StoredArray
from upcycle_jax.checkpoints.vit.arrays import Stored
from upcycle_jax.checkpoints.vit.names import FIRST
from upcycle_jax.printing import printable

_LAST = "-LAST"
_STEP = re.compile(r"\d{1,18}(-tmp)?")
_SEPARATOR = "~"
_VERSION = 3
"""Of T5X's legacy format, whose arrays these are: bfloat16 is stored as such."""


def is_zarr_folder(names: list[str]) -> bool:
    """Whether a folder with such entries is one of these."""
    return any(name.replace(_SEPARATOR, "/").endswith(FIRST) for name in names)


def newest(path: epath.Path) -> epath.Path | None:
    """The newest of the folders `<path>-<step>`; None where nothing says which it is.

    Raises:
      ValueError: the file that says it is damaged.
    """
    pointer = path.with_name(path.name + _LAST)
    if not pointer.is_file():
        return None
    text = untrusted.read_bytes(pointer)[:64].decode(errors="replace").strip()
    if not _STEP.fullmatch(text):
        raise untrusted.damaged(pointer, f"{text!r} is no step")
    return path.with_name(f"{path.name}-{text}")


class ZarrFolder:
    """See `arrays.Arrays`.

    Args:
      path: the folder.

    Raises:
      ValueError: an array is damaged, or the folder holds something else beside arrays.
    """

    format = "big_vision"

    def __init__(self, path: epath.Path):
        self.path = path
        if storage.is_local(path):
            untrusted.stored_bytes(path)  # First of all, so that no link out of it is followed.
        context = storage.new_context()
        self._stored: dict[str, StoredArray] = {}
        for folder in sorted(path.iterdir()):
            name = folder.name.replace(_SEPARATOR, "/")
            if not folder.is_dir():
                raise ValueError(
                    f"{path} holds the file {printable(folder.name)} among folders of arrays: it is"
                    " no checkpoint of big_vision, or not only one"
                )
            untrusted.check_parts(name.split("/"), path)
            self._stored[name] = StoredArray(folder, {}, _VERSION, context)
        self.arrays = {name: Stored(one.shape, one.dtype) for name, one in self._stored.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._stored[name].read(index)

    def fingerprint(self) -> str:
        return fingerprint_files(self.path, sorted(files_below(self.path)))
