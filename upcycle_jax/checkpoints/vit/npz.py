"""NumPy archives (`.npz`) whose arrays are read one by one. Nothing in them is unpickled."""

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.reader import Index, fingerprint_files
from upcycle_jax.checkpoints.vit.arrays import Stored
from upcycle_jax.printing import printable

_SUFFIX = ".npy"
_LARGEST = 1 << 36
"""Bytes of one array: more is a damaged header, or an archive that unpacks to fill the memory."""
_DEFLATED = 1032
"""Bytes that a byte of a deflated member stands for, at most."""
_CHUNK = 1 << 20
"""Bytes that are unpacked at once."""
_LOCAL_HEADER, _LOCAL_MAGIC = 30, b"PK\x03\x04"
_BFLOAT16, _RAW = np.dtype(ml_dtypes.bfloat16), np.dtype("V2")


class _Member(NamedTuple):
    """An array's place.

    Attributes:
      info: of the archive's directory.
      begin: byte of the member at which the array's data begin.
      dtype: as NumPy wrote it.
      fortran: the first axis is the fastest.
    """

    info: zipfile.ZipInfo
    begin: int
    dtype: np.dtype
    fortran: bool


class NpzArrays:
    """See `arrays.Arrays`. Names are without the ending `.npy`; bfloat16, which NumPy has no name
    for, is stored as two raw bytes. Parts of arrays that are not compressed are read alone.

    Args:
      path: of the archive.

    Raises:
      ValueError: it is no archive, or an array of it is damaged or needs unpickling.
    """

    format = "npz"

    def __init__(self, path: epath.Path):
        self.path = path
        if not storage.is_local(path):
            raise ValueError(f"{path}: copy the archive to a local disk first")
        self._file = Path(path)
        self._bytes = self._file.stat().st_size
        self.arrays: dict[str, Stored] = {}
        self._members: dict[str, _Member] = {}
        try:
            with zipfile.ZipFile(path) as members:
                for info in members.infolist():
                    if info.filename.endswith(_SUFFIX):
                        self._add(members, info)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no NumPy archive, or a part of one: {error}") from None

    def _add(self, members: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(_SUFFIX)
        if name in self.arrays:
            raise self._damaged(name, "it is there twice")
        try:
            with members.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = read(member)
                begin = member.tell()
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
            raise self._damaged(name, str(error)) from None
        if dtype.hasobject:
            raise self._damaged(name, "it holds pickled objects, which are never read")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > _LARGEST or info.file_size != begin + nbytes:
            raise self._damaged(name, "its size is not that of its shape")
        ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATED
        if (
            info.file_size > ratio * max(info.compress_size, 1)
            or info.header_offset + info.compress_size > self._bytes
        ):
            raise self._damaged(name, "the archive does not hold so many bytes")
        self.arrays[name] = Stored(shape, _BFLOAT16 if dtype == _RAW else dtype)
        self._members[name] = _Member(info, begin, dtype, fortran)

    def _damaged(self, name: str, why: str) -> ValueError:
        return ValueError(f"{self.path}: the array {printable(name)} is damaged: {why}")

    def read(self, name: str, index: Index) -> np.ndarray:
        member, stored = self._members[name], self.arrays[name]
        whole = all(part == slice(0, size) for part, size in zip(index, stored.shape, strict=True))
        if whole or member.info.compress_type != zipfile.ZIP_STORED:
            value = self._whole(name)[index]
        else:
            value = np.array(self._mapped(name, member)[index])
        return value.view(_BFLOAT16) if value.dtype == _RAW else value

    def _whole(self, name: str) -> np.ndarray:
        """The array, its bytes compared with their checksum.

        Leaves are read in threads, and NumPy parses headers as Python's source, which CPython 3.11
        may fail at in several threads: the header is known since the archive was opened.
        """
        member = self._members[name]
        order: Literal["F", "C"] = "F" if member.fortran else "C"
        value = np.empty(self.arrays[name].shape, member.dtype, order)
        data = value.reshape(-1, order="A").view(np.uint8)  # as it lies in memory
        try:
            with zipfile.ZipFile(self._file) as members, members.open(member.info) as stream:
                stream.read(member.begin)
                for begin in range(0, data.size, _CHUNK):
                    part = data[begin : begin + _CHUNK]
                    read = np.frombuffer(stream.read(part.size), np.uint8)
                    if read.size != part.size:
                        raise EOFError("the archive ends in it")
                    part[:] = read
        except (ValueError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise self._damaged(name, str(error)) from None
        return value

    def _mapped(self, name: str, member: _Member) -> np.ndarray:
        """The array of a member that is not compressed, where it lies in the file."""
        with open(self._file, "rb") as stream:
            stream.seek(member.info.header_offset)
            header = stream.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or not header.startswith(_LOCAL_MAGIC):
            raise self._damaged(name, "it does not begin where the archive's directory says")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        data = member.info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
        if data + member.info.file_size > self._bytes:
            raise self._damaged(name, "the archive ends in it")
        order: Literal["F", "C"] = "F" if member.fortran else "C"
        shape = self.arrays[name].shape
        if not math.prod(shape):
            return np.empty(shape, member.dtype)
        return np.memmap(
            self._file, member.dtype, "r", offset=data + member.begin, shape=shape, order=order
        )

    def fingerprint(self) -> str:
        return fingerprint_files(self.path, [self.path])
