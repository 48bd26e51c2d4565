"""Pixels of images in a temporary file."""

import logging
import os
import pathlib
import shutil
import tempfile
import threading
from typing import Any, NamedTuple

from upcycle_jax.text import size

_log = logging.getLogger(__name__)

_PART_OF_FREE = 4
"""One in so many bytes that are free on the disk may be used."""
_LARGE_FILES = pathlib.Path("/var/tmp")
"""Where systems expect large temporary files; /tmp is often memory."""


class Place(NamedTuple):
    """Where an image lies: `width * height` pixels of a mode, 'L' or 'RGB', from a byte on."""

    offset: int
    mode: str
    width: int
    height: int

    @property
    def nbytes(self) -> int:
        """Of the pixels."""
        return self.width * self.height * len(self.mode)


class TemporaryImages:
    """A file that has no name, so that it goes with the process, however that ends. It is opened
    for the first image. Threads may share it.

    Args:
      most_bytes: of the file; None: a quarter of what is free where it lies.
    """

    def __init__(self, most_bytes: int | None = None):
        self._most, self._end = most_bytes, 0
        self._folder = folder()
        self._file: Any = None
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"{size(self._end)} in a temporary file in {self._folder}"

    def put(self, image: Any) -> Place | None:
        """Writes a Pillow image of mode 'L' or 'RGB'; None where it finds no room."""
        with self._lock:
            place = Place(self._end, image.mode, *image.size)
            try:
                if place.offset + place.nbytes > self._room():
                    return None
                _write(self._file.fileno(), image.tobytes(), place.offset)
            except OSError as error:
                _log.warning("images cannot be kept in %s: %s", self._folder, error)
                self._most = 0
                return None
            self._end += place.nbytes
        return place

    def _room(self) -> int:
        """Bytes that the file may take. It is opened here, where it may take any."""
        if self._most is None:
            self._most = shutil.disk_usage(self._folder).free // _PART_OF_FREE
        if self._most and self._file is None:
            # It has no owner who would close it before the process ends.
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            _log.info(
                "images that find no room in memory go, scaled, to a temporary file in %s, of at"
                " most %s (TMPDIR names another folder)",
                self._folder,
                size(self._most),
            )
        return self._most

    def read(self, place: Place) -> Any:
        """The image that was written there.

        Raises:
          OSError: the disk does not give it back.
        """
        from PIL import Image

        pixels = os.pread(self._file.fileno(), place.nbytes, place.offset)
        if len(pixels) != place.nbytes:
            raise OSError(f"a temporary file in {self._folder} was cut off")
        return Image.frombytes(place.mode, (place.width, place.height), pixels)


def folder() -> str:
    """Where the file lies: what TMPDIR names, else the system's folder for large ones."""
    named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    if not named and os.access(_LARGE_FILES, os.W_OK | os.X_OK):
        return str(_LARGE_FILES)
    return tempfile.gettempdir()


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """All bytes: the system may take some at a time."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
