"""Batches of image classifiers: an image and its class, or its classes.

Axis legend: B images, S side of an image, c channels, K classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from upcycle_jax.features.base import Example, HostBatch, Lengths, check_lengths

if TYPE_CHECKING:
    import jax
    import seqio

IMAGE, LABEL = "image", "label"


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """See `base.FeatureConverter`. Of examples with an 'image' `[S, S, c]` and a 'label', whose
    length is the side of the image:

    images: float32 `[B, S, S, c]`; 8-bit images are put into [-1, 1].
    labels: int32 `[B]`; with several labels of an image `[B, L]`, -1 where it has fewer.
    weights: float32 `[B]`: 1 for images, 0 for rows that fill a batch up.

    Attributes:
      size: S, which the model has positions for.
      channels: c.
      num_classes: labels are below it; 0 where the model has no head.
      max_labels: L, the most labels of an image.
    """

    size: int
    channels: int = 3
    num_classes: int = 0
    max_labels: int = 1

    task_features: ClassVar[tuple[str, ...]] = (IMAGE,)
    optional_features: ClassVar[tuple[str, ...]] = ()
    annotations: ClassVar[tuple[str, ...]] = (LABEL,)
    targets: ClassVar[str] = "labels"
    unit: ClassVar[str] = "images"

    @property
    def usual_lengths(self) -> Lengths:
        """See `base.FeatureConverter`."""
        return {IMAGE: self.size}

    def specs(
        self, batch_size: int, lengths: Lengths, *, packed: bool = False
    ) -> dict[str, "jax.ShapeDtypeStruct"]:
        """See `base.FeatureConverter`."""
        import jax

        check_lengths(self, lengths)
        self.check_size(lengths[IMAGE])
        shape = (batch_size, lengths[IMAGE], lengths[IMAGE], self.channels)
        return {
            "images": jax.ShapeDtypeStruct(shape, np.dtype(np.float32)),
            "labels": jax.ShapeDtypeStruct(self._label_shape(batch_size), np.dtype(np.int32)),
            "weights": jax.ShapeDtypeStruct((batch_size,), np.dtype(np.float32)),
        }

    def _label_shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.max_labels == 1 else (rows, self.max_labels)

    def check_size(self, size: int) -> None:
        """Raises a ValueError where images have another size than the model."""
        if size != self.size:
            raise ValueError(
                f"images are {size} pixels wide, the model takes {self.size}: set"
                f" TASK_FEATURE_LENGTHS = {{'image': {self.size}}}, or the model's IMAGE_SIZE"
            )

    def pad(self, examples: Sequence[Example], lengths: Lengths, rows: int) -> HostBatch:
        """See `base.FeatureConverter`.

        Raises:
          ValueError: an image has another size or dtype than the model takes.
        """
        shape = (lengths[IMAGE], lengths[IMAGE], self.channels)
        images = [_in_range(np.asarray(example[IMAGE]), shape) for example in examples]
        labels = _together([example[LABEL] for example in examples])
        found = np.stack(images) if images else np.zeros((0, *shape), np.float32)
        return self.batch(found, labels, rows)

    def batch(self, images: np.ndarray, labels: np.ndarray, rows: int) -> HostBatch:
        """A batch of float32 images `[n, S, S, c]` and int32 labels `[n]`, or `[n, l]` with -1
        where an image has fewer; rows beyond are zeros without weight.

        Raises:
          ValueError: a label is no class of the model, or an image has more than it takes.
        """
        if self.num_classes and len(labels) and not 0 <= labels.max() < self.num_classes:
            raise ValueError(
                f"an image has the label {labels.max()}, the model {self.num_classes} classes: set"
                " NUM_CLASSES to more"
            )
        if labels.ndim == 2 and labels.shape[1] > self.max_labels:
            raise ValueError(
                f"images have up to {labels.shape[1]} labels, the model takes {self.max_labels}:"
                f" set LABELS_PER_IMAGE = {labels.shape[1]}, with LOSS = 'sigmoid'"
            )
        if self.max_labels > 1:
            labels = labels[:, None] if labels.ndim == 1 else labels
            lacking = self.max_labels - labels.shape[1]
            labels = np.pad(labels, ((0, 0), (0, lacking)), constant_values=-1)
        elif labels.ndim == 2:
            labels = labels[:, 0]
        missing = rows - len(images)
        weights = np.zeros(rows, np.float32)
        weights[: len(images)] = 1
        if missing:
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return {
            "images": images,
            "labels": np.pad(
                labels.astype(np.int32), ((0, missing), *[(0, 0)] * (labels.ndim - 1))
            ),
            "weights": weights,
        }

    def pack(self, rows: Sequence[Sequence[Example]], lengths: Lengths) -> HostBatch:
        """See `base.FeatureConverter`."""
        raise ValueError("a row holds one image: set pack=False")

    def row_capacity(self, lengths: Lengths) -> tuple[int, ...]:
        """See `base.FeatureConverter`: a row is one image."""
        return (1,)

    def row_usage(self, sizes: np.ndarray) -> np.ndarray:
        """See `base.FeatureConverter`."""
        return np.ones((len(sizes), 1), np.int64)

    def random(
        self, vocab_size: int | None, *, batch_size: int = 2, length: int = 32, seed: int = 0
    ) -> HostBatch:
        """See `base.FeatureConverter`: noise in [-1, 1], of the model's
        size whatever `length` is."""
        rng = np.random.default_rng(seed)
        shape = (batch_size, self.size, self.size, self.channels)
        return {
            "images": rng.uniform(-1, 1, shape).astype(np.float32),
            "labels": np.zeros(self._label_shape(batch_size), np.int32),
            "weights": np.ones(batch_size, np.float32),
        }

    def real_targets(self, batch: Mapping[str, Any]) -> Any:
        """See `base.FeatureConverter`."""
        return batch["weights"] > 0

    def describe(self, batch: Mapping[str, Any]) -> str:
        """See `base.FeatureConverter`."""
        rows, height, width, _ = np.shape(batch["images"])
        return f"{rows} images of {height} x {width}"

    def seqio_converter(self, *, pack: bool) -> "seqio.FeatureConverter":
        """See `base.FeatureConverter`."""
        raise ValueError("image tasks are not read through SeqIO")


def _together(labels: Sequence[Any]) -> np.ndarray:
    """Int32 `[n]` of single labels, `[n, l]` of several, filled up with -1."""
    found = [np.asarray(label, np.int32) for label in labels]
    if all(label.ndim == 0 for label in found):
        return np.asarray(found, np.int32)
    rows = [np.atleast_1d(label) for label in found]
    out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, label in zip(out, rows, strict=True):
        row[: len(label)] = label
    return out


def _in_range(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An image as float32 in [-1, 1]."""
    if image.shape != shape:
        raise ValueError(
            f"an image has the shape {list(image.shape)}, the model takes {list(shape)}: resize"
            " images before they are batched, or set the model's IMAGE_SIZE"
        )
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 127.5 - 1
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"an image is of dtype {image.dtype}: uint8 or floats in [-1, 1] are read")
    return image
