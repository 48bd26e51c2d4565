"""Writing files so that a reader, or the next start after a kill, never meets half of one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

from etils import epath

SUFFIX = ".writing"
"""Ends the temporary names, which begin with a dot."""


@contextlib.contextmanager
def replacing(
    path: epath.PathLike, mode: str = "w", *, shared: bool = False, durable: bool = False
) -> Iterator[Any]:
    """Opens a file under a temporary name; it takes the place of `path` when the block ends.

    A block that raises leaves `path` as it was, and no temporary file.

    Args:
      path: local, or in a bucket.
      mode: 'w' or 'wb'.
      shared: several processes may write the file at the same time: each gets a temporary name of
        its own. Otherwise the next write overwrites what a killed one left.
      durable: wait until the content is on the disk; local files only.

    Yields:
      The stream to write to.
    """
    path = epath.Path(path)
    own = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.parent / f".{path.name}{own}{SUFFIX}"
    try:
        with temporary.open(mode) as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(
    path: epath.PathLike, text: str, *, shared: bool = False, durable: bool = False
) -> None:
    """Writes a text file; a reader sees the old one or the new one. See `replacing`."""
    with replacing(path, shared=shared, durable=durable) as stream:
        stream.write(text)


def append_line(path: epath.PathLike, line: str) -> None:
    """Appends a line to a local file. A last line that a kill cut short is ended first, so that
    the new one stands alone.
    """
    with open(path, "ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"
        else:
            torn = False
        stream.write(f"{chr(10) * torn}{line}\n".encode())
