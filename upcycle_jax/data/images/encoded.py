"""Images that are kept as PNG or JPEG and decoded when they are asked for: a `Source`, but for
where their bytes are.
"""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from upcycle_jax.data.images import decoding


class EncodedImages(abc.ABC):
    """Labelled images of one split.

    Attributes:
      labels: int32 `[N]`.
    """

    labels: np.ndarray

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """See `Source`."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """See `Source`."""
        return None

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int:
        """See `Source`."""

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """See `Source`."""

    @abc.abstractmethod
    def encoded(self, place: int) -> bytes:
        """A PNG or JPEG file.

        Raises:
          ValueError: it cannot be read.
        """

    @abc.abstractmethod
    def name(self, place: int) -> str:
        """What an image is called in messages."""

    def image(self, place: int, *, channels: int, at_least: int) -> Any:
        """See `Source`."""
        return decoding.decode(
            self.encoded(place), what=self.name(place), channels=channels, at_least=at_least
        )

    def verify(self) -> int:
        """See `Source`: every image is decoded."""
        for place in range(len(self.labels)):
            self.image(place, channels=3, at_least=1)
        return self.num_bytes
