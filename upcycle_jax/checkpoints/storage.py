"""TensorStore specs of the places where arrays lie, and the layout of zarr arrays. The only module
that spells these specs.
"""

import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import tensorstore as ts
from etils import epath

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.printing import printable

Json = dict[str, Any]

OCDBT_CONFIG: Json = {
    "manifest_kind": "single",
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
    "compression": {"id": "zstd"},
}
"""Database options as Orbax sets them: entries can be copied between databases only where these
agree.
"""

DATA_FILE_BYTES = 2**31

_STORAGE_ERRORS = {
    "No space left": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Permission denied": errno.EACCES,
    "Read-only": errno.EROFS,
    "Input/output error": errno.EIO,
}


def new_context() -> ts.Context:
    """A TensorStore context with a cache for B-tree nodes only. Array data is never cached."""
    return ts.Context(
        {
            "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
            "file_io_concurrency": {"limit": 64},
        }
    )


def is_local(path: os.PathLike | str) -> bool:
    """Whether `path` is on a file system rather than in a bucket."""
    return "://" not in os.fspath(path)


def absolute(path: os.PathLike | str) -> epath.Path:
    """`path` as an absolute epath without trailing slash; bucket addresses are left as they are."""
    text = os.fspath(path)
    return (
        epath.Path(os.path.abspath(os.path.expanduser(text)))
        if is_local(text)
        else epath.Path(text.rstrip("/"))
    )


def check_characters(path: str) -> None:
    """Refuses a local path that TensorStore cannot use as it is.

    Raises:
      ValueError: a backslash (which it takes for a slash), a null byte, or a name that is too long.
    """
    if "\\" in path or "\0" in path:
        raise ValueError(
            f"{path!r}: checkpoints cannot lie at a path with a backslash or a null byte; rename"
            " the folder"
        )
    # The longest names that are put beside a checkpoint end in '.partial' or a few characters more.
    if len(os.fsencode(path)) > 3800 or any(
        len(os.fsencode(part)) > 240 for part in path.split("/")
    ):
        raise ValueError(
            f"{path[:60]}...: a path of {len(path)} characters is too long for a checkpoint; choose"
            " a shorter one"
        )


def file_spec(directory: os.PathLike | str) -> Json:
    """The key-value store over the files of `directory` (local or gs://).

    Raises:
      ValueError: an address other than a local path or gs://, or a path with a backslash.
    """
    text = os.fspath(directory)
    if is_local(text):
        check_characters(text)
        return {"driver": "file", "path": os.path.abspath(text) + "/"}
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "gs":
        raise ValueError(
            f"{text}: only local paths and gs:// addresses can be read, not {scheme}://"
        )
    return {"driver": "gcs", "bucket": bucket, "path": key.strip("/") + "/"}


def ocdbt_spec(directory: os.PathLike | str, *, create: bool = False) -> Json:
    """The OCDBT database in `directory`; with `create`, one with Orbax's options is made where
    there is none.
    """
    spec: Json = {"driver": "ocdbt", "base": file_spec(directory), "cache_pool": "cache_pool#ocdbt"}
    if create:
        spec |= {"config": OCDBT_CONFIG, "target_data_file_size": DATA_FILE_BYTES}
    return spec


def reason(error: Exception) -> str:
    """What TensorStore says went wrong, without the specs and source lines that it appends."""
    text = str(error)
    for mark in (" [source locations=", " [tensorstore_spec=", " [transform=", " [domain="):
        text = text.partition(mark)[0]
    return printable(text)


