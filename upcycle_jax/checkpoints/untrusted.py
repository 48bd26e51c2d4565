"""What is read out of a checkpoint's files is checked here before anything is done with it.

A checkpoint may be damaged, or made by somebody else: its JSON may be of any shape, its names may
lead out of its folder, and its sizes may be claimed. Every refusal is a ValueError of one line that
names the file.
"""

import ast
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import psutil
from etils import epath

from upcycle_jax.printing import printable

MAX_RANK = 32
"""What TensorStore allows."""

MAX_DEPTH = 64
"""Of maps in maps; the trees of real checkpoints have about ten levels."""

MAX_RATIO = 1 << 16
"""Decoded bytes per stored byte that are believed. zstd writes a block of 128 KiB of zeros as 4
bytes, a ratio of 2^15, and no other codec that checkpoints use comes near it.
"""

_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4),
    *(ml_dtypes.uint4, ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float8_e4m3fnuz),
    *(ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e3m4, ml_dtypes.float8_e4m3),
)
_NATIVE = [np.dtype(name) for name in _DTYPES if isinstance(name, str)]
_SPELLINGS = (
    {np.dtype(dtype).name: np.dtype(dtype) for dtype in _DTYPES}
    | {dtype.str: dtype for dtype in _NATIVE}
    | {f">{dtype.str[1:]}": dtype.newbyteorder(">") for dtype in _NATIVE if dtype.itemsize > 1}
)
"""The dtypes that arrays of checkpoints have, by NumPy's and zarr's names. NumPy itself parses far
more out of a text, objects and nested structures among it.
"""


def damaged(place: object, what: str) -> ValueError:
    """The error for a file that does not hold what it should."""
    return ValueError(f"{printable(place)} is damaged ({printable(what)}): copy it again")


def read_bytes(path: epath.Path) -> bytes:
    """The content of a file.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it cannot be read, or is no plain file.
    """
    try:
        if "://" not in os.fspath(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{printable(path)} is no plain file: copy the checkpoint again")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(path)} does not exist") from None
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror or error}") from None


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it cannot be read, is no JSON object, or names a member twice.
    """
    return parse_json(read_bytes(path), path)


def parse_json(text: bytes | str, place: object) -> dict[str, Any]:
    """A JSON object.

    Args:
      text: UTF-8.
      place: file (and entry) that the text comes from, for messages.

    Raises:
      ValueError: it is no JSON object, nests too deeply, or names a member twice.
    """
    try:
        content = json.loads(
            text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_members
        )
    except RecursionError:
        raise damaged(place, "nested too deeply") from None
    except ValueError as error:  # also bad UTF-8 and numbers of endless digits
        why = str(error).partition("; use sys.")[0]
        raise damaged(place, why if text else "empty") from None
    if not isinstance(content, dict):
        raise damaged(place, f"a {type(content).__name__} where an object is expected")
    return content


def _members(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the member {twice!r} is there twice")
    return members


def member(content: Mapping[str, Any], name: str, kind: type, place: object) -> Any:
    """`content[name]`, of the given type (True is no int).

    Raises:
      ValueError: it is missing or of another type.
    """
    value = content.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = type(value).__name__ if name in content else "nothing"
        raise damaged(place, f"{name} should be of type {kind.__name__}, not {found}")
    return value


def dtype(text: object, place: object) -> np.dtype:
    """The dtype that NumPy's or zarr's name stands for.

    Raises:
      ValueError: it is no dtype that arrays of checkpoints have.
    """
    if not isinstance(text, str) or text not in _SPELLINGS:
        raise damaged(place, f"the unknown dtype {_short(text)}")
    return _SPELLINGS[text]


def dimensions(value: object, place: object, *, what: str = "shape") -> tuple[int, ...]:
    """A shape out of a file.

    Raises:
      ValueError: it is no list of at most 32 whole numbers, or its elements could not be counted in
        64 bits.
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_RANK:
        raise damaged(place, f"{what} {_short(value)} is no list of dimensions")
    for size in value:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise damaged(place, f"{what} {_short(value)} has the dimension {_short(size)}")
    # Without zeros: NumPy, too, refuses [0, 2^62].
    if math.prod(size or 1 for size in value) > 1 << 58:
        raise damaged(place, f"{what} {_short(value)} is larger than any array")
    return tuple(value)


