"""Scaled images that are kept, in memory and beyond it in a temporary file, so that no epoch
decodes them again.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from upcycle_jax.data.images.temporary import Place, TemporaryImages
from upcycle_jax.text import size

MOST_BYTES = min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
"""In memory, of one set or mixture: 1 GiB, about seven thousand photographs for a model of 32 x 32
pixels, and no more than an eighth of the machine's memory.
"""
_BYTES_OF_A_PIXEL = {"L": 1, "RGB": 4}
"""As Pillow keeps them."""


class HeldImages:
    """The first images that fit. None gives way to another: where each is shown once in an epoch,
    any choice serves as well.

    Args:
      most_bytes: in memory, of all images together.
      most_on_disk: in the temporary file; None: see `TemporaryImages`.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, most_on_disk: int | None = None):
        self._room, self._used = most_bytes, 0
        self.is_full = False
        """Whether an image found no room."""
        self._kept: dict[tuple[str, int], Any] = {}  # Pillow's, or a `Place`
        self._file = TemporaryImages(most_on_disk)
        self._spills = False
        self._lock = threading.Lock()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._kept

    def __str__(self) -> str:
        in_memory = f"{size(self._used)} in memory"
        return f"{in_memory}, {self._file}" if self._spills else in_memory

    def get(self, key: tuple[str, int], make: Callable[[], Any]) -> Any:
        """An image, Pillow's of mode 'L' or 'RGB'; it is not to be changed.

        Args:
          key: name of its set, and its place there.
          make: gives it where it is not held.

        Raises:
          OSError: the disk does not give back what was written to it.
        """
        found = self._kept.get(key)
        if found is None:
            found = make()
            self._keep(key, found)
        return self._file.read(found) if isinstance(found, Place) else found

    def _keep(self, key: tuple[str, int], image: Any) -> None:
        nbytes = image.width * image.height * _BYTES_OF_A_PIXEL[image.mode]
        with self._lock:
            if key in self._kept:
                return
            if self._used + nbytes <= self._room:
                self._used += nbytes
                self._kept[key] = image
                return
        place = self._file.put(image)
        if place is None:
            self.is_full = True
        else:
            self._spills = True
            self._kept[key] = place
