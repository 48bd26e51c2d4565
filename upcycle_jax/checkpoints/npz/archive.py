"""NumPy archives (`.npz`) whose arrays are read one by one. Nothing in them is unpickled."""

import dataclasses
import math
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from upcycle_jax.printing import printable

_SUFFIX = ".npy"
_LARGEST = 1 << 36
"""Bytes of one array: more is a damaged header, or an archive that unpacks to fill the memory."""
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of an archive.

    Attributes:
      shape: of it.
      dtype: of it; bfloat16, which NumPy has no name for, is stored as two raw bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


class Archive:
    """The arrays of an archive by name, without the ending `.npy`.

    Args:
      path: of the archive.

    Raises:
      ValueError: it is no archive, or an array of it is damaged or needs unpickling.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            with zipfile.ZipFile(path) as members:
                self.arrays = {
                    info.filename.removesuffix(_SUFFIX): self._header(members, info)
                    for info in members.infolist()
                    if info.filename.endswith(_SUFFIX)
                }
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no NumPy archive, or a part of one: {error}") from None

    def _header(self, members: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored:
        try:
            with members.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(member)
                begin = member.tell()
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise self._damaged(info.filename, str(error)) from None
        if dtype.hasobject:
            raise self._damaged(info.filename, "it holds pickled objects, which are never read")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > _LARGEST or info.file_size != begin + nbytes:
            raise self._damaged(info.filename, "its size is not that of its shape")
        return Stored(shape, _BFLOAT16 if dtype == np.dtype("V2") else dtype)

    def _damaged(self, name: str, why: str) -> ValueError:
        return ValueError(f"{self._path}: the array {printable(name)} is damaged: {why}")

    def read(self, name: str) -> np.ndarray:
        """An array.

        Raises:
          ValueError: it is damaged.
        """
        try:
            with zipfile.ZipFile(self._path) as members, members.open(name + _SUFFIX) as member:
                value = np.lib.format.read_array(member, allow_pickle=False)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise self._damaged(name, str(error)) from None
        return value.view(_BFLOAT16) if value.dtype == np.dtype("V2") else value