def _short(value: object) -> str:
    """A value in a message; what a hostile file holds may be long, or too deep for `repr`."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def literal(text: str, place: object) -> Any:
    """A Python literal, such as the tuples that Orbax writes as keys.

    Raises:
      ValueError: it is none.
    """
    try:
        if len(text) > 1 << 16:
            raise ValueError
        return _parsed(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise damaged(place, f"the unreadable key {_short(text)}") from None


def _parsed(text: str) -> Any:
    """CPython 3.11 counts the depth of what all threads parse in one number, and raises SystemError
    where two of them meet (other libraries parse in threads, too): not at the next try.
    """
    for _ in range(10):
        try:
            return ast.literal_eval(text)
        except SystemError:
            continue
    return ast.literal_eval(text)


def _is_plain(name: str) -> bool:
    # TensorStore takes a backslash for a slash; half a character (JSON can hold one) is no UTF-8.
    return name not in ("", ".", "..") and not re.search(r"[\0\\\ud800-\udfff]", name)


def check_parts(parts: Sequence[object], place: object) -> None:
    """Checks the parts of a leaf's name, of which its stored path is made.

    Raises:
      ValueError: one is no text, is empty, or leads somewhere else ('..').
    """
    for part in parts:
        if not isinstance(part, str) or not all(map(_is_plain, part.split("/"))):
            raise ValueError(
                f"{printable(place)}: the entry {_short(list(parts))} names no array inside the"
                " checkpoint; it is damaged, or not to be trusted"
            )


def check_folder_name(name: object, place: object) -> str:
    """Checks that a text is the name of something directly inside the checkpoint's folder.

    Raises:
      ValueError: it is none, or leads somewhere else.
    """
    if not isinstance(name, str) or "/" in name or not _is_plain(name):
        raise ValueError(
            f"{printable(place)} names {_short(name)}, which is no folder inside the checkpoint;"
            " it is damaged, or not to be trusted"
        )
    return name


def stored_bytes(root: epath.Path) -> int:
    """The bytes of all files below a local folder, after a check that no link leads out of it.

    `root` itself may be a link: whoever named it meant it. Below a snapshot in the cache of the
    Hugging Face hub, links may lead to its folder `blobs`, where that cache keeps the files.

    Raises:
      ValueError: a link below `root` leads out of it, or to nothing.
    """
    top = os.path.realpath(root)
    blobs = _hub_blobs(top)
    total, todo = 0, [top]
    while todo:
        folder = todo.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        total += _check_link(entry.path, top, blobs)
                    elif entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # a folder that is removed while it is looked at
            continue
        except OSError as error:
            raise ValueError(
                f"{printable(folder)} cannot be read: {error.strerror or error}"
            ) from None
    return total


def _hub_blobs(top: str) -> str | None:
    """`<repository>/blobs`, where `top` is at or below `<repository>/snapshots/<revision>`."""
    for folder in (top, *map(str, pathlib.PurePath(top).parents)):
        around = os.path.dirname(folder)
        if os.path.basename(around) == "snapshots":
            return os.path.join(os.path.dirname(around), "blobs")
    return None


def _check_link(path: str, top: str, blobs: str | None) -> int:
    """The bytes outside of `top` that a link adds."""
    target = os.path.realpath(path)
    inside = target.startswith(os.path.join(top, ""))
    cached = blobs is not None and os.path.dirname(target) == blobs
    if not (inside or cached) or not os.path.exists(target):
        reason = "leads nowhere" if inside or cached else "leads out of the checkpoint"
        raise ValueError(
            f"{printable(path)} is a link that {reason} (to {printable(os.readlink(path))}):"
            " put the file itself in its place"
        )
    return os.stat(target).st_size if cached else 0


def check_chunk(nbytes: int, stored: int | None, place: object) -> None:
    """Checks the decoded size of one chunk before memory is taken for it.

    Args:
      nbytes: what the file claims.
      stored: bytes on disk that it can come from; None where unknown.
      place: file (and entry) of the claim.

    Raises:
      ValueError: so few bytes cannot hold it, or this machine cannot.
    """
    if stored is not None and nbytes > MAX_RATIO * max(stored, 1):
        raise damaged(place, f"chunks of {nbytes} bytes are claimed, {stored} bytes are stored")
    memory = psutil.virtual_memory().total
    if nbytes > memory:
        raise ValueError(
            f"{printable(place)} claims chunks of {nbytes} bytes, more than this machine's memory"
            f" of {memory}: read it on a larger one"
        )