@dataclasses.dataclass(frozen=True)
class ZarrLayout:
    """How a zarr (version 2) array is cut into chunks and encoded: the content of its `.zarray`.

    Attributes:
      shape: dimensions of the array.
      chunks: dimensions of one stored chunk.
      dtype: zarr's spelling of the dtype, e.g. '<f4' or 'bfloat16'.
      codec: every other member of `.zarray` (compressor, filters, order, fill_value,
        dimension_separator, zarr_format).
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    codec: Mapping[str, Any]

    @classmethod
    def from_json(cls, text: bytes | str, place: object) -> "ZarrLayout":
        """The layout in a `.zarray`.

        Raises:
          ValueError: it is none, or not one that a checkpoint has; `place` names the file.
        """
        return cls.from_members(untrusted.parse_json(text, place), place)

    @classmethod
    def from_members(cls, members: Mapping[str, Any], place: object) -> "ZarrLayout":
        """The layout that the members of a `.zarray` describe.

        Raises:
          ValueError: as for `from_json`.
        """
        codec = dict(members)
        shape = untrusted.dimensions(codec.pop("shape", None), place)
        chunks = untrusted.dimensions(codec.pop("chunks", None), place, what="chunks")
        dtype = codec.pop("dtype", None)
        untrusted.dtype(dtype, place)
        # Whoever wrote the array cut it into chunks no larger than itself: a larger one is a claim
        # that would only cost memory.
        if len(chunks) != len(shape) or any(
            not 1 <= chunk <= max(1, size) for chunk, size in zip(chunks, shape, strict=True)
        ):
            raise untrusted.damaged(
                place, f"chunks {list(chunks)} do not cut an array of shape {list(shape)}"
            )
        if codec.get("dimension_separator", ".") not in (".", "/"):
            raise untrusted.damaged(place, "a dimension_separator other than '.' and '/'")
        return cls(shape, chunks, dtype, codec)

    def to_json(self) -> Json:
        return {
            "chunks": list(self.chunks),
            **self.codec,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunks) * self.numpy_dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(
            math.ceil(size / chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)
        )

    @property
    def separator(self) -> str:
        return self.codec.get("dimension_separator", ".")

    def key(self, position: Sequence[int]) -> str:
        """The key of the chunk at a grid position, below the array's own key. A scalar has the one
        chunk '0'.
        """
        return self.separator.join(map(str, position)) if position else "0"

    def region(self, position: Sequence[int]) -> tuple[slice, ...]:
        """The part of the array that the chunk at a grid position holds."""
        return tuple(
            slice(p * chunk, min(size, (p + 1) * chunk))
            for p, chunk, size in zip(position, self.chunks, self.shape, strict=True)
        )


def positions(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The positions of a grid of chunks, one by one in C order: a file may claim any number of them
    (`itertools.product` would first take memory for every axis).
    """
    for number in range(math.prod(grid)):
        position = []
        for size in reversed(grid):
            number, place = divmod(number, size)
            position.append(place)
        yield tuple(reversed(position))


def new_layout(
    shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype, *, compress: bool = True
) -> ZarrLayout:
    """The layout that Orbax itself would write, with the given chunks: zarr 2, zstd level 1, C
    order.
    """
    codec = {
        "compressor": {"id": "zstd", "level": 1} if compress else None,
        "dimension_separator": ".",
        "fill_value": None,
        "filters": None,
        "order": "C",
        "zarr_format": 2,
    }
    dtype = np.dtype(dtype)
    return ZarrLayout(
        tuple(shape), tuple(chunks), dtype.name if dtype.name == "bfloat16" else dtype.str, codec
    )


def choose_chunks(
    shape: Sequence[int], itemsize: int, *, leading: int, limit: int
) -> tuple[int, ...]:
    """Chunk dimensions: 1 along the first `leading` axes, then halved along the longest axis until
    a chunk has at most `limit` bytes.

    >>> choose_chunks((8, 512, 1024), 4, leading=1, limit=2**20)
    (1, 512, 512)
    """
    chunks = [1] * leading + [max(1, n) for n in shape[leading:]]
    while math.prod(chunks) * itemsize > limit and max(chunks[leading:], default=1) > 1:
        longest = leading + int(np.argmax(chunks[leading:]))
        chunks[longest] = math.ceil(chunks[longest] / 2)
    return tuple(chunks)


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
