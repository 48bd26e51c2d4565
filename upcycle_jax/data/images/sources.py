"""Where labelled images come from: arrays in memory, or files that are read one by one.

Axis legend: N images, H and W their height and width, S side of equal ones, c channels.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Labelled images of one split."""

    @property
    def labels(self) -> np.ndarray:
        """Int32 `[N]`, or `[N, L]` with -1 after the last of an image."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """What the classes are called, where they have names."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all images, as they are stored."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the images and labels from others, for fingerprints; no path of this
        machine.
        """
        ...

    def image(self, place: int, *, channels: int, at_least: int) -> Any:
        """An image, Pillow's of mode 'L' or 'RGB'.

        Args:
          place: below N.
          channels: 1 or 3.
          at_least: the shorter side may be made smaller while it is decoded, but not below this.

        Raises:
          ValueError: it cannot be read.
        """
        ...

    def verify(self) -> int:
        """Reads everything and compares it with what is known of it; returns the bytes read.

        Raises:
          ValueError: an image cannot be read, or is not what was written.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in memory, all of one size.

    Attributes:
      images: uint8 `[N, S, S, c]`.
      labels: int32 `[N]` or `[N, L]`, see `Source`.
      num_classes: labels are below it.
      class_names: none.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: None = None

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of images and labels."""
        found = hashlib.sha256(np.ascontiguousarray(self.images).data)
        found.update(np.ascontiguousarray(self.labels).data)
        return found.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {"sha256": self.digest}

    @property
    def num_bytes(self) -> int:
        """See `Source`."""
        return self.images.nbytes

    def image(self, place: int, *, channels: int, at_least: int) -> Any:
        """See `Source`."""
        from PIL import Image

        values = self.images[place]
        found = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
        return found.convert("L" if channels == 1 else "RGB")

    def verify(self) -> int:
        """See `Source`: nothing is cached in parts."""
        return self.num_bytes
