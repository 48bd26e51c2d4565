"""Scaled images that stay in memory, so that no epoch decodes them again."""

import os
import threading
from collections.abc import Callable
from typing import Any

MOST_BYTES = min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
"""Of one set or mixture: 1 GiB, about seven thousand photographs for a model of 32 x 32 pixels, and
no more than an eighth of the machine's memory.
"""
_BYTES_OF_A_PIXEL = {"L": 1, "RGB": 4}
"""As Pillow keeps them."""


class HeldImages:
    """The first images that fit. None gives way to another: where each is shown once in an epoch,
    any choice serves as well.

    Args:
      most_bytes: of all images together.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._room = most_bytes
        self.is_full = False
        """Whether an image found no room."""
        self._images: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._images

    def get(self, key: tuple[str, int], make: Callable[[], Any]) -> Any:
        """An image, Pillow's of mode 'L' or 'RGB'; it is not to be changed.

        Args:
          key: name of its set, and its place there.
          make: gives it where it is not held.
        """
        found = self._images.get(key)
        if found is None:
            found = make()
            size = found.width * found.height * _BYTES_OF_A_PIXEL[found.mode]
            with self._lock:
                if key not in self._images:
                    self.is_full |= size > self._room
                    if size <= self._room:
                        self._room -= size
                        self._images[key] = found
        return found
