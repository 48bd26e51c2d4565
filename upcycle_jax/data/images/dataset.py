"""Labelled images as a `Dataset`: an endless stream of warped views to train on, the same views
every time to evaluate on. No TensorFlow.
"""

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.data.images import glyphs, views
from upcycle_jax.data.images.config import ImageDatasetConfig
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.data.stream import Stream, describe, eval_rows
from upcycle_jax.features import FeatureConverter, HostBatch, check_lengths
from upcycle_jax.features.images import IMAGE, ImageFeatures

_EVALUATION_SEED = 0x5EED
_LARGEST = 1 << 34
"""Bytes of one array of the user's: more does not fit into memory here."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images of one split.

    Attributes:
      images: uint8 `[N, S, S, c]`.
      labels: int32 `[N]`.
      num_classes: labels are below it.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of images and labels."""
        found = hashlib.sha256(np.ascontiguousarray(self.images).data)
        found.update(np.ascontiguousarray(self.labels).data)
        return found.hexdigest()


class ImageDataset:
    """See `data.dataset.Dataset`.

    Args:
      config: what to read.
      features: the model's converter.

    Raises:
      ValueError: the model takes no images, or of another size, or has too few classes; or the
        arrays are not what `ImageDatasetConfig.arrays` describes.
    """

    def __init__(self, config: ImageDatasetConfig, features: FeatureConverter):
        if not isinstance(features, ImageFeatures):
            raise ValueError(f"{config.mixture_or_task_name} are images, the model takes none")
        check_lengths(features, config.task_feature_lengths)
        features.check_size(config.task_feature_lengths[IMAGE])
        self.config, self.features = config, features
        self.images = _glyphs(config) if config.arrays is None else _arrays(config)
        if features.num_classes and self.images.num_classes > features.num_classes:
            raise ValueError(
                f"{config.mixture_or_task_name} has {self.images.num_classes} classes, the model"
                f" {features.num_classes}: set NUM_CLASSES to at least that many"
            )

    def batch(self, which: np.ndarray, numbers: np.ndarray, seed: int, rows: int) -> HostBatch:
        """Views of images.

        Args:
          which: int `[n]`, the images.
          numbers: int `[n]`, the number of each view.
          seed: of the views.
          rows: of the batch, n at least; the others are zeros without weight.
        """
        seen = views.views(
            self.images.images[which],
            self.features.size,
            seed=seed,
            numbers=numbers,
            warp=self.config.warp,
        )
        if seen.shape[-1] != self.features.channels:
            seen = np.repeat(seen, self.features.channels, axis=-1)
        return self.features.batch(seen, self.images.labels[which], rows)

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> "ImageStream":
        """See `Dataset`."""
        return ImageStream(self, process_index=process_index, process_count=process_count)

    def eval_batches(
        self, num_batches: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Callable[[], Iterator[HostBatch]]]:
        """See `Dataset`: one view of each image, in an order that mixes classes."""
        mine = eval_rows(
            self.config,
            num_batches=num_batches,
            process_index=process_index,
            process_count=process_count,
        )
        size, count = self.config.batch_size, len(self.images.labels)
        batches = -(-count // size)
        batches = batches if num_batches is None else min(batches, num_batches)
        order = _permutation(_EVALUATION_SEED, 0, count)

        def one_pass() -> Iterator[HostBatch]:
            for batch in range(batches):
                which = order[batch * size : (batch + 1) * size][mine]
                yield self.batch(which, which, _EVALUATION_SEED, mine.stop - mine.start)

        return {self.config.mixture_or_task_name: one_pass}

    def task_names(self) -> tuple[str, ...]:
        """See `Dataset`."""
        return (self.config.mixture_or_task_name,)

    def vocabulary_size(self) -> int:
        """See `Dataset`: the number of classes."""
        return self.images.num_classes

    def fingerprint(self) -> dict[str, Any]:
        """See `Dataset`."""
        config = self.config
        task = {
            "images": len(self.images.labels),
            "classes": self.images.num_classes,
            "sha256": self.images.digest,
            "warp": config.warp,
        }
        return describe(
            config,
            tasks={config.mixture_or_task_name: task},
            vocabularies={},
            packages=("numpy",),
        )

    def verify(self) -> int:
        """See `Dataset`: nothing is cached in parts."""
        return self.images.images.nbytes


class ImageStream(Stream):
    """An endless stream of views: every image once in each epoch, in an order of its own."""

    def __init__(self, dataset: ImageDataset, *, process_index: int, process_count: int):
        super().__init__(dataset, process_index=process_index, process_count=process_count)
        self._images = dataset

    def __next__(self) -> HostBatch:
        size, count = self._config.batch_size, len(self._images.images.labels)
        local = self._config.local_batch_size(self._process_count)
        first = self._batches * size + self._process_index * local
        numbers = np.arange(first, first + local)
        epochs, places = np.divmod(numbers, count)
        which = places
        if self._config.shuffle:
            which = np.empty(local, np.int64)
            for epoch in np.unique(epochs):
                mine = epochs == epoch
                which[mine] = _permutation(self.seed, int(epoch), count)[places[mine]]
        self._batches += 1
        return self._images.batch(which, numbers, self.seed, local)

    def _open(self) -> None:
        """See `Stream`: a batch depends on seed and number alone."""

    def _move(self, num_batches: int) -> None:
        self._batches = num_batches

    def save(self, directory: epath.PathLike) -> None:
        """See `BatchIterator`."""
        self._write_position(directory)

    def restore(self, directory: epath.PathLike) -> None:
        """See `BatchIterator`."""
        self._batches = self._read_position(directory).batches


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Int64 `[count]`, the order of an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def _glyphs(config: ImageDatasetConfig) -> Images:
    """Glyphs of a split. Classes are numbered anew: those trained on, or those held out."""
    found = glyphs.load()
    held_out = config.split == "held_out"
    numbers = np.arange(len(found.code_points))
    kept = numbers[glyphs.is_held_out(numbers) == held_out]
    if config.num_classes is not None:
        if config.num_classes > len(kept):
            raise ValueError(
                f"num_classes is {config.num_classes}: glyphs have {len(kept)} classes in the split"
                f" {config.split!r}"
            )
        kept = kept[: config.num_classes]
    wanted = np.isin(found.classes, kept)
    labels = np.searchsorted(kept, found.classes[wanted]).astype(np.int32)
    return Images(found.images[wanted][..., None], labels, len(kept))


def _arrays(config: ImageDatasetConfig) -> Images:
    """The user's own images of a split."""
    path = config.arrays
    try:
        with np.load(str(path), allow_pickle=False) as archive:
            names = [f"{config.split}_{kind}" for kind in ("images", "labels")]
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise ValueError(f"has no array {missing[0]}, only {', '.join(archive.files[:8])}")
            sizes = archive.zip.infolist()
            if max(info.file_size for info in sizes) > _LARGEST:
                raise ValueError("holds an array that is too large for this way of reading")
            images, labels = (archive[name] for name in names)
            everywhere = [archive[n] for n in archive.files if n.endswith("_labels")]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    images = images[..., None] if images.ndim == 3 else images
    problem = _problem(images, labels)
    if problem:
        raise ValueError(f"{path}: {problem}")
    count = 1 + max(int(found.max(initial=0)) for found in everywhere)
    return Images(images, labels.astype(np.int32), count)


def _problem(images: np.ndarray, labels: np.ndarray) -> str | None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2]:
        return f"images are {images.dtype} {list(images.shape)}: uint8 [N, S, S, c] are read"
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        return f"labels are {labels.dtype} {list(labels.shape)}, of {len(images)} images"
    if int(labels.min()) < 0:
        return f"a label is {int(labels.min())}: classes are counted from 0"
    return None


@open_dataset.register
def open_images(config: ImageDatasetConfig, features: FeatureConverter) -> ImageDataset:
    """`opening.open_dataset` of images."""
    return ImageDataset(config, features)
